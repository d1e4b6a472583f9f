"""The gate: a whole folder passes, and a folder that breaks one rule is refused by that rule with file and fix."""

import atexit
import base64
import gc
import importlib.util
import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stock_pixels import resize_by_pil

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.export.export import write_export
from llava_llama31.trainer.model.opening import open_model
from llava_llama31.trainer.publishing import door as door_process
from llava_llama31.trainer.publishing import doors
from llava_llama31.trainer.publishing.door import open_door
from llava_llama31.trainer.publishing.doors import empty_cache, open_doors
from llava_llama31.trainer.publishing.gate import REQUIRED, RULES, check_folder
from llava_llama31.trainer.publishing.gate_code import code_problems
from llava_llama31.trainer.publishing.gate_files import POSSIBLE_SECRET, SECRETS
from llava_llama31.trainer.publishing.pickles import holds_pickle
from llava_llama31.trainer.runs.base_model import is_ours


TOKEN = "hf_" + "S" * 34


@pytest.fixture
def folder(exported, tmp_path):
    return Path(shutil.copytree(exported / "llama", tmp_path / "model"))


@pytest.mark.parametrize("kind", SECRETS)
@settings(max_examples=20)
@given(st.data())
def test_every_secret_is_a_possible_one(kind, data):
    assert POSSIBLE_SECRET.search(data.draw(st.from_regex(SECRETS[kind])))


def sign(folder: Path) -> None:
    """A manifest that fits, so that only the rule under test can object."""
    staging = atomic_folders.staging_folder(folder)
    (folder / atomic_folders.MANIFEST).unlink(missing_ok=True)
    shutil.copytree(folder, staging, dirs_exist_ok=True)
    atomic_folders.commit(staging, folder, {})


def edit_json(folder: Path, file: str, **values) -> None:
    content = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps(content))


def edit_text(folder: Path, file: str, old: str, new: str) -> None:
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, *, whole_index: bool = True, keep: bool = False) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if not keep:
        (folder / "model.safetensors").unlink()
    if not whole_index:
        weight_map[names[0]] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def zip_in(folder: Path) -> None:
    with zipfile.ZipFile(folder / "tokenizer.model", "w") as archive:
        archive.writestr("data.txt", "x")


def append(folder: Path, file: str, content: bytes) -> None:
    with (folder / file).open("ab") as stream:
        stream.write(content)


def write(folder: Path, file: str, content: bytes, size: int | None = None) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(content)
    if size is not None:
        os.truncate(folder / file, size)  # takes no space


def map_to(folder: Path, **classes: str) -> None:
    edit_json(folder, "config.json", auto_map=json.loads((folder / "config.json").read_text())["auto_map"] | classes)


def edit_metadata(folder: Path, **metadata: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **metadata})


def double(tensors: dict[str, torch.Tensor]) -> None:
    """Give a tensor of the tower its other name too."""
    name = "vision_tower.vision_model.post_layernorm.bias"
    tensors[f"model.{name}"] = tensors[name] + 1


