"""Makes text safe to show: escapes control characters of hostile data, removes tokens and passwords."""

import logging
import os
import re
import sys
from types import TracebackType


SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "COMET_API_KEY",
    "NEPTUNE_API_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "AWS_SECRET_ACCESS_KEY",
)
HIDDEN = "***"
LONGEST_MESSAGE = 10_000

_ID_LENGTH = 200
# at every import by Transformers or PEFT, used or not: kernels that they lack, and calls of deprecated names;
# and a CUDA build of torch on a machine with `nvcc` and no GPU
_NOISY = ("torchao", "torch.utils._pytree", "torch.utils.cpp_extension", "bitsandbytes.backends")
# Hub tokens, headers that carry one, and upload signatures
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?i:bearer)\s+[^\s'\"]+|X-Amz-[\w-]+=[^&\s]+")
# user and password of a URL; a Path writes the URL with one slash
_LOGIN = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]+:/{1,2})[^/?#\s]*@")


def holds_credential(text: str) -> bool:
    """Whether `redacted` would change the text."""
    return redacted(text) != text


def printable(text: str, longest: int = _ID_LENGTH) -> str:
    """Text from the data, safe for a terminal: control characters and lone surrogates escaped, truncated if long."""
    if len(text) > longest:
        text = text[:longest] + "..."
    return text if text.isprintable() else _escaped(text)


def plain(text: str) -> str:
    """Text from data, models and paths as one line that is safe for a terminal: nothing is cut but a page of text."""
    return printable(text, LONGEST_MESSAGE)


def quiet_libraries() -> None:
    """Before torch and Transformers are imported: no messages that are of no use to whoever started a command."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # its import sets level and handler of its own, on stdout
    # read as tqdm is imported: the bars of loading and writing weights; those of the Hub's downloads stay
    os.environ.setdefault("TQDM_DISABLE", "1")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def say(line: str, *, stdout: bool = False) -> None:
    """Print one line on stderr, or on stdout where it is a result, without secrets and control characters."""
    print(plain(redacted(line)), file=sys.stdout if stdout else sys.stderr, flush=True)


def redacted(text: str) -> str:
    """Text without Hub tokens, passwords in URLs, and values of secret environment variables."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return _LOGIN.sub(rf"\g<1>{HIDDEN}@", _TOKEN.sub(HIDDEN, text))


def shown(text: str) -> str:
    """Multi-line text, such as a traceback, made safe for a terminal or a log."""
    return "\n".join(_escaped(line) for line in redacted(text).split("\n"))


class SafeFormatter(logging.Formatter):
    """Formats log lines without secrets and control characters; a message from the data stays on one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _escaped(redacted(super().formatMessage(record)))

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        return shown(super().formatException(ei))


def _secrets() -> list[str]:
    return [value for name in SECRET_VARIABLES if len(value := os.environ.get(name, "").strip()) >= 8]


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
