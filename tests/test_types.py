"""The type check follows the installed names: a wrong argument in a call across two rooms is found."""

import re
import shutil
from pathlib import Path

import pytest
from mypy import api


ROOT = Path(__file__).parents[1]
FOLDERS = ("modeling_llava_llama31", "processing", "trainer", "model_card")
NAMES = {
    "from llava_llama31.trainer.recipes.schema import Stage": "Stage",
    "from llava_llama31.trainer.errors import UserError": "UserError",
    "from llava_llama31.processing import LlavaLlama31Processor": "LlavaLlama31Processor",
    "from llava_llama31 import LlavaLlama31ForConditionalGeneration": "LlavaLlama31ForConditionalGeneration",
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Check one more module of a copy of the package, by the project's own settings."""
    copy = tmp_path_factory.mktemp("package")
    package = copy / ".venv/links/llava_llama31"
    ignored = shutil.ignore_patterns("__pycache__", "*.json", "*.yaml")
    shutil.copytree(ROOT / FOLDERS[0], package, ignore=ignored)
    for folder in FOLDERS[1:]:
        shutil.copytree(ROOT / folder, package / folder, ignore=ignored)
    settings = (ROOT / "setup.cfg").read_text()
    assert "\npackages = llava_llama31\n" in settings
    (copy / "setup.cfg").write_text(settings.replace("\npackages = llava_llama31\n", "\n"))
    # what mypy knows of torch and Transformers from the check before the tests: a second instead of half a minute
    if (ROOT / ".mypy_cache").is_dir():
        shutil.copytree(ROOT / ".mypy_cache", copy / "cache")

    def check(room: str, text: str) -> str:
        module = package / "trainer" / room / "planted.py"
        module.write_text(text)
        options = ["--config-file", str(copy / "setup.cfg"), "--cache-dir", str(copy / "cache")]
        printed, errors, _ = api.run([*options, "-m", f"llava_llama31.trainer.{room}.planted"])
        module.unlink()
        assert not errors, errors
        return "\n".join(line for line in printed.splitlines() if "planted.py" in line)

    return check


CALLS = (
    "from pathlib import Path\n\nfrom llava_llama31.trainer.checkpoint import atomic_folders\n\n\n"
    "def right(folder: Path) -> int:\n    return atomic_folders.size(folder)\n\n\n"
    "def wrong(folder: Path) -> int:\n    return atomic_folders.size(3)\n"
)


@pytest.mark.slow
def test_a_wrong_argument_across_two_rooms_is_found_and_the_installed_names_have_types(checked):
    lines = [*NAMES, *(f"reveal_type({name})" for name in NAMES.values()), CALLS]
    printed = checked("data", "\n".join(lines)).splitlines()
    (error,) = (line for line in printed if ": error: " in line)
    assert '"size" has incompatible type "int"' in error
    found = dict(zip(NAMES.values(), (line for line in printed if "Revealed type" in line), strict=True))
    for name, line in found.items():
        assert re.search(rf'-> llava_llama31\.[\w.]*\b{name}"$', line), line
