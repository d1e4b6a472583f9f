"""Vision tower + projector + language model -> one LlavaNext checkpoint, without holding a model in memory.

`plan_assembly` reads only configs and safetensors headers and names every wrong part. `write_assembly` streams the
planned tensors, one at a time, into a folder that appears complete or not at all; peak memory is one tensor (two for
the embedding), about 2 GB for an 8B model. The keys are those of `LlavaNextForConditionalGeneration.state_dict()`.
"""

import fcntl
import glob
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import GenerationConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from .checkpoint_parts import (
    VISION_TOWERS,
    AssemblyError,
    Checkpoint,
    LlavaSettings,
    ModelPart,
    Part,
    PlannedTensor,
    Vocabulary,
    image_statistics,
    language_part,
    listed,
    projector_part,
    vision_part,
)
from .tile_grids import GRID_SHAPES, shapes_up_to


MAX_SHARD_BYTES = 4 * 2**30
INITIALIZER_STD = 0.02

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_COUNTED_PARTS = {
    "model.vision_tower.": "vision_tower",
    "model.multi_modal_projector.": "multi_modal_projector",
    "model.image_newline": "image_newline",
    "model.language_model.embed_tokens.": "embed_tokens",
    "model.language_model.layers.": "layers",
    "model.language_model.norm.": "norm",
    "lm_head.": "lm_head",
}


@dataclass(frozen=True, kw_only=True)
class VisionChoices:
    """What an assembled checkpoint takes over from its parts unless it is chosen here.

    Args:
        image_size: side of a tile in pixels; default: the tower's.
        max_tiles: the grid has every shape of 2 to this many tiles; in place of `image_grid_pinpoints`.
        image_grid_pinpoints: (height, width) in pixels; default: those of the LLaVA checkpoint that the tower comes
            from, else LLaVA-1.6's five shapes in units of the tile.
        vision_feature_layer: hidden state(s) that the projector reads; default: that checkpoint's, else -2.
    """

    image_size: int | None = None
    max_tiles: int | None = None
    image_grid_pinpoints: Sequence[Sequence[int]] | None = None
    vision_feature_layer: int | list[int] | None = None


@dataclass(frozen=True)
class AssemblyPlan:
    """A checkpoint ready to be written; none of its tensors is in memory.

    Args:
        config: of the finished model.
        generation_config: greedy, with the pad id and every stop id.
        tensors: native key -> tensor, in the model's order.
        dtype: of all tensors of the output.
        image_mean, image_std: of the vision tower's pre-processing, on pixel values in [0, 1].
        notes: remarks for the user on how the parts were joined.
    """

    config: LlavaNextConfig
    generation_config: GenerationConfig
    tensors: Mapping[str, PlannedTensor]
    dtype: torch.dtype
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values()) * self.dtype.itemsize

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters of each part; a head tied to the embedding counts as part of the embedding."""
        counts = dict.fromkeys(_COUNTED_PARTS.values(), 0)
        for name, tensor in self.tensors.items():
            part = next(part for prefix, part in _COUNTED_PARTS.items() if name.startswith(prefix))
            counts[part] += math.prod(tensor.shape)
        return counts


def plan_assembly(
    vision_tower: str | Path,
    language_model: str | Path,
    *,
    vocabulary: Vocabulary,
    projector: str | Path | None = None,
    vision: VisionChoices = VisionChoices(),
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> AssemblyPlan:
    """Plan one checkpoint from its parts, reading only configs and safetensors headers.

    Args:
        vision_tower: folder of a LLaVA checkpoint, a CLIP, a SigLIP or a DINOv2.
        language_model: folder of a Llama-family model, or of a LLaVA checkpoint that contains one.
        vocabulary: of the finished tokenizer.
        projector: folder of a LLaVA checkpoint, or a projector's safetensors file; default: a fresh one.
        dtype: of the output; default: the language model's.
        seed: for a fresh projector and a fresh `image_newline`.

    Raises:
        AssemblyError: the parts do not fit; one line for each wrong part.
    """
    problems: list[str] = []
    with collecting(problems):
        tower = vision_part(Checkpoint.open(vision_tower), vision.image_size)
    with collecting(problems):
        language = language_part(Checkpoint.open(language_model), vocabulary)
    with collecting(problems):
        given = projector_part(Checkpoint.open(projector)) if projector is not None else None
    if problems:
        raise AssemblyError(*problems)
    settings = _chosen_settings(tower, given, vision)
    config = _assembled_config(tower, language, settings, vocabulary)
    tensors = _checked_tensors(config, tower, given, language, seed)
    mean, std, stated = image_statistics(tower.path, tower.config.model_type)
    config.dtype = dtype or tensors["model.language_model.embed_tokens.weight"].dtype
    notes = [*tower.notes, *language.notes, *_projector_notes(given, seed)]
    if not stated:
        notes.append(f"{tower.path}: names no image mean and standard deviation; using those of its family")
    return AssemblyPlan(
        config=config,
        generation_config=GenerationConfig(
            bos_token_id=vocabulary.bos_token_id,
            eos_token_id=list(vocabulary.eos_token_ids),
            pad_token_id=vocabulary.pad_token_id,
        ),
        tensors=tensors,
        dtype=config.dtype,
        image_mean=mean,
        image_std=std,
        notes=tuple(notes),
    )


def write_assembly(plan: AssemblyPlan, folder: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write weights, config and generation config into a new folder, which appears once complete."""
    with staged_folder(folder) as staging:
        write_model_files(plan, staging, max_shard_bytes=max_shard_bytes)


