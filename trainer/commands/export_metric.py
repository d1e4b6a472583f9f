"""`llava-llama31 export-metric`."""

import argparse
import sys


HELP = "write the score as a Hugging Face `evaluate` metric"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="textvqa_accuracy", metavar="DIR", help="default: textvqa_accuracy")


def run(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.evaluation.metric import export_metric

    print(export_metric(options.output), file=sys.stderr)  # noqa: T201
    return 0
