"""The launch lines that the README, the docs and the Slurm script give, read by the programs that they start."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed import run as torchrun

from llava_llama31.trainer.cli import command_parser


ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples/slurm").glob("*"))]
PROGRAMS = ("accelerate launch", "torchrun", "llava-llama31")
SCRIPTS = {"examples/train.py": "train", "examples/evaluate.py": "evaluate"}


def lines(path: Path) -> list[list[str]]:
    """Commands of a text's bash blocks, or of a script, that start one of the programs; a backslash goes on."""
    text = path.read_text().replace("\\\n", " ")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    found = [re.sub(r"^(\w+=\S+ )+", "", line.strip(" #")) for line in text.splitlines()]
    return [
        shlex.split(line.partition(" > ")[0], comments=True)
        for line in found
        if line.startswith(tuple(f"{program} " for program in PROGRAMS))
    ]


LINES = [pytest.param(line, id=f"{path.name}: {' '.join(line)}") for path in TEXTS for line in lines(path)]


def check_ours(words: list[str]) -> None:
    command_parser().parse_args(words)


def check_script(script: str, arguments: list[str], *, python: bool) -> None:
    assert (ROOT / script).is_file() if python else script == "llava-llama31"
    check_ours([SCRIPTS[script], *arguments] if python else arguments)


def accelerate_arguments(words: list[str]):
    """As `accelerate launch` sees them, filled up from the file that they name."""
    options = launch.launch_command_parser().parse_args(words)
    if options.config_file is not None:
        options.config_file = str(ROOT / options.config_file)
        assert Path(options.config_file).is_file(), f"{options.config_file} is not shipped"
        load_config_from_file(options.config_file)
    return launch._validate_launch_command(options)[0]


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_understood(line, monkeypatch):
    monkeypatch.setattr(launch, "default_config_file", "/no/saved/default")
    if line[0] == "llava-llama31":
        check_ours(line[1:])
        return
    if line[0] == "accelerate":
        options = accelerate_arguments(line[2:])
    else:
        options = torchrun.parse_args(line[1:])
        torchrun.config_from_args(options)
    check_script(options.training_script, options.training_script_args, python=not options.no_python)


@pytest.mark.parametrize("name", ["README.md", "docs/multi_node.md"])
def test_there_is_a_line_for_one_gpu_for_eight_and_for_two_machines(name, monkeypatch):
    monkeypatch.setattr(launch, "default_config_file", "/no/saved/default")
    sizes = set()
    for line in lines(ROOT / name):
        if line[0] == "accelerate" and "examples/train.py" in line:
            options = accelerate_arguments(line[2:])
            assert options.multi_gpu or options.use_deepspeed or options.use_fsdp
            sizes.add((int(options.num_machines or 1), int(options.num_processes)))
        elif line[0] == "torchrun" and "examples/train.py" in line:
            config = torchrun.config_from_args(torchrun.parse_args(line[1:]))[0]
            assert config.min_nodes == config.max_nodes
            sizes.add((config.min_nodes, config.min_nodes * config.nproc_per_node))
        elif line[:2] == ["llava-llama31", "train"]:
            sizes.add((1, 1))
    assert {(1, 1), (1, 8), (2, 16)} <= sizes, sizes
