"""Measures the memory that the head and its loss add to a training step, ours against the stock path.

Stock: `lm_head` at every position, then Transformers' loss on a float32 copy of the logits. Ours: the head at labelled
positions, chunk by chunk. Both start from hidden states that need a gradient, run forward and backward, and leave the
gradients of hidden states and weights; each runs in a separate process. The figure is the peak above the initial
level: of resident memory on a CPU, of allocated memory on a GPU.

python benchmarks/head_memory.py
python benchmarks/head_memory.py --hidden-size 4096 --frozen --json
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from llava_llama31.packed_llama_llava_llama31 import SupervisedHead
from llava_llama31.trainer.costs.matrix_peak import cpu_instructions


IGNORE_INDEX = -100
WAYS = ("stock", "ours")
WARM_POSITIONS = 64
LOSS_TOLERANCE = 1e-2  # relative; bfloat16 sums differ


@dataclass(frozen=True)
class Settings:
    """Settings for both; `labelled` is a share of the positions, `frozen` refers to the head."""

    device: str
    dtype: str
    vocabulary: int
    positions: int
    labelled: float
    hidden_size: int
    frozen: bool


def loss_of(way: str, head: SupervisedHead, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of hidden states (1, S, D) on labels (1, S)."""
    if way == "stock":
        return ForCausalLMLoss(nn.Linear.forward(head, hidden), labels, head.out_features)
    supervised = (labels[0, 1:] != IGNORE_INDEX).nonzero()[:, 0]
    return head(hidden[0, supervised], labels[0, supervised + 1]) / len(supervised)


def drive(way: str, settings: Settings) -> dict[str, float]:
    """Peak of added bytes, how many of them remain as gradients, and the loss."""
    torch.manual_seed(0)
    dtype, device = getattr(torch, settings.dtype), torch.device(settings.device)
    with torch.device(device):
        head = SupervisedHead(settings.hidden_size, settings.vocabulary, bias=False, dtype=dtype)
        hidden = torch.randn(1, settings.positions, settings.hidden_size, dtype=dtype, requires_grad=True)
        labels = torch.randint(settings.vocabulary, (1, settings.positions))
        labels[torch.rand(labels.shape) >= settings.labelled] = IGNORE_INDEX
        labels[0, 1] = 0  # so that even a short row has a label
    head.requires_grad_(not settings.frozen)
    warm = slice(0, min(WARM_POSITIONS, settings.positions))
    loss_of(
        way, head, hidden[:, warm], labels[:, warm]
    ).backward()  # warm up: kernels and threads allocate their memory
    head.weight.grad = hidden.grad = None
    read = _growth(device)
    loss = loss_of(way, head, hidden, labels)
    loss.backward()
    gradients = [tensor.grad for tensor in (head.weight, hidden) if tensor.grad is not None]
    return {"bytes": read(), "gradients": sum(grad.nbytes for grad in gradients), "loss": float(loss.detach())}


def _growth(device: torch.device) -> Callable[[], int]:
    """Start measuring; the returned function gives the peak since then above the level at the start.

    A CPU's peak is that of the whole process: the setup must not take more memory than the work.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - before
    now = _resident()
    return lambda: _peak_resident() - now


def _resident() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return _peak_resident()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_own_process(way: str, settings: Settings) -> dict[str, float]:
    command = [sys.executable, __file__, "--drive", json.dumps([way, asdict(settings)])]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(settings: Settings, run: Callable[[str, Settings], dict[str, float]] = in_own_process) -> dict[str, Any]:
    """Everything that `--json` prints; in bytes."""
    results = {way: run(way, settings) for way in WAYS}
    stock, ours = results["stock"], results["ours"]
    return {
        "settings": asdict(settings),
        "machine": cpu_instructions(),
        "results": results,
        "share": ours["bytes"] / stock["bytes"],
        # without the gradients that both leave, which every exact training step needs
        "share_beyond_gradients": (ours["bytes"] - ours["gradients"]) / (stock["bytes"] - stock["gradients"]),
        "loss_difference": abs(ours["loss"] - stock["loss"]) / stock["loss"],
    }


def print_report(report: dict[str, Any]) -> None:
    settings = report["settings"]
    print(
        f"{report['machine']} {settings['device']}, {settings['dtype']}: vocabulary {settings['vocabulary']:,}, "
        f"{settings['positions']:,} positions, {settings['labelled']:.0%} labelled, hidden size "
        f"{settings['hidden_size']:,}, {'frozen' if settings['frozen'] else 'trained'} head"
    )
    print(f"{'':8}{'peak added':>15}{'left as gradients':>20}{'loss':>10}")
    for way, result in report["results"].items():
        added, left = result["bytes"] / 2**20, result["gradients"] / 2**20
        print(f"{way:8}{added:11,.0f} MiB{left:16,.0f} MiB{result['loss']:10.4f}")
    print(
        f"ours is {report['share']:.1%} of stock; {report['share_beyond_gradients']:.1%} beyond the gradients, which "
        f"both leave. The losses differ by {report['loss_difference']:.1e} of stock's"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--labelled", type=float, default=0.05, help="share of the positions")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--frozen", action="store_true", help="freeze the head")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Returns 1 if the losses differ."""
    options = vars(parse())
    as_json, driven = options.pop("json"), options.pop("drive")
    if driven:
        way, settings = json.loads(driven)
        print(json.dumps(drive(way, Settings(**settings))))
        return 0
    report = measure(Settings(**options))
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
    return int(not report["loss_difference"] <= LOSS_TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
