"""Recipes key by key: `stages.NAME.key`, positions of lists counted from 0."""

from collections.abc import Mapping, Sequence
from typing import Any


def flat(content: Any, key: str = "") -> dict[str, Any]:
    """Values of nested mappings and of lists of mappings, by key; other lists are values."""
    if isinstance(content, Mapping) and content:
        items = {str(name): value for name, value in content.items()}
    elif isinstance(content, list) and content and all(isinstance(item, Mapping) for item in content):
        items = {str(number): value for number, value in enumerate(content)}
    else:
        return {key: content}
    found: dict[str, Any] = {}
    for name, value in items.items():
        found |= flat(value, f"{key}.{name}" if key else name)
    return found


def differing(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Keys whose values are not the same in all recipes, with the values as text."""
    flattened = [flat(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for recipe in flattened for key in recipe)
    values = {key: [str(recipe.get(key, "not there")) for recipe in flattened] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}
