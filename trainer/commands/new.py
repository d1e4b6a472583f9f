"""`llava-llama31 new`: a commented recipe for rows of your own."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_llama31.trainer.commands.options import counted
from llava_llama31.trainer.commands.quick_imports import quick_imports
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import say


if TYPE_CHECKING:
    from llava_llama31.trainer.data.sources.records import RecordStore
    from llava_llama31.trainer.recipes.schema import Recipe


HELP = "write a commented recipe for your own rows"
RELEASED = "llava-hf/llama3-llava-next-8b-hf"
_SHOWN = 400  # characters of the first row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the recipe, which is written to NAME.yaml")
    parser.add_argument(
        "--data", metavar="FILE", help="rows to train on; without it the command asks for everything in a terminal"
    )
    parser.add_argument("--image-root", metavar="DIR", help="folder of the images; default: the folder of FILE")
    parser.add_argument("--model", help=f"folder, run or Hub id to start from; default: {RELEASED}")
    parser.add_argument("--questions", metavar="FILE", help="questions that score the finished model")
    parser.add_argument("--lora", action="store_true", help="train adapters: less memory than the whole model")
    parser.add_argument("--output", metavar="FILE.yaml", help="recipe to write; default: NAME.yaml")


def run(options: argparse.Namespace) -> int:
    """Look at the rows and the machine, write the recipe, and say what it will do and what comes next.

    Raises:
        UserError: there are no rows that can be read, or the file is there already.
    """
    from llava_llama31.trainer.recipes.loading import load_recipe

    if not options.name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"{options.name!r} is not a name", where="NAME", fix="use letters, digits, - and _")
    output = Path(options.output or f"{options.name}.yaml")
    if output.exists():
        raise UserError("already exists", where=str(output), fix="name another --output")
    if options.data is None and sys.stdin.isatty():
        _ask(options)
    if options.data is None:
        raise UserError("has no rows", where="--data", fix="--data FILE")
    options.model = _start(options.model or RELEASED)
    num_rows = _look_at(options.data, options.image_root)
    device = _device()
    text = _recipe(options, num_rows, device)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(str(error.strerror), where=str(output), fix="name a file in a folder that exists") from error
    try:
        _plan(load_recipe(str(output)), device)
    except UserError:  # such as a model that is not a LlavaNext: the recipe is useless
        output.unlink()
        raise
    sys.stdout.write(f"{output}\n")
    say(f"next: llava-llama31 train {output} --dry-run, then without --dry-run")
    return 0


def _ask(options: argparse.Namespace) -> None:
    """Ask for what no option says."""
    options.data = _asked("rows to train on (file or folder)")
    if options.model is None:
        options.model = _asked(f"model to start from (folder, run or Hub id; empty: {RELEASED})")
    if options.questions is None:
        options.questions = _asked("questions that score it (file; empty: none)")
    if not options.lora:
        options.lora = (_asked("train adapters only, which takes less memory? (y/N)") or "n").lower() in ("y", "yes")


def _asked(question: str) -> str | None:
    try:
        return input(f"{question}: ").strip() or None
    except EOFError:
        return None


def _start(model: str) -> str:
    """The checkpoint that a recipe can name: of a run its export."""
    from llava_llama31.trainer.checkpoint.run_folder import RunFolder

    export = RunFolder(Path(model)).export
    return str(export) if export.is_dir() else model


def _look_at(data: str, image_root: str | None) -> int:
    """Number of rows; format, columns and first row are shown."""
    from llava_llama31.trainer.data.sources.records import RecordError, open_records
    from llava_llama31.trainer.recipes.schema import DataSource

    records = open_records(DataSource(name="rows", path=data, image_root=image_root))
    say(f"{data}: {counted(len(records), 'row')} in the format {records.format}")
    _show_first(records)
    try:
        found = records[0]
        say(f"read as {counted(len(found.images), 'image')} and {counted(len(found.messages), 'turn')}")
    except RecordError as error:
        say(f"warning: the first row cannot be used: {error}")
    return len(records)


def _show_first(records: "RecordStore") -> None:
    text = records.source_text(0)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict):
        say(f"columns: {', '.join(row)}")
        text = json.dumps(row, ensure_ascii=False)
    say(f"the first: {text[:_SHOWN]}{'...' * (len(text) > _SHOWN)}")


@dataclass(frozen=True)
class _Device:
    """What this machine trains on; `memory` in bytes, of one; None: a CPU."""

    number: int = 1
    memory: int | None = None


def _device() -> _Device:
    with quick_imports():
        import torch

        from llava_llama31.trainer.distributed.devices import default_device, device_name, total_memory
    device = default_device()
    if device.type == "cpu":
        say("device: the CPU; torch finds no GPU (llava-llama31 doctor says why)")
        return _Device()
    found = _Device(torch.accelerator.device_count(), total_memory(device))
    say(f"device: {found.number} x {device_name(device)}")
    return found


def _plan(recipe: "Recipe", device: _Device) -> None:
    """Show what the recipe will do here, on stderr: the result is the file's name."""
    from llava_llama31.trainer.commands.plan import print_plan
    from llava_llama31.trainer.planning.plan import Machine, plan_recipe
    from llava_llama31.trainer.planning.row_lengths import Assumptions
    from llava_llama31.trainer.runs.named_paths import missing_paths

    output = Path("runs", recipe.name)
    number = device.number if recipe.stages["instruct"].global_batch % device.number == 0 else 1
    plan = plan_recipe(recipe, output, Machine(num_devices=number, device_memory=device.memory), Assumptions({}))
    print_plan(plan | {"missing": missing_paths(recipe, output)}, stderr=True)


