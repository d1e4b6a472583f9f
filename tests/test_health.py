"""Steps are judged, requests are heard, memory and disk that are full are said: in this process."""

import json
import math
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import TrainerState

from llava_llama31.assembly import staged_folder
from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.background import wait_for_background
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.data.check.cache import write_atomically
from llava_llama31.trainer.errors import EndedElsewhere, OutOfMemory, Unhealthy, UserError
from llava_llama31.trainer.evaluation.answering import Answers
from llava_llama31.trainer.fault_tolerance import peers
from llava_llama31.trainer.fault_tolerance.out_of_memory import advising
from llava_llama31.trainer.fault_tolerance.stage_guard import StopRequests
from llava_llama31.trainer.fault_tolerance.step_health import ENOUGH, MOST_SKIPPED_IN_A_ROW, WINDOW, Health
from llava_llama31.trainer.recipes.schema import Stage
from llava_llama31.trainer.runs import stage_parts
from llava_llama31.trainer.runs.run_log import append_entry
from llava_llama31.trainer.training import stage_checkpoints
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer


@pytest.fixture
def train(tmp_path, recipe_content):
    """Run the first stage alone, 6 steps of 2 x 4 records that are logged and saved, with changed keys."""
    del recipe_content["evaluation"], recipe_content["stages"]["instruct"]
    recipe_content["stages"]["projector"] |= {"max_steps": 6, "epochs": None, "save_steps": 1, "save_total_limit": 9}

    def run(output="run", **keys):
        recipe_content["stages"]["projector"] |= keys
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
        return main(["train", str(path), "--output", str(tmp_path / output)]), tmp_path / output

    return run


@pytest.fixture
def healthy_run(make_once, train, tmp_path) -> Path:
    """The stage as `train` runs it, made once for all tests."""

    def fill(folder: Path) -> None:
        code, run = train("healthy")
        assert code == 0
        run.rename(folder / "run")

    return make_once("healthy", fill) / "run"


@pytest.fixture
def spoil(monkeypatch):
    """Multiply the loss of one micro-batch of steps by a factor."""

    def spoil(factors, micro_batch=1):
        original = LlavaTrainer.compute_loss

        def compute_loss(self, *args, **kwargs):
            loss = original(self, *args, **kwargs)
            due = len(self._losses) == micro_batch  # those before it
            return loss * factors.get(self.state.global_step + 1, 1) if due else loss

        monkeypatch.setattr(LlavaTrainer, "compute_loss", compute_loss)

    return spoil


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[11:]) for path in run.glob("stages/1-projector/checkpoint-*"))


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / f"stages/1-projector/checkpoint-{step}"
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def history(run: Path) -> list[dict]:
    return json.loads((run / f"stages/1-projector/checkpoint-{steps(run)[-1]}/trainer_state.json").read_text())[
        "log_history"
    ]


def record(run: Path) -> dict:
    return json.loads((run / "stages/1-projector/final/stage.json").read_text())


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_within_the_step_and_names_the_micro_batch(train, spoil, capsys, wrong):
    spoil({3: wrong})
    code, run = train()
    assert code == 4 and steps(run) == [1, 2]
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: stages.projector, step 3: loss is {wrong}, gradient norm is nan; rank 0: records " in error
    names = error.partition("records ")[2].partition(" (fix")[0].split(", ")
    assert len(names) == 4 and all(name.startswith("r") for name in names)


