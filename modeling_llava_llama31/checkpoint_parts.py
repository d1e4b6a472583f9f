"""Reads the parts of a model - vision tower, projector, language model - from checkpoints in any layout.

Only configs and safetensors headers are read here; a `PlannedTensor` reads its data on demand.

Layouts: LLaVA in Transformers' old keys (`language_model.model.*`, `vision_tower.vision_model.*`) and new keys
(`model.language_model.*`, `model.vision_tower.*`, with and without `vision_model.`), LLaVA-1.6's original layout
(`model.mm_projector.*`, `model.vision_tower.vision_tower.vision_model.*`), CLIP (and towers of its shape, such as
MLCD-L), SigLIP, DINOv2, and causal language models.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, PreTrainedConfig


LANGUAGE_MODELS = ("llama", "mistral")  # one tensor layout
ROW_MULTIPLE = (
    64  # embedding rows are padded to a multiple of this, for the head's GEMM and for sharding the vocabulary
)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class TowerFamily:
    """What towers of one `model_type` have in common.

    Args:
        has_class_token: the first hidden state is not a patch, and LLaVA drops it.
        mean, std: of the pre-processing, for a folder that does not name them.
    """

    has_class_token: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def select_strategy(self) -> Literal["default", "full"]:
        """`vision_feature_select_strategy` that keeps the patches and nothing else."""
        return "default" if self.has_class_token else "full"


VISION_TOWERS = {
    "clip_vision_model": TowerFamily(True, CLIP_MEAN, CLIP_STD),
    "siglip_vision_model": TowerFamily(False, SIGLIP_MEAN, SIGLIP_STD),
    "dinov2": TowerFamily(True, IMAGENET_MEAN, IMAGENET_STD),
}
# `model_type` of a whole image-and-text model whose tower has the type on the right
_TWO_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
# towers that stock LlavaNext can't hold, and what to use instead
_UNFIT_TOWERS = {
    "siglip2_vision_model": "its number of patches varies (NaFlex), and LlavaNext's tiles have one; use a SigLIP2 of "
    "fixed resolution, for instance google/siglip2-so400m-patch14-384",
    "mlcd_vision_model": "it rotates its queries and keys by patch, which is not supported; use the MLCD of "
    "CLIP's shape, DeepGlint-AI/mlcd-vit-large-patch14-336",
}
_UNFIT_TOWERS["siglip2"] = _UNFIT_TOWERS["siglip2_vision_model"]
_UNFIT_TOWERS["mlcd"] = _UNFIT_TOWERS["mlcd_vision_model"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Group 1 is the name inside the native module.
_VISION_KEY = re.compile(
    r"(?:model\.)?(?:vision_tower\.){0,2}(?:vision_model\.|dinov2\.)?"
    r"((?:embeddings|encoder|pre_layrnorm|post_layernorm|layernorm|head)\..+)"
)
_LANGUAGE_KEY = re.compile(
    r"(?:model\.language_model\.model\.|language_model\.model\.|model\.language_model\.|model\.)"
    r"((?:embed_tokens|layers\.\d+|norm)\..+)"
)
_HEAD_KEY = re.compile(r"(?:language_model\.)?lm_head\.weight")
_PROJECTOR_KEY = re.compile(r"(?:model\.)?(?:multi_modal_projector|mm_projector)\.(.+)|((?:linear_[12]|[02])\..+)")
_PROJECTOR_NAMES = {
    f"{old}.{kind}": f"linear_{new}.{kind}"
    for old, new in (("0", 1), ("2", 2), ("linear_1", 1), ("linear_2", 2))
    for kind in ("weight", "bias")
}
_NEWLINE_KEY = re.compile(r"(?:model\.)?image_newline")
_NOT_A_WEIGHT = re.compile(r"(?:.+\.)?(?:position_ids|rotary_emb\.inv_freq|mask_token)")
_OLD_DINOV2_NAME = re.compile(r"(?<=attention\.)(?:attention\.(?:query|key|value)|output\.dense)(?=\.)")
_DINOV2_NAMES = {
    "attention.query": "q_proj",
    "attention.key": "k_proj",
    "attention.value": "v_proj",
    "output.dense": "o_proj",
}


class AssemblyError(ValueError):
    """The parts do not make a checkpoint; `problems` has one line per fault: where it is and how to fix it."""

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__("; ".join(problems))


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor known by its header.

    Args:
        shape, dtype: of the tensor that `read` returns.
        read: loads the data.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Vocabulary:
    """How the finished tokenizer determines the rows of the embedding.

    Args:
        size: number of tokens, including the added ones.
        first_new_id: the first id that the language model has never seen; its row and all later rows are new. None:
            there is no new token.
        image_token_id: id of `<image>`.
        bos_token_id, pad_token_id, eos_token_ids: for the generation config; every id that ends an answer.
        copies: new id -> old id whose row it copies; other new rows start from the mean of the old rows.
    """

    size: int
    first_new_id: int | None
    image_token_id: int
    bos_token_id: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    copies: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LlavaSettings:
    """Settings that join the parts of a LLaVA model.

    Args:
        vision_feature_layer: hidden state(s) of the tower that the projector reads.
        image_grid_pinpoints: (height, width) in pixels; empty for LLaVA-1.5, which has none.
        projector_hidden_act: activation between the projector's two layers.
        multimodal_projector_bias: whether these layers have biases.
    """

    vision_feature_layer: int | list[int] = -2
    image_grid_pinpoints: Sequence[Sequence[int]] = ()
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True


@dataclass(frozen=True)
class Part:
    """One part of the model.

    Args:
        path: of its checkpoint.
        tensors: by native key.
        settings: of its checkpoint, if that is a LLaVA.
    """

    path: Path
    tensors: Mapping[str, PlannedTensor]
    settings: LlavaSettings | None


@dataclass(frozen=True)
class ModelPart(Part):
    """A part with its own config: the vision tower or the language model.

    Args:
        config: of the part.
        notes: remarks for the user on how it was changed.
    """

    config: PreTrainedConfig
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files with a config.json, or one safetensors file.

    Args:
        config: contents of config.json; empty if there is none.
        headers: key -> tensor.
    """

    path: Path
    config: Mapping[str, Any]
    headers: Mapping[str, PlannedTensor]

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Read config.json and all headers.

        Raises:
            AssemblyError: a file is missing, unreadable or a pickle; names it.
        """
        path = Path(path)
        headers: dict[str, PlannedTensor] = {}
        for file in _safetensors_files(path):
            headers |= _headers(file)
        return cls(path, read_json(path / "config.json"), headers)

    @property
    def is_original_llava(self) -> bool:
        return is_original_llava(self.config)

    def settings(self) -> LlavaSettings | None:
        """Settings from either layout of a LLaVA config; None for any other checkpoint."""
        config = self.config
        if self.is_original_llava:
            strategy = config.get("mm_vision_select_feature", "patch")
            kind = config.get("mm_projector_type", "linear")
            if strategy != "patch" or kind != "mlp2x_gelu":
                raise AssemblyError(
                    f"{self.path}: mm_projector_type {kind!r} on {strategy!r} features is not "
                    f"supported; LLaVA-1.6 has 'mlp2x_gelu' on 'patch' features (fix: use another checkpoint)"
                )
            return LlavaSettings(config.get("mm_vision_select_layer", -2), config.get("image_grid_pinpoints") or ())
        if "vision_config" not in config or "text_config" not in config or config.get("model_type") in _TWO_TOWERS:
            return None
        strategy = config.get("vision_feature_select_strategy", "default")
        family = VISION_TOWERS.get(config["vision_config"].get("model_type", "clip_vision_model"))
        if family is not None and strategy != family.select_strategy:
            keeps = "which keeps the CLS token" if family.has_class_token else "which drops the first patch"
            raise AssemblyError(
                f"{self.path}: vision_feature_select_strategy is {strategy!r}, {keeps}; the model takes the patches "
                f"alone (fix: use a checkpoint with {family.select_strategy!r})"
            )
        return LlavaSettings(
            config.get("vision_feature_layer", -2),
            config.get("image_grid_pinpoints") or (),
            config.get("projector_hidden_act", "gelu"),
            config.get("multimodal_projector_bias", True),
        )


def vision_part(checkpoint: Checkpoint, image_size: int | None = None) -> ModelPart:
    """The vision tower of a LLaVA, CLIP, SigLIP or DINOv2 checkpoint.

    SigLIP's pooling head is left out: LLaVA reads hidden states before it.

    Args:
        image_size: side of a tile in pixels; DINOv2's position embeddings are permanently resized to it.

    Raises:
        AssemblyError: there is none, or it has another type or size.
    """
    tensors = {}
    for key, tensor in checkpoint.headers.items():
        match = _VISION_KEY.fullmatch(key)
        if match and not _NOT_A_WEIGHT.fullmatch(match[1]):
            name = _OLD_DINOV2_NAME.sub(lambda old: _DINOV2_NAMES[old[0]], match[1])
            tensors[f"model.vision_tower.{name}"] = tensor
    config = _vision_config(checkpoint, tensors)
    notes = []
    head = [name for name in tensors if name.startswith("model.vision_tower.head.")]
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
        notes += [f"the pooling head's {len(head)} tensors are left out: LLaVA reads none of them"] if head else []
        for name in head:
            del tensors[name]
        border = config.image_size % config.patch_size
        if border:
            notes.append(
                f"the tower reads {config.image_size // config.patch_size} patches of {config.patch_size} px a side, "
                f"and not the last {border} px of a tile, as it was trained"
            )
    if image_size is not None and image_size != config.image_size:
        if config.model_type != "dinov2":
            raise AssemblyError(
                f"{checkpoint.path}: the position embeddings are for {config.image_size} px, not for {image_size} px "
                f"(fix: leave image_size out; only DINOv2's can be resized)"
            )
        config.image_size = image_size
    positions = "model.vision_tower.embeddings.position_embeddings"
    if config.model_type == "dinov2":
        config.use_mask_token = False  # a pre-training parameter that would never get a gradient here
        grid = config.image_size // config.patch_size
        if positions in tensors and tensors[positions].shape[1] != grid**2 + 1:
            notes.append(f"position embeddings resized to {grid}x{grid} patches (bicubic)")
            tensors[positions] = _resized_positions(tensors[positions], grid)
    return ModelPart(checkpoint.path, tensors, checkpoint.settings(), config, tuple(notes))


def language_part(checkpoint: Checkpoint, vocabulary: Vocabulary) -> ModelPart:
    """The Llama-family language model of a checkpoint, its embedding (and head) grown to the vocabulary.

    Raises:
        AssemblyError: there is none, or it is of another family.
    """
    config = _language_config(checkpoint)
    tensors: dict[str, PlannedTensor] = {}
    for key, tensor in checkpoint.headers.items():
        match = _LANGUAGE_KEY.fullmatch(key)
        if match and not _NOT_A_WEIGHT.fullmatch(match[1]):
            tensors[f"model.language_model.{match[1]}"] = tensor
        elif _HEAD_KEY.fullmatch(key):
            tensors["lm_head.weight"] = tensor
    notes = _settle_tie(checkpoint, config, tensors)
    old_rows = config.vocab_size
    rows = math.ceil(max(old_rows, vocabulary.size) / ROW_MULTIPLE) * ROW_MULTIPLE
    kept = old_rows if vocabulary.first_new_id is None else min(vocabulary.first_new_id, old_rows)
    if kept < rows:
        notes.append(f"embedding: {kept} rows kept, {rows - kept} new rows initialised to their mean, {rows} in all")
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            if (
                name in tensors and tensors[name].shape[0] == old_rows
            ):  # otherwise the check against the model reports it
                tensors[name] = _grown(tensors[name], rows, kept, vocabulary.copies)
    config.vocab_size = rows
    config.bos_token_id, config.pad_token_id = vocabulary.bos_token_id, vocabulary.pad_token_id
    config.eos_token_id = list(vocabulary.eos_token_ids)
    return ModelPart(checkpoint.path, tensors, None, config, tuple(notes))


def _settle_tie(checkpoint: Checkpoint, config: PreTrainedConfig, tensors: dict[str, PlannedTensor]) -> list[str]:
    """Decide as Transformers' loading does whether head and embedding are one matrix; returns notes.

    A head in the file that differs from the embedding is kept whatever the config says. Without one the config
    decides: that of the whole model, where it has the key, before that of the language model.

    Raises:
        AssemblyError: there is no head, and the two levels of the config contradict each other.
    """
    outer = checkpoint.config.get("tie_word_embeddings") if "text_config" in checkpoint.config else None
    inner = config.tie_word_embeddings
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.language_model.embed_tokens.weight")
    if head is None:
        if outer is False and inner:
            raise AssemblyError(
                f"{checkpoint.path}: config.json has tie_word_embeddings: false, its text_config true, and no file "
                "contains lm_head.weight (fix: set the former to true, or download the folder again)"
            )
        config.tie_word_embeddings = bool(outer or inner)
        return []
    if not (outer or inner):
        return []
    if embedding is not None and head.shape == embedding.shape and torch.equal(head.read(), embedding.read()):
        del tensors["lm_head.weight"]
        config.tie_word_embeddings = True
        return []
    config.tie_word_embeddings = False
    return [f"{checkpoint.path}: the config ties the head to the embedding, but its lm_head.weight differs; kept"]


def projector_part(checkpoint: Checkpoint) -> Part:
    """The two-layer projector, and `image_newline` if present, of a LLaVA checkpoint or a projector's file.

    Raises:
        AssemblyError: there is none, or it has another depth.
    """
    tensors, strangers = {}, []
    for key, tensor in checkpoint.headers.items():
        match = _PROJECTOR_KEY.fullmatch(key)
        if _NEWLINE_KEY.fullmatch(key):
            tensors["model.image_newline"] = tensor
        elif match and (match[1] or match[2]) in _PROJECTOR_NAMES:
            tensors[f"model.multi_modal_projector.{_PROJECTOR_NAMES[match[1] or match[2]]}"] = tensor
        elif match:
            strangers.append(key)
    if strangers or not tensors:
        found = (
            f"{listed(strangers)} does not belong to a two-layer projector" if strangers else "contains no projector"
        )
        raise AssemblyError(
            f"{checkpoint.path}: {found} (fix: use a LLaVA-1.5 or 1.6 checkpoint, or leave the projector out to get a "
            f"fresh one)"
        )
    return Part(checkpoint.path, tensors, checkpoint.settings())


def image_statistics(folder: Path, tower_type: str) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Mean and standard deviation per channel of a tower's pre-processing, and whether its folder names them."""
    named = read_json(folder / "preprocessor_config.json")
    named = named or read_json(folder / "processor_config.json").get("image_processor", {})
    if "image_mean" in named and "image_std" in named:
        return tuple(named["image_mean"]), tuple(named["image_std"]), True
    family = VISION_TOWERS[tower_type]
    return family.mean, family.std, False


