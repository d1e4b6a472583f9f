"""What tests of real processes share; the models, data and recipes are those of tests/conftest.py."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from forks import Forks


@pytest.fixture(scope="session")
def forks(tmp_path_factory, shared_folder, pristine_recipe, adopted_orphans) -> Iterator[Forks]:
    """The launcher of this suite: one process that has imported everything, and forks.

    A run comes first, from which it learns what a run imports on its way.
    """
    folder = tmp_path_factory.mktemp("forks")
    forks = Forks(folder, shared_folder)
    if forks.is_new:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(pristine_recipe, sort_keys=False))
        job = forks.start("train", folder / "recipe.yaml", "--output", folder / "run")
        assert job.returncode == 0, job.output()
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def launch():
    """Start a script of examples/ in a process of its own, or in several through `accelerate launch`."""

    def start(script: str, *arguments: str, processes: int = 1) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        command = [str(Path(__file__).parents[2] / "examples" / script), *arguments]
        if processes > 1:
            options = f"--multi_gpu --num_machines 1 --num_processes {processes} --main_process_port 0"
            options += " --mixed_precision no --dynamo_backend no"
            command = ["-m", "accelerate.commands.launch", *options.split(), *command]
        return subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    return start
