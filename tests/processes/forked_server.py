"""The fork server of data workers as a fork of its process, which has imported what the server would import again."""

import os
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import util


_spawn = util.spawnv_passfds


def _fork(path: bytes, args: Sequence[str], passfds: Sequence[int]) -> int:
    """In place of `util.spawnv_passfds`: run a fork server's code in a fork that has its files alone."""
    if "multiprocessing.forkserver" not in args[-1]:
        return _spawn(path, args, passfds)
    pid = os.fork()
    if pid:
        return pid
    try:
        # closed files' numbers would be given to others, which the objects of these would close one day
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in map(int, os.listdir("/dev/fd")):
            if number > 2 and number not in (*passfds, nothing):
                _replace(nothing, number)
        exec(args[-1], {})
    except SystemExit:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def _replace(nothing: int, number: int) -> None:
    try:
        os.dup2(nothing, number)
    except OSError:  # the listing's own, which is closed by now
        return


def use() -> None:
    """From now on, in this process."""
    util.spawnv_passfds = _fork
