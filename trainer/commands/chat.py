"""`llava-llama31 chat`: talk to a model about images, in the terminal or in a browser."""

import argparse
import difflib
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from llava_llama31.trainer.commands.options import above_zero, add_max_pixels, positive
from llava_llama31.trainer.commands.quick_imports import quick_imports
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import say, shown


if TYPE_CHECKING:
    from llava_llama31.trainer.chat.conversation import Conversation
    from llava_llama31.trainer.chat.web import Example


HELP = "talk to a model about images"
SLASH_COMMANDS = {
    "/image": "/image FILE: show an image with the next question; a path dragged into the terminal does the same",
    "/reset": "/reset: forget all turns and images",
    "/save": "/save FILE: write the conversation as JSON",
    "/help": "/help: show this",
    "/exit": "/exit: leave, as Ctrl-D does",
}
# the first word of a line as a shell would read it: in quotes, or with backslashes before spaces
_FIRST_WORD = re.compile(r"""\s*('[^']*'|"[^"]*"|(?:\\.|[^\s\\'"])+)(?=\s|$)""")
_HEAD_BYTES = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run, an export, adapters on their base, or a Hub id")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image to show first; may be repeated"
    )
    add_max_pixels(parser)
    parser.add_argument("--ask", metavar="TEXT", help="print one answer and exit")
    parser.add_argument("--system", default="", metavar="TEXT", help="text of the system turn")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=512, metavar="N", help="longest answer in tokens; default: 512"
    )
    parser.add_argument("--temperature", type=above_zero, metavar="T", help="sample tokens; default: greedy")
    parser.add_argument(
        "--top-p",
        type=above_zero,
        metavar="P",
        help="sample from the most likely tokens that together have this probability",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed for sampling; default: 0")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="type to compute in; default: auto, the model's own, or float32 where a CPU emulates it",
    )
    parser.add_argument("--device", metavar="NAME", help="torch's name of a device; default: the GPU if there is one")
    web = parser.add_argument_group("in a browser")
    web.add_argument("--web", action="store_true", help="serve a page to this machine instead of using the terminal")
    web.add_argument("--compare", metavar="MODEL", help="a second model that answers beside the first")
    web.add_argument("--open", action="store_true", help="open the page in a browser")
    web.add_argument("--port", type=int, default=0, metavar="N", help="port of the page; default: a free one")
    web.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; default: 127.0.0.1")


def run(options: argparse.Namespace) -> int:
    """Exit code 0; a question that fails ends `--ask` and is only reported in a conversation."""
    if options.top_p is not None and options.top_p > 1:
        raise UserError(f"{options.top_p} is above 1", where="--top-p", fix="name a probability")
    _check_web(options)
    begin = _open(options, options.model)
    if options.web:
        return _serve(options, begin)
    conversation = begin()
    if options.ask is not None:
        from llava_llama31.trainer.chat.conversation import answer_to

        sys.stdout.write(shown(answer_to(conversation, options.ask, options.image)) + "\n")
        return 0
    for image in options.image:
        _show(conversation, image)
    say("ask, or /help; Ctrl-C stops an answer")
    while (line := _read_line()) is not None:
        try:
            if not _obey(conversation, line, options):
                return 0
        except UserError as error:
            say(f"error: {error}")
    return 0


def _check_web(options: argparse.Namespace) -> None:
    """Refuse options that have no effect where they stand."""
    given = {"--compare": options.compare, "--open": options.open, "--port": options.port}
    for name, value in given.items():
        if value and not options.web:
            raise UserError("has no effect in the terminal", where=name, fix="add --web")
    if options.web and (options.ask is not None or options.image):
        where = "--ask" if options.ask is not None else "--image"
        raise UserError("has no effect in the browser", where=where, fix="leave it out, or leave out --web")


def _open(options: argparse.Namespace, model: str) -> "Callable[[], Conversation]":
    """Loads a model; what comes back begins a conversation with it."""
    from llava_llama31.trainer.model.locating import model_folder

    folder = model_folder(model, where="MODEL")  # before torch is imported: it fails faster
    with quick_imports():
        import transformers

        from llava_llama31.trainer.chat.conversation import Conversation, Sampling
        from llava_llama31.trainer.evaluation.precision import answers_in_float32
        from llava_llama31.trainer.model.opening import open_model

    transformers.utils.logging.disable_progress_bar()
    weights, processor = open_model(folder, dtype=options.dtype, device=options.device)
    if answers_in_float32(weights, say, insists=options.dtype != "auto"):  # as `evaluate` does
        weights = weights.float()
    sampling = None
    if options.temperature is not None or options.top_p is not None:
        sampling = Sampling(options.temperature or 1.0, options.top_p or 1.0, options.seed)
    return lambda: Conversation(
        weights,
        processor,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        system=options.system,
        max_pixels=options.max_pixels,
    )


