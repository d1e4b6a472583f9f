"""Which of NVIDIA's GPUs a torch build has kernels for."""

from collections.abc import Sequence


def is_built_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Machine code runs on the same major version from its minor version on, PTX on everything newer.

    Args:
        capability: major and minor version of the GPU.
        architectures: as `torch.cuda.get_arch_list` names them, e.g. sm_90, sm_90a or compute_90.
    """
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        built = (int(digits[:-1]), int(digits[-1]))
        if number.endswith("a"):  # for exactly one GPU model
            fits = capability == built
        elif kind == "sm":
            fits = capability[0] == built[0] and capability >= built
        else:
            fits = capability >= built
        if fits:
            return True
    return False