def is_original_llava(config: Mapping[str, Any]) -> bool:
    """Whether a config.json was written by LLaVA's own code rather than by Transformers."""
    return "mm_vision_tower" in config


def listed(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _safetensors_files(path: Path) -> list[Path]:
    if not path.exists():
        raise AssemblyError(f"{path}: no such file or folder (fix: `hf download NAME --local-dir {path}`)")
    if path.is_file():
        files = [path] if path.suffix == ".safetensors" else []
    else:
        index = read_json(path / "model.safetensors.index.json").get("weight_map", {})
        files = [path / name for name in sorted(set(index.values()))]
        if not files:
            single = path / "model.safetensors"
            files = [single] if single.exists() else sorted(path.glob("*.safetensors"))
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise AssemblyError(f"{path}: {listed(absent)} is in the index but missing (fix: download the folder again)")
    if not files:
        raise AssemblyError(
            f"{path}: contains no safetensors file; pickles (.bin, .pt) can run code when opened and are refused "
            f"(fix: use a revision with safetensors, or convert it in a sandbox with safetensors.torch.save_file)"
        )
    return files


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        AssemblyError: the file is unreadable or holds no object.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssemblyError(f"{file}: unreadable: {error} (fix: download it again)") from error
    if not isinstance(content, dict):
        raise AssemblyError(f"{file}: is not a JSON object (fix: download it again)")
    return content


def _headers(file: Path) -> dict[str, PlannedTensor]:
    try:
        with safe_open(str(file), "pt") as source:
            slices = {key: source.get_slice(key) for key in source.keys()}  # noqa: SIM118 (not a mapping)
            heads = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise AssemblyError(f"{file}: unreadable: {error} (fix: download it again)") from error
    odd = sorted({dtype for _, dtype in heads.values()} - set(_DTYPES) - {"I64"})  # I64: buffers of old checkpoints
    if odd:
        raise AssemblyError(
            f"{file}: contains {listed(odd)} tensors (fix: use weights in floating point, not quantised)"
        )
    return {
        key: PlannedTensor(shape, _DTYPES[dtype], partial(_read_tensor, file, key))
        for key, (shape, dtype) in heads.items()
        if dtype in _DTYPES
    }


def _read_tensor(file: Path, key: str) -> torch.Tensor:
    # opened again for every tensor, so that the pages do not stay mapped
    with safe_open(str(file), "pt") as source:
        return source.get_tensor(key)


_NOT_OF_THE_MODEL = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}


