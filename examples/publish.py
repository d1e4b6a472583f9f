"""Publish a finished run or an exported folder on the Hub; the same code as `llava-llama31 publish`.

python examples/publish.py RUN --repo-id OWNER/NAME [--private] [--dry-run] [--json]
"""

import sys

from llava_llama31.trainer.cli import main


if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
