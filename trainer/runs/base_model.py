"""The checkpoint that the first stage starts from."""

import json
from pathlib import Path

from llava_llama31.assembly import VisionChoices
from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.export.templates import is_own_template
from llava_llama31.trainer.model.assemble import Choices, assemble, planned_processor
from llava_llama31.trainer.model.locating import local_checkpoint
from llava_llama31.trainer.recipes.schema import Recipe
from llava_llama31.trainer.terminal import Terminal


def prepare(recipe: Recipe, folder: RunFolder, console: Terminal) -> None:
    """Make the parts that a recipe makes itself, and the checkpoint that the first stage starts from."""
    if recipe.prepare in ("tiny", "tiny-siglip"):
        from llava_llama31.trainer.demo import parts as demo  # needs the `demo` extra

        settings = demo.SIGLIP if recipe.prepare == "tiny-siglip" else demo.Settings()
        demo.prepare(folder.prepared, seed=recipe.seed, progress=console.print, settings=settings)
    if folder.base.exists():
        return
    parts = _parts(recipe)
    if parts is None:
        return
    tower, language, choices = parts
    counts = assemble(
        tower,
        language,
        folder.base,
        projector=choices.projector,
        vision=choices.vision,
        add_chat_tokens=choices.add_chat_tokens,
        dtype=choices.dtype,
        seed=choices.seed,
    )
    console.print(f"assembled {folder.base}: " + ", ".join(f"{part} {count:,}" for part, count in counts.items()))


def base_processor(recipe: Recipe, folder: RunFolder) -> LlavaLlama31Processor:
    """The processor of the checkpoint that the first stage starts from, which need not be assembled yet."""
    parts = None if folder.base.exists() else _parts(recipe)
    if parts is None:
        return LlavaLlama31Processor.from_pretrained(base_of(recipe, folder))
    return planned_processor(*parts)


def _parts(recipe: Recipe) -> tuple[Path, Path, Choices] | None:
    """What the base is assembled from: tower, language model, choices; None if a checkpoint is taken as it is."""
    model = recipe.model
    projector: Path | None
    if model.checkpoint is not None:
        tower = language = projector = local_checkpoint(model.checkpoint, where="model.checkpoint")
        if is_ours(tower) and model.image_grid_pinpoints is None and model.max_tiles is None:
            return None
        # llava-hf's or LLaVA's own layout, or another grid: the same parts, our processor
    else:
        assert model.vision_tower is not None and model.language_model is not None
        tower = local_checkpoint(model.vision_tower, where="model.vision_tower")
        language = local_checkpoint(model.language_model, where="model.language_model")
        projector = local_checkpoint(model.projector, where="model.projector", file=True) if model.projector else None
    vision = VisionChoices(
        max_tiles=model.max_tiles,
        image_grid_pinpoints=model.image_grid_pinpoints,
        vision_feature_layer=model.vision_feature_layer,
    )
    return tower, language, Choices(projector, vision, model.add_chat_tokens, model.dtype, recipe.seed)


def base_of(recipe: Recipe, folder: RunFolder) -> Path:
    """The checkpoint that the first stage starts from, after `prepare`."""
    if folder.base.exists():
        return folder.base
    assert recipe.model.checkpoint is not None
    return local_checkpoint(recipe.model.checkpoint, where="model.checkpoint")


def is_ours(folder: Path) -> bool:
    """Whether a checkpoint has our processor, so that a stage can start from it as it is."""
    template, processor = folder / "chat_template.jinja", folder / "processor_config.json"
    if not (template.is_file() and processor.is_file()):
        return False
    # by its name, and not by the file with its code, which is not downloaded
    names = json.loads(processor.read_text(encoding="utf-8")).get("auto_map", {}).get("AutoProcessor", "")
    return "LlavaLlama31Processor" in str(names) and is_own_template(template.read_text(encoding="utf-8"))
