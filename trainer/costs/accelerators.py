"""Common GPUs by their data sheets, and the shares of those figures that a step is assumed to reach.

Nothing here has been measured by this project; `docs/plan.md` says what follows from it.
"""

from dataclasses import dataclass


_GIB = 2**30
# shares of a data sheet's figures that well-kept kernels reach; assumptions
PRODUCTS, ATTENTION, BANDWIDTH, LINK = 0.65, 0.35, 0.85, 0.7


@dataclass(frozen=True)
class Accelerator:
    """One GPU.

    Args:
        name: as `--device` takes it.
        memory: bytes that torch reports.
        bfloat16, float32: dense products, FLOP/s; a GPU without bfloat16 emulates it by float32.
        bandwidth: of its memory, bytes/s.
        link: to the other GPUs of the machine, bytes/s in one direction.
    """

    name: str
    memory: float
    bfloat16: float
    float32: float
    bandwidth: float
    link: float

    def peak(self, precision: str) -> float:
        """FLOP/s of the products of a stage in this precision."""
        return self.float32 if precision == "float32" else self.bfloat16


ACCELERATORS = {
    gpu.name: gpu
    for gpu in (
        Accelerator("a100-80", 79.1 * _GIB, 312e12, 19.5e12, 2.04e12, 300e9),
        Accelerator("a100-40", 39.4 * _GIB, 312e12, 19.5e12, 1.56e12, 300e9),
        Accelerator("h100", 79.1 * _GIB, 989e12, 67e12, 3.35e12, 450e9),
        Accelerator("h200", 139.8 * _GIB, 989e12, 67e12, 4.8e12, 450e9),
        Accelerator("l40s", 44.4 * _GIB, 362e12, 91.6e12, 0.864e12, 32e9),
        Accelerator("rtx4090", 23.6 * _GIB, 165e12, 82.6e12, 1.01e12, 32e9),
        Accelerator("rtx3090", 23.6 * _GIB, 71e12, 35.6e12, 0.936e12, 32e9),
        Accelerator("v100", 31.7 * _GIB, 15.7e12, 15.7e12, 0.9e12, 150e9),
        Accelerator("t4", 14.6 * _GIB, 8.1e12, 8.1e12, 0.32e12, 16e9),
    )
}
