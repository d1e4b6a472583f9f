"""A trained run goes to a Hub by the command, and opens there for somebody who has Transformers alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from early_settings import QUICK_START
from hub_server import Blob, hub_of_this_process, running_hub

from llava_llama31.model_card.card import usage_snippet
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.publishing import publish as publishing
from llava_llama31.trainer.publishing.doors import Doors
from llava_llama31.trainer.recipes.loading import load_recipe
from llava_llama31.trainer.runs.run import run_recipe


ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "e" * 34
REPO = "me/mine"


def start(hub, home: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    environment |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(QUICK_START)}
    return subprocess.run([sys.executable, *command], cwd=home, env=environment, capture_output=True, text=True)


@pytest.mark.timeout(600)
def test_from_a_run_to_a_stranger(recipe_content, make_image, tmp_path, monkeypatch, capfd):
    recipe_content["model"] |= {"licence": "apache-2.0"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_content))
    run = tmp_path / "run"
    run_recipe(load_recipe(str(tmp_path / "recipe.yaml"), output=run), run, command="test", signals=Signals())
    home = tmp_path / "home"
    home.mkdir()
    script = str(ROOT / "examples" / "publish.py")
    with hub_of_this_process(TOKEN, monkeypatch) as hub:
        hub.faults = [("merge", "lost"), ("tag", 403), ("resolve_get", 500)]
        with monkeypatch.context() as patch:  # the next one opens the folder's doors
            patch.setattr(publishing, "open_doors", lambda *_, **__: Doors("", []))
            assert main(["publish", str(run), "--repo-id", REPO, "--json"]) == 2
        first = "".join(capfd.readouterr())
        assert "the Hub answered 403" in first
        second = start(hub, home, script, str(run), "--repo-id", REPO, "--json")
        assert second.returncode == 0, second.stderr
        result = json.loads(second.stdout)
        repo = hub.repos[REPO]
        assert result["revision"] == repo.find("main").oid == repo.find(result["tag"]).oid
        assert result["checks"]["snippet"] and len(result["checks"]["samples"]) == 3
        assert len(repo.history()) == 2 and not repo.private
        card = repo.find("main").files["README.md"].content.decode()
        assert "# mine\n" in card and f'repo = "{REPO}"' in card
        assert TOKEN not in first + second.stdout + second.stderr and not hub.leaks

        # README's snippet, which is the card's, by somebody with an empty cache
        (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
        assert 'hf_hub_download(repo, "samples/1.png")' in code
        code = f"{usage_snippet(REPO)}\n{code}".replace("print(", "texts.append(")
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        make_image(50, 70).save(stranger / "sign.png")
        code = f"texts = []\n{code}\nimport json, sys\nprint(json.dumps([texts, 'llava_llama31' in sys.modules]))"
        opened = start(hub, stranger, "-s", "-P", "-c", code)
        assert opened.returncode == 0, opened.stderr
        texts, has_ours = json.loads(opened.stdout.splitlines()[-1])
        assert len(texts) == 6 and len(set(texts[:5])) == 1 and texts[0] and texts[5] and not has_ours


STRANGER = """
import json, sys
from peft import PeftConfig, PeftModel
from transformers import LlavaNextForConditionalGeneration
adapters, merged = sys.argv[1:]
named = PeftConfig.from_pretrained(adapters)
base = LlavaNextForConditionalGeneration.from_pretrained(named.base_model_name_or_path, revision=named.revision)
adapted = PeftModel.from_pretrained(base, adapters).merge_and_unload().state_dict()
wanted = LlavaNextForConditionalGeneration.from_pretrained(merged).state_dict()
assert adapted.keys() == wanted.keys()
apart = max((adapted[name] - wanted[name]).abs().max().item() for name in wanted)
print(json.dumps([apart, "llava_llama31" in sys.modules]))
"""


@pytest.mark.torture
@pytest.mark.timeout(900)
def test_adapters_reach_a_stranger(recipe_content, exported, make_image, tmp_path):
    """Published by the command for a base on the Hub that has moved since; opened by PEFT and by the card's code."""
    base = exported / "other"
    del recipe_content["evaluation"], recipe_content["stages"]["projector"]
    recipe_content["model"] = {"checkpoint": str(base), "dtype": "float32", "license": "apache-2.0"}
    only = {"trainable": ["language_model"], "learning_rate": 1e-2, "lora": {"r": 4, "alpha": 8}}
    recipe_content["stages"]["instruct"] |= only
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_content))
    run = tmp_path / "run"
    run_recipe(load_recipe(str(tmp_path / "recipe.yaml"), output=run), run, command="test", signals=Signals())
    home, stranger = tmp_path / "home", tmp_path / "stranger"
    home.mkdir()
    stranger.mkdir()
    make_image(50, 70).save(stranger / "sign.png")
    command = ("-m", "llava_llama31.trainer.cli")
    with running_hub(TOKEN) as hub:
        files = {path.name: Blob(path.read_bytes()) for path in base.iterdir() if path.is_file()}
        hub.create("me/base", private=False).commit("refs/heads/main", "the base", files)
        made = start(hub, home, *command, "export", str(run), "--adapter", "--base", "me/base")
        assert made.returncode == 0, made.stderr
        hub.repos["me/base"].commit("refs/heads/main", "no longer it", {"README.md": Blob(b"gone")})
        folder = made.stdout.strip()
        sent = start(hub, home, *command, "publish", folder, "--repo-id", "me/adapters", "--json")
        assert sent.returncode == 0, sent.stderr
        assert json.loads(sent.stdout)["checks"]["snippet"] and not hub.leaks
        assert "model.safetensors" not in hub.repos["me/adapters"].find("main").files

        opened = start(hub, stranger, "-I", "-c", STRANGER, "me/adapters", str(run / "export"))
        assert opened.returncode == 0, opened.stderr
        apart, has_ours = json.loads(opened.stdout.splitlines()[-1])
        assert apart < 1e-6 and not has_ours
        card = hub.repos["me/adapters"].find("main").files["README.md"].content.decode()
        (code,) = re.findall(r"```python\n([^`]*PeftModel[^`]*)\n```", card)
        asked = start(hub, stranger, "-I", "-c", code)
        assert asked.returncode == 0, asked.stderr
        stock, remote = asked.stdout.splitlines()[-2:]
        assert stock == remote
