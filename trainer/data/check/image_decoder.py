"""Images decoded in a process of their own: one that crashes, stalls or bloats it is its record's fault, by name."""

import os
import resource
import signal
import socket
import subprocess
import sys
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection

from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.data.sources.reject_reasons import RecordError


Size = tuple[int, int]  # (height, width) in pixels

SECONDS = 120.0
# address space: the interpreter, and for each pixel twice what the greediest decoder (WebP with alpha) takes
_BASE_BYTES, _BYTES_PER_PIXEL = 2**30, 40
_TRIES = 2
_CODE = f"import sys; from {__name__} import serve; serve(*map(int, sys.argv[1:]))"


class Decoder:
    """A process that decodes images and returns their sizes; it starts with the first image.

    Args:
        max_pixels: of an image; the process may use memory for this many and no more.
        seconds: that one image may take.
    """

    def __init__(self, max_pixels: int, seconds: float = SECONDS):
        self.max_pixels, self.seconds = max_pixels, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def size(self, image: ImageRef) -> Size:
        """(height, width) in pixels, as seen upright, of an image that was decoded whole.

        Raises:
            RecordError: why it can't be used; decoder_died when the process died or stalled on it, twice.
        """
        for _ in range(_TRIES):
            connection = self._connection or self._start()
            try:
                connection.send(image)
                if connection.poll(self.seconds):
                    answer = connection.recv()
                    break
                what = f"not decoded within {self.seconds:g} s"
            except (EOFError, OSError):
                what = "the decoder died"
            what = f"{what} (exit code {self.close()})"
        else:
            raise RecordError("decoder_died", what, image.name)
        if isinstance(answer, RecordError):
            raise answer
        return answer

    def close(self) -> int | None:
        """End the process; returns its exit code, negative for the signal that killed it."""
        if self._process is None or self._connection is None:
            return None
        self._connection.close()
        try:
            return self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            self._process = self._connection = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(_BASE_BYTES + _BYTES_PER_PIXEL * self.max_pixels)]
        # not multiprocessing: that would run the user's own script again in the new process
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        assert self._process.stderr is not None
        with self._process.stderr as complaints:
            # closed by the process when it is ready
            complaint = complaints.read().decode(errors="replace").strip()
        if complaint:
            self.close()
            raise RuntimeError(f"the process that decodes images did not start: {complaint}")
        return self._connection


def serve(file_descriptor: int, memory_bytes: int) -> None:
    """The decoder's side: a size or a RecordError for every image, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other side decides
    warnings.simplefilter("ignore")  # Pillow's, about metadata
    with suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    with Connection(file_descriptor) as connection, suppress(EOFError, OSError):
        while True:
            connection.send(_decoded_size(connection.recv()))


def _decoded_size(image: ImageRef) -> Size | RecordError:
    try:
        decoded = image.open()
    except RecordError as error:
        return error
    return decoded.height, decoded.width