def _native_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    fields = {key: value for key, value in fields.items() if key not in _NOT_OF_THE_MODEL}
    return AutoConfig.for_model(**fields)


def _vision_config(checkpoint: Checkpoint, tensors: Mapping[str, PlannedTensor]) -> PreTrainedConfig:
    fields = checkpoint.config
    if not tensors:
        named = f" (it names {fields['mm_vision_tower']!r})" if checkpoint.is_original_llava else ""
        raise AssemblyError(
            f"{checkpoint.path}: contains no vision tower{named} (fix: name the folder of the tower itself)"
        )
    if checkpoint.is_original_llava:
        return _clip_config_of(checkpoint.path, tensors)
    if "vision_config" in fields:
        kind = _TWO_TOWERS.get(fields.get("model_type", ""), "clip_vision_model")
        if fields.get("model_type") in _UNFIT_TOWERS:
            kind = fields["model_type"]
        fields = {"model_type": kind} | fields["vision_config"]
    kind = fields.get("model_type", "")
    if kind not in VISION_TOWERS:
        instead = _UNFIT_TOWERS.get(kind, "use CLIP, SigLIP, DINOv2 without registers, or a LLaVA checkpoint")
        raise AssemblyError(f"{checkpoint.path}: a vision tower of type {kind!r} is not supported (fix: {instead})")
    config = _native_config(fields)
    sizes = {key: getattr(config, key) for key in ("image_size", "patch_size")}
    if odd := {key: size for key, size in sizes.items() if not isinstance(size, int)}:
        raise AssemblyError(f"{checkpoint.path}: {odd}: LlavaNext's tiles are square (fix: use a tower with one size)")
    return config


