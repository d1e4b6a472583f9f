"""Time and size of the report of a run with a long log.

.venv/bin/python benchmarks/report.py
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.recipes.loading import load_recipe


NUM_LINES = 100_000


def write_run(folder: Path) -> None:
    """A stopped run of `tiny` that logged each of its steps, and was resumed twice."""
    recipe = load_recipe("tiny", output=folder).model_dump(mode="json")
    (folder / "recipe.json").write_text(json.dumps(recipe))
    with (folder / "log.jsonl").open("w") as log:
        for i in range(NUM_LINES):
            entry = {"time": "2026-11-28T13:00:00.000+00:00", "stage": "projector", "step": i}
            if i in (0, 40_000, 70_000):
                entry |= {"event": "start", "steps": 2 * NUM_LINES}
            else:
                entry |= {
                    "loss": 2 + 1 / (i + 1),
                    "grad_norm": 1 + i % 7,
                    "seconds": 0.5 * i,
                    "mfu": 0.3,
                    "padding": 0.0,
                }
                entry |= {"tokens_per_second": 900 + i % 50, "supervised_tokens_per_second": 90.0, "data_wait": 0.01}
                entry |= {
                    "memory_gib": 40.5,
                    "learning_rates": {"multi_modal_projector": 1e-3, "language_model": 1e-5},
                }
            log.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder))
        started, busy = time.perf_counter(), time.process_time()
        code = main(["report", folder])
        seconds, cpu = time.perf_counter() - started, time.process_time() - busy
        size = (Path(folder) / "report.html").stat().st_size / 1e6
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{NUM_LINES:,} lines: {seconds:.2f} s ({cpu:.2f} s of CPU), {size:.2f} MB, peak {memory:.2f} GiB")
    sys.exit(code)
