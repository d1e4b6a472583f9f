"""Kills, signals, faults and full disks, at many moments of real runs.

A sample by default. TORTURE=1 runs the numbers of docs/results/torture.md and prints them: `make torture`.
"""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llava_llama31.trainer.checkpoint import atomic_folders


FULL = bool(os.environ.get("TORTURE"))
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(7200 if FULL else 300)


def cases(number: int, sample: int) -> int:
    return number if FULL else sample


@pytest.fixture
def start(forks):
    """Train in forks; how it ended, with the log."""

    def run(recipe: Path, folder: Path, *, processes: int = 1, **case) -> dict:
        arguments = ("train", recipe, "--output", folder)
        job = forks.start(*arguments, processes=processes, folder=str(folder), deadline=300.0, **case)
        result = job.wait(310)
        operations = Path(f"{job.log}.operations").read_text()
        return {**result, "log": job.output(), "operations": int(operations or 0)}

    return run


@pytest.fixture
def recipe(recipe_content, tmp_path):
    """Write a variant of the two-stage recipe that saves every step."""
    del recipe_content["evaluation"]
    for stage in recipe_content["stages"].values():
        stage |= {"save_steps": 1, "logging_steps": 1}

    def write(name: str = "recipe", **instruct) -> Path:
        content = json.loads(json.dumps(recipe_content))
        content["stages"]["instruct"] |= instruct
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path / f"{name}.yaml"

    return write


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(run: Path) -> dict[str, str]:
    """Hashes of all weights and optimizer states that a finished run leaves."""
    files = [run / "export/model.safetensors"]
    for stage in sorted((run / "stages").iterdir()):
        files += [stage / "final/model.safetensors", step_folders(stage)[-1][1] / "optimizer.safetensors"]
    return {str(file.relative_to(run)): digest(file) for file in files}


def step_folders(stage: Path) -> list[tuple[int, Path]]:
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in stage.glob("checkpoint-*"))
    return sorted((int(match[1]), stage / match[0]) for match in found if match)


def num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def is_whole(folder: Path) -> bool:
    """By the manifest, without the code under test."""
    try:
        entries = json.loads((folder / "manifest.json").read_text())["files"]
        return all(digest(folder / entry["name"]) == entry["sha256"] for entry in entries)
    except (OSError, ValueError):
        return False


def standing(run: Path) -> tuple[str, int]:
    """Stage and step from which a run has to resume."""
    for stage in sorted((run / "stages").iterdir()) if (run / "stages").is_dir() else []:
        if not is_whole(stage / "final"):
            whole = [step for step, folder in step_folders(stage) if is_whole(folder)]
            return stage.name, max(whole, default=0)
    return "", 0


def assert_resumes(run: Path, log: str, before: tuple[str, int]) -> None:
    stage, step = before
    if step:
        assert f"{stage}/checkpoint-{step}, step {step} of" in log, (before, log[-3000:])
    else:
        first = re.search(r"resuming from \S*/(\S+)/checkpoint-", log)
        assert first is None or first[1] != stage, (before, log[-3000:])


def report(title: str, text: str) -> None:
    if FULL:
        sys.__stdout__.write(f"\n{title}: {text}\n")
        sys.__stdout__.flush()


# --- kill -9


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.torture)], ids=["full", "lora"])
def test_a_killed_run_loses_nothing_but_the_steps_since_its_last_checkpoint(start, recipe, tmp_path, lora):
    options = {"lora": {"r": 4, "alpha": 8.0, "dropout": 0.1}} if lora else {}
    path = recipe(**options)
    whole = start(path, tmp_path / "whole")
    assert whole["codes"] == [0], whole["log"]
    expected, last = outcome(tmp_path / "whole"), whole["operations"]
    dice = random.Random(7)
    num_named, num_random = (90 if not lora else 70, 20) if FULL else (2, 1)
    # the sample's are neither the first nor the last operation
    spread = [i / (num_named - 1) for i in range(num_named)] if FULL else [1 / 3, 2 / 3]
    points = [{"kill_at": 1 + round(share * (last - 1))} for share in spread]
    points += [{"after": dice.uniform(0, whole["seconds"])} for _ in range(num_random)]
    num_killed, steps = 0, Counter()
    for number, point in enumerate(points):
        run = tmp_path / "killed"
        killed = start(path, run, **point)
        assert killed["codes"][0] in (-9, 0), killed["log"]
        num_killed += killed["codes"] == [-9]
        before = standing(run)
        again = start(path, run)
        assert again["codes"] == [0], (point, again["log"])
        assert_resumes(run, again["log"], before)
        assert outcome(run) == expected, point
        leftovers = [path for path in run.rglob("*") if path.name.startswith((".tmp", ".staging"))]
        assert not leftovers, (point, leftovers)
        steps[before[0]] += 1
        shutil.rmtree(run)
        if number % 20 == 19:
            report("kill -9", f"{number + 1} of {len(points)}")
    assert num_killed >= len(points) * 0.8
    where = ", ".join(f"{count} in {stage or 'the end'}" for stage, count in sorted(steps.items()))
    report(
        "kill -9", f"{num_killed} kills over {last} file operations and at random ({where}): all resumed, same bits"
    )


