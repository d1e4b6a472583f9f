"""Functions stay short and take few parameters, and LlavaTrainer stays a thin layer of hooks."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
MAX_LINES, MAX_PARAMETERS = 60, 8
# those of Transformers, which its own code passes
TRANSFORMERS = {
    "LlavaTrainer": {"model", "args", "callbacks"},
    "LlavaLlama31Model": {"input_ids", "pixel_values", "image_sizes", "attention_mask", "position_ids"}
    | {"past_key_values", "inputs_embeds", "vision_feature_layer", "vision_feature_select_strategy", "use_cache"}
    | {"mm_encoder_outputs", "cache"},
}
TRANSFORMERS["LlavaLlama31ForConditionalGeneration"] = TRANSFORMERS["LlavaLlama31Model"] | {
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
}
FILES = sorted(
    file for room in ("modeling_llava_llama31", "processing", "trainer") for file in (ROOT / room).rglob("*.py")
)


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function with the name of the class that it is in."""
    owners = {child: node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
    return ((owners.get(node, ""), node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def over_limits(source: str) -> list[str]:
    found = []
    for owner, function in functions(ast.parse(source)):
        given = function.args
        names = {argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
        own = names - {"self", "cls"} - TRANSFORMERS.get(owner, set())
        num_lines = function.end_lineno - function.lineno + 1
        if len(own) > MAX_PARAMETERS or num_lines > MAX_LINES:
            found.append(f"{owner}.{function.name}: {len(own)} parameters, {num_lines} lines")
    return found


@pytest.mark.slow
def test_every_function_is_within_the_limits():
    assert len(FILES) > 150
    assert {str(file): found for file in FILES if (found := over_limits(file.read_text()))} == {}


def test_the_trainer_is_within_its_limit():
    tree = ast.parse((ROOT / "trainer/training/llava_trainer.py").read_text())
    [trainer] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "LlavaTrainer"]
    assert trainer.end_lineno - trainer.lineno + 1 <= 250


@pytest.mark.parametrize(
    "source",
    [
        "def f(" + ", ".join(f"x{i}" for i in range(MAX_PARAMETERS + 1)) + "): ...",
        "class A:\n    def f(self, *, " + ", ".join(f"x{i}=0" for i in range(MAX_PARAMETERS + 1)) + "): ...",
        "def f():\n" + "    x = 1\n" * MAX_LINES,
    ],
)
def test_planted_excess_is_found(source):
    assert len(over_limits(source)) == 1
