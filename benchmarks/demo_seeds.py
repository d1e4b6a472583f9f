"""Run the demo for several seeds and check its bar: at least 60 % accuracy, untrained and blind below 15 %.

python benchmarks/demo_seeds.py --seeds 1 2 3
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


BAR, BASELINE = 0.60, 0.15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs", "demo-seeds"))
    options = parser.parse_args()
    held = True
    print(f"{'seed':>6}{'before':>10}{'after':>10}{'blind':>10}{'questions':>11}{'minutes':>9}")
    for seed in options.seeds:
        run = options.output / str(seed)
        command = [sys.executable, "-I", "-m", "llava_llama31.trainer.cli", "train", "tiny"]
        subprocess.run([*command, "--output", str(run), "--set", f"seed={seed}"], check=True)
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        before, after, blind = (summary[f"accuracy_{name}"] for name in ("before", "after", "blind"))
        held &= after >= BAR and before < BASELINE and blind < BASELINE
        row = f"{seed:>6}{before:>10.1%}{after:>10.1%}{blind:>10.1%}"
        print(f"{row}{summary['num_questions']:>11}{summary['minutes']:>9.1f}", flush=True)
    print("the bar holds" if held else "the bar does not hold")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
