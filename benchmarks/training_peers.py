"""Trains once with one of the trainers that benchmarks/training.py compares, inside that trainer's environment.

python benchmarks/training_peers.py SETTINGS.json
"""

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


IGNORE_INDEX = -100


@dataclass(frozen=True)
class Settings:
    """One run; paths as text, so that it goes through JSON."""

    trainer: str
    stage: str
    """`instruct` trains projector and language model, `projector` only the projector."""
    precision: str
    """`bf16`: autocast over float32 weights; or `fp32`."""
    checkpoint: str
    rows: str
    """JSON rows in training order; for ours, a recipe."""
    output: str
    result: str
    steps: int
    micro_batch: int
    accumulation: int
    learning_rate: float
    seed: int
    profile: str | None = None
    profile_from: int = 0

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    def trainer_arguments(self) -> dict[str, Any]:
        """The TrainingArguments common to all."""
        return {
            "output_dir": self.output,
            "max_steps": self.steps,
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch_fused",
            "bf16": self.precision == "bf16",
            "fp16": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,
            "remove_unused_columns": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "seed": self.seed,
        }


def main() -> None:
    settings = Settings(**json.loads(Path(sys.argv[1]).read_text()))
    if settings.trainer != "ours":
        declare_torchvision_operators()
    from training_meter import attach  # it imports Transformers, which imports torchvision

    attach(
        Path(settings.result),
        note_order=settings.trainer == "ours",
        profile=Path(settings.profile) if settings.profile else None,
        profile_from=settings.profile_from,
    )
    runs = {
        "transformers": run_transformers,
        "trl": run_trl,
        "ms-swift": run_swift,
        "llamafactory": run_llamafactory,
        "ours": run_ours,
    }
    runs[settings.trainer](settings)


def declare_torchvision_operators() -> None:
    """Let PyPI's torchvision, whose compiled part needs CUDA, be imported with a CPU build of torch."""
    import torch

    with contextlib.suppress(RuntimeError):  # already known: the compiled part was loaded
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declare_torchvision_operators.library = library  # type: ignore[attr-defined]  # lives as long as the process


def run_ours(settings: Settings) -> None:
    from llava_llama31.trainer.cli import main as run_command

    code = run_command(["train", settings.rows, "--output", settings.output])
    if code:
        raise SystemExit(code)


def load_stock(settings: Settings) -> tuple[Any, Any]:
    """Model, frozen for the stage, and processor."""
    import torch
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(settings.checkpoint, dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    if settings.stage == "projector":
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    return model, AutoProcessor.from_pretrained(settings.checkpoint)


def run_transformers(settings: Settings) -> None:
    from PIL import Image
    from transformers import Trainer, TrainingArguments

    model, processor = load_stock(settings)
    processor.tokenizer.padding_side = "right"

    def collate(rows: list[dict]) -> dict:
        conversations = []
        for row in rows:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]]
            messages[0]["content"].insert(0, {"type": "image", "image": Image.open(row["image"])})
            conversations.append(messages)
        batch = processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True},
        )
        mask = batch.pop("assistant_masks")
        batch["labels"] = batch["input_ids"].masked_fill(mask == 0, IGNORE_INDEX)
        return batch

    arguments = TrainingArguments(**settings.trainer_arguments(), train_sampling_strategy="sequential")
    rows = json.loads(Path(settings.rows).read_text())
    Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()


def run_trl(settings: Settings) -> None:
    from datasets import Dataset, Image, Sequence
    from trl import SFTConfig, SFTTrainer

    model, processor = load_stock(settings)
    rows = json.loads(Path(settings.rows).read_text())
    columns = [{"messages": row["messages"], "images": [row["image"]]} for row in rows]
    dataset = Dataset.from_list(columns).cast_column("images", Sequence(Image()))
    arguments = SFTConfig(
        **settings.trainer_arguments(),
        train_sampling_strategy="sequential",
        assistant_only_loss=True,
        max_length=None,
    )
    SFTTrainer(model, arguments, train_dataset=dataset, processing_class=processor).train()


def run_swift(settings: Settings) -> None:
    import runpy

    arguments = {
        **settings.trainer_arguments(),
        "model": settings.checkpoint,
        "model_type": "llama3_llava_next_hf",
        "template": "llama3_llava_next_hf",
        "torch_dtype": "float32",
        "tuner_type": "full",
        "freeze_vit": True,
        "freeze_llm": settings.stage == "projector",
        "freeze_aligner": False,
        "dataset": settings.rows,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "split_dataset_ratio": 0,
        "attn_impl": "sdpa",
        "max_length": 8192,
        "warmup_ratio": 0,
    }
    sys.argv = ["sft"]
    for key, value in arguments.items():
        sys.argv += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    runpy.run_module("swift.cli.sft", run_name="__main__")


def run_llamafactory(settings: Settings) -> None:
    from llamafactory.train.tuner import run_exp

    rows = Path(settings.rows)
    run_exp(
        {
            **settings.trainer_arguments(),
            "model_name_or_path": settings.checkpoint,
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "full",
            "freeze_vision_tower": True,
            "freeze_multi_modal_projector": False,
            "freeze_language_model": settings.stage == "projector",
            "dataset_dir": str(rows.parent),
            "dataset": rows.stem,
            "template": "llava_next_llama3",
            "cutoff_len": 8192,
            "flash_attn": "sdpa",
            "disable_gradient_checkpointing": True,
            "disable_shuffling": True,
        }
    )


if __name__ == "__main__":
    main()