def _clip_config_of(path: Path, tensors: Mapping[str, PlannedTensor]) -> CLIPVisionConfig:
    """Config of one of OpenAI's CLIP towers, from its shapes: LLaVA's original layout only names the tower."""
    prefix = "model.vision_tower."
    try:
        positions, hidden = tensors[prefix + "embeddings.position_embedding.weight"].shape
        patch = tensors[prefix + "embeddings.patch_embedding.weight"].shape[-1]
        intermediate = tensors[prefix + "encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise AssemblyError(f"{path}: lacks {error.args[0]} (fix: download the folder again)") from error
    layers = {name.split(".")[4] for name in tensors if name.startswith(prefix + "encoder.layers.")}
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, hidden // 64),  # all OpenAI CLIP models have heads of size 64
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        projection_dim=768,
    )


def _language_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    fields = checkpoint.config
    if checkpoint.is_original_llava:
        known = {field.name for field in dataclasses.fields(LlamaConfig)} | {"rope_theta", "rope_scaling"}
        kind = fields.get("model_type", "").removeprefix("llava_")
        fields = {key: value for key, value in fields.items() if key in known}
        fields["model_type"] = "llama" if kind == "llava" else kind
    elif "text_config" in fields:
        fields = {"model_type": "llama"} | fields["text_config"]
    if fields.get("model_type") not in LANGUAGE_MODELS:
        raise AssemblyError(
            f"{checkpoint.path}: a language model of type {fields.get('model_type')!r} is not supported "
            f"(fix: use one of the Llama family, for instance Llama-3.1-8B-Instruct)"
        )
    return _native_config(fields)


