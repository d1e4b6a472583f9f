"""`llava-llama31 doctor`, alone or as the script of a launcher."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llava_llama31.trainer.commands.options import add_json, counted
from llava_llama31.trainer.redaction import plain


if TYPE_CHECKING:
    from llava_llama31.trainer.doctor.findings import DoctorFinding


HELP = "find what is missing on this machine, or in a launch, and how to fix it"
EXIT_ERRORS = 1
_RANKS_SECONDS = 180.0
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", help="folder that runs will write to; default: runs")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the findings; returns 0, or 1 where one of them is an error.

    Raises:
        UserError: a launcher's variables are incomplete, or its ranks don't meet.
    """
    from llava_llama31.trainer.doctor.gathering import cache_folder, local_findings

    folder = Path(options.output or "runs")
    if "RANK" not in os.environ:
        found: list[DoctorFinding] | None = local_findings(folder, options.debug, alone=True)
    else:
        from llava_llama31.trainer.doctor.ranks import Place, survey

        place = Place.of_environment()
        own = local_findings(folder, options.debug, alone=False) if place.local_rank == 0 else []
        found = survey(place, own, folder, cache_folder(), _RANKS_SECONDS)
    if found is None:
        return 0
    report(found, json_output=options.json_output)
    return EXIT_ERRORS if any(finding.level == "error" for finding in found) else 0


def report(found: Sequence["DoctorFinding"], *, json_output: bool) -> None:
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
    from llava_llama31.trainer.terminal import Terminal, styled

    console = Terminal()
    for level, style in _STYLES.items():
        for finding in (finding for finding in found if finding.level == level):
            name = f"{finding.check} on {finding.host}" if finding.host else finding.check
            console.print(styled((f"{level:8}", style), (f" {name}: {plain(finding.what)}", "")))
            if level != "ok":
                console.print(f"{'':9}why: {plain(finding.why)}\n{'':9}fix: {plain(finding.fix)}")
    console.print(f"{counted(counts['error'], 'error')}, {counted(counts['warning'], 'warning')}, {counts['ok']} ok")
