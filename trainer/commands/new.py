"""`llava-llama31 new`: a commented recipe for rows of your own."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from llava_llama31.trainer.commands.options import counted
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import say


HELP = "write a commented recipe for your own rows"
RELEASED = "llava-hf/llama3-llava-next-8b-hf"
_SHOWN = 400  # characters of the first row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the recipe, which is written to NAME.yaml")
    parser.add_argument("--data", metavar="FILE", help="rows to train on; asked for in a terminal")
    parser.add_argument("--image-root", metavar="DIR", help="default: the folder of FILE")
    parser.add_argument("--model", default=RELEASED, help=f"folder or Hub id to start from; default: {RELEASED}")
    parser.add_argument("--questions", metavar="FILE", help="questions that score the finished model")
    parser.add_argument("--lora", action="store_true", help="train adapters: less memory than the whole model")
    parser.add_argument("--output", metavar="FILE.yaml", help="default: NAME.yaml")


def run(options: argparse.Namespace) -> int:
    """Look at the rows, write the recipe, and say what comes next.

    Raises:
        UserError: there are no rows that can be read, or the file is there already.
    """
    from llava_llama31.trainer.recipes.loading import load_recipe

    if not options.name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"{options.name!r} is not a name", where="NAME", fix="use letters, digits, - and _")
    output = Path(options.output or f"{options.name}.yaml")
    if output.exists():
        raise UserError("is there already", where=str(output), fix="name another --output")
    data = options.data or _asked("rows to train on (file or folder)?")
    if data is None:
        raise UserError("names no rows", where="--data", fix="--data FILE")
    num_rows = _look_at(data, options.image_root)
    text = _recipe(options, data, num_rows)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(str(error.strerror), where=str(output), fix="name a file in a folder that exists") from error
    load_recipe(str(output))
    sys.stdout.write(f"{output}\n")
    say(f"next: llava-llama31 train {output} --dry-run, then without --dry-run")
    return 0


def _asked(question: str) -> str | None:
    return input(f"{question} ").strip() or None if sys.stdin.isatty() else None


def _look_at(data: str, image_root: str | None) -> int:
    """Number of rows; format and first row are shown."""
    from llava_llama31.trainer.data.sources.records import RecordError, open_records
    from llava_llama31.trainer.recipes.schema import DataSource

    records = open_records(DataSource(name="rows", path=data, image_root=image_root))
    say(f"{data}: {len(records):,} rows in the format {records.format}")
    say(f"the first: {records.source_text(0)[:_SHOWN]}")
    try:
        found = records[0]
        say(f"read as {counted(len(found.images), 'image')} and {counted(len(found.messages), 'turn')}")
    except RecordError as error:
        say(f"warning: the first row cannot be used: {error}")
    return len(records)


def _recipe(options: argparse.Namespace, data: str, num_rows: int) -> str:
    from llava_llama31.trainer.recipes.json_schema import SCHEMA_FILE

    batch = max(1, min(64, num_rows // 20))
    values: Mapping[str, object] = {
        "schema": SCHEMA_FILE,
        "name": options.name,
        "model": _quoted(options.model),
        "data": _quoted(data),
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
    import json

    return json.dumps(text, ensure_ascii=False)


_TEMPLATE = """\
# yaml-language-server: $schema={schema}
# All keys: docs/recipes.md. Check it: llava-llama31 train FILE --dry-run
name: {name}
model:
  checkpoint: {model}         # a folder or a Hub id; or vision_tower and language_model to assemble
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