# --- resume from every step


RESUMES = {
    "dropout": {"lora": {"r": 4, "alpha": 8.0, "dropout": 0.1}, "packing": False},
    "lora and packing": {"lora": {"r": 4, "alpha": 8.0}},
    "packing, accumulation 1": {"micro_batch": 8},
    "packing, accumulation 4": {"micro_batch": 2},
    "padded, by length": {"packing": False, "group_by_length": True},
    "shared prefixes, 2 workers": {"share_prefix": 2, "dataloader_workers": 2},
    "all groups, bfloat16": {
        "trainable": ["vision_tower", "multi_modal_projector", "language_model"],
        "learning_rate": 1e-3,
        "precision": "bfloat16",
        "activation_checkpointing": True,
    },
}


@pytest.mark.torture
@pytest.mark.parametrize("name", RESUMES)
def test_resume_from_every_step_ends_with_the_same_bits(start, recipe, tmp_path, name, request):
    """20 steps and more over the epochs of the second stage; the first stage's too, with the hand-over behind them."""
    if RESUMES[name].get("precision") == "bfloat16":
        request.getfixturevalue("fast_bfloat16")
    path = recipe(epochs=4, save_total_limit=100, **RESUMES[name])
    whole = tmp_path / "whole"
    result = start(path, whole)
    assert result["codes"] == [0], result["log"]
    expected = outcome(whole)
    points = [(stage, step) for stage in sorted((whole / "stages").iterdir()) for step, _ in step_folders(stage)]
    assert len(points) >= 25
    for stage, step in points:
        run = tmp_path / "resumed"
        shutil.copytree(whole, run, copy_function=os.link)
        (run / "summary.json").unlink()
        shutil.rmtree(run / "export")
        for later in sorted((run / "stages").iterdir()):
            if later.name >= stage.name:
                shutil.rmtree(later / "final")
            for number, folder in step_folders(later):
                if later.name > stage.name or (later.name == stage.name and number > step):
                    shutil.rmtree(folder)
        again = start(path, run)
        assert again["codes"] == [0], again["log"]
        assert_resumes(run, again["log"], (stage.name, step))
        assert outcome(run) == expected, (stage.name, step)
        shutil.rmtree(run)
    report("resume", f"{name}: from {len(points)} checkpoints, the same bits each time")


# --- damage


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "truncated": lambda file, former: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one byte short": lambda file, former: file.write_bytes(file.read_bytes()[:-1]),
    "one byte long": lambda file, former: file.write_bytes(file.read_bytes() + b"\0"),
    "emptied": lambda file, former: file.write_bytes(b""),
    "first byte": lambda file, former: flip(file, 0),
    "a middle byte": lambda file, former: flip(file, file.stat().st_size // 2),
    "zeros": lambda file, former: file.write_bytes(bytes(file.stat().st_size)),
    "deleted": lambda file, former: file.unlink(),
    "another step's": lambda file, former: file.write_bytes(former.read_bytes()),
}


def test_every_damage_to_every_file_is_found_and_the_checkpoint_before_is_taken(start, recipe, tmp_path):
    path = recipe(save_total_limit=100)
    assert start(path, tmp_path / "run")["codes"] == [0]
    stage = tmp_path / "run/stages/2-instruct"
    folders = [folder for _, folder in step_folders(stage)]
    for folder in folders[:-2]:
        shutil.rmtree(folder)
    former, newest = folders[-2:]
    files = sorted(file.relative_to(newest) for file in newest.rglob("*") if file.is_file())
    num_found = num_cases = 0
    for name in files:
        for kind, damage in DAMAGE.items():
            content, mode = (newest / name).read_bytes(), (newest / name).stat().st_mode
            # no damage: the other step's is the same, or the line's end of the manifest is gone
            if kind == "another step's" and content == (former / name).read_bytes():
                continue
            if kind == "one byte short" and str(name) == "manifest.json":
                continue
            assert content
            (newest / name).unlink()  # links of other runs stay as they are
            (newest / name).write_bytes(content)
            damage(newest / name, former / name)
            found, skipped = atomic_folders.newest_whole(stage)
            num_cases += 1
            num_found += found == former and skipped[0][0] == newest
            assert found == former and skipped[0][0] == newest, (name, kind)
            (newest / name).unlink(missing_ok=True)
            (newest / name).write_bytes(content)
            (newest / name).chmod(mode)
    assert atomic_folders.newest_whole(stage) == (newest, [])
    report("damage", f"{num_found} of {num_cases} found ({len(files)} files, {len(DAMAGE)} kinds)")


