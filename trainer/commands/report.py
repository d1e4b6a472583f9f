"""`llava-llama31 report`."""

import argparse
import sys
from pathlib import Path

from llava_llama31.trainer.commands.options import positive


HELP = "write one HTML page about a run, or comparing several: curves, data, scores, samples"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument("--output", metavar="FILE.html", help="page to write; default: report.html in the first RUN")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument(
        "--watch", action="store_true", help="serve the page on this machine, up to date at each reload"
    )
    parser.add_argument("--port", type=int, default=0, metavar="N", help="port for --watch; default: a free one")
    parser.add_argument(
        "--every", type=positive, default=10, metavar="S", help="seconds between reloads under --watch; default: 10"
    )


def run(options: argparse.Namespace) -> int:
    """Exit code 0 once the file is written, or when watching is ended by Ctrl-C."""
    from llava_llama31.trainer.report.page import write_report
    from llava_llama31.trainer.report.run_facts import run_facts

    folders = [Path(folder) for folder in options.runs]
    if options.watch:
        from llava_llama31.trainer.report.watch import watch

        return watch(folders, port=options.port, every=options.every, opens=options.open)
    facts = [run_facts(folder) for folder in folders]
    output = Path(options.output) if options.output else facts[0].folder.report
    write_report(facts, output)
    sys.stdout.write(f"{output}\n")
    if options.open:
        import webbrowser

        webbrowser.open(output.resolve().as_uri())
    return 0
