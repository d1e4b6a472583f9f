"""Gather the facts of this machine and judge them."""

import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from llava_llama31.trainer.doctor import checks, facts
from llava_llama31.trainer.doctor.findings import DoctorFinding
from llava_llama31.trainer.doctor.probe import Probes, all_reduce_commands


Table: TypeAlias = list[tuple[str, Callable[[], list[DoctorFinding]]]]  # name and check

_HUB_SECONDS = 4.0
# with the import of torch, which takes minutes for eight processes on a network file system
_LOCAL_SECONDS = 120.0


def local_findings(output: Path, debug: bool, *, alone: bool) -> list[DoctorFinding]:
    """Findings on this machine; `alone` also tests the communication between two processes, and between its GPUs."""
    modules = [module for module in ("torchvision", "torchao") if find_spec(module)]
    with tempfile.TemporaryDirectory() as scratch:
        pair = all_reduce_commands("gloo", 2, Path(scratch), _LOCAL_SECONDS) if alone else []
        with Probes([*(["import", module] for module in modules), *pair]) as probes:
            found = _run(_checks(output), debug)
            outcomes = probes.outcomes(_LOCAL_SECONDS)
        by_module = dict(zip(modules, outcomes, strict=False))
        table: Table = [
            ("torchvision", lambda: checks.check_torchvision(by_module.get("torchvision"))),
            ("torchao", lambda: checks.check_torchao(by_module.get("torchao"), len(facts.gpus().devices))),
        ]
        if alone:
            table += [
                ("gloo", lambda: checks.check_communication("gloo", outcomes[len(modules) :])),
                ("nccl", lambda: _check_nccl(Path(scratch))),
            ]
        return found + _run(table, debug)


def _checks(output: Path) -> Table:
    folders: dict[str, Callable[[], Path]] = {
        "output": lambda: output,
        "cache": cache_folder,
        "Hub cache": facts.hub_cache,
        "temporary": lambda: Path(tempfile.gettempdir()),
    }
    return [
        ("machine", lambda: checks.check_machine(facts.machine(), facts.launch().number("LOCAL_WORLD_SIZE"))),
        ("CPU", lambda: checks.check_processor(facts.cpu_speed(), len(facts.gpus().devices))),
        ("packages", lambda: checks.check_packages(facts.packages())),
        ("installation", lambda: checks.check_installations(facts.installations())),
        ("GPUs", lambda: checks.check_gpus(facts.gpus())),
        ("DeepSpeed", lambda: checks.check_compilers(facts.compilers())),
        ("accelerate config", lambda: checks.check_accelerate_config(facts.accelerate_config())),
        ("environment", lambda: checks.check_variables(facts.launch())),
        *((f"{role} folder", partial(_check_folder, role, path)) for role, path in folders.items()),
        ("Hub", lambda: checks.check_hub(facts.hub(_HUB_SECONDS))),
    ]


def cache_folder() -> Path:
    from llava_llama31.trainer.data.check.check import default_cache_dir

    return default_cache_dir()


def _check_folder(role: str, path: Callable[[], Path]) -> list[DoctorFinding]:
    return checks.check_folder(facts.folder(role, path()))


def _check_nccl(scratch: Path) -> list[DoctorFinding]:
    """One process for each GPU, if there are several."""
    num_gpus = len(facts.gpus().devices)
    if num_gpus < 2:
        return []
    with Probes(all_reduce_commands("nccl", num_gpus, scratch, _LOCAL_SECONDS)) as probes:
        return checks.check_communication("nccl", probes.outcomes(_LOCAL_SECONDS))


def _run(table: Table, debug: bool) -> list[DoctorFinding]:
    """Findings of all checks; one that fails is a finding itself."""
    found = []
    for name, check in table:
        try:
            found += check()
        except Exception as error:  # whatever it is, the other checks go on
            if debug:
                traceback.print_exc()
            what = f"the check failed: {type(error).__name__}: {error}"
            why = "what it looks for may be there"
            found.append(DoctorFinding(name, "error", what, why, "report it with what --debug prints"))
    return found