@pytest.mark.slow
def test_a_skipped_step_changes_nothing_and_the_run_that_stopped_there_may_skip_it(train, healthy_run, spoil, capsys):
    assert record(healthy_run)["health"] == {"skipped_steps": 0, "spikes": 0, "events": []}
    spoil({3: math.nan})
    assert train("run")[0] == 4
    code, run = train("run", on_nonfinite="skip")
    assert code == 0 and "resuming from" in capsys.readouterr().err
    before, after, next_one = (weights(run, step) for step in (2, 3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], next_one[name]) for name in after)
    health = record(run)["health"]
    assert health["skipped_steps"] == 1 and health["events"][0]["step"] == 3
    assert health["events"][0]["what"] == "loss is nan, gradient norm is nan"
    assert len(health["events"][0]["records"]["0"]) == 4
    entries = [entry for entry in history(run) if "learning_rate" in entry]
    assert [entry.get("skipped_steps") for entry in entries] == [None, None, 1, None, None, None]
    assert ["loss" in entry for entry in entries] == [True, True, False, True, True, True]
    shutil.rmtree(run / "stages/1-projector/final")
    shutil.rmtree(run / "stages/1-projector/checkpoint-6")
    (run / "summary.json").unlink()
    assert train("run")[0] == 0 and record(run)["health"] == health  # carried on by the checkpoint


@pytest.mark.slow
def test_a_logged_loss_is_the_mean_of_the_steps_that_were_taken(train, spoil):
    code, each = train("each", logging_steps=1, learning_rate=1e-12)
    assert code == 0
    losses = [entry["loss"] for entry in history(each) if "loss" in entry]
    spoil({2: math.inf})
    code, run = train("skipped", on_nonfinite="skip", logging_steps=3, save_steps=3)
    logged = [entry for entry in history(run) if "learning_rate" in entry]
    assert code == 0 and [entry.get("skipped_steps", 0) for entry in logged] == [1, 0]
    assert logged[0]["loss"] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-5)
    assert logged[1]["loss"] == pytest.approx(statistics.fmean(losses[3:]), rel=1e-5)


def test_weights_that_are_broken_are_not_skipped_over_for_ever(train, spoil, capsys):
    spoil(dict.fromkeys(range(2, 100), math.nan), micro_batch=0)
    assert train(on_nonfinite="skip", max_steps=20)[0] == 4
    assert (
        f"step {MOST_SKIPPED_IN_A_ROW + 1}: {MOST_SKIPPED_IN_A_ROW} steps in a row were skipped"
        in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["warn", "skip", "stop"])
def test_a_spike_is_reported_skipped_or_stopped_at(train, spoil, caplog, capsys, policy, monkeypatch):
    monkeypatch.setattr("llava_llama31.trainer.fault_tolerance.step_health.ENOUGH", 4)
    spoil({6: 50.0}, micro_batch=0)
    code, run = train(on_spike=policy, max_steps=7, learning_rate=1e-4)
    told = capsys.readouterr().err if policy == "stop" else caplog.text
    assert "step 6" in told and "is a spike (" in told and "; rank 0: records r" in told
    if policy == "stop":
        assert code == 4 and steps(run)[-1] == 5
        return
    assert code == 0 and record(run)["health"]["spikes"] == 1
    five, six = weights(run, 5), weights(run, 6)
    assert all(torch.equal(five[name], six[name]) for name in five) == (policy == "skip")


def naive_spike(value: float, before: list[float]) -> bool:
    before = before[-WINDOW:]
    if len(before) < ENOUGH:
        return False
    mean = math.fsum(before) / len(before)
    return value > mean + 6 * math.sqrt(math.fsum((x - mean) ** 2 for x in before) / len(before))


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(0, 2**32), st.integers(0, 250))
def test_a_resumed_judgement_is_the_same_as_an_uninterrupted_one(seed, cut):
    rng = random.Random(seed)
    values = [
        (rng.choice([rng.gauss(2, 0.1)] * 60 + [3.0, 40.0, math.nan, math.inf]), rng.gauss(1, 0.2)) for _ in range(250)
    ]
    whole, losses = Health(on_nonfinite="skip", on_spike="skip"), []
    resumed = Health(on_nonfinite="skip", on_spike="skip")
    for step, (loss, norm) in enumerate(values, 1):
        if step == cut:
            state = json.loads(json.dumps(resumed.state(), allow_nan=False))
            resumed = Health(on_nonfinite="skip", on_spike="skip")
            resumed.restore(state)
        finding = whole.judge(loss, norm)
        assert resumed.judge(loss, norm) == finding
        for health in (whole, resumed):
            health.note(step, finding, {0: ["a"]} if finding else {})
        if math.isfinite(loss):
            assert (finding is not None and "loss" in finding.what) == naive_spike(loss, losses)
            losses.append(loss)
        else:
            assert finding is not None and not finding.is_finite and finding.action == "skip"
    assert whole.state() == resumed.state()
    assert whole.num_skipped == len(whole.events) == whole.skipped_after(0)


