"""Run a recipe on one or many processes; the same code as `llava-llama31 train`.

accelerate launch examples/train.py RECIPE [--output DIR] [--set stages.NAME.key=value ...]
"""

import sys

from llava_llama31.trainer.cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
