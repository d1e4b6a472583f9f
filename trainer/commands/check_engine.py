"""`llava-llama31 check-engine`."""

import argparse
from pathlib import Path

from llava_llama31.trainer.commands.options import above_zero, add_json, positive
from llava_llama31.trainer.redaction import say


HELP = "ask a server the questions of an exported folder's reference, and compare the answers"
EXIT_DIFFERENT = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="what `export` wrote: its reference.json is used")
    parser.add_argument(
        "--url", required=True, help="address of an OpenAI-compatible server; its key is read from OPENAI_API_KEY"
    )
    parser.add_argument("--model", metavar="NAME", help="the model's name there; default: the only one that is served")
    parser.add_argument("--concurrency", type=positive, default=8, metavar="N", help="questions at a time; default: 8")
    parser.add_argument(
        "--timeout", type=above_zero, default=600, metavar="SECONDS", help="longest wait for an answer; default: 600"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Exit code 0, or 3 if an answer differs."""
    import json

    from llava_llama31.trainer.engines.check import check_engine
    from llava_llama31.trainer.engines.client import EngineClient
    from llava_llama31.trainer.engines.reference import read_reference

    reference = read_reference(Path(options.folder))
    with EngineClient(options.url, options.model, options.timeout) as client:
        report = check_engine(reference, client, options.concurrency)
    if options.json_output:
        say(json.dumps(report.to_json(), ensure_ascii=False), stdout=True)
    else:
        say(f"{report.equal} of {report.asked} answers are equal", stdout=True)
        for name, value in (report.first_difference or {}).items():
            say(f"  {name.replace('_', ' ')}: {value!r}", stdout=True)
        if report.likely:
            say(f"likely: {report.likely}", stdout=True)
    return 0 if report.equal == report.asked else EXIT_DIFFERENT
