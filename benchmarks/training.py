"""Compares our training with stock Transformers, TRL, ms-swift and LLaMA-Factory on the same work.

All train the same small LlavaNext with the same rows in the same order, batches, precision and optimizer, each in a
separate process and environment (made from PyPI on first use), taking turns. Times are CPU seconds with one thread,
which a busy machine disturbs least, or wall seconds with more (`--threads 2`, on an idle machine).

python benchmarks/training.py
python benchmarks/training.py --without-sharing --only ms-swift --precision fp32
python benchmarks/training.py --stage projector --threads 2 --json
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import rich.box
import transformers
import yaml
from rich.console import Console
from rich.table import Table
from training_environments import default_folder, python_of
from training_peers import Settings
from training_workload import (
    Row,
    Words,
    make_checkpoint,
    make_config,
    make_processor,
    make_rows,
    make_stock_checkpoint,
    needed_flops,
    write_for,
    write_llava,
)

from llava_llama31 import LlavaLlama31Config
from llava_llama31.trainer.costs.matrix_peak import cpu_instructions, measure_cpu_speed


PEERS = ("transformers", "trl", "ms-swift", "llamafactory")
OURS = "ours"
TRAINABLE = {"instruct": ["multi_modal_projector", "language_model"], "projector": ["multi_modal_projector"]}
GLOBAL_BATCH = 4
# the peers' micro-batch; other splits of the batch did not make them faster
MICRO_BATCH = 2
LEARNING_RATE = 5e-4
SEED = 0
SKIPPED_STEPS = 3
# settings of our recipe's stage beyond the common ones
OUR_STAGE_KEYS: dict[str, Any] = {"micro_batch": GLOBAL_BATCH}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
# relative difference of a step's loss from stock Transformers'
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-3}


@dataclass(frozen=True)
class Run:
    """One trainer's measurements in one round; seconds of an optimizer step in steady state, memory in bytes."""

    cpu_seconds: float
    wall_seconds: float
    peak: int
    beyond_weights: int
    """Peak beyond the program, the weights, their gradients and the optimizer's state."""
    losses: list[float]
    tokens: int
    supervised_tokens: int
    trained: int
    order: list[list[int]] = field(default_factory=list)


