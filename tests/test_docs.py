"""Every fenced block of the pages is read by what it is for; links lead somewhere; tables of keys are the schema's."""

import ast
import copy
import csv
import importlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from llava_llama31.trainer.cli import command_parser
from llava_llama31.trainer.data.registry.registry import with_own
from llava_llama31.trainer.evaluation.task_files import load_task
from llava_llama31.trainer.recipes.json_schema import key_tables
from llava_llama31.trainer.recipes.schema import DataSource, Lora, Model, Recipe, Stage
from llava_llama31.trainer.strict_yaml import parse_yaml


ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found, start, language, lines = [], 0, "", []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.lstrip().startswith("```"):
            if start:
                found.append(Block(page, start, language, "\n".join(lines) + "\n"))
                start = 0
            else:
                start, language, lines = number, line.strip()[3:].split(" ")[0], []
        elif start:
            lines.append(line)
    assert not start, f"{page}:{start}: the block has no end"
    return found


BLOCKS = [pytest.param(b, id=f"{b.page.name}:{b.line}") for page in PAGES for b in blocks(page)]


def check_bash(block: Block) -> None:
    for words in commands(block.text):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif words[0] in ("python", ".venv/bin/python"):
            assert words[1].startswith("-") or (ROOT / words[1]).is_file(), words
        else:
            assert words[0].removeprefix(".venv/bin/") in PROGRAMS, f"{block.page}: what is {words[0]}?"


def commands(text: str) -> list[list[str]]:
    """Words of the commands; one may go on over lines, by a backslash or in quotes."""
    found, rest = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(rest + line, comments=True)
        except ValueError:  # a quote is open
            rest += f"{line}\n"
            continue
        rest = ""
        words = words[next((i for i, word in enumerate(words) if not re.match(r"\w+=", word)), len(words)) :]
        found += [words] if words else []
    assert not rest, f"a quote has no end: {rest}"
    return found


# other people's, and what test_launch_lines.py reads
PROGRAMS = {"llava-llama31", "accelerate", "torchrun", "pip", "npx", "hf", "vllm", "curl", "transformers", "ssh"}
PROGRAMS |= {"sbatch", "export", "git", "score", "tensorboard", "pytest"}


def check_text(block: Block) -> None:
    """A summary of a command names its options only."""
    if not block.text.startswith("llava-llama31 ") or "[--" not in block.text:
        return
    (group,) = (action for action in command_parser()._actions if isinstance(action.choices, dict))
    known = set(group.choices[block.text.split()[1]]._option_string_actions)
    assert set(re.findall(r"--[a-z-]+", re.sub(r"#.*", "", block.text))) <= known


def check_python(block: Block) -> None:
    tree = compile(block.text, f"{block.page}:{block.line}", "exec", ast.PyCF_ONLY_AST)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for alias in node.names:
                if alias.name not in dir(module):
                    importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


def check_json(block: Block) -> None:
    try:
        json.loads(block.text)
    except ValueError:
        for line in block.text.splitlines():
            json.loads(line)


def check_csv(block: Block) -> None:
    rows = list(csv.reader(block.text.splitlines()))
    assert len({len(row) for row in rows}) == 1


@pytest.fixture
def check_yaml(pristine_recipe, tmp_path):
    """A whole recipe, parts of one at any depth, or a task."""

    def check(block: Block) -> None:
        content = parse_yaml(block.text)
        if block.page.name == "fetch.md":  # data sets of one's own
            (tmp_path / "datasets.yaml").write_text(block.text)
            assert content.keys() <= with_own(tmp_path / "datasets.yaml").keys()
            return
        if "layouts" in content or "protocols" in content:
            (tmp_path / "task.yaml").write_text(block.text)
            load_task(tmp_path / "task.yaml")
            return
        recipe = copy.deepcopy(pristine_recipe)
        if set(content) <= set(Stage.model_fields):
            content = {"stages": {"instruct": content}}
        assert set(content) <= set(Recipe.model_fields), f"neither a recipe nor a stage nor a task: {list(content)}"
        Recipe.model_validate(merged(recipe, content))

    return check


def merged(base: dict, change: dict) -> dict:
    """Mappings are joined; a stage whose data or rates are given has them as given, and one that is new is whole."""
    found = dict(base)
    for key, value in change.items():
        joins = isinstance(value, dict) and isinstance(base.get(key), dict) and key not in ("learning_rate", "model")
        found[key] = merged(base[key], value) if joins else value
    if "max_steps" in change:
        found.pop("epochs", None)
    if "trainable" in change and "learning_rate" not in change:
        found["learning_rate"] = 1e-3
    if change.get("eval_steps"):
        found["save_steps"] = change.get("save_steps", change["eval_steps"])
    return found


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_what_it_says(block, check_yaml):
    checks = {
        "bash": check_bash,
        "python": check_python,
        "yaml": check_yaml,
        "json": check_json,
        "csv": check_csv,
        "mermaid": lambda block: None,
        "text": check_text,
    }
    assert block.language in checks, f"{block.page}:{block.line}: name the block's language"
    checks[block.language](block)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file), f"{page}: {target} has no such heading"


def test_every_page_is_in_the_site():
    class Loader(yaml.SafeLoader):
        """Reads names of Python functions as text."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=Loader)
    listed = re.findall(r"[\w/-]+\.md", json.dumps(site["nav"]))
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))


def test_names_of_the_python_reference_exist():
    names = re.findall(r"^::: (.+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    places = [name.rpartition(".") for name in names]
    assert places and all(vars(importlib.import_module(module))[name] for module, _, name in places)


def test_others_options_lead_to_keys_and_options_that_exist():
    keys = {name for model in (Recipe, Stage, DataSource, Model, Lora) for name in model.model_fields}
    (group,) = (action for action in command_parser()._actions if isinstance(action.choices, dict))
    keys |= {option for command in group.choices.values() for option in command._option_string_actions}
    keys |= set(group.choices)
    rows = [
        line.split("|")[2] for line in (ROOT / "docs/coming-from.md").read_text().splitlines() if line[:3] == "| `"
    ]
    for ours in [ours for row in rows for ours in re.findall(r"`([^`]*)`", row)]:
        names = re.split(r"[ :.]+", ours)
        assert names[0] in keys | {"nf4", "spatial_unpad"}, ours
        assert len(names) == 1 or "." not in ours or names[1] in keys, ours


def test_the_tables_of_keys_are_the_schemas():
    page = (ROOT / "docs/recipes.md").read_text()
    assert key_tables() in page, "make keys"
    assert page.count("## Keys of") == key_tables().count("## Keys of")


@pytest.mark.parametrize("text", ["a:\n```bash\nmake nosuch\n```\n", "```bash\nrm x\n```\n", "```yaml\nsed: 1\n```\n"])
def test_a_wrong_block_is_found(text, tmp_path, check_yaml):
    (tmp_path / "page.md").write_text(text)
    (block,) = blocks(tmp_path / "page.md")
    with pytest.raises(AssertionError):
        (check_yaml if block.language == "yaml" else check_bash)(block)
