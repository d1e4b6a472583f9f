"""Score a model on a TextVQA-format file; the same code as `llava-llama31 evaluate`.

python examples/evaluate.py MODEL --data FILE
"""

import sys

from llava_llama31.trainer.cli import main


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
