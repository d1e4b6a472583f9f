"""`llava-llama31 export`."""

import argparse
from pathlib import Path

from llava_llama31.trainer.export.dialects import DIALECTS, PORTABLE
from llava_llama31.trainer.redaction import say


HELP = "write a finished run's two-door folder again, with its card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", metavar="DIR", help="default: RUN/export, or RUN/export-DIALECT")
    parser.add_argument(
        "--dialect",
        choices=DIALECTS,
        default=PORTABLE,
        help="portable (default): for Transformers 4.52 and newer, and vLLM; native: as this Transformers saves",
    )


def run(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.checkpoint.run_folder import RunFolder
    from llava_llama31.trainer.export.export import export_again

    run, output = RunFolder(Path(options.folder)), Path(options.output) if options.output else None
    folder = export_again(run, output, options.dialect)
    say(str(folder), stdout=True)
    return 0
