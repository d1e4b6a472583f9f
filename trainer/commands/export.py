"""`llava-llama31 export`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.export.dialects import DIALECTS, PORTABLE
from llava_llama31.trainer.redaction import say


if TYPE_CHECKING:
    from llava_llama31.trainer.checkpoint.run_folder import RunFolder


EXIT_DIFFERENT = 3
HELP = "write a finished run's model folder again, with its card, or its adapters or a quantised twin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", metavar="DIR", help="folder to write; default: RUN/export, or RUN/export-DIALECT")
    parser.add_argument(
        "--dialect",
        choices=DIALECTS,
        default=PORTABLE,
        help="portable (default): for Transformers 4.52 and newer, and vLLM; native: as this Transformers saves",
    )
    parser.add_argument(
        "--adapter", action="store_true", help="write the last stage's adapters, unmerged, into RUN/export-adapter"
    )
    parser.add_argument(
        "--base",
        metavar="OWNER/NAME@REVISION",
        help="the model that the adapters belong to; default: the one that the recipe names",
    )
    parser.add_argument(
        "--quantize",
        choices=("fp8", "int8", "w4a16"),
        metavar="fp8|int8|w4a16",
        help="write a twin with the decoder in 8 or 4 bits into RUN/export-SCHEME, and score it again",
    )
    parser.add_argument(
        "--check", action="store_true", help="open the folder in clean processes, and write the result into its card"
    )
    parser.add_argument(
        "--check-with",
        action="append",
        default=[],
        metavar="PYTHON",
        help="also open it with the Transformers, and vLLM if there, of this interpreter; may be repeated",
    )


def run(options: argparse.Namespace) -> int:
    """Exit code 0, or 3 if the checked folder does not open everywhere with the same answers."""
    from llava_llama31.trainer.checkpoint.run_folder import RunFolder
    from llava_llama31.trainer.export.export import export_again

    run, output = RunFolder(Path(options.folder)), Path(options.output) if options.output else None
    if options.adapter:
        return _export_adapter(run, output, options)
    if options.quantize is not None:
        return _export_twin(run, output, options)
    if options.base is not None:
        raise UserError("goes with --adapter", where="--base", fix="leave it out, or add --adapter")
    folder = export_again(run, output, options.dialect)
    say(str(folder), stdout=True)
    return _check(run, folder, options.check_with) if options.check or options.check_with else 0


def _export_adapter(run: "RunFolder", output: Path | None, options: argparse.Namespace) -> int:
    from llava_llama31.trainer.export.adapter import export_adapter

    if options.check or options.check_with or options.quantize or options.dialect != PORTABLE:
        what = "adapters are checked as they are written, and have one layout"
        raise UserError(what, where="--adapter", fix="leave out --check, --check-with, --quantize and --dialect")
    say(str(export_adapter(run, options.base, output)), stdout=True)
    return 0


def _export_twin(run: "RunFolder", output: Path | None, options: argparse.Namespace) -> int:
    from llava_llama31.trainer.runs.quantized_twin import export_twin

    if options.check or options.check_with or options.base or options.dialect != PORTABLE:
        what = "a twin is checked as it is written, and has one layout"
        raise UserError(what, where="--quantize", fix="leave out --check, --check-with, --base and --dialect")
    say(str(export_twin(run, options.quantize, output, say)), stdout=True)
    return 0


def _check(run: "RunFolder", folder: Path, pythons: list[str]) -> int:
    from llava_llama31.trainer.engines.opening_elsewhere import open_everywhere
    from llava_llama31.trainer.export.export import write_openings

    opened = []
    for found in open_everywhere(folder, pythons):
        note = f": {found.note}" if found.note else ""
        say(f"{found.engine}, {found.door}: {found.equal} of {found.asked} answers are equal{note}", stdout=True)
        opened.append(found)
    write_openings(run, folder, [found.to_json() for found in opened])
    return 0 if all(found.whole for found in opened) else EXIT_DIFFERENT