# --- signals


@pytest.mark.torture
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_at_any_moment_ends_with_75_and_the_run_resumes(start, recipe, tmp_path, processes):
    path = recipe()
    whole = start(path, tmp_path / "whole", processes=processes)
    assert set(whole["codes"]) == {0}, whole["log"]
    expected, dice = outcome(tmp_path / "whole"), random.Random(11 * processes)
    # by a second run, which imports nothing any more
    seconds = start(path, tmp_path / "warm", processes=processes)["seconds"]
    codes: Counter[int] = Counter()
    for number in range(50):
        run = tmp_path / "stopped"
        moment = dice.uniform(0.05, seconds)
        stopped = start(path, run, processes=processes, after=moment, signal=15)
        # nobody ends with 0 before its work is done: the summary for the first process, the last stage for the others
        done = [(run / "summary.json").is_file(), is_whole(run / "stages/2-instruct/final")]
        for rank, code in enumerate(stopped["codes"]):
            allowed = {75} if rank in stopped["signalled"] else set()
            allowed |= {-15} if moment < 0.5 else set()  # a process that has no handlers yet
            # a process whose work is done may meet the signal as it ends, without handlers
            assert code in allowed | ({0, -15} if done[rank] else set()), (moment, done, stopped)
        codes.update(stopped["codes"])
        before = standing(run)
        again = start(path, run, processes=processes)
        assert set(again["codes"]) == {0}, again["log"]
        assert_resumes(run, again["log"], before)
        assert outcome(run) == expected, moment
        shutil.rmtree(run)
        if number % 10 == 9:
            report("SIGTERM", f"{number + 1} moments")
    told = ", ".join(f"{count} times {code}" for code, count in codes.most_common())
    report("SIGTERM", f"50 moments, {processes} processes: exit codes {told}; same bits each time")


# --- health


def test_a_value_that_is_not_finite_on_one_of_two_ranks_stops_both_in_that_step(
    start, recipe, recipe_content, tmp_path
):
    if not FULL:  # has too few steps for a spike, and saves every one
        del recipe_content["stages"]["projector"]
    dice, told = random.Random(5), Counter()
    kinds = ["nan", "inf", "1e9"]
    for kind in (dice.choice(kinds) for _ in range(100)) if FULL else kinds:
        rank, step = dice.randrange(2), dice.randrange(70, 80)
        spike = kind == "1e9"
        options = {"epochs": 16, "on_spike": "stop"} if spike else {"epochs": 2}
        step = step if spike else dice.randrange(1, 9)
        path = recipe(save_steps=100, **options)
        run = tmp_path / "run"
        # the first stage has too few steps for a spike, and is not what is looked at
        result = start(path, run, processes=2, fault=[kind, rank, step])
        where = re.search(r"stages\.(\w+), step (\d+): (.*)", result["log"])
        assert result["codes"] == [4, 4] and where and int(where[2]) == step, (kind, rank, step, result["log"][-3000:])
        assert result["log"].count("error: ") == 1
        told[("spike" if spike else kind)] += 1
        shutil.rmtree(run)
    report("faults", ", ".join(f"{count} {kind}" for kind, count in told.items()) + ": both ranks stopped in the step")


# --- faults

FAULTS = {  # kind -> exit codes of the process that has it and of the other, and what is told once
    "user": (2, 2, "error: planted"),
    "key": (1, 1, "KeyError: 'planted'"),
    "memory": (6, 6, "is out of memory"),
    "kill": (-9, 7, "disappeared without an error"),
}