def write_model_files(plan: AssemblyPlan, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Stream the plan's tensors, one at a time, into safetensors shards in an existing folder.

    Raises:
        AssemblyError: the disk has too little space; raised before anything is written.
    """
    free = shutil.disk_usage(folder).free
    if free < plan.num_bytes:
        raise AssemblyError(
            f"{folder.parent}: {plan.num_bytes / 1e9:.1f} GB are needed but only {free / 1e9:.1f} GB are free "
            f"(fix: make room, or another output)"
        )
    shards = _shards(plan, max_shard_bytes)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        num_parameters = sum(plan.parameter_counts().values())
        index = {
            "metadata": {"total_parameters": num_parameters, "total_size": plan.num_bytes},
            "weight_map": weight_map,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, names in zip(files, shards, strict=True):
        _write_safetensors(folder / file, {name: plan.tensors[name] for name in names}, plan.dtype)
    plan.config.architectures = [LlavaNextForConditionalGeneration.__name__]
    plan.config.save_pretrained(folder)
    plan.generation_config.save_pretrained(folder)


@contextmanager
def staged_folder(output: str | Path) -> Iterator[Path]:
    """Context with a hidden folder beside `output`, renamed to `output` on success and removed on failure.

    Leftovers of killed processes are removed first.

    Raises:
        AssemblyError: `output` exists and is not an empty folder.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise AssemblyError(f"{output}: already exists (fix: choose another output, or remove it)")
    output.parent.mkdir(parents=True, exist_ok=True)
    for leftover in output.parent.glob(f".staging-{glob.escape(output.name)}-*"):
        with _locked(leftover) as is_ours:
            if is_ours:
                shutil.rmtree(leftover)
    staging = Path(tempfile.mkdtemp(prefix=f".staging-{output.name}-", dir=output.parent))
    with _locked(staging):
        yield from _filled(staging, output)


def _filled(staging: Path, output: Path) -> Iterator[Path]:
    try:
        staging.chmod(0o755)  # mkdtemp creates private folders
        yield staging
        for path in [*staging.rglob("*"), staging]:
            _fsync(path)
        staging.rename(output)
        _fsync(output.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Context that tries to hold a folder's lock, which ends with the process; yields whether it holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:  # another process uses the folder, or the file system has no locks
            held = False
        yield held
    finally:
        os.close(descriptor)


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Context that adds the problems of an `AssemblyError` to `problems` and continues."""
    try:
        yield
    except AssemblyError as error:
        problems += error.problems


def _scaled_grid(image_size: int, shapes: Sequence[tuple[int, int]] = GRID_SHAPES) -> list[tuple[int, int]]:
    return [(rows * image_size, columns * image_size) for rows, columns in shapes]


def _chosen_settings(tower: ModelPart, given: Part | None, chosen: VisionChoices) -> LlavaSettings:
    """The caller's settings, else those of the tower's LLaVA checkpoint, else LLaVA-1.6's; validated."""
    stated = tower.settings or LlavaSettings()
    layer = chosen.vision_feature_layer
    pinpoints = chosen.image_grid_pinpoints or stated.image_grid_pinpoints or _scaled_grid(tower.config.image_size)
    if chosen.max_tiles is not None:
        pinpoints = _scaled_grid(tower.config.image_size, shapes_up_to(chosen.max_tiles))
    settings = replace(
        (given and given.settings) or LlavaSettings(),
        vision_feature_layer=stated.vision_feature_layer if layer is None else layer,
        image_grid_pinpoints=[list(pinpoint) for pinpoint in pinpoints],
    )
    problems = _grid_problems(tower, settings) + _projector_problems(given, settings)
    if problems:
        raise AssemblyError(*problems)
    return settings


def _assembled_config(
    tower: ModelPart, language: ModelPart, settings: LlavaSettings, vocabulary: Vocabulary
) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=vocabulary.image_token_id,
        vision_feature_layer=settings.vision_feature_layer,
        vision_feature_select_strategy=VISION_TOWERS[tower.config.model_type].select_strategy,
        image_grid_pinpoints=[list(pinpoint) for pinpoint in settings.image_grid_pinpoints],
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        projector_hidden_act=settings.projector_hidden_act,
        multimodal_projector_bias=settings.multimodal_projector_bias,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )


def _checked_tensors(
    config: LlavaNextConfig, tower: ModelPart, given: Part | None, language: ModelPart, seed: int
) -> dict[str, PlannedTensor]:
    """The parts' tensors and the fresh ones in the model's order, checked against the model itself."""
    shapes = _native_shapes(config)
    kept = {} if given is None else dict(given.tensors)
    tensors = {**tower.tensors, **_fresh_tensors(shapes, kept, seed), **kept, **language.tensors}
    problems = _tensor_problems(shapes, tensors, tower, given, language)
    if problems:
        raise AssemblyError(*problems)
    return {name: tensors[name] for name in shapes}


def _native_shapes(config: LlavaNextConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def _fresh_tensors(
    shapes: Mapping[str, tuple[int, ...]], kept: Mapping[str, PlannedTensor], seed: int
) -> dict[str, PlannedTensor]:
    """Projector (unless one is given) and newline, initialised like Transformers'."""
    prefixes: tuple[str, ...] = ("model.image_newline",)
    if not any(name.startswith("model.multi_modal_projector.") for name in kept):
        prefixes = ("model.multi_modal_projector.", *prefixes)
    hidden = shapes["model.image_newline"][0]
    stds = {"model.image_newline": hidden**-0.5}
    names = [name for name in shapes if name.startswith(prefixes)]
    return {
        name: _normal(shapes[name], 0.0 if name.endswith(".bias") else stds.get(name, INITIALIZER_STD), seed + i)
        for i, name in enumerate(names)
    }


def _normal(shape: tuple[int, ...], std: float, seed: int) -> PlannedTensor:
    def read() -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std

    return PlannedTensor(shape, torch.float32, read)


def _grid_problems(tower: ModelPart, settings: LlavaSettings) -> list[str]:
    config, problems = tower.config, []
    size, patch = config.image_size, config.patch_size
    # SigLIP's 384 px are 27 patches of 14 px and a border that its own convolution leaves out
    if size % patch and config.model_type != "siglip_vision_model":
        problems.append(
            f"{tower.path}: image_size {size} is not a multiple of patch_size {patch} (fix: image_size "
            f"{round(size / patch) * patch})"
        )
    odd = [
        pinpoint for pinpoint in settings.image_grid_pinpoints if any(side <= 0 or side % size for side in pinpoint)
    ]
    if odd or any(len(pinpoint) != 2 for pinpoint in settings.image_grid_pinpoints):
        problems.append(
            f"image_grid_pinpoints: {listed([str(pair) for pair in odd])} are not (height, width) in multiples "
            f"of the tile of {size} px (fix: {[list(pinpoint) for pinpoint in _scaled_grid(size)]})"
        )
    layer = settings.vision_feature_layer
    depth = config.num_hidden_layers
    for index in [layer] if isinstance(layer, int) else layer:
        if not -(depth + 1) <= index <= depth:
            problems.append(
                f"{tower.path}: vision_feature_layer is {index}, but the tower has {depth} layers (fix: "
                f"{-(depth + 1)} to {depth}; 0 is the embedding)"
            )
    return problems


def _projector_problems(given: Part | None, settings: LlavaSettings) -> list[str]:
    if given is None or given.settings is None:
        return []
    trained_on = given.settings.vision_feature_layer
    if trained_on == settings.vision_feature_layer:
        return []
    return [
        f"{given.path}: this projector was trained on vision_feature_layer {trained_on}, not "
        f"{settings.vision_feature_layer} (fix: vision_feature_layer {trained_on}, or a fresh projector)"
    ]


def _projector_notes(given: Part | None, seed: int) -> list[str]:
    if given is None:
        return [f"fresh projector and image_newline: weights from N(0, {INITIALIZER_STD}), biases 0, seed {seed}"]
    if "model.image_newline" not in given.tensors:
        return [f"{given.path}: has no image_newline (LLaVA-1.5 had none); initialised a fresh one, seed {seed}"]
    return []


def _tensor_problems(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, PlannedTensor],
    tower: ModelPart,
    given: Part | None,
    language: ModelPart,
) -> list[str]:
    """Tensors that are missing from the parts, have the wrong shape, or do not belong to the model."""
    widths = f"the vision tower is {tower.config.hidden_size} wide, the language model {language.config.hidden_size}"
    owners = {"model.vision_tower.": tower.path, "model.language_model.": language.path, "lm_head.": language.path}
    if given is not None:
        owners |= {"model.multi_modal_projector.": given.path, "model.image_newline": given.path}
    problems = []
    for prefix, path in owners.items():
        wanted = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
        found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith(prefix)}
        missing = [name for name in wanted if name not in found]
        if missing:
            problems.append(f"{path}: lacks {listed(missing)} (fix: download the folder again)")
        strangers = [name for name in found if name not in wanted]
        if strangers:
            problems.append(
                f"{path}: {listed(strangers)} not in the model that its config.json describes (fix: use the "
                f"config.json that belongs to the weights)"
            )
        wrong = [
            f"{name} is {list(found[name])} and should be {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ]
        if wrong:
            problems.append(f"{path}: {listed(wrong)}; {widths} (fix: choose parts that fit each other)")
    return problems


def _shards(plan: AssemblyPlan, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in plan.tensors.items():
        size = math.prod(tensor.shape) * plan.dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_safetensors(file: Path, tensors: Mapping[str, PlannedTensor], dtype: torch.dtype) -> None:
    """Write one safetensors file tensor by tensor; `save_file` would need all tensors in memory at once.

    Format: https://github.com/huggingface/safetensors (length of the header, header in JSON, little-endian data).
    """
    assert sys.byteorder == "little"
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as output:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, planned in tensors.items():
            data = planned.read().to(dtype).contiguous()
            assert tuple(data.shape) == planned.shape, name
            output.write(data.reshape(-1).view(torch.uint8).numpy().data)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