def test_ids_of_many_records_are_cut_in_the_message_alone():
    health = Health(on_nonfinite="stop", on_spike="warn")
    finding, ids = health.judge(math.nan, 1.0), [f"r{i}" for i in range(40)]
    health.note(7, finding, {1: ids})
    with pytest.raises(Unhealthy, match=r"stages.x, step 7: loss is nan; rank 1: records r0, .*r15 and 24 more"):
        health.act(7, finding, {1: ids}, "stages.x")
    assert health.events[0]["records"] == {"1": ids}


@pytest.mark.parametrize("key", ["on_nonfinite", "on_spike"])
def test_deepspeed_can_not_skip_and_says_so(recipe_content, key):
    stage = recipe_content["stages"]["projector"]
    Stage.model_validate(stage | {key: "skip"})
    with pytest.raises(ValueError, match=f"{key} can't be skip"):
        Stage.model_validate(stage | {key: "skip", "deepspeed": "zero3"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.torture)]
)
def test_a_signal_outside_of_training_stops_at_once(train, monkeypatch, capsys, number):
    from llava_llama31.trainer.runs import stage as stages

    original = stages.write_final_weights

    def publish(*arguments):
        signal.raise_signal(number)
        original(*arguments)

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with monkeypatch.context() as patch:
        patch.setattr(stages, "write_final_weights", publish)
        assert train()[0] == (130 if number == signal.SIGINT else 75)
    assert "run the same command to resume from the last checkpoint" in capsys.readouterr().err
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert train()[0] == 0


