"""`llava-llama31 completion`."""

import argparse
import sys

from llava_llama31.trainer.errors import UserError


HELP = "print a script for a shell that completes commands and options"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")
    parser.set_defaults(root=None)


def run(options: argparse.Namespace) -> int:
    """Print the script.

    Raises:
        UserError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise UserError("shtab is not installed", fix="pip install 'llava-llama31[completion]'") from None
    sys.stdout.write(shtab.complete(options.root, options.shell) + "\n")
    return 0
