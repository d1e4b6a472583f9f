"""Runs Transformers' own LlavaNext tests on stock's classes and on ours, and shows which of them end differently.

    python tests/upstream/run.py DIR

DIR is a checkout of Transformers' repository at the installed version. A test that passes with stock and not with ours
is a fault, or exceptions.toml names it with the reason. It needs no network, and minutes on one core.

Exit codes: 0 all differences are exceptions; 1 another test differs, or an exception does not; 2 DIR is not such a
checkout, or its tests cannot run.
"""

import argparse
import collections
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import tomllib
import transformers


HERE = Path(__file__).parent
CASES = ("model_cases.py", "processor_cases.py")
STOCK, OURS = "StockTest", "OurTest"  # the classes in them
NEEDED = ("conftest.py",) + tuple(
    f"tests/models/llava_next/test_{part}_llava_next.py" for part in ("modeling", "processing")
)
BEST_FIRST = ("passed", "xfailed", "skipped", "failed")


class Difference(NamedTuple):
    """A test, as `model::test_name`, and how it ends with either class."""

    test: str
    stock: str
    ours: str

    def __str__(self) -> str:
        return f"{self.test}: {self.stock} with stock, {self.ours} with ours"


class Outcomes:
    """A pytest plugin that keeps how each test of each class ended: the worst of its parts and subtests."""

    def __init__(self) -> None:
        self.of: dict[str, dict[str, str]] = {STOCK: {}, OURS: {}}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file, owner, name = report.nodeid.split("::")
        outcome = "xfailed" if report.skipped and "wasxfail" in vars(report) else report.outcome
        test = f"{file.removesuffix('_cases.py')}::{name}"
        self.of[owner][test] = max(self.of[owner].get(test, "passed"), outcome, key=BEST_FIRST.index)

    def differences(self) -> list[Difference]:
        stock, ours = self.of[STOCK], self.of[OURS]
        tests = sorted(stock.keys() | ours.keys())
        both = [Difference(test, stock.get(test, "absent"), ours.get(test, "absent")) for test in tests]
        return [one for one in both if one.stock != one.ours]


def judge(found: Sequence[Difference], exceptions: Sequence[Mapping[str, str]]) -> tuple[list[str], list[str]]:
    """Lines about differences that are expected or no loss, and about those and exceptions that are neither."""
    expected = {(entry["test"], "passed", entry["ours"]): entry["reason"] for entry in exceptions}
    fine, wrong = [], []
    for one in found:
        if one in expected:
            fine.append(f"exception: {one}\n  {expected[one].strip()}")
        elif one.stock == "passed":
            wrong.append(f"FAULT: {one}")
        else:
            fine.append(f"no loss: {one}")
    stale = [Difference(*key) for key in expected if key not in found]
    return fine, wrong + [f"STALE: not so any more: {one}" for one in stale]


def explain_checkout(checkout: Path | None) -> str | None:
    """What is wrong with the folder and how to get one that fits."""
    how = (
        f"git clone --depth 1 --branch v{transformers.__version__} https://github.com/huggingface/transformers DIR && "
        "make upstream TRANSFORMERS=DIR"
    )
    if checkout is None:
        return f"Transformers' tests are not part of its package. Get them: {how}"
    missing = [name for name in NEEDED if not (checkout / name).is_file()]
    if missing:
        return f"{checkout} is not a checkout of Transformers' repository: {missing[0]} is missing. Get one: {how}"
    return None


def version_of(checkout: Path) -> str:
    init = checkout / "src/transformers/__init__.py"
    found = re.search(r'^__version__ = "(.+)"', init.read_text(encoding="utf-8"), re.M) if init.is_file() else None
    return found[1] if found else "unknown"


def run_tests(checkout: Path) -> Outcomes | None:
    """How the tests end; None where they cannot run."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(checkout)  # some of the tests read files of their repository
    sys.path.insert(0, str(checkout))
    outcomes = Outcomes()
    options = ["-c", os.devnull, f"--rootdir={HERE}", "--noconftest", "-p", "conftest", "-p", "no:cacheprovider"]
    options += ["-q", "-W", "ignore", "--tb=short", *(str(HERE / name) for name in CASES)]
    code = pytest.main(options, plugins=[outcomes])
    return outcomes if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", metavar="DIR", nargs="?", type=Path)
    parser.add_argument("--exceptions", type=Path, default=HERE / "exceptions.toml")
    options = parser.parse_args()
    trouble = explain_checkout(options.checkout)
    if trouble is not None:
        print(trouble)
        return 2
    exceptions = tomllib.loads(options.exceptions.read_text(encoding="utf-8")).get("exception", [])
    checkout = options.checkout.resolve()
    version = version_of(checkout)
    outcomes = run_tests(checkout)
    if outcomes is None:
        print(f"the tests of {checkout} cannot run; see above")
        return 2
    print(f"\nTransformers {transformers.__version__}, its tests {version}")
    if version != transformers.__version__:
        print("tests of another version may fail with both classes, and then compare nothing")
    for owner, of in outcomes.of.items():
        counts = collections.Counter(of.values())
        print(f"{owner}: " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in BEST_FIRST))
    fine, wrong = judge(outcomes.differences(), exceptions)
    print(*fine, *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
