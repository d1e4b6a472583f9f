"""The JSON schema of recipes, for editors: made from the models in schema.py and the sentences below their fields."""

import ast
import json
from pathlib import Path
from typing import Any

from llava_llama31.trainer.recipes import schema


SCHEMA_FILE = Path(__file__).with_name("editors") / "recipe.schema.json"
NAMED = f"$schema={SCHEMA_FILE.parent.name}/{SCHEMA_FILE.name}\n"  # in shipped recipes
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe; what keys mean to each other is checked when a recipe is read."""
    content = schema.Recipe.model_json_schema()
    sentences = _sentences(Path(schema.__file__).read_text(encoding="utf-8"))
    for name, model in [("Recipe", content), *content["$defs"].items()]:
        for key, described in model["properties"].items():
            described.pop("title", None)
            if key in sentences.get(name, {}):
                described["description"] = sentences[name][key]
    for source in ("Model", "DataSource"):
        for former, key in schema.FORMER_KEYS.items():
            properties = content["$defs"][source]["properties"]
            if key in properties:
                properties[former] = {**properties[key], "deprecated": True}
    return {"$schema": DIALECT, "title": "A recipe of llava-llama31", **content}


def schema_text() -> str:
    """The schema as the file that recipes name on their first line."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def _sentences(source: str) -> dict[str, dict[str, str]]:
    """The string below a field, by class and field."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                found.setdefault(node.name, {})[field.target.id] = " ".join(text.split())
    return found