def _resized_positions(positions: PlannedTensor, grid: int) -> PlannedTensor:
    shape = (1, grid**2 + 1, positions.shape[2])

    def read() -> torch.Tensor:
        whole = positions.read()
        side = math.isqrt(whole.shape[1] - 1)
        patches = whole[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        # like Dinov2Embeddings.interpolate_pos_encoding, which does it in every forward pass
        patches = F.interpolate(patches.float(), size=(grid, grid), mode="bicubic", align_corners=False)
        patches = patches.to(whole.dtype).permute(0, 2, 3, 1).reshape(1, grid**2, -1)
        return torch.cat((whole[:, :1], patches), dim=1)

    return PlannedTensor(shape, positions.dtype, read)


def _grown(matrix: PlannedTensor, rows: int, kept: int, copies: Mapping[int, int]) -> PlannedTensor:
    """`matrix` (V, D) cut to its first `kept` rows and extended by new ones up to `rows`.

    A new row starts as the mean of the kept ones: in the head its logit is then the mean of the other logits, which
    takes almost no probability from known tokens; a random row could outscore all of them.
    """

    def read() -> torch.Tensor:
        old = matrix.read()
        new = old.new_empty(rows, old.shape[1])
        new[:kept] = old[:kept]
        total = torch.zeros(old.shape[1], dtype=torch.float64)
        for chunk in old[:kept].split(
            4096
        ):  # in chunks: a float64 copy of the whole matrix would be four times as large
            total += chunk.double().sum(0)
        new[kept:] = (total / kept).to(old.dtype)
        for row, source in copies.items():
            new[row] = old[source]
        return new

    return PlannedTensor((rows, *matrix.shape[1:]), matrix.dtype, read)
