"""Reading a recipe: a shipped one by name or a YAML file; an error names file, key and the nearest right key."""

import difflib
import importlib.resources
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.differences import flat
from llava_llama31.trainer.recipes.schema import FORMER_KEYS, MODEL_PARTS, Recipe
from llava_llama31.trainer.strict_yaml import parse_yaml


# keys that name a file, a folder or a checkpoint
_NAMES = ("path", "data", "image_root", "task", "init_from", "deepspeed", *MODEL_PARTS)

SHIPPED = (
    "tiny",
    "tiny-siglip",
    "smol",
    "llama31-8b",
    "llama31-8b-beyond",
    "llama31-8b-beyond-data",
    "llama31-8b-beyond-siglip2",
    "llama31-8b-beyond-no-textvqa",
    "llama31-8b-qlora-24gb",
    "llava16-lora-24gb",
    "llama32-1b",
    "llama32-3b",
    "llama31-8b-card",
    "llama31-8b-card-commands",
)


def load_recipe(name_or_path: str, *, output: Path | None = None, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name or a YAML file by path; `{output}` in it stands for the run's folder.

    Args:
        overrides: `stages.NAME.key=value` and the like; values are YAML.

    Raises:
        UserError: naming file, key and fix.
    """
    try:
        content, where = _content(name_or_path, overrides)
        if output is not None:
            content = _substitute(content, "{output}", str(output))
        _refuse_empty_names(content, where)
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _explain(error, where) from None
    except RecursionError:
        what = "a value is nested too deeply, or an anchor contains itself"
        raise UserError(what, where=name_or_path, fix="write the value out") from None


def _refuse_empty_names(content: dict[str, Any], where: str) -> None:
    """Check that no key names the working directory, which an empty path is."""
    for key, value in flat(content).items():
        if value == "" and key.rpartition(".")[2] in _NAMES:
            raise UserError("is empty", where=f"{where}: {key}", fix="name one, or remove the key")


def changed_recipe(name_or_path: str, overrides: typing.Sequence[str]) -> str:
    """YAML of a recipe with overrides, as `load_recipe` takes them; `{output}` stays, comments don't."""
    return yaml.safe_dump(_content(name_or_path, overrides)[0], sort_keys=False, allow_unicode=True, width=100)


def _content(name_or_path: str, overrides: typing.Sequence[str]) -> tuple[dict[str, Any], str]:
    """A recipe as it is written, with overrides, and the name to call it by in messages."""
    text, where = read_recipe_text(name_or_path)
    try:
        content = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        what = (error.problem if isinstance(error, yaml.MarkedYAMLError) else None) or str(error)
        raise UserError(f"not valid YAML: {what}", where=f"{where}{place}", fix="correct the syntax there") from None
    if not isinstance(content, dict):
        raise UserError("a recipe is a mapping with name, model and stages", where=where, fix="see a shipped recipe")
    for override in overrides:
        _apply_override(content, override)
    return content, where


def read_recipe_text(name_or_path: str) -> tuple[str, str]:
    """Text of a recipe and the name to call it by in messages."""
    if name_or_path in SHIPPED:
        file = importlib.resources.files("llava_llama31.trainer.recipes") / f"{name_or_path}.yaml"
        return file.read_text(encoding="utf-8"), f"{name_or_path}.yaml"
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, SHIPPED, n=1)
        hint = f"did you mean {near[0]}?" if near else f"name a YAML file, or one of {', '.join(SHIPPED)}"
        what = "is a folder" if path.is_dir() else "there is no such recipe"
        raise UserError(what, where=name_or_path, fix=hint)
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path), fix="give a readable UTF-8 file") from None


def _apply_override(content: dict, override: str) -> None:
    path, separator, value = override.partition("=")
    *parents, last = path.split(".")
    keys = [*parents, FORMER_KEYS.get(last, last)]
    if not separator or not all(keys):
        raise UserError(f"{override!r} is not KEY=VALUE", where="--set", fix="--set stages.NAME.key=value")
    target = content
    for depth, key in enumerate(keys[:-1]):
        if depth == 1 and keys[0] == "stages" and key not in target:
            raise UserError(
                f"there is no stage {key!r}", where=f"--set {path}", fix=_nearest(key, list(target)) or "name a stage"
            )
        target = _list_item(target, key, path) if isinstance(target, list) else target.setdefault(key, {})
        if not isinstance(target, dict | list):
            raise UserError(f"{key!r} holds a single value", where=f"--set {path}", fix="set it as a whole")
    try:
        parsed = parse_yaml(value)
    except yaml.YAMLError as error:
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
        what = f"{ascii(value)[:80]} is not YAML{f': {problem}' if problem else ''}"
        raise UserError(what, where=f"--set {path}", fix="quote it, or close its brackets") from None
    for former, present in FORMER_KEYS.items():
        if present == keys[-1] and isinstance(target, dict):
            target.pop(former, None)  # the override counts, whatever the file calls it
    if isinstance(target, list):
        _list_item(target, keys[-1], path)
        target[int(keys[-1])] = parsed
    else:
        target[keys[-1]] = parsed


def _list_item(target: list, key: str, path: str) -> Any:
    if not key.isdigit() or int(key) >= len(target):
        raise UserError(
            f"{key!r} is not a position in a list of {len(target)}", where=f"--set {path}", fix="count from 0"
        )
    return target[int(key)]


def _substitute(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _substitute(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, old, new) for item in value]
    return value.replace(old, new) if isinstance(value, str) else value


def _explain(error: ValidationError, where: str) -> UserError:
    """First fault of a recipe as one line: file, key, what, nearest right key."""
    errors = error.errors(include_url=False)
    # of the faults of a union's members, that of a number says most
    first = next((one for one in errors if one["type"] == "finite_number"), errors[0])
    location = _location(first["loc"])
    key = ".".join(str(part) for part in location)
    others = len({tuple(_location(one["loc"])) for one in errors}) - 1
    if first["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        return UserError(
            "unknown key" + _and_others(others), where=f"{where}: {key}", fix=_nearest(str(location[-1]), known)
        )
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return UserError("this key is missing" + _and_others(others), where=f"{where}: {key}", fix="add it")
    if first["type"] == "value_error":
        return UserError(message + _and_others(others), where=f"{where}: {key}" if key else where)
    got = f", not {first['input']!r}"
    fix = "give a finite number" if first["type"] == "finite_number" else "give a value of that type"
    if first["type"] == "literal_error":
        fix = _nearest(str(first["input"]), re.findall(r"'([^']*)'", first["ctx"]["expected"])) or "give one of these"
    return UserError(message + got + _and_others(others), where=f"{where}: {key}", fix=fix)


def _location(parts: tuple[str | int, ...]) -> list[str | int]:
    """Where a fault is, without pydantic's names for the members of a union."""
    return [part for part in parts if not re.fullmatch(r"bool|constrained-\w+|\w+\[.*", str(part))]


def _and_others(count: int) -> str:
    return f" (and {count} more faults)" if count else ""


def _fields_at(location: list) -> list[str]:
    """Fields of the object at a location of a recipe, for the nearest right key."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue  # the name of a stage: its mapping was stepped into already
        field = model.model_fields.get(part)
        if field is None:
            continue
        model = _object_type(field.annotation)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _object_type(annotation: Any) -> Any:
    """The first object among the types that an annotation is made of, or the annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in typing.get_args(annotation):
        found = _object_type(part)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return annotation


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else (f"one of {', '.join(known)}" if known else "")