@pytest.mark.torture
def test_a_fault_on_one_of_two_ranks_ends_both_and_is_reported_once(start, recipe, tmp_path):
    """In a step, a save, an evaluation, and in loading a checkpoint."""
    path = recipe(validation_fraction=0.1, eval_steps=2)
    whole = tmp_path / "whole"
    methods = "compute_loss", "_save_checkpoint", "evaluate", "_load_from_checkpoint"
    points = [(method, kind, rank) for method in methods for kind in FAULTS for rank in (0, 1)]
    assert start(path, whole, processes=2)["codes"] == [0, 0]
    slowest = 0.0
    for method, kind, rank in points:
        run = tmp_path / "run"
        if method == "_load_from_checkpoint":
            shutil.copytree(whole, run, copy_function=os.link)
            (run / "summary.json").unlink()
            shutil.rmtree(run / "stages/2-instruct/final")
            shutil.rmtree(step_folders(run / "stages/2-instruct")[-1][1])
        result = start(path, run, processes=2, fault=[f"{kind}:{method}", rank, 1])
        own, other, told = FAULTS[kind]
        expected = [own, other] if rank == 0 else [other, own]
        assert result["codes"] == expected, (method, kind, rank, result)
        assert result["log"].count(told) == 1, (method, kind, rank, result["log"][-3000:])
        slowest = max(slowest, result["seconds"])
        shutil.rmtree(run)
    assert slowest < 60
    report("one rank", f"{len(points)} faults of one of two ranks: both ended, {slowest:.0f} s at most, told once")


# --- processes


@pytest.mark.torture
def test_one_two_and_four_processes_end_alike(start, recipe, recipe_content, tmp_path):
    recipe_content["stages"]["projector"] |= {"micro_batch": 2, "save_steps": 100}
    path, ends = recipe(micro_batch=2, save_steps=100), {}
    for processes in (1, 2, 4):
        run = tmp_path / f"run-{processes}"
        result = start(path, run, processes=processes)
        assert set(result["codes"]) == {0}, result["log"]
        ends[processes] = load_file(run / "export/model.safetensors")
    worst = 0.0
    for processes, weights in ends.items():
        for name, tensor in ends[1].items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6, msg=f"{processes}: {name}")
            worst = max(worst, float((weights[name] - tensor).abs().max()))
    report("processes", f"{sorted(ends)}: weights differ by {worst:.1e} at most")


# --- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of some bytes; needs root."""
    mounted: list[Path] = []

    def make(size: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a small file system cannot be mounted here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before_and_is_reported_with_path_and_bytes(
    start, recipe, small_disk, tmp_path
):
    path = recipe(save_total_limit=100)
    assert start(path, tmp_path / "whole")["codes"] == [0]
    stage = tmp_path / "whole/stages/2-instruct"
    sizes = [
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for _, folder in step_folders(stage)
    ]
    total = sum(file.stat().st_size for file in (tmp_path / "whole").rglob("*") if file.is_file())
    number = cases(24, 2)
    outcomes: Counter[str] = Counter()
    for i in range(number):
        # from too small for the second stage's first checkpoint to too small for the export alone
        disk = small_disk(int(total - sum(sizes) + sizes[0] * 5 * (i + 0.5) / number))
        result = start(path, disk / "run")
        if result["codes"] == [0]:
            outcomes["enough"] += 1
            continue
        last = result["log"].strip().splitlines()[-1]
        assert result["codes"] == [2] and last.startswith("error: ") and str(disk) in last, result["log"][-3000:]
        assert re.search(r"[\d,]+ bytes", last), last
        folders = [folder for _, folder in step_folders(disk / "run/stages/2-instruct")]
        assert all(map(is_whole, folders)), last
        outcomes["before" if "nothing was written" in last else "within"] += 1
    report("full disk", f"{number} sizes: " + ", ".join(f"{count} {what}" for what, count in outcomes.items()))


# --- a killer


@pytest.mark.skipif(not FULL, reason="takes ten minutes: make torture")
def test_ten_minutes_under_a_killer_repeat_few_steps(start, recipe, tmp_path):
    path, run, steps = recipe(epochs=100_000, save_steps=50, logging_steps=50), tmp_path / "run", tmp_path / "steps"
    dice, end, num_kills = random.Random(1), time.monotonic() + 600, 0
    while (left := end - time.monotonic()) > 0:
        result = start(path, run, after=min(left, dice.expovariate(1 / 60)), steps=str(steps))
        assert result["codes"] == [-9], result["log"]
        num_kills += 1
    stage, step = standing(run)
    trained = steps.stat().st_size
    kept = step + 6 * (stage == "2-instruct")  # the first stage's steps
    report("killer", f"{num_kills} kills in ten minutes: {kept} of {trained} steps kept ({kept / trained:.1%})")
    assert kept >= 0.9 * trained
