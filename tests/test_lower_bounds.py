"""constraints-lower.txt pins what setup.cfg asks for at least, so that `make lower-bounds` tests that."""

import configparser
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parents[1]
UNTESTED = {"deepspeed"}  # builds from source; see the Makefile
# without a bound, or not of the library: what `make upstream` and the pages of the documentation need
WITHOUT = {"types-pyyaml", "httpx", "parameterized", "mkdocs-material", "mkdocstrings"}


def requirements() -> list[Requirement]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    parts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    return [Requirement(line) for part in parts for line in part.split("\n") if line]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_each_lower_bound_of_setup_cfg_is_pinned_and_nothing_else():
    pinned = {}
    for line in (ROOT / "constraints-lower.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[canonical(name)] = Version(version)
    asked: dict[str, set[Version]] = {}
    for requirement in requirements():
        bounds = {Version(s.version) for s in requirement.specifier if s.operator in (">=", "==")}
        asked.setdefault(canonical(requirement.name), set()).update(bounds)
    asked = {name: bounds for name, bounds in asked.items() if name not in UNTESTED | WITHOUT}
    assert {name: {version} for name, version in pinned.items()} == asked
