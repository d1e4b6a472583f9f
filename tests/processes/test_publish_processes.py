"""A trained run goes to a Hub by the command, and opens there for somebody who has Transformers alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import running_hub

from llava_llama31.model_card.card import usage_snippet
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.recipes.loading import load_recipe
from llava_llama31.trainer.runs.run import run_recipe


ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "e" * 34
REPO = "me/mine"


def start(hub, home: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    environment |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.run([sys.executable, *command], cwd=home, env=environment, capture_output=True, text=True)


@pytest.mark.timeout(600)
def test_from_a_run_to_a_stranger(recipe_content, make_image, tmp_path):
    recipe_content["model"] |= {"licence": "apache-2.0"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_content))
    run = tmp_path / "run"
    run_recipe(load_recipe(str(tmp_path / "recipe.yaml"), output=run), run, command="test", signals=Signals())
    home = tmp_path / "home"
    home.mkdir()
    script = str(ROOT / "examples" / "publish.py")
    with running_hub(TOKEN) as hub:
        hub.faults = [("merge", "lost"), ("tag", 403), ("resolve_get", 500)]
        first = start(hub, home, script, str(run), "--repo-id", REPO, "--json")
        assert first.returncode == 2 and "the Hub answered 403" in first.stderr and TOKEN not in first.stderr
        second = start(hub, home, script, str(run), "--repo-id", REPO, "--json")
        assert second.returncode == 0, second.stderr
        result = json.loads(second.stdout)
        repo = hub.repos[REPO]
        assert result["revision"] == repo.find("main").oid == repo.find(result["tag"]).oid
        assert result["checks"]["snippet"] and len(result["checks"]["samples"]) == 3
        assert len(repo.history()) == 2 and not repo.private
        card = repo.find("main").files["README.md"].content.decode()
        assert "# mine\n" in card and f'repo = "{REPO}"' in card
        assert TOKEN not in first.stdout + first.stderr + second.stdout + second.stderr and not hub.leaks

        # README's snippet, which is the card's, by somebody with an empty cache
        (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
        assert 'hf_hub_download(repo, "samples/1.png")' in code
        code = f"{usage_snippet(REPO)}\n{code}".replace("print(", "texts.append(")
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        make_image(50, 70).save(stranger / "sign.png")
        code = f"texts = []\n{code}\nimport json, sys\nprint(json.dumps([texts, 'llava_llama31' in sys.modules]))"
        opened = start(hub, stranger, "-I", "-c", code)
        assert opened.returncode == 0, opened.stderr
        texts, has_ours = json.loads(opened.stdout.splitlines()[-1])
        assert len(texts) == 6 and len(set(texts[:5])) == 1 and texts[0] and texts[5] and not has_ours