def _recipe(options: argparse.Namespace, num_rows: int, device: _Device) -> str:
    from llava_llama31.trainer.recipes.json_schema import SCHEMA_FILE

    batch = max(1, min(64, num_rows // 20))
    batch -= batch % device.number if batch > device.number else 0
    values: Mapping[str, object] = {
        "schema": SCHEMA_FILE,
        "name": options.name,
        "model": _quoted(options.model),
        "data": _quoted(options.data),
        "image_root": f"\n        image_root: {_quoted(options.image_root)}" if options.image_root else "",
        "batch": batch,
        "lora": _LORA if options.lora else "",
        "language_rate": "2.0e-4" if options.lora else "1.0e-5",
        "save_steps": 200,
    }
    evaluation = _EVALUATION.format(questions=_quoted(options.questions)) if options.questions else ""
    return _TEMPLATE.format(**values) + evaluation


def _quoted(text: str) -> str:
    """As a YAML string, which JSON's are."""
    return json.dumps(text, ensure_ascii=False)


_TEMPLATE = """\
# yaml-language-server: $schema={schema}
# All keys: docs/recipes.md. Check it: llava-llama31 train FILE --dry-run
name: {name}
model:
  checkpoint: {model}         # a folder or a Hub id; or vision_tower and language_model to assemble
  # license: llama3.1               # of the model: `publish` needs it, and it is set before training
stages:
  instruct:
    trainable: [multi_modal_projector, language_model]   # the rest is frozen
    learning_rate: {{multi_modal_projector: 2.0e-5, language_model: {language_rate}}}
    data:
      - name: rows
        path: {data}{image_root}
        # license: cc-by-4.0          # for the model card
{lora}    global_batch: {batch}                   # samples a step, over all devices
    micro_batch: 1                    # samples that a device computes at once: as many as fit
    epochs: 1
    activation_checkpointing: true    # less memory, a third more time
    validation_fraction: 0.02         # rows held out for the validation loss
    eval_steps: {save_steps}
    save_steps: {save_steps}
    on_bad_record: {{default: error}}   # or e.g. {{default: error, missing_image: skip}}
"""
_LORA = """\
    lora: {r: 64, alpha: 128}         # add quantize: nf4 for QLoRA
"""
_EVALUATION = """\
evaluation:
  data: {questions}
  baselines: true                     # also before training, and with images shuffled
"""