PICKLED = pickle.dumps(Path("x"))
OLD_PICKLE = pickle.dumps(Path("x"), protocol=0)
NEEDED = [*REQUIRED, "NOTICE", "preprocessor_config.json"]
NEEDED += ["configuration_llava_llama31.py", "processing_llava_llama31.py"]
# rule, file that is named, what is done to a whole folder
BREAKS = [
    *(("complete", file, lambda f, file=file: (f / file).unlink()) for file in NEEDED),
    ("complete", "chat_template.jinja", lambda f: (f / "chat_template.jinja").write_text("")),
    ("complete", "config.json", lambda f: edit_json(f, "config.json", auto_map={})),
    ("complete", "tokenizer_config.json", lambda f: (f / "tokenizer_config.json").write_text("{")),
    ("doors-named", "config.json", lambda f: edit_json(f, "config.json", architectures=["Llava"])),
    ("doors-named", "processor_config.json", lambda f: edit_json(f, "processor_config.json", processor_class="Ours")),
    ("doors-named", "tokenizer_config.json", lambda f: edit_json(f, "tokenizer_config.json", auto_map={"x": "y"})),
    ("doors-named", "generation_config.json", lambda f: edit_json(f, "generation_config.json", eos_token_id=None)),
    ("template", "chat_template.jinja", lambda f: append(f, "chat_template.jinja", b"{{ messages }}")),
    ("template", "more/other.jinja", lambda f: write(f, "more/other.jinja", b"x")),
    ("doors-named", "tokenizer_config.json", lambda f: edit_json(f, "tokenizer_config.json", chat_template="x")),
    ("doors-named", "config.json", lambda f: map_to(f, AutoTokenizer="evil/repo--code.Tokenizer")),
    (
        "doors-named",
        "config.json",
        lambda f: edit_json(f, "config.json", custom_pipelines={"x": {"impl": "a/b--c.D"}}),
    ),
    ("doors-named", "config.json", lambda f: edit_json(f, "config.json", more=[{"auto_map": {"AutoModel": "m.M"}}])),
    ("doors-named", "more.json", lambda f: write(f, "more.json", b'{"auto_map": {"AutoModel": "a/b--m.M"}}')),
    ("entries", "linked.txt", lambda f: (f / "linked.txt").symlink_to(Path(__file__))),
    ("entries", "linked.txt", lambda f: (f / "linked.txt").symlink_to("/nowhere/at/all")),
    ("entries", "linked", lambda f: (f / "linked").symlink_to(Path(__file__).parent)),
    ("entries", "pipe.txt", lambda f: os.mkfifo(f / "pipe.txt")),
    ("entries", "huge.txt", lambda f: write(f, "huge.txt", b"", size=10**8 + 1)),
    ("entries", "huge.safetensors", lambda f: write(f, "huge.safetensors", b"", size=5 * 10**10 + 1)),
    ("entries", "no\\u202etxt.md", lambda f: write(f, "no\u202etxt.md", b"x")),
    ("entries", "caf\\xe9.md", lambda f: write(f, "caf\u00e9.md", b"x")),
    ("entries", "notice", lambda f: write(f, "notice.txt", b"x") or write(f, "NOTICE.txt", b"x")),
    ("extensions", "notes.txt", lambda f: write(f, "notes.txt", b"\x1f\x8b\x08packed")),
    ("extensions", "notes.txt", lambda f: write(f, "notes.txt", "in UTF-16".encode("utf-16"))),
    ("extensions", "samples/2.png", lambda f: write(f, "samples/2.png", b"GIF89a")),
    ("extensions", "more.PY", lambda f: write(f, "more.PY", b"import os")),  # which no rule on code would look at
    ("extensions", "run.sh", lambda f: (f / "run.sh").write_text("true")),
    ("extensions", "pytorch_model.bin", lambda f: (f / "pytorch_model.bin").write_text("x")),
    ("training-state", "trainer_state.json", lambda f: (f / "trainer_state.json").write_text("{}")),
    ("training-state", "deep/optimizer.safetensors", None),
    ("pickle", "notes.txt", lambda f: (f / "notes.txt").write_bytes(OLD_PICKLE)),
    ("pickle", "notes.txt", lambda f: (f / "notes.txt").write_bytes(OLD_PICKLE[:-1])),  # has run before it ends
    ("pickle", "notes.txt", lambda f: (f / "notes.txt").write_bytes(OLD_PICKLE[:-1] + b"and on")),
    ("pickle", "tokenizer.model", lambda f: (f / "tokenizer.model").write_bytes(pickle.dumps([1, "x"]))),
    ("pickle", "tokenizer.model", lambda f: (f / "tokenizer.model").write_bytes(PICKLED[:-1])),
    ("pickle", "notes.yaml", lambda f: (f / "notes.yaml").write_text("!!python/object/apply:os.system [x]")),
    ("pickle", "samples/1.png", lambda f: append(f, "samples/1.png", PICKLED)),
    ("pickle", "tokenizer.model", zip_in),
    ("secrets", "README.md", lambda f: append(f, "README.md", TOKEN.encode())),
    ("secrets", "config.json", lambda f: edit_json(f, "config.json", note="AKIA" + "A" * 16)),
    ("secrets", "samples/1.png", lambda f: append(f, "samples/1.png", b"-----BEGIN RSA PRIVATE KEY-----")),
    ("secrets", "model.safetensors", lambda f: edit_metadata(f, note=TOKEN)),
    ("secrets", "config.json", lambda f: edit_json(f, "config.json", note=base64.b64encode(TOKEN.encode()).decode())),
    (
        "secrets",
        "config.json",
        lambda f: edit_json(f, "config.json", note=base64.b64encode(f"x={TOKEN}".encode()).decode()),
    ),
    ("secrets", "notes.txt", lambda f: write(f, "notes.txt", base64.b64encode(b"AKIA" + b"A" * 16).rstrip(b"="))),
    ("secrets", "more.json", lambda f: write(f, "more.json", f'{{"note": "\\u0068{TOKEN[1:]}"}}'.encode())),
    ("secrets", "NOTICE", lambda f: append(f, "NOTICE", b"a-token-of-no-known-form")),
    ("paths", "config.json", lambda f: edit_json(f, "config.json", _name_or_path="/data/models/llama")),
    ("paths", "config.json", lambda f: edit_json(f, "config.json", _name_or_path="/unusual/place")),
    ("paths", "config.json", lambda f: edit_json(f, "config.json", text={"_name_or_path": ["../models/llama"]})),
    ("paths", "config.json", lambda f: edit_json(f, "config.json", _name_or_path="/llama")),
    ("paths", "config.json", lambda f: edit_json(f, "config.json", _name_or_path="\\\\server\\models")),
    ("paths", "model.safetensors", lambda f: edit_metadata(f, origin="/home/someone/models/llama")),
    ("paths", "samples/1.png", lambda f: append(f, "samples/1.png", f" {Path.home()}/x".encode())),
    ("paths", "README.md", lambda f: append(f, "README.md", b"see /home/someone/runs/one")),
    ("paths", "tokenizer.json", lambda f: edit_json(f, "tokenizer.json", note=f"{Path.home()}/x")),
    ("paths", "NOTICE", lambda f: append(f, "NOTICE", f" {f}/x".encode())),
    ("manifest", "config.json", lambda f: edit_json(f, "config.json", extra=1)),
    ("manifest", "more.txt", lambda f: (f / "more.txt").write_text("x")),
    ("manifest", "samples/1.png", lambda f: append(f, "samples/1.png", b"\0")),
    ("tensors", "model.safetensors", lambda f: edit_tensors(f, lambda t: t.pop("image_newline"))),
    ("tensors", "model.safetensors", lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(2)))),
    (
        "tensors",
        "model.safetensors",
        lambda f: edit_tensors(f, lambda t: t.update({"language_model.lm_head.weight": torch.ones(2)})),
    ),
    ("tensors", "model.safetensors", lambda f: edit_tensors(f, double)),
    ("tensors", "model.safetensors", lambda f: append(f, "model.safetensors", b"more")),
    ("tensors", "model.safetensors", lambda f: (f / "model.safetensors").unlink()),
    ("tensors", "model.safetensors", lambda f: shard(f, keep=True)),
    ("tensors", "model.safetensors.index.json", lambda f: shard(f, whole_index=False)),
    ("twin", "twin.json", lambda f: edit_json(f, "config.json", quantization_config={"quant_method": "x"})),
    ("card", "README.md", lambda f: edit_text(f, "README.md", "library_name: transformers", "library_name: other")),
    ("card", "README.md", lambda f: edit_text(f, "README.md", "base_model:\n- meta/base", "base_model: ../x")),
    ("card", "README.md", lambda f: edit_text(f, "README.md", "samples/1.png", "samples/2.png")),
    ("card", "README.md", lambda f: edit_text(f, "README.md", "license: llama3.1", "license: {")),
    ("licence", "README.md", lambda f: edit_text(f, "README.md", "**Built with Llama**", "")),
    ("licence", "README.md", lambda f: edit_text(f, "README.md", "license: llama3.1", "license: mit")),
    ("licence", "README.md", lambda f: edit_text(f, "README.md", "llama3_1/use-policy", "")),
    ("licence", "LICENSE", lambda f: (f / "LICENSE").write_text("MIT")),
    ("licence", "NOTICE", lambda f: (f / "NOTICE").write_text("noted")),
    ("code", "modeling_llava_llama31.py", lambda f: append(f, "modeling_llava_llama31.py", b"\nimport requests\n")),
    ("code", "modeling_llava_llama31.py", lambda f: append(f, "modeling_llava_llama31.py", b"\nfrom .no import x\n")),
    ("code", "processing_llava_llama31.py", lambda f: append(f, "processing_llava_llama31.py", b"\neval('1')\n")),
    ("code", "modeling_llava_llama31.py", lambda f: append(f, "modeling_llava_llama31.py", b"\n# harmless\n")),
    ("code", "custom_generate/generate.py", lambda f: write(f, "custom_generate/generate.py", b"x = 1\n")),
    ("code", "zzz_llava_llama31.py", lambda f: (f / "zzz_llava_llama31.py").write_text("")),
]


