"""`llava-llama31 export-metric`: the folder of a Hugging Face Space that `evaluate.load` opens, offline too."""

import os
import shutil
from importlib import resources
from pathlib import Path

from llava_llama31.trainer.errors import UserError


# a file of the folder -> where it comes from; the metric's own script gets the folder's name
_SOURCES = {
    "vqa_accuracy.py": ("llava_llama31.trainer.evaluation", "vqa_accuracy.py"),
    "app.py": ("llava_llama31.trainer.evaluation", "space/app.py"),
    "requirements.txt": ("llava_llama31.trainer.evaluation", "space/requirements.txt"),
    "README.md": ("llava_llama31.trainer.evaluation", "space/README.md"),
    "LICENSE": ("llava_llama31.model_card", "licences/apache-2.0.txt"),
}
_SCRIPT = ("llava_llama31.trainer.evaluation", "textvqa_accuracy.py")


def export_metric(output: str | Path) -> Path:
    """Write the metric's folder, ready to be pushed as a Space; it appears when it is complete.

    `evaluate.load(output)` looks for `output/NAME.py` with the folder's own name, so the script is called that.

    Args:
        output: a new folder, or an empty one.

    Raises:
        UserError: the folder holds something, or its name cannot be a script's.
    """
    folder = Path(os.path.abspath(output))
    script = f"{folder.name}.py"
    if not folder.name or "." in folder.name or script in _SOURCES:
        what = f"{folder.name!r} cannot be the name of the metric's script"
        raise UserError(what, where=str(output), fix="name the folder textvqa_accuracy")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("is not empty", where=str(output), fix="pass another --output, or remove it")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, (package, source) in (_SOURCES | {script: _SCRIPT}).items():
        (partial / name).write_bytes((resources.files(package) / source).read_bytes())
    os.replace(partial, folder)
    return folder
