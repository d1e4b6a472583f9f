"""The recipes' JSON schema, judged by an independent validator: never stricter than reading a recipe."""

import copy
import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.json_schema import NAMED, SCHEMA_FILE, recipe_schema, schema_text
from llava_llama31.trainer.recipes.loading import SHIPPED, load_recipe
from llava_llama31.trainer.recipes.schema import Recipe


VALIDATOR = Draft202012Validator(recipe_schema())


def meaning(text: str) -> Any:
    """A schema as all versions of pydantic write it: older ones leave out what holds anyway, and write 0 as 0.0."""

    def stated(entries: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entries.items() if (key, value) != ("additionalProperties", True)}

    return json.loads(text, object_hook=stated)


def test_the_committed_file_is_the_schema(capsys):
    Draft202012Validator.check_schema(recipe_schema())
    fix = "llava-llama31 recipes --schema > trainer/recipes/editors/recipe.schema.json"
    assert meaning(SCHEMA_FILE.read_text()) == meaning(schema_text()), fix
    assert main(["recipes", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_name_it_and_obey_it(name, capsys):
    file = SCHEMA_FILE.parents[1] / f"{name}.yaml"
    assert file.read_text().startswith(f"# yaml-language-server: {NAMED}")
    content = load_recipe(name).model_dump(mode="json", exclude_none=True)
    assert list(VALIDATOR.iter_errors(content)) == []
    assert main(["recipes", name]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"# yaml-language-server: $schema={SCHEMA_FILE}\n")  # a copy lies elsewhere
    assert yaml.safe_load(printed) == yaml.safe_load(file.read_text())


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"learning_rat": 1e-3}, "learning_rat"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"trainable": []}, "trainable"),
    ],
)
def test_it_finds_what_an_editor_should_underline(recipe_content, change, key):
    assert list(VALIDATOR.iter_errors(recipe_content)) == []
    recipe_content["stages"]["projector"] |= change
    (error,) = VALIDATOR.iter_errors(recipe_content)
    assert key in [*error.absolute_path, *error.message.split("'")]


def test_fields_have_their_sentences_and_former_names():
    stage, source = (recipe_schema()["$defs"][name]["properties"] for name in ("Stage", "DataSource"))
    assert stage["global_batch"]["description"].startswith("Samples of one optimizer step")
    assert source["licence"]["deprecated"] and source["licence"]["anyOf"] == source["license"]["anyOf"]


def paths(content, path=()):
    """Of every value in nested mappings and lists."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(-2, 2) | st.sampled_from(["float32", "error", "x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["name", "x"]), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.slow
@settings(max_examples=300)
@given(data=st.data())
def test_what_it_refuses_is_refused_when_read(pristine_recipe, tmp_path, data):
    content = copy.deepcopy(pristine_recipe)
    *way, key = data.draw(st.sampled_from(list(paths(content))[1:]))
    place = content
    for step in way:
        place = place[step]
    place[key] = data.draw(VALUES)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    if any(VALIDATOR.iter_errors(content)):
        with pytest.raises(UserError):
            load_recipe(str(path))


def test_every_key_of_a_recipe_is_in_it():
    for name, model in (("Recipe", Recipe), *((key, None) for key in recipe_schema()["$defs"])):
        properties = recipe_schema()["properties"] if model else recipe_schema()["$defs"][name]["properties"]
        assert all("title" not in described for described in properties.values())
        assert model is None or set(properties) == set(model.model_fields)
