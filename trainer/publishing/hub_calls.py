"""Calls to the Hub, retried where that can help, else reported with their fix."""

import json
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import HIDDEN, redacted


logger = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0
# huggingface_hub has no timeout; a dead connection must end
TIMEOUT_S = 120.0
# somebody else's commit or merge: the step looks at the repository again
RETRIED = frozenset((408, 412, 425, 429, 500, 502, 503, 504))
FIXES = {
    400: "fix what the Hub's answer names",
    401: "set HF_TOKEN to a valid token with write access, or `hf auth login`",
    402: "the Hub requires payment; see the account's billing settings",
    403: "the token needs write access to this repository (fine-grained: `repo.write` of its owner)",
    404: "check the names of repository and collection, and that the token may read them",
    409: "somebody changed the repository in the meantime; close the pull request there",
    412: "somebody is committing to the repository at the same time; wait until they have finished",
    413: "a file is too large for the Hub; export again, which splits the weights into 5 GB files",
    429: "wait a few minutes for the rate limit to reset",
}
UNREACHABLE = "wait until the Hub answers, and check HF_ENDPOINT and the connection"

Result = TypeVar("Result")


class DownloadError(RuntimeError):
    """A clean process could not download; `status` is the Hub's HTTP status, None if it did not answer."""

    def __init__(self, message: str, status: int | None):
        super().__init__(message)
        self.status = status


def redact(text: str) -> str:
    """Like `redaction.redacted`, and also without the token that `hf auth login` stored on this machine."""
    token = get_token()
    return redacted(text.replace(token, HIDDEN) if token else text)


def attempt(what: str, step: Callable[[], Result], *, resume: str) -> Result:
    """Run a step; retry it after a pause if the error may be temporary.

    A step first looks at what exists: an earlier attempt may have succeeded although its answer was lost.

    Args:
        what: names the step in messages.
        step: safe to run again.
        resume: the command that continues from here.

    Raises:
        UserError: it failed for good; has the fix and `resume`, and no token.
    """
    for number in range(1, ATTEMPTS + 1):
        get_session().timeout = TIMEOUT_S
        try:
            return step()
        except (HTTPError, RuntimeError, ValueError, OfflineModeIsEnabled, LocalTokenNotFoundError) as error:
            if isinstance(error, UserError):
                raise
            fault = _http_fault(error)
            if isinstance(error, RuntimeError) and not isinstance(error, DownloadError) and fault is None:
                raise
            status = _status(error, fault)
            if number == ATTEMPTS or not _may_pass(error, fault, status):
                raise _named(what, error, fault, status, resume) from None
            wait = _wait(fault, number)
            reason = status or type(fault or error).__name__
            logger.warning("%s: %s; trying again in %.0f s (%d of %d)", what, reason, wait, number, ATTEMPTS)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _http_fault(error: BaseException | None) -> HTTPError | None:
    """The HTTP error that caused an error: uploads wrap theirs."""
    while error is not None and not isinstance(error, HTTPError):
        error = error.__cause__
    return error


def _status(error: Exception, fault: HTTPError | None) -> int | None:
    if isinstance(error, DownloadError):
        return error.status
    return fault.response.status_code if isinstance(fault, HfHubHTTPError) else None


def _may_pass(error: Exception, fault: HTTPError | None, status: int | None) -> bool:
    if status is not None:
        return status in RETRIED
    if fault is not None or isinstance(error, DownloadError):
        return True  # the connection broke or timed out
    return isinstance(error, json.JSONDecodeError)  # a proxy's HTML page instead of the Hub's answer


def _wait(fault: HTTPError | None, number: int) -> float:
    """Seconds to wait: as long as the Hub asks for, else doubled each time."""
    if isinstance(fault, HfHubHTTPError):
        limit = parse_ratelimit_headers(fault.response.headers)
        if limit is not None and limit.remaining == 0:
            return min(LONGEST_WAIT_S, limit.reset_in_seconds + 1.0)
        asked = fault.response.headers.get("Retry-After", "")
        if asked.isdigit():
            return min(LONGEST_WAIT_S, float(asked))
    return FIRST_WAIT_S * 2 ** (number - 1)


def _named(what: str, error: Exception, fault: HTTPError | None, status: int | None, resume: str) -> UserError:
    if isinstance(error, OfflineModeIsEnabled):
        return UserError("HF_HUB_OFFLINE is set", where=what, fix=f"unset it, then: {resume}")
    if isinstance(error, LocalTokenNotFoundError):
        return UserError("there is no token", where=what, fix=f"{FIXES[401]}, then: {resume}")
    said = redact(" ".join(str(error).split()))[:300]
    if status is not None:
        return UserError(
            f"the Hub answered {status}: {said}", where=what, fix=f"{FIXES.get(status, UNREACHABLE)}; then: {resume}"
        )
    unheard = fault is not None or isinstance(error, DownloadError | json.JSONDecodeError)
    return UserError(said, where=what, fix=f"{UNREACHABLE if unheard else FIXES[400]}; then: {resume}")
