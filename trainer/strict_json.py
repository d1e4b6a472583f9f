"""JSON in which a key that is given twice is an error: none of its values is the right one."""

import json
from typing import Any


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One JSON object, for a decoder's `object_pairs_hook`.

    Raises:
        ValueError: naming a key that is given twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {ascii(key[:80])} is given twice")
            seen.add(key)
    return found


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or gives a key twice.
    """
    return json.loads(text, object_pairs_hook=unique_keys)
