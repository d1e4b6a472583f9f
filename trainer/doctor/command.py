"""Gather, judge, report: `llava-llama31 doctor`, alone or as the script of a launcher."""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from llava_llama31.trainer.doctor import checks, facts
from llava_llama31.trainer.doctor.findings import DoctorFinding
from llava_llama31.trainer.doctor.probe import Probes, all_reduce_commands


Table: TypeAlias = list[tuple[str, Callable[[], list[DoctorFinding]]]]  # name and check

EXIT_ERRORS = 1
_HUB_SECONDS = 4.0
_LOCAL_SECONDS = 20.0
_RANKS_SECONDS = 60.0
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor_command(output: str | None, *, json_output: bool, debug: bool = False) -> int:
    """Print the findings; returns 0, or 1 where one of them is an error.

    Raises:
        UserError: a launcher's variables are incomplete, or its ranks don't meet.
    """
    folder = Path(output or "runs")
    if "RANK" not in os.environ:
        found: list[DoctorFinding] | None = _local_findings(folder, debug, alone=True)
    else:
        from llava_llama31.trainer.doctor.ranks import Place, survey

        place = Place.of_environment()
        own = _local_findings(folder, debug, alone=False) if place.local_rank == 0 else []
        found = survey(place, own, folder, _cache(), _RANKS_SECONDS)
    if found is None:
        return 0
    report(found, json_output=json_output)
    return EXIT_ERRORS if any(finding.level == "error" for finding in found) else 0


def _local_findings(output: Path, debug: bool, *, alone: bool) -> list[DoctorFinding]:
    """Of this machine; `alone` also lets two processes of it talk to each other, and its GPUs."""
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
        "cache": _cache,
        "Hub cache": facts.hub_cache,
        "temporary": lambda: Path(tempfile.gettempdir()),
    }
    return [
        ("machine", lambda: checks.check_machine(facts.machine(), facts.launch().number("LOCAL_WORLD_SIZE"))),
        ("packages", lambda: checks.check_packages(facts.packages())),
        ("installation", lambda: checks.check_installations(facts.installations())),
        ("GPUs", lambda: checks.check_gpus(facts.gpus())),
        ("DeepSpeed", lambda: checks.check_compilers(facts.compilers())),
        ("accelerate config", lambda: checks.check_accelerate_config(facts.accelerate_config())),
        ("environment", lambda: checks.check_variables(facts.launch())),
        *((f"{role} folder", partial(_check_folder, role, path)) for role, path in folders.items()),
        ("Hub", lambda: checks.check_hub(facts.hub(_HUB_SECONDS))),
    ]


def _cache() -> Path:
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


def report(found: Sequence[DoctorFinding], *, json_output: bool) -> None:
    """Findings on stdout, errors last, or as one JSON object."""
    counts = {level: sum(finding.level == level for finding in found) for level in _STYLES}
    if json_output:
        content = {
            "ok": not counts["error"],
            "num_errors": counts["error"],
            "num_warnings": counts["warning"],
            "findings": [asdict(finding) for finding in found],
        }
        sys.stdout.write(json.dumps(content) + "\n")
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True, highlight=False)
    for level, style in _STYLES.items():
        for finding in (finding for finding in found if finding.level == level):
            name = f"{finding.check} on {finding.host}" if finding.host else finding.check
            console.print(f"[{style}]{level:8}[/] {escape(name)}: {escape(finding.what)}")
            if level != "ok":
                console.print(f"{'':9}why: {escape(finding.why)}\n{'':9}fix: {escape(finding.fix)}")
    console.print(f"{counts['error']} error(s), {counts['warning']} warning(s), {counts['ok']} ok")