def _serve(options: argparse.Namespace, begin: "Callable[[], Conversation]") -> int:
    """Serve the page until Ctrl-C."""
    from llava_llama31.trainer.chat.web import LOOPBACK, ChatServer

    models, begins = [options.model], [begin]
    if options.compare:
        models.append(options.compare)
        begins.append(_open(options, options.compare))
    examples = _examples(Path(options.model))
    server = ChatServer(models, lambda: [one() for one in begins], examples, host=options.host, port=options.port)
    with server:
        sys.stdout.write(f"{server.address}\n")
        sys.stdout.flush()
        if options.host != LOOPBACK:
            say(f"whoever reaches {options.host} can use the model: there is no password")
        say("Ctrl-C ends it")
        if options.open:
            import webbrowser

            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def _examples(model: Path) -> "list[Example]":
    """Sample questions of a run."""
    from llava_llama31.trainer.chat.web import Example
    from llava_llama31.trainer.checkpoint import atomic_folders
    from llava_llama31.trainer.checkpoint.run_folder import RunFolder

    record = RunFolder(model).record
    samples = atomic_folders.read_json(record).get("samples", []) if record.is_file() else []
    found = [Example(model / sample["image"], sample["question"]) for sample in samples]
    return [example for example in found if example.image.is_file()]


def _read_line() -> str | None:
    """The next line, or None at the end of the input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # editing and history for input()

    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            say("\nleave with Ctrl-D or /exit")


def _obey(conversation: "Conversation", line: str, options: argparse.Namespace) -> bool:
    """Do what one line says; False: leave."""
    images, text = split_images(line)
    for image in images:
        _show(conversation, image)
    command, _, argument = text.partition(" ")
    if not command.startswith("/"):
        if text:
            _answer(conversation, text)
        return True
    if command not in SLASH_COMMANDS:
        near = difflib.get_close_matches(command, SLASH_COMMANDS, 1)
        fix = f"did you mean {near[0]}?" if near else f"one of {', '.join(SLASH_COMMANDS)}"
        raise UserError(f"unknown command {command}", fix=fix)
    actions: dict[str, Callable[[], object]] = {
        "/image": lambda: _show(conversation, _only_word(argument, command)),
        "/reset": conversation.reset,
        "/save": lambda: _save(conversation, Path(_only_word(argument, command)), options.model),
        "/help": lambda: sys.stdout.write("\n".join([*SLASH_COMMANDS.values(), ""])),
        "/exit": lambda: None,
    }
    actions[command]()
    return command != "/exit"


def split_images(line: str) -> tuple[list[str], str]:
    """Paths of image files that a line begins with, as a terminal writes a dragged file, and the rest of it."""
    images: list[str] = []
    while match := _FIRST_WORD.match(line):
        (word,) = shlex.split(match[1])
        path = unquote(word.removeprefix("file://")) if word.startswith("file://") else word
        if not _is_image(Path(path).expanduser()):
            break
        images.append(path)
        line = line[match.end() :]
    return images, line.strip()


def _is_image(path: Path) -> bool:
    from llava_llama31.trainer.data.sources.images import is_encoded_image

    try:
        with path.open("rb") as file:
            return is_encoded_image(file.read(_HEAD_BYTES))
    except (OSError, ValueError):
        return False


def _only_word(argument: str, command: str) -> str:
    """The path after a command, quoted or not."""
    path = argument.strip()
    if match := _FIRST_WORD.fullmatch(path):
        (path,) = shlex.split(match[1])
    if not path:
        raise UserError("names no file", where=command, fix=f"{command} FILE")
    return path


def _show(conversation: "Conversation", path: str) -> None:
    height, width = conversation.add_image(path)
    say(f"{path}: {width} x {height} pixels")


def _answer(conversation: "Conversation", text: str) -> None:
    pieces = conversation.ask(text)
    try:
        for piece in pieces:
            sys.stdout.write(shown(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" [stopped]")
    finally:
        pieces.close()
        sys.stdout.write("\n")


def _save(conversation: "Conversation", path: Path, model: str) -> None:
    text = json.dumps({"model": model, "turns": conversation.to_json()}, ensure_ascii=False, indent=2)
    try:
        with path.expanduser().open("x", encoding="utf-8") as file:
            file.write(f"{text}\n")
    except OSError as error:
        raise UserError(str(error.strerror), where=str(path), fix="name a new file in a folder that exists") from error
    say(f"saved: {path}")