@pytest.mark.parametrize("step", [1, 6])
def test_a_signal_in_any_step_saves_that_step_and_stops(train, monkeypatch, step):
    """In the last one too: the run does not go on to what comes after the stage."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequests, "on_step_begin", on_step_begin)
        code, run = train(save_steps=100)
    assert code == 75 and steps(run) == [step] and not (run / "export").exists()
    assert train(save_steps=100)[0] == 0 and (run / "export").exists()


def test_save_now_saves_at_the_next_step_once(train, monkeypatch, tmp_path):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            (tmp_path / "run/save-now").touch()

    monkeypatch.setattr(StopRequests, "on_step_begin", on_step_begin)
    code, run = train(save_steps=100)
    assert code == 0 and steps(run) == [3, 6] and not (run / "save-now").exists()


FULL = (
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore"), "the device"),
    (MemoryError(), "the host"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the device"),
    (RuntimeError("CUDA error: out of memory"), "the device"),
    (RuntimeError("CUDA driver error: out of memory"), "the device"),
    (RuntimeError("NCCL error, unhandled cuda error: Cuda failure 2 'out of memory'"), "the device"),
    (RuntimeError("HIP error: out of memory"), "the device"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 20 GB)"), "the device"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), "the host"),
)


def test_memory_that_is_full_names_what_to_lower(train, recipe_content, monkeypatch, capsys):
    """In a run, the first two; all in what a run is within."""
    stage = Stage.model_validate(recipe_content["stages"]["projector"])
    for number, (error, place) in enumerate(FULL):
        with pytest.raises(OutOfMemory) as caught, advising(stage, "stages.projector"):
            raise error
        said = str(caught.value)
        if number < 2:

            def compute_loss(self, *args, _error=error, **kwargs):
                raise _error

            monkeypatch.setattr(LlavaTrainer, "compute_loss", compute_loss)
            assert train()[0] == 6
            assert capsys.readouterr().err.splitlines()[-1] == f"error: {said}"
        assert said.startswith(f"stages.projector: {place} is out of memory")
        assert "lower micro_batch (now 4)" in said and "activation_checkpointing" in said


@pytest.mark.slow
def test_a_disk_without_room_is_noticed_before_anything_is_written(train, healthy_run, monkeypatch, capsys):
    needed = atomic_folders.size(healthy_run / "stages/1-projector/checkpoint-6")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: usage(0, 0, 10**9 if not list(Path(folder).glob("c*-2")) else 9)
    )
    code, run = train()
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and steps(run) == [1, 2]
    assert (
        f"{run / 'stages/1-projector'}: saving needs " in error and "but only 9 are free; nothing was written" in error
    )
    said = int(error.partition("needs ")[2].partition(" bytes")[0].replace(",", ""))
    assert said == pytest.approx(needed, rel=0.02)
    monkeypatch.undo()
    assert train()[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1000, 60_000, pytest.param(20_000, marks=pytest.mark.torture)])
def test_a_disk_that_gets_full_in_a_save_leaves_the_former_checkpoint(train, monkeypatch, capsys, limit):
    original = LlavaTrainer._save_checkpoint
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_checkpoint(self, *arguments):
        if self.state.global_step == 3:
            wait_for_background(20)  # the former checkpoint's commit
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LlavaTrainer, "_save_checkpoint", save_checkpoint)
        try:
            code, run = train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.splitlines()[-1]
    folder = run / "stages/1-projector"
    assert code == 2 and error.startswith(f"error: {folder}: saving ") and "bytes failed, with" in error
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["checkpoint-1", "checkpoint-2"]
    assert not list(folder.glob(".*")) and all(atomic_folders.verify(path) is None for path in folder.glob("c*"))
    assert train()[0] == 0


def test_a_disk_that_is_full_for_the_log_is_reported_with_its_name(train, monkeypatch, capsys):
    """The line of the save is cut off, and the next start begins one of its own."""
    limits, original = resource.getrlimit(resource.RLIMIT_FSIZE), stage_parts.append_save

    def append_save(path, stage, step):
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, limits[1]))
        original(path, stage, step)

    with monkeypatch.context() as patch:
        patch.setattr(stage_parts, "append_save", append_save)
        try:
            code, run = train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and capsys.readouterr().err.splitlines()[-1] == f"error: {run / 'log.jsonl'}: File too large"
    assert (run / "log.jsonl").read_bytes().splitlines()[-1] == b'{"time": '
    assert steps(run) == [1, 2] and train()[0] == 0 and steps(run) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: atomic_folders.write_json(path, {"a": 1}),
        lambda path: write_atomically(path, ["a"]),
        lambda path: Answers([], path, 0.0, {}).write_scores({}),
        lambda path: append_entry(path, "projector", {}),
    ],
)
def test_a_write_that_fails_names_its_file(tmp_path, write):
    """Python's own error of a write or flush names none."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as failed:
            write(tmp_path / "file.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path(failed.value.filename).parent == tmp_path


def test_a_full_device_is_reported_with_the_file_and_the_fix(train, tmp_path, capsys):
    log = tmp_path / "run/log.jsonl"
    log.parent.mkdir()
    log.symlink_to("/dev/full")
    assert train()[0] == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {log}: No space left on device (fix: free space there and run again)"


@pytest.fixture
def committing(monkeypatch):
    """Call a function with the step of every checkpoint before it is committed."""

    def committing(before):
        original = atomic_folders.commit

        def commit(staging, final, facts):
            if final.name.startswith("checkpoint-"):
                before(facts["step"])
            original(staging, final, facts)

        monkeypatch.setattr(atomic_folders, "commit", commit)

    return committing


def test_a_stage_trains_while_a_checkpoint_is_hashed(train, monkeypatch):
    original, began = LlavaTrainer.training_step, {step: threading.Event() for step in range(1, 7)}
    hashed, overlapped = atomic_folders.sha256, set()

    def training_step(self, *args, **kwargs):
        began[self.state.global_step + 1].set()
        return original(self, *args, **kwargs)

    def sha256(path):
        if path.parent.name.startswith("checkpoint-") and (step := int(path.parent.name[11:])) < 6:
            overlapped.add((step, began[step + 1].wait(20)))
        return hashed(path)

    monkeypatch.setattr(LlavaTrainer, "training_step", training_step)
    monkeypatch.setattr(atomic_folders, "sha256", sha256)
    code, run = train()
    assert code == 0 and overlapped == {(step, True) for step in range(1, 6)} and steps(run) == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def save(tmp_path):
    """Save step 1 as a rank of two; a function is called with the checkpoint's folder before training continues."""

    def save(rank, then):
        args = SimpleNamespace(output_dir=str(tmp_path), world_size=2, should_save=not rank, save_total_limit=1)
        args.deepspeed_plugin = None
        guard = SimpleNamespace(watchdog=SimpleNamespace(beat=lambda doing: None), save=lambda folder: None)
        saves = stage_checkpoints.StageSaves(args, guard, inputs={}, only_trainable=False, committed=None)
        with saves.completed():
            with saves.staged(TrainerState(global_step=1), torch.nn.Linear(1, 1)) as parent:
                (parent / f"checkpoint-1/{rank}").touch()
            then(tmp_path / "checkpoint-1")
        assert atomic_folders.verify(tmp_path / "checkpoint-1") is None

    return save


def test_no_rank_waits_for_the_commit(save, committing, monkeypatch):
    """Two ranks that wait for each other as processes do: both go on before the checkpoint is committed."""
    together, went_on = threading.Barrier(2), threading.Barrier(3)
    monkeypatch.setattr(stage_checkpoints, "_barrier", lambda args: together.wait(20))
    committing(lambda step: went_on.wait(20))

    def then(folder):
        assert not folder.exists()
        went_on.wait(20)

    with ThreadPoolExecutor(2) as ranks:
        list(ranks.map(lambda rank: save(rank, then), (0, 1)))


def test_a_tracker_that_uploads_checkpoints_gets_whole_ones(save, committing, monkeypatch):
    monkeypatch.setattr(stage_checkpoints, "_barrier", lambda args: None)
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    committing(lambda step: time.sleep(0.05))
    found = []
    save(0, lambda folder: found.append(atomic_folders.verify(folder)))
    assert found == [None]


def test_a_commit_that_fails_ends_the_stage_at_its_next_step(train, committing, capsys, monkeypatch):
    def fail(step):
        if step == 3:
            raise OSError(28, "No space left on device")

    committing(fail)
    code, run = train()
    error, folder = capsys.readouterr().err.splitlines()[-1], run / "stages/1-projector"
    assert code == 2 and error.startswith(f"error: {folder}: saving ") and "No space left on device" in error
    assert steps(run) == [1, 2] and not list(folder.glob(".*"))
    monkeypatch.undo()
    assert train()[0] == 0 and steps(run) == [1, 2, 3, 4, 5, 6]


def test_a_failed_commit_does_not_wait_for_the_next_save(train, committing, monkeypatch):
    original, failed, begun = LlavaTrainer.training_step, threading.Event(), []

    def fail(step):
        failed.set()
        raise OSError(28, "No space left on device")

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 4:
            failed.wait(20)
            time.sleep(0.2)  # until the thread has ended
        begun.append(self.state.global_step + 1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlavaTrainer, "training_step", training_step)
    committing(fail)
    assert train(save_steps=3)[0] == 2 and max(begun) <= 5


def test_a_stage_that_fails_keeps_the_checkpoint_that_is_being_committed(train, spoil, committing):
    spoil({3: math.nan})
    committing(lambda step: time.sleep(0.5))
    code, run = train()
    assert code == 4 and steps(run) == [1, 2]


ENDED_ELSEWHERE = """
import pathlib, sys, time
from llava_llama31.trainer.checkpoint.background import Background
from llava_llama31.trainer.fault_tolerance.watchdog import end_process
def commit():
    time.sleep(0.3)
    pathlib.Path(sys.argv[1]).touch()
Background("commit").start(commit)
end_process(7)
"""


def test_a_process_that_ends_since_another_one_failed_completes_its_commit(tmp_path):
    done = subprocess.run([sys.executable, "-c", ENDED_ELSEWHERE, str(tmp_path / "committed")])
    assert done.returncode == 7 and (tmp_path / "committed").exists()


def test_leftovers_of_a_killed_save_are_swept_by_the_next(train, tmp_path):
    folder = tmp_path / "run/stages/1-projector"
    (folder / ".staging-" / "checkpoint-9").mkdir(parents=True)
    (folder / ".staging-x.json").write_text("{")
    assert train()[0] == 0
    assert not list(folder.glob(".staging-*"))


def test_leftovers_of_a_killed_assembly_are_swept_but_not_those_of_a_living_one(tmp_path):
    (tmp_path / ".staging-base-dead").mkdir()
    (tmp_path / ".staging-base-dead" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".base-ment").mkdir()
    with staged_folder(tmp_path / "base") as one, pytest.raises(UserError), staged_folder(tmp_path / "base") as two:
        assert one != two and one.is_dir() and not (tmp_path / ".staging-base-dead").exists()
        raise UserError("the second one fails")
    assert sorted(os.listdir(tmp_path)) == [".base-ment", "base"]


# the others while rank 0 works


def test_the_others_wait_for_rank_0_at_the_store_and_in_no_collective(monkeypatch):
    """A collective would keep every device and a core each busy for as long as rank 0 checks its data."""
    monkeypatch.setattr(peers, "_LOOK_SECONDS", 0.001)
    store, passed = dist.HashStore(), threading.Event()
    others = threading.Thread(target=lambda: (peers.Peers(1, 2, store).await_main("checked"), passed.set()))
    others.start()
    assert not passed.wait(0.05)
    peers.Peers(0, 2, store).await_main("checked")
    assert passed.wait(10)
    others.join()
    peers.Peers().await_main("checked")  # alone


def test_a_failure_of_rank_0_ends_the_wait():
    store = dist.HashStore()
    store.set(peers._FAILED, '{"rank": 0, "thread": 1, "exit_code": 2, "message": "no data"}')
    with pytest.raises(EndedElsewhere) as ended:
        peers.Peers(1, 2, store).await_main("checked")
    assert (ended.value.exit_code, ended.value.untold) == (2, "rank 0, on another machine: no data")


@pytest.mark.parametrize("parts_late", [False, True])
def test_a_process_that_fails_first_ends_with_its_message_however_long_the_others_are_stuck(
    monkeypatch, capsys, parts_late
):
    """Its watching thread ends a process that does not end by itself; the main thread had not printed by then."""
    monkeypatch.setattr(peers, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(peers, "_GRACE_SECONDS", 1.0)
    ended, has_ended = [], threading.Event()
    monkeypatch.setattr(peers, "end_process", lambda code: (ended.append(code), has_ended.set()))
    watched = peers.Peers(0, 2, dist.HashStore())  # whose rank 1 never signs off
    with pytest.raises(UserError, match="planted"), watched.together():
        raise UserError("planted")
    if parts_late:  # such as the process group's own end
        assert has_ended.wait(20)
    watched.close()
    assert ended == [2] * parts_late
    assert capsys.readouterr().err.splitlines() == ["error: planted"] * parts_late
