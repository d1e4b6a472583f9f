"""The JSON schema of recipes, for editors: made from the models in schema.py and the sentences below their fields."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

from llava_llama31.trainer.recipes import schema


SCHEMA_FILE = Path(__file__).with_name("editors") / "recipe.schema.json"
NAMED = f"$schema={SCHEMA_FILE.parent.name}/{SCHEMA_FILE.name}\n"  # in shipped recipes
KEYS_BEGIN, KEYS_END = "<!-- made by `make keys`; tests/test_docs.py compares -->\n", "<!-- end of the keys -->"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe; rules that involve several keys are checked when a recipe is read."""
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


def key_tables() -> str:
    """All keys of a recipe as Markdown, for docs/recipes.md."""
    content = recipe_schema()
    models = {"Recipe": content, **content["$defs"]}
    places = {
        "Recipe": "the top level",
        "Model": "`model`",
        "Stage": "`stages.NAME`",
        "DataSource": "`stages.NAME.data`, a list",
        "Where": "`stages.NAME.data.NUMBER.where.COLUMN`",
        "Lora": "`stages.NAME.lora`",
        "LoraGroup": "`stages.NAME.lora.vision_tower` and `stages.NAME.lora.multi_modal_projector`",
        "Contamination": "`stages.NAME.contamination`",
        "Evaluation": "`evaluation`",
        "TextQuestions": "`text_questions`",
        "Publish": "`publish`",
    }
    assert models.keys() == places.keys(), "a model of schema.py is in no table"
    tables = []
    for name, place in places.items():
        rows = [f"## Keys of {place}\n", "| key | value | default | meaning |", "|---|---|---|---|"]
        for key, described in models[name]["properties"].items():
            if described.get("deprecated"):
                continue
            default = "required" if key in models[name].get("required", ()) else _default(described.get("default"))
            cells = (f"`{key}`", _values(described), default, described["description"])
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        tables.append("\n".join(rows) + "\n")
    return "\n".join(tables)


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if value in ("", [], {}):
        return "empty"
    return f"`{json.dumps(value) if not isinstance(value, str) else value}`"


def _values(described: dict[str, Any]) -> str:
    """What a value may be, in words."""
    for union in ("anyOf", "oneOf"):
        if union in described:
            return " or ".join(_values(one) for one in described[union] if one.get("type") != "null")
    if "enum" in described:
        return ", ".join(f"`{value}`" for value in described["enum"])
    if "const" in described:
        return f"`{described['const']}`"
    if "$ref" in described:
        return "mapping"
    kind = described["type"]
    if kind == "array":
        return f"list of {_values(described['items'])}"
    if kind == "object":
        return "mapping"
    words = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text"}[kind]
    limits = {"exclusiveMinimum": "above", "minimum": "from", "exclusiveMaximum": "below", "maximum": "up to"}
    return " ".join([words, *(f"{word} {described[key]:g}" for key, word in limits.items() if key in described)])


def _write(schema_file: Path, page: Path) -> None:
    """Write the schema, and the tables of keys into the page between their marks."""
    schema_file.write_text(schema_text(), encoding="utf-8")
    head, mark, rest = page.read_text(encoding="utf-8").partition(KEYS_BEGIN)
    _, end, tail = rest.partition(KEYS_END)
    assert mark and end, f"{page} lacks the marks of its tables"
    page.write_text(head + mark + key_tables() + end + tail, encoding="utf-8")


if __name__ == "__main__":
    _write(*map(Path, sys.argv[1:]))