@dataclass
class Bench:
    """A workload on disk and how to run it."""

    folder: Path
    environments: Path
    options: argparse.Namespace
    config: LlavaLlama31Config
    rows: list[Row]
    order: list[list[int]] = field(default_factory=list)
    """Rows of every step, in the order of our trainer's first run."""

    def step_rows(self) -> list[list[Row]]:
        return [[self.rows[i] for i in step] for step in self.order]

    def run(self, trainer: str, number: int, profile: Path | None = None) -> Run:
        folder = self.folder / f"{trainer}-{number}"
        folder.mkdir()
        micro_batch = GLOBAL_BATCH if trainer == OURS else MICRO_BATCH
        settings = Settings(
            trainer=trainer,
            stage=self.options.stage,
            precision=self.options.precision,
            checkpoint=str(self.folder / "stock-checkpoint"),
            rows=str(self.rows_for(trainer, folder)),
            output=str(folder / "output"),
            result=str(folder / "result.json"),
            steps=self.options.steps,
            micro_batch=micro_batch,
            accumulation=GLOBAL_BATCH // micro_batch,
            learning_rate=LEARNING_RATE,
            seed=SEED,
            profile=str(profile) if profile else None,
            profile_from=SKIPPED_STEPS,
        )
        settings.write(folder / "settings.json")
        self.start(trainer, folder)
        shutil.rmtree(folder / "output", ignore_errors=True)
        return read_run(Path(settings.result))

    def rows_for(self, trainer: str, folder: Path) -> Path:
        if trainer == OURS:
            file = folder / "recipe.yaml"
            file.write_text(yaml.safe_dump(self.recipe(), sort_keys=False))
            return file
        file = folder / ("rows.jsonl" if trainer == "ms-swift" else "rows.json")
        write_for(trainer, [row for step in self.step_rows() for row in step], file)
        return file

    def recipe(self) -> dict[str, Any]:
        stage = {
            "trainable": TRAINABLE[self.options.stage],
            "learning_rate": LEARNING_RATE,
            "data": [{"name": "rows", "path": str(self.folder / "images" / "rows.json")}],
            "global_batch": GLOBAL_BATCH,
            "max_steps": self.options.steps,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "precision": DTYPES[self.options.precision],
            "logging_steps": 1,
            "save_steps": 10**6,
            "dataloader_workers": 0,
            **OUR_STAGE_KEYS,
        }
        model = {"checkpoint": str(self.folder / "checkpoint"), "dtype": "float32"}
        return {"name": "benchmark", "seed": SEED, "model": model, "stages": {self.options.stage: stage}}

    def start(self, trainer: str, folder: Path) -> None:
        """Train in a separate process; its output is shown only if it fails."""
        script = Path(__file__).with_name("training_peers.py")
        command = [python_of(trainer, self.environments), str(script), str(folder / "settings.json")]
        with (folder / "log.txt").open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=log, cwd=folder, env=self.variables())
        if done.returncode:
            tail = (folder / "log.txt").read_text(errors="replace")[-4000:]
            raise SystemExit(f"{tail}\n{trainer} failed with exit code {done.returncode}")

    def variables(self) -> dict[str, str]:
        threads = str(self.options.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
        return {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            **dict.fromkeys(names, threads),
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder / "cache" / "huggingface"),
            "MODELSCOPE_CACHE": str(self.folder / "cache" / "modelscope"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "USE_HF": "1",  # ms-swift: not ModelScope
            "DISABLE_VERSION_CHECK": "1",  # LLaMA-Factory: newer releases than it knows
        }


def read_run(result: Path) -> Run:
    record = json.loads(result.read_text())

    def per_step(clock: list[float]) -> float:
        return (clock[-2] - clock[SKIPPED_STEPS]) / (len(clock) - 2 - SKIPPED_STEPS)

    beyond = max(0, record["peak"] - record["resident"] - record["gradients"])
    return Run(
        cpu_seconds=per_step(record["cpu"]),
        wall_seconds=per_step(record["wall"]),
        peak=record["peak"],
        beyond_weights=beyond,
        losses=record["losses"],
        tokens=record["tokens"],
        supervised_tokens=record["supervised_tokens"],
        trained=record["trained"],
        order=record.get("order", []),
    )


class Result:
    """All rounds of one trainer, compared with ours.

    Args:
        floor: CPU seconds that a step's needed operations would take at the measured matrix peak.
    """

    def __init__(self, runs: Sequence[Run], ours: Sequence[Run], threads: int, floor: float):
        def seconds(run: Run) -> float:
            return run.cpu_seconds if threads == 1 else run.wall_seconds

        self.seconds = [seconds(run) for run in runs]
        self.ratios = [seconds(run) / seconds(our) for run, our in zip(runs, ours, strict=True)]
        self.cpu_seconds = statistics.median(run.cpu_seconds for run in runs)
        self.wall_seconds = statistics.median(run.wall_seconds for run in runs)
        self.mfu = floor / self.cpu_seconds
        self.peak = statistics.median(run.peak for run in runs)
        self.beyond_weights = statistics.median(run.beyond_weights for run in runs)
        self.first = runs[0]


class Measured(NamedTuple):
    """All rounds of all trainers; `peak` in operations per second."""

    bench: Bench
    runs: dict[str, list[Run]]
    results: dict[str, Result]
    peak: float


def main() -> int:
    options = parse()
    if options.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            return compare(Path(folder), options)
    options.folder.mkdir(parents=True, exist_ok=False)
    return compare(options.folder.absolute(), options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=(*PEERS, OURS), help="compare only this trainer with ours; may be repeated"
    )
    parser.add_argument("--stage", choices=("instruct", "projector"), default="instruct")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), help="bf16 is autocast; default: bf16, on a CPU that emulates it fp32"
    )
    parser.add_argument("--without-sharing", action="store_true", help="one conversation per image instead of two")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps per run")
    parser.add_argument("--repeats", type=int, default=3, help="number of rounds; each trainer runs once per round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--environments", type=Path, default=default_folder(), help="where the peers are installed")
    parser.add_argument("--folder", type=Path, help="new folder for the workload, logs and results")
    parser.add_argument("--profile", type=Path, help="write torch.profiler's table of one of our runs to this file")
    parser.add_argument("--json", action="store_true", help="print only one JSON object")
    options = parser.parse_args()
    if options.steps < SKIPPED_STEPS + 3:
        parser.error(
            f"--steps: must be at least {SKIPPED_STEPS + 3}: the first {SKIPPED_STEPS} and the last are not timed"
        )
    speed = measure_cpu_speed()
    if options.precision == "bf16" and speed.is_slow_in_bfloat16:
        parser.error(f"--precision bf16: {speed}: a step would take minutes; use fp32")
    if options.precision is None:
        options.precision = "fp32" if speed.is_slow_in_bfloat16 else "bf16"
        if speed.is_slow_in_bfloat16:
            print(f"--precision fp32: {speed}", file=sys.stderr)
    return options