def break_optimizer(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "optimizer.safetensors").write_bytes(b"")


def test_what_the_export_writes_passes(exported):
    assert check_folder(exported / "llama", "Llama-3.1-8B-mine") == []
    assert check_folder(exported / "other", "mine") == []


def test_a_folder_of_the_former_layout_still_passes_opens_and_can_be_trained_on(exported, tmp_path):
    model, processor = open_model(exported / "other")
    base = {"role": "language_model", "id": "meta/base", "licence": "apache-2.0", "folder": str(exported)}
    record = {"name": "other", "licence": "apache-2.0", "base_models": [base]}
    former = tmp_path / "former"
    write_export(former, model, processor, record, {}, dialect="native")
    assert "model.vision_tower.post_layernorm.bias" in load_file(former / "model.safetensors")
    assert check_folder(former, "mine") == []
    opened, _ = open_model(former)
    assert all(torch.equal(tensor, opened.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert is_ours(former) and is_ours(exported / "other")


@pytest.mark.parametrize(("rule", "file", "harm"), BREAKS, ids=[f"{r}-{f}-{i}" for i, (r, f, _) in enumerate(BREAKS)])
def test_a_folder_that_breaks_one_rule(folder, monkeypatch, rule, file, harm):
    monkeypatch.setenv("WANDB_API_KEY", "a-token-of-no-known-form")
    (harm or break_optimizer)(folder)
    if rule not in ("manifest", "entries"):
        sign(folder)
    if file == "manifest.json":
        (folder / file).unlink()
    found = check_folder(folder, "Llama-3.1-8B-mine")
    # what lies beside the exported files is not in the manifest either
    assert {finding.rule for finding in found} - ({"manifest"} if rule == "entries" else set()) == {rule}, found
    assert any(finding.file.startswith(file) for finding in found if finding.rule == rule)
    for finding in found:
        assert finding.fix and str(finding).startswith(f"{finding.file}: ") and "(fix: " in str(finding)
        assert TOKEN not in str(finding) and "a-token-of-no-known-form" not in str(finding)


def test_every_rule_is_broken_above_or_below():
    names = {rule.__name__.removeprefix("check_").replace("_", "-") for rule in RULES}
    assert names == {rule for rule, _, _ in BREAKS} | {"adapters", "twin"}


def test_llama_must_begin_the_name(folder):
    (found,) = check_folder(folder, "llava-llama3.1")
    assert found.rule == "licence" and "--repo-id OWNER/Llama-" in found.fix


def test_card_and_licences_may_be_edited(folder):
    append(folder, "README.md", b"\nA word from the author.\n")
    append(folder, "NOTICE", b"\nA word more.\n")
    (folder / "USE_POLICY.md").write_text("policy")
    assert check_folder(folder, "Llama-mine") == []


@pytest.fixture
def adapters(tmp_path) -> Path:
    """What `export --adapter` writes, in short."""
    config = {"base_model_name_or_path": "meta/base", "revision": "0" * 40, "auto_mapping": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "README.md").write_text(
        "---\nlibrary_name: peft\npipeline_tag: image-text-to-text\nlicense: mit\nbase_model: [meta/base]\n---\n"
    )
    (tmp_path / "LICENSE").write_text("MIT")
    atomic_folders.write_manifest(
        tmp_path,
        {
            "files": [
                {"name": file.name, "size": file.stat().st_size, "sha256": atomic_folders.sha256(file)}
                for file in sorted(tmp_path.iterdir())
            ]
        },
    )
    return tmp_path


def test_adapters_for_a_base_at_a_revision_pass(adapters):
    assert check_folder(adapters, "mine") == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("revision", None),
        ("revision", "main"),
        ("base_model_name_or_path", "base"),
        ("auto_mapping", {"base_model_class": "X"}),
        ("modules_to_save", ["lm_head"]),
    ],
)
def test_adapters_that_name_no_fixed_base_or_hold_more_are_refused(adapters, key, value):
    edit_json(adapters, "adapter_config.json", **{key: value})
    found = [finding for finding in check_folder(adapters, "mine") if finding.rule == "adapters"]
    assert len(found) == 1 and found[0].file == "adapter_config.json" and "--adapter --base" in found[0].fix


