"""`llava-llama31 export-metric`."""

import argparse

from llava_llama31.trainer.redaction import say


HELP = "write the score as a Hugging Face `evaluate` metric"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default="textvqa_accuracy", metavar="DIR", help="folder to write; default: textvqa_accuracy"
    )


def run(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.evaluation.metric import export_metric

    say(str(export_metric(options.output)), stdout=True)
    return 0