def compare(folder: Path, options: argparse.Namespace) -> int:
    """Run all rounds and print the results; returns 1 if a loss curve differs from stock Transformers'."""
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 119)
    peers = [peer for peer in PEERS if options.only is None or peer in options.only]
    for peer in peers:
        python_of(peer, options.environments)
    with redirect_stdout(sys.stderr if options.json else sys.stdout):  # libraries print there as well
        measured = measure(folder, options, (OURS, *peers), console)
    faults = loss_faults(measured.runs, options.precision)
    if options.json:
        print(json.dumps(as_json(measured.results)))
    else:
        show(console, measured.bench, measured.results, measured.peak)
    for fault in faults:
        console.print(fault, style="red")
    return int(bool(faults))


def measure(folder: Path, options: argparse.Namespace, trainers: Sequence[str], console: Console) -> Measured:
    bench = make_bench(folder, options)
    runs: dict[str, list[Run]] = {trainer: [] for trainer in trainers}
    peaks = []
    for number in range(options.repeats):
        peaks.append(matrix_peak(options))
        for trainer, done in runs.items():  # ours first: it determines the order of the rows
            done.append(bench.run(trainer, number))
            bench.order = bench.order or done[0].order
            console.print(f"round {number + 1}, {trainer}: {done[-1].cpu_seconds:.3f} CPU s/step", style="dim")
    flops = [needed_flops(rows, bench.config, TRAINABLE[options.stage]) for rows in bench.step_rows()]
    peak = max(peaks)
    floor = statistics.mean(flops[SKIPPED_STEPS:-1]) / peak
    results = {trainer: Result(done, runs[OURS], options.threads, floor) for trainer, done in runs.items()}
    if options.profile:
        bench.run(OURS, options.repeats, options.profile.absolute())
    return Measured(bench, runs, results, peak)


def make_bench(folder: Path, options: argparse.Namespace) -> Bench:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    words = Words(SEED)
    processor = make_processor(words)
    config = make_config(processor)
    make_checkpoint(folder / "checkpoint", config, processor, SEED)
    make_stock_checkpoint(folder / "checkpoint", folder / "stock-checkpoint")
    (folder / "images").mkdir()
    rows = make_rows(
        folder / "images",
        words,
        processor,
        stage=options.stage,
        num_rows=options.rows,
        share=not options.without_sharing and options.stage == "instruct",
        seed=SEED,
    )
    write_llava(rows, folder / "images" / "rows.json")
    return Bench(folder, options.environments, options, config, rows)


