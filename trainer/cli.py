"""`llava-llama31`: train, fetch and check data, plan, doctor, assemble, evaluate, chat, score, browse, export, check
engines, publish.

llava-llama31 train tiny
"""

import argparse
import atexit
import difflib
import errno
import gc
import io
import logging
import os
import re
import select
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from llava_llama31 import __version__
from llava_llama31.trainer.commands import (
    assemble,
    browse,
    chat,
    check_data,
    check_engine,
    completion,
    doctor,
    evaluate,
    export,
    export_metric,
    fetch,
    new,
    plan,
    publish,
    recipes,
    report,
    score,
    shards,
    train,
)
from llava_llama31.trainer.commands.examples import EXAMPLES
from llava_llama31.trainer.errors import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_KEYBOARD,
    EXIT_MEMORY,
    EXIT_UNREAD,
    EXIT_USER,
    EndedElsewhere,
    Interrupted,
    UserError,
)
from llava_llama31.trainer.redaction import SafeFormatter, plain, quiet_libraries, redacted, say, shown


_STDOUT = 1  # its file descriptor
# what the next start of a stopped command resumes from; the others keep nothing
_KEPT: dict[str, Callable[[argparse.Namespace], str]] = {
    "train": train.what_is_kept,
    "evaluate": evaluate.what_is_kept,
    "publish": publish.what_is_kept,
}
_COMMANDS = {
    "new": new,
    "train": train,
    "plan": plan,
    "recipes": recipes,
    "fetch": fetch,
    "shards": shards,
    "check-data": check_data,
    "doctor": doctor,
    "assemble": assemble,
    "report": report,
    "evaluate": evaluate,
    "chat": chat,
    "score": score,
    "browse": browse,
    "export-metric": export_metric,
    "export": export,
    "check-engine": check_engine,
    "publish": publish,
    "completion": completion,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run one command, and return its exit code: 0, or one of docs/recipes.md."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an id or a path may not fit the locale's encoding
    try:
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()  # here, and not as the interpreter ends, which would print a traceback
    except BrokenPipeError:  # as with `| head`: no fault, and nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        return EXIT_UNREAD


def _run(given: list[str]) -> int:
    options = _parsed(given)
    if isinstance(options, int):
        return options
    atexit.register(gc.freeze)  # Python's last search for garbage takes seconds among all that is imported by then
    log = logging.StreamHandler()
    log.setFormatter(SafeFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    quiet_libraries()
    warnings.filterwarnings("ignore", module="PIL")  # one a metadata tag: a hostile image has thousands
    # DeepSpeed's calls of former names, several lines a step; its users can't change them
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers fork after the tokenizer was used
    # read at torch's first allocation: huge pages, without which a CPU spends a tenth of a step on page faults
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # packed rows differ in length, which tears a GPU's memory to pieces
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what matters of its warnings is checked here
    try:
        return options.run(options)
    except UserError as error:
        return _say(str(error), error.exit_code, debug=options.debug)
    except EndedElsewhere as error:
        if error.untold:
            return _say(error.untold, error.exit_code, debug=options.debug)
        if options.debug:
            sys.stderr.write(shown(traceback.format_exc()))
        return error.exit_code
    except Interrupted as stopped:
        say(str(stopped) if stopped.agreed else _with_what_is_kept(str(stopped), options))
        return EXIT_INTERRUPTED
    except MemoryError:
        return _say(
            "the host has no memory left (fix: give this process more memory)", EXIT_MEMORY, debug=options.debug
        )
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise
        return _say(_what_failed(error), EXIT_USER, debug=options.debug)
    except KeyboardInterrupt:
        say(_with_what_is_kept("stopped", options))
        return EXIT_KEYBOARD
    except Exception:  # a fault of ours: Python's own traceback would show a secret that a message holds
        sys.stderr.write(shown(traceback.format_exc()))
        return EXIT_FAULT


def _what_failed(error: OSError) -> str:
    what = f"{error.filename or 'a file'}: {error.strerror or error}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return what
    if error.filename is not None:
        return f"{what} (fix: free space there and run again)"
    return f"{what} (fix: free space where the command writes and in {tempfile.gettempdir()}; --debug shows the file)"


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has gone: a broken pipe may also be one to another process."""
    poll = select.poll()
    poll.register(_STDOUT, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _with_what_is_kept(stopped: str, options: argparse.Namespace) -> str:
    """The closing line of a command that a signal ended."""
    kept = options.kept(options) if options.kept is not None else ""
    return f"{stopped}; {kept}" if kept else stopped


def _say(error: str, exit_code: int, *, debug: bool) -> int:
    """Print what the user can fix, and return the exit code."""
    if debug:
        sys.stderr.write(shown(traceback.format_exc()))
    if not sys.stderr.isatty():
        say(f"error: {error}")
        return exit_code
    from llava_llama31.trainer.terminal import Terminal, styled

    what, _, fix = plain(redacted(error)).partition(" (fix: ")
    terminal = Terminal(stderr=True)
    terminal.print(styled(("error: ", "bold red"), (what, "")))
    if fix:
        terminal.print(styled(("fix: ", "bold"), (fix.removesuffix(")"), "")))
    return exit_code


def _parsed(given: list[str]) -> argparse.Namespace | int:
    """The options, or an exit code where there is nothing to run."""
    parser = command_parser()
    if not given:
        parser.print_help()
        return 0
    if given[0] == "--debug":  # of any command
        given = [*given[1:], "--debug"]
    if given and not given[0].startswith("-") and given[0] not in _COMMANDS:
        near = difflib.get_close_matches(given[0], _COMMANDS, 1)
        fix = f"did you mean {near[0]}?" if near else f"one of {', '.join(_COMMANDS)}"
        return _say(f"unknown command {given[0]} (fix: {fix})", EXIT_USER, debug=False)
    options, unknown = parser.parse_known_args(given)
    options.root = parser  # for `completion`
    for argument in unknown:
        name = argument.partition("=")[0]
        if name.startswith("-"):
            near = difflib.get_close_matches(name, options.known, 1)
            fix = f"did you mean {near[0]}?" if near else f"llava-llama31 {given[0]} --help"
            return _say(f"{given[0]} has no option {name} (fix: {fix})", EXIT_USER, debug=False)
    # argparse leaves an optional argument empty where an option stands before it
    for name in options.optional:
        if unknown and vars(options)[name] is None:
            setattr(options, name, unknown.pop(0))
    if unknown:
        fix = f"llava-llama31 {given[0]} --help"
        return _say(f"{given[0]}: unexpected argument: {unknown[0]} (fix: {fix})", EXIT_USER, debug=False)
    return options


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line with its fix."""

    def error(self, message: str) -> NoReturn:
        fix = f"{self.prog} --help"
        if chosen := re.fullmatch(r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            where, value, listed = chosen.groups()
            choices = [choice.strip("' ") for choice in listed.split(",")]
            near = difflib.get_close_matches(value, choices, 1)
            fix = f"did you mean {near[0]}?" if near else f"one of {', '.join(choices)}"
            message = f"{where}: there is no {value!r}"
        message = re.sub(r"^the following arguments are required:", "missing:", message)
        say(f"error: {message.removeprefix('argument ')} (fix: {fix})")
        raise SystemExit(EXIT_USER)


def _examples(command: str) -> str | None:
    """The end of a command's help."""
    lines = [f"  llava-llama31 {command} {line}" for line in EXAMPLES.get(command, ())]
    return "\n".join(["examples:", *lines]) if lines else None


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it parses has the command as `run`."""
    parser = _Parser(prog="llava-llama31", description="Train, evaluate and publish LLaVA-NeXT on Llama 3.1.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=_examples(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run, kept=_KEPT.get(name))
        module.add_arguments(command)
        command.set_defaults(known=[name for action in command._actions for name in action.option_strings])
        optional = [action.dest for action in command._actions if not action.option_strings and action.nargs == "?"]
        command.set_defaults(optional=optional)
    return parser


if __name__ == "__main__":
    sys.exit(main())
