"""A stage's weights, written so that a next stage, or anyone, opens them."""

import contextlib
import logging
import time
from typing import Any

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import STAGE_RECORD
from llava_llama31.trainer.distributed.engine import forget_deepspeed
from llava_llama31.trainer.distributed.parameters import num_elements
from llava_llama31.trainer.model.adapters import take_dequantized
from llava_llama31.trainer.model.stage_model import load_stage_model
from llava_llama31.trainer.runs.context import StageRun
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer


logger = logging.getLogger(__name__)


def write_final_weights(run: StageRun, trainer: LlavaTrainer, record: dict[str, Any]) -> None:
    """Write `final/`; adapters are merged, and kept beside in PEFT's format."""
    assert trainer.model is not None
    weights = sum(num_elements(parameter) * parameter.element_size() for parameter in trainer.model.parameters())
    with atomic_folders.room(run.folder.path, weights) if run.context.is_main else contextlib.nullcontext():
        _write_final(run, trainer, record)


def _write_final(run: StageRun, trainer: LlavaTrainer, record: dict[str, Any]) -> None:
    if run.context.is_main:
        atomic_folders.sweep(run.folder.path)
    staging = atomic_folders.staging_folder(run.folder.final) if run.context.is_main else run.folder.final
    if run.stage.lora is not None:
        adapted = _whole_adapted(run, trainer)
        if run.context.is_main:
            adapted.save_pretrained(staging / "adapter")
            adapted.merge_and_unload().save_pretrained(staging)
            trainer.processor.save_pretrained(staging)
    else:
        trainer.save_model(str(staging))
    if run.context.is_main:
        atomic_folders.write_json(staging / STAGE_RECORD, record)
        started = time.monotonic()
        atomic_folders.commit(
            staging, run.folder.final, {"step": record["steps"], "num_processes": run.context.num_processes}
        )
        logger.info("wrote %s in %.1f s", run.folder.final, time.monotonic() - started)
    trainer.accelerator.wait_for_everyone()


def _whole_adapted(run: StageRun, trainer: LlavaTrainer) -> Any:
    """Rebuild the adapted model unsharded on the host of rank 0, in the origin's precision. Collective."""
    trained = trainer.whole_weights()
    if not run.context.is_main:
        return trainer.model
    forget_deepspeed()  # it would shard the model over ranks that don't take part
    model = load_stage_model(run.origin, run.stage, seed=run.seed, where=run.where)
    assert run.stage.lora is not None and trainer.model is not None and trained is not None
    if run.stage.lora.quantize:
        take_dequantized(model, trainer.model)
    _, unexpected = model.load_state_dict(trained, strict=False)
    assert not unexpected, unexpected
    return model
