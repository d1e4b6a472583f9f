"""Recipes key by key: `stages.NAME.key`, positions of lists counted from 0."""

from collections.abc import Mapping
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
