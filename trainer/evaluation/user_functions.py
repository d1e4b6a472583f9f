"""A user's own metric: a function of a Python file beside the task's file.

The function is code that runs with the user's rights, so its file is taken from the task's own folder alone, and only
where nobody else could have written it; a module that is installed is not taken, as `os:system` would be one.
"""

import importlib.util
import inspect
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_llama31.trainer.errors import UserError


def user_function(name: str, folder: str | None, task: str) -> Callable[[str, list[str]], Any]:
    """The function `module:function` of `module.py`, called with an answer and the annotated ones.

    Args:
        name: module:function.
        folder: the task file's folder; None for a shipped task.
        task: what stands in errors.

    Raises:
        UserError: there is no such function, or others than the user could have written it.
    """
    module_name, function_name = name.split(":")
    if folder is None or not module_name.isidentifier():
        raise UserError(f"function {name!r} is not beside the task", where=task, fix="name module:function")
    path = Path(folder, f"{module_name}.py")
    if not path.is_file():
        raise UserError(f"no file {path}", where=task, fix=f"put {module_name}.py beside the task's file")
    for place in (path, path.parent):
        _refuse_foreign(place, task)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"{path} fails: {type(error).__name__}: {error}", where=task, fix="repair it") from error
    function = vars(module).get(function_name)
    if not callable(function):
        raise UserError(f"{path} has no function {function_name}", where=task, fix="check the name")
    try:
        inspect.signature(function).bind("answer", ["annotated"])
    except TypeError as error:
        what = f"{path}: {function_name} cannot be called with an answer and the annotated ones: {error}"
        raise UserError(what, where=task, fix=f"def {function_name}(answer, answers)") from error
    except ValueError:  # a function written in C, which does not name its arguments
        pass
    return function


def _refuse_foreign(place: Path, task: str) -> None:
    facts = os.stat(place)
    others = facts.st_mode & stat.S_IWOTH or (facts.st_mode & stat.S_IWGRP and facts.st_gid != os.getgid())
    if facts.st_uid not in (0, os.getuid()) or others:
        what = f"{place} belongs to another user, or others may write to it; its code is not run"
        raise UserError(what, where=task, fix="read the code, and copy it to a folder that only you may write to")