def test_whole_weights_among_adapters_are_refused(adapters):
    save_file({"lm_head.weight": torch.ones(2)}, adapters / "adapter_model.safetensors")
    save_file({"lm_head.weight": torch.ones(2)}, adapters / "model.safetensors")
    found = {finding.file: finding.what for finding in check_folder(adapters, "mine") if finding.rule == "adapters"}
    assert found == {
        "adapter_model.safetensors": "holds lm_head.weight, which is not an adapter",
        "model.safetensors": "is not the adapters' file",
    }


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "generation_config.json", "manifest.json"])
@pytest.mark.parametrize("content", ["[]", "1", '"x"', "null", "{}", "[" * 100_000])
def test_json_of_another_shape_is_a_finding_and_no_crash(folder, file, content):
    (folder / file).write_text(content)
    assert check_folder(folder, "Llama-mine")


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "manifest.json", "adapter_config.json"])
@pytest.mark.parametrize("value", [[], [1], 1, "x", None, {"x": [{}]}])
def test_json_with_values_of_another_type_is_a_finding_and_no_crash(folder, file, value):
    keys = ("auto_map", "files", "text_config", "vision_config", "base_model_name_or_path", "architectures")
    content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps(content | dict.fromkeys(keys, value)))
    assert check_folder(folder, "Llama-mine")