def matrix_peak(options: argparse.Namespace) -> float:
    """Operations per CPU second of the best matrix product in this precision, in a process with as many threads."""
    code = f"""
import time, torch
from llava_llama31.trainer.costs.matrix_peak import measure_matrix_peak
print(measure_matrix_peak(torch.{DTYPES[options.precision]}, "cpu", clock=time.process_time))
"""
    variables = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    run = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=variables)
    return float(run.stdout.split()[-1])


def as_json(results: dict[str, Result]) -> dict[str, Any]:
    return {
        "cpu": cpu_instructions(),
        "ratios": {name: round(statistics.median(r.ratios), 3) for name, r in results.items() if name != OURS},
        "seconds_per_step": {name: round(statistics.median(r.seconds), 4) for name, r in results.items()},
        "mfu": {name: round(r.mfu, 4) for name, r in results.items()},
        "memory_gb": {name: round(r.beyond_weights / 1e9, 3) for name, r in results.items()},
    }


def show(console: Console, bench: Bench, results: dict[str, Result], peak: float) -> None:
    options = bench.options
    clock = "CPU" if options.threads == 1 else "wall"
    conversations = "one conversation" if len({row.image for row in bench.rows}) == len(bench.rows) else "two"
    about = f"stage {options.stage}, {options.precision}, {conversations} per image, {options.threads} thread(s)"
    table = Table(title=f"{about}, median of {options.repeats} (min-max)", box=rich.box.SIMPLE)
    columns = ("samples/s", "MFU", "memory", "beyond weights", "loss", "ours is faster by")
    for name in ("trainer", f"{clock} s/step", *columns):
        table.add_column(name, justify="left" if name == "trainer" else "right")
    for name, result in results.items():
        losses = result.first.losses
        table.add_row(
            name,
            spread(result.seconds),
            f"{GLOBAL_BATCH / statistics.median(result.seconds):.2f}",
            f"{result.mfu:.1%}",
            f"{result.peak / 1e9:.2f} GB",
            f"{result.beyond_weights / 1e9:.2f} GB",
            f"{losses[0]:.3f} {losses[-1]:.3f}",
            "" if name == OURS else spread(result.ratios),
        )
    console.print(table)
    lengths = describe([row.num_tokens for row in bench.rows])
    supervised = describe([len(row.read_positions) for row in bench.rows])
    console.print(f"{cpu_instructions()}; torch.mm reaches {peak / 1e9:.0f} GFLOP per CPU second")
    for name, result in results.items():
        first = result.first
        tokens = f"{first.tokens:,} positions in all steps, {first.supervised_tokens:,} supervised"
        console.print(f"{name}: {tokens}, {first.trained:,} weights trained")
    console.print(f"{len(bench.rows)} rows; tokens per row at 5, 50, 95 %: {lengths}, supervised: {supervised}")


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def describe(values: Sequence[int]) -> str:
    ordered = sorted(values)
    return ", ".join(str(ordered[round(share * (len(ordered) - 1))]) for share in (0.05, 0.5, 0.95))


def loss_faults(runs: dict[str, list[Run]], precision: str) -> list[str]:
    """Trainers whose losses differ at any step from those of the first peer that ran."""
    reference = next((name for name in runs if name != OURS), OURS)
    expected, faults = runs[reference][0].losses, []
    for name, done in runs.items():
        for run in done:
            if len(run.losses) != len(expected):
                faults.append(f"{name} logged {len(run.losses)} losses, {reference} {len(expected)}")
                continue
            worst = max(abs(a - b) / b for a, b in zip(run.losses, expected, strict=True))
            if not math.isfinite(worst) or worst > TOLERANCE[precision]:
                faults.append(f"{name}: a loss differs by {worst:.2%} from {reference}'s")
    return faults


if __name__ == "__main__":
    sys.exit(main())
