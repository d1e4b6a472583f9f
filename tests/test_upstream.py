"""`make upstream` finds the tests of Transformers that end differently with our classes; on a made-up checkout."""

import importlib.util
import multiprocessing
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest
import transformers


RUN = Path(__file__).with_name("upstream") / "run.py"
MODELING = """
import unittest

from transformers import LlavaNextConfig


class LlavaNextVisionText2TextModelTester:
    config_class = LlavaNextConfig


class LlavaNextForConditionalGenerationModelTest(unittest.TestCase):
    model_tester_class = LlavaNextVisionText2TextModelTester

    def is_stock(self):
        return self.model_tester_class.config_class is LlavaNextConfig

    def test_same(self):
        pass

    def test_fails_with_both(self):
        self.fail()

    def test_planted(self):
        self.assertTrue(self.is_stock())

    def test_planted_in_a_subtest(self):
        for part in ("a", "b"):
            with self.subTest(part):
                self.assertTrue(part == "a" or self.is_stock())

    def test_known(self):
        if not self.is_stock():
            self.skipTest("ours")

    def test_fails_with_stock(self):
        self.assertFalse(self.is_stock())
"""
PROCESSING = """
import unittest

from transformers import LlavaNextProcessor


class LlavaNextProcessorTest(unittest.TestCase):
    processor_class = LlavaNextProcessor

    def test_planted(self):
        self.assertIs(self.processor_class, LlavaNextProcessor)

    def test_tokenizer(self):
        tokenizer = self._setup_tokenizer()
        self.assertEqual(tokenizer.decode(tokenizer("<image>a b").input_ids), "<image>a b")
"""
EXCEPTIONS = """
[[exception]]
test = "model::test_known"
ours = "skipped"
reason = "a reason"

[[exception]]
test = "model::test_same"
ours = "failed"
reason = "no longer so"
"""


@pytest.fixture(scope="module")
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("upstream_run", RUN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "transformers"
    (folder / "tests/models/llava_next").mkdir(parents=True)
    for package in ("tests", "tests/models", "tests/models/llava_next"):
        (folder / package / "__init__.py").touch()
    (folder / "conftest.py").touch()
    (folder / "src/transformers").mkdir(parents=True)
    (folder / "src/transformers/__init__.py").write_text('__version__ = "0.1"\n')
    (folder / "tests/models/llava_next/test_modeling_llava_next.py").write_text(MODELING)
    (folder / "tests/models/llava_next/test_processing_llava_next.py").write_text(PROCESSING)
    return folder


def ended(run: ModuleType, folder: Path, *arguments: str) -> tuple[int | None, str]:
    """Exit code and output of the command in a fork, whose tests are those of the checkout alone."""

    def in_fork() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "conftest")]:
            del sys.modules[name]
        for name in [name for name in os.environ if name.startswith("PYTEST")]:
            del os.environ[name]
        os.chdir(folder)
        with (folder / "printed").open("w") as printed, redirect_stdout(printed), redirect_stderr(printed):
            sys.argv = ["run.py", *arguments]
            code = run.main()
        os._exit(code)

    fork = multiprocessing.get_context("fork").Process(target=in_fork)
    fork.start()
    fork.join(200)
    return fork.exitcode, (folder / "printed").read_text()


@pytest.mark.slow
def test_planted_differences_and_stale_exceptions_are_found(run, checkout, tmp_path):
    (tmp_path / "exceptions.toml").write_text(EXCEPTIONS)
    code, printed = ended(run, tmp_path, str(checkout), "--exceptions", str(tmp_path / "exceptions.toml"))
    assert code == 1, printed
    said = printed.split("\nTransformers ")[1].splitlines()
    assert said == [
        f"{transformers.__version__}, its tests 0.1",
        "tests of another version may fail with both classes, and then compare nothing",
        "StockTest: 6 passed, 0 xfailed, 0 skipped, 2 failed",
        "OurTest: 3 passed, 0 xfailed, 1 skipped, 4 failed",
        "no loss: model::test_fails_with_stock: failed with stock, passed with ours",
        "exception: model::test_known: passed with stock, skipped with ours",
        "  a reason",
        "FAULT: model::test_planted: passed with stock, failed with ours",
        "FAULT: model::test_planted_in_a_subtest: passed with stock, failed with ours",
        "FAULT: processor::test_planted: passed with stock, failed with ours",
        "STALE: not so any more: model::test_same: passed with stock, failed with ours",
    ]


@pytest.mark.slow
def test_tests_that_cannot_run_are_no_success(run, checkout, tmp_path):
    (checkout / "tests/models/llava_next/test_modeling_llava_next.py").write_text("import nothing_of_that_name\n")
    code, printed = ended(run, tmp_path, str(checkout))
    assert code == 2 and "nothing_of_that_name" in printed and "cannot run" in printed


@pytest.mark.parametrize(
    ("folders", "named"), [([], "not part of its package"), (["elsewhere"], "conftest.py is miss")]
)
def test_without_a_checkout_it_says_how_to_get_one(run, tmp_path, monkeypatch, capsys, folders, named):
    monkeypatch.setattr(sys, "argv", ["run.py", *(str(tmp_path / folder) for folder in folders)])
    assert run.main() == 2
    said = capsys.readouterr().out
    assert named in said and f"git clone --depth 1 --branch v{transformers.__version__} https://github.com/" in said


def test_an_exception_is_for_one_outcome(run):
    found = [run.Difference("model::a", "passed", "failed"), run.Difference("model::b", "skipped", "failed")]
    entry = {"test": "model::a", "ours": "failed", "reason": "why"}
    fine, wrong = run.judge(found, [entry])
    assert wrong == [] and len(fine) == 2
    _, wrong = run.judge(found, [entry | {"ours": "skipped"}])
    assert [line.partition(":")[0] for line in wrong] == ["FAULT", "STALE"]
