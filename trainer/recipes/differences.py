"""Recipes key by key: `stages.NAME.key`, positions of lists counted from 0."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


_ABSENT = object()


def _children(content: Any) -> dict[str, Any] | None:
    """What a mapping or a list of mappings holds, by name or position; None: it is a value."""
    if isinstance(content, Mapping) and content:
        return {str(name): value for name, value in content.items()}
    if isinstance(content, list) and content and all(isinstance(item, Mapping) for item in content):
        return {str(number): value for number, value in enumerate(content)}
    return None


def flat(content: Any, key: str = "") -> dict[str, Any]:
    """Values of nested mappings and of lists of mappings, by key; other lists are values."""
    items = _children(content)
    if items is None:
        return {key: content}
    found: dict[str, Any] = {}
    for name, value in items.items():
        found |= flat(value, f"{key}.{name}" if key else name)
    return found


def as_yaml(value: Any) -> str:
    """A value as a recipe spells it, on one line: null, true, [a, b]."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
        .removesuffix("...\n")
        .strip()
    )


def differing(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Keys whose values are not the same in all recipes, with the values as YAML.

    A value that is a mapping in one recipe and none in another, such as a learning rate, is one key.
    """
    return _differing(list(recipes), "")


def _differing(values: list[Any], key: str) -> dict[str, list[str]]:
    branches: list[dict[str, Any] | None] = [{} if value is _ABSENT else _children(value) for value in values]
    names = dict.fromkeys(name for branch in branches if branch for name in branch)
    if None in branches or not names:
        texts = ["not there" if value is _ABSENT else as_yaml(value) for value in values]
        return {key: texts} if len(set(texts)) > 1 else {}
    found: dict[str, list[str]] = {}
    for name in names:
        below = [branch.get(name, _ABSENT) for branch in branches if branch is not None]
        found |= _differing(below, f"{key}.{name}" if key else name)
    return found
