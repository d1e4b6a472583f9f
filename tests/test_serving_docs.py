"""docs/serving.md: each command is one that `make serve-check` runs, or that a parser knows; its table is computed."""

import ast
import re
import shlex
from pathlib import Path

from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/serving.md").read_text()
GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIDE = 24  # patches of a tile
# bytes of a position of Llama 3.1 8B: layers, key and value heads, head size, keys and values, bfloat16
POSITION = 32 * 8 * 128 * 2 * 2
# by another document's test, or not a server's
ELSEWHERE = ("llava-llama31", "curl", "python")


def commands() -> list[list[str]]:
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)).replace("\\\n", " ")
    # a request's body spans lines
    blocks = re.sub(r"^curl .*?'$", "curl", blocks, flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for line in blocks.splitlines() if line.strip()]


def checked_words() -> set[str]:
    """Every word that the script may pass to a server."""
    tree = ast.parse((ROOT / "benchmarks/serve_check.py").read_text())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_servers_command_is_one_that_the_script_runs():
    words, programs = checked_words(), set()
    for command in commands():
        programs.add(command[0])
        if command[0] in ELSEWHERE:
            continue
        assert command[:2] in (["vllm", "serve"], ["transformers", "serve"]), command
        unknown = {word for word in command if word.startswith("--")} - words - {"--revision"}
        assert not unknown, f"benchmarks/serve_check.py passes no {', '.join(unknown)}"
    assert programs == {"vllm", "transformers", "curl", "python", "llava-llama31"}


def test_scripts_that_are_named_exist():
    for command in commands():
        if command[0] == "python":
            assert (ROOT / command[1]).is_file()
    for link in re.findall(r"\]\((\.\./[^)#]+|[\w/]+\.md)", TEXT):
        assert (ROOT / "docs" / link).is_file(), link


def test_the_memory_of_each_grid_is_what_the_model_takes():
    rows = re.findall(r"\| (\d+) x (\d+) \| (\d+) \| ([\d,]+) \| (\d+) MiB \|", TEXT)
    assert sorted([int(height), int(width)] for height, width, *_ in rows) == sorted(GRIDS)
    for height, width, tiles, positions, memory in rows:
        size = (int(height), int(width))
        assert int(tiles) == image_size_to_num_patches(size, GRIDS, 336)
        patches = SIDE * SIDE + (size[0] // 336 * SIDE) * (size[1] // 336 * SIDE + 1)  # a newline ends each row
        assert int(positions.replace(",", "")) == patches
        assert int(memory) == round(patches * POSITION / 2**20)
