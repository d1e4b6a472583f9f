"""SECURITY.md names a test for every threat, and every test that it names is there."""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
ROWS = [line for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]


def test_every_threat_has_tests_that_exist():
    assert len(ROWS) > 15
    for row in ROWS:
        threat, defence, tests = (cell.strip() for cell in row.strip("|").split("|"))
        named = re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", tests)
        assert threat and defence and named and len(named) == tests.count("`") // 2, row
        for file, name in named:
            functions = [
                node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
            ]
            assert name in {function.name for function in functions}, f"{file}::{name}"
