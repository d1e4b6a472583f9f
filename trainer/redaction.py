"""Text that may be shown: control characters of hostile data escaped, tokens and passwords taken out."""

import logging
import os
import re
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
# the Hub's tokens, headers that carry one, and the signatures of uploads
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?i:bearer)\s+[^\s'\"]+|X-Amz-[\w-]+=[^&\s]+")
# user and password of a URL, which a Path writes with one slash
_LOGIN = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]+:/{1,2})[^/?#\s]*@")


def holds_credential(text: str) -> bool:
    """Whether `redacted` would change a text."""
    return redacted(text) != text


def printable(text: str, longest: int = _ID_LENGTH) -> str:
    """Text from the data that can't harm a terminal: control characters and lone surrogates escaped, cut if long."""
    if len(text) > longest:
        text = text[:longest] + "..."
    return text if text.isprintable() else _escaped(text)


def redacted(text: str) -> str:
    """Text without Hub tokens, passwords in URLs, and what the environment's secret variables hold."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return _LOGIN.sub(rf"\g<1>{HIDDEN}@", _TOKEN.sub(HIDDEN, text))


def shown(text: str) -> str:
    """What may go to a terminal or a log of text with lines of its own, such as a traceback."""
    return "\n".join(_escaped(line) for line in redacted(text).split("\n"))


class SafeFormatter(logging.Formatter):
    """Log lines without secrets and control characters; a message from the data stays one line."""

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