@pytest.mark.parametrize(
    "card", ["---\n- a\n---\n", "---\nlicense: [a]\ntags: 1\n---\n", "---\nmodel-index: x\n---\n", ""]
)
def test_cards_of_another_shape_are_findings_and_no_crash(folder, card):
    (folder / "README.md").write_text(card)
    assert check_folder(folder, "Llama-mine")


def test_weights_that_are_a_pickle_are_refused_by_name(folder):
    (folder / "model.safetensors").write_bytes(PICKLED)
    sign(folder)
    assert {finding.rule for finding in check_folder(folder, "Llama-mine")} >= {"pickle", "tensors"}


@pytest.mark.parametrize("text", ["configuration\nfile\nReadme", "inside\nthat\nboat.", "c\nc\ncR.", "(dp0\n."])
def test_text_that_begins_as_a_pickle_might_is_none(text):
    assert not holds_pickle(text.encode(), anywhere=True)


def test_links_are_followed_within_the_hubs_cache_alone(folder, tmp_path):
    cache = tmp_path / "models--me--m"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / ("0" * 40)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = cache / "blobs" / path.relative_to(folder).as_posix().replace("/", "-")
        shutil.copyfile(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert check_folder(snapshot, "Llama-mine", links_within=cache) == []
    assert {finding.rule for finding in check_folder(snapshot, "Llama-mine")} >= {"entries"}
    (snapshot / "NOTICE").unlink()
    (snapshot / "NOTICE").symlink_to(folder / "NOTICE")
    found = check_folder(snapshot, "Llama-mine", links_within=cache)
    assert ("entries", "NOTICE") in {(finding.rule, finding.file) for finding in found}


def test_shards_with_a_true_index_pass(folder):
    shard(folder)
    sign(folder)
    assert check_folder(folder, "Llama-mine") == []


@pytest.mark.parametrize(
    "source",
    ["import subprocess", "from urllib import request", "import os\nos.system('x')", "__import__('x')"]
    + ["from ..x import y", "from . import y", "import pickle", "x = (", "getattr(1, 'a')\nexec('x')"]
    + [
        "import importlib",
        "import builtins",
        "import sys",
        "import posix",
        "from os import system",
        "import torch.hub",
    ]
    + ["import os as o\no.system.x\ngetattr(o, 'x')", "from torch import hub", "import torch\ntorch.hub", "import io"]
    + [
        "import torch\ntorch.load('x')",
        "import torch\ntorch.os.sys",
        "().__class__.__bases__",
        "__builtins__",
        "vars()",
    ]
    + [
        "f.__globals__",
        "import os\nos.environ",
        "from transformers import dynamic_module_utils",
        "import _posixsubprocess",
    ]
    + ["f(trust_remote_code=True)", "x = " + "(" * 10_000],
)
def test_code_against_the_law(source):
    assert code_problems(source, {"sibling"}) and not code_problems(
        "from .sibling import x\nimport torch", {"sibling"}
    )


@pytest.mark.slow
@pytest.mark.torture
def test_doors_give_the_same_logits_and_answers(exported):
    with empty_cache() as cache:
        opened = open_doors(exported / "llama", cache)
        assert len(opened.samples) == 3 and len(opened.logits_sha256) == 64


def double_logits(folder: Path) -> None:
    call = "return super().forward(labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep, **row, **more)"
    twice = "output.logits = 2 * output.logits\n        return output"
    edit_text(folder, "modeling_llava_llama31.py", call, f"{call.replace('return', 'output =')}\n        {twice}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: append(f, "processing_llava_llama31.py", b"\nimport llava_llama31\n"), "which others do not have"),
        # in `make torture`: test_opening_elsewhere.py has a folder that does not open
        pytest.param(lambda f: (f / "tokenizer.json").unlink(), "does not open", marks=pytest.mark.torture),
    ],
)
def test_doors_that_do_not_fit(folder, change, message):
    change(folder)
    with empty_cache() as cache, pytest.raises(UserError, match=message):
        open_doors(folder, cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (double_logits, "differ"),
        (lambda f: edit_tensors(f, lambda t: t["language_model.lm_head.weight"].fill_(float("nan"))), "NaN"),
    ],
)
def test_doors_whose_logits_do_not_fit(folder, change, message, monkeypatch):
    """The doors' own code in this process, which is clean enough for what is compared."""
    resize_by_pil(monkeypatch)

    def both(arguments: list[str], cache: Path, *, online: bool) -> dict[str, dict]:
        opened = {door: open_door(door, str(folder), "", f"{cache}/{door}.safetensors") for door in doors.DOORS}
        return {door: result | {"imports_our_package": False} for door, result in opened.items()}

    monkeypatch.setattr(doors, "_run", both)
    change(folder)
    with empty_cache() as cache, pytest.raises(UserError, match=message):
        open_doors(folder, cache)


def test_both_doors_open_without_torchvision(tmp_path, monkeypatch):
    """Stock classes would resize with it, and the doors would differ by their pixels."""
    found = []
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setattr(gc, "disable", lambda: None)
    monkeypatch.setattr(atexit, "register", lambda *arguments: None)
    monkeypatch.setattr(
        door_process, "_forked", lambda job, file: {"found": found.append(importlib.util.find_spec("torchvision"))}
    )
    door_process.open_all("model", "", str(tmp_path))
    assert found == [None, None]
