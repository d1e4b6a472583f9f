"""The portable export is the same model as the native one: in this version, in the oldest and in any that is named.

`make` puts the oldest beside this environment. Another one:

python -m pip install --no-deps --target old452 'transformers==4.52.*' 'huggingface_hub<1' 'tokenizers<0.22'
OLD_TRANSFORMERS=old452 pytest tests/processes/test_dialects.py
"""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from stock_pixels import resize_by_pil
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    Dinov2Config,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.auto import modeling_auto

from llava_llama31 import LlavaLlama31Config, LlavaLlama31ForConditionalGeneration
from llava_llama31.trainer.export.dialects import native_name, portable_name, to_portable
from llava_llama31.trainer.model.opening import open_model


# folders with a Transformers that is not installed, by os.pathsep
OLDEST = Path(sys.prefix) / "oldest-transformers"
NAMED = os.environ.get("OLD_TRANSFORMERS", str(OLDEST)).split(os.pathsep)
OLD = [folder for folder in NAMED if Path(folder).is_dir()]
FIRST_WITH_OUR_CODE = Version("5.17")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QUESTION = "What does the sign say?"
TOWERS = ("clip", "dinov2")
Answers = dict[tuple[str, str], tuple[list, np.ndarray]]
# stock classes would resize with it, which gives other pixels
WITHOUT_TORCHVISION = "import sys; sys.modules['torchvision'] = None"
ASK = f"""
import itertools, json, sys, numpy as np, torch, transformers
from PIL import Image
from safetensors.numpy import save_file
from transformers import AutoProcessor, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers import AutoModelForImageTextToText
image_file, folders, *doors = sys.argv[1:]
for folder, door in itertools.product(folders.split(","), doors):
    models, processors = LlavaNextForConditionalGeneration, LlavaNextProcessor
    options = {{}}
    if door == "auto":
        models, processors = AutoModelForImageTextToText, AutoProcessor
    if door == "remote":
        models, processors = AutoModelForImageTextToText, AutoProcessor
        options = {{"trust_remote_code": True}}
    model, info = models.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32, **options)
    processor = processors.from_pretrained(folder, **options)
    content = [{{"type": "image", "image": Image.open(image_file)}}, {{"type": "text", "text": {QUESTION!r}}}]
    inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        save_file({{"logits": model.eval()(**inputs).logits.numpy()}}, f"{{folder}}.{{door}}.logits")
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist()
    faults = [*info["missing_keys"], *info["unexpected_keys"]]
    special = sorted(processor.tokenizer.all_special_tokens)
    answered = [type(model).__name__, faults, inputs["input_ids"][0].tolist(), answer, special]
    print(json.dumps([transformers.__version__, *answered]))
"""


@pytest.fixture(scope="module")
def folders(lively_folder, tmp_path_factory):
    """TOWER-native and TOWER-portable, with Llama 3.1's rotary embedding and weights in several files."""
    root = tmp_path_factory.mktemp("dialects")
    clip, processor = open_model(lively_folder)
    clip.config.text_config.rope_parameters = LLAMA3_ROPE
    fields = clip.config.to_dict()
    sizes = {key: fields["vision_config"][key] for key in ("hidden_size", "image_size", "patch_size")}
    tower = Dinov2Config(**sizes, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, use_mask_token=False)
    config = LlavaLlama31Config.from_dict(fields | {"vision_config": tower.to_dict()})
    torch.manual_seed(2)
    dinov2 = LlavaLlama31ForConditionalGeneration(config)
    for parameter in dinov2.parameters():
        parameter.data = 0.25 * torch.randn_like(parameter)
    for name, model in (("clip", clip), ("dinov2", dinov2)):
        model.config.dtype = torch.float32
        for dialect in ("native", "portable"):
            model.save_pretrained(root / f"{name}-{dialect}", max_shard_size="400KB")
            processor.save_pretrained(root / f"{name}-{dialect}")
        to_portable(root / f"{name}-portable")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "sign.png")
    return root


def ask(folders: Sequence[Path], *doors: str, transformers: str | None = None) -> Answers:
    """What a clean process gets through each door of each folder, one after the other."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folders[0].parent / "home")}
    environment |= {"PYTHONPATH": transformers} if transformers else {}
    command = [sys.executable, "-c", WITHOUT_TORCHVISION + ASK, *asked(folders, *doors)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return answers_in(done.stdout, folders, *doors)


def asked(folders: Sequence[Path], *doors: str) -> list[str]:
    return [str(folders[0].parent / "sign.png"), ",".join(map(str, folders)), *doors]


def answers_in(printed: str, folders: Sequence[Path], *doors: str) -> Answers:
    ways = list(itertools.product(folders, doors))
    said = map(json.loads, printed.splitlines()[-len(ways) :])
    return {
        (folder.name, door): (answered, load_file(f"{folder}.{door}.logits")["logits"].numpy())
        for (folder, door), answered in zip(ways, said, strict=True)
    }


def keys(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= set(tensors.keys())
    return found


@pytest.mark.parametrize("tower", TOWERS)
def test_both_layouts_are_the_same_model_for_stock_and_for_our_class(folders, tower):
    for models in (LlavaNextForConditionalGeneration, LlavaLlama31ForConditionalGeneration):
        states, answers = {}, {}
        for name in ("native", "portable"):
            folder = folders / f"{tower}-{name}"
            assert len(list(folder.glob("*.safetensors"))) > 1
            model, info = models.from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            states[name] = model.state_dict()
            assert model.config.text_config.rope_parameters == LLAMA3_ROPE
            assert model.dtype == torch.float32
            processor = LlavaNextProcessor.from_pretrained(folder)
            text = processor.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
            inputs = processor(text=text, images=None, return_tensors="pt", add_special_tokens=False)
            special = sorted(processor.tokenizer.all_special_tokens)
            answers[name] = inputs["input_ids"].tolist(), processor.image_processor.to_dict(), special
        assert states["native"].keys() == states["portable"].keys()
        assert all(torch.equal(tensor, states["portable"][name]) for name, tensor in states["native"].items())
        assert answers["native"] == answers["portable"]


def test_the_portable_folder_has_the_names_that_every_engine_reads(folders):
    """Those of llava-hf's repositories, of vLLM's and SGLang's mappings and of Transformers 4."""
    llava_hf = re.compile(
        r"language_model\.(model|lm_head)\..+|vision_tower\..+|multi_modal_projector\..+|image_newline"
    )
    for tower in TOWERS:
        assert all(llava_hf.fullmatch(name) for name in keys(folders / f"{tower}-portable"))
    of_vllm = re.compile(r"vision_tower\.vision_model\.(embeddings|encoder|pre_layrnorm|post_layernorm)\..+")
    names = {name for name in keys(folders / "clip-portable") if "vision_tower" in name}
    assert names and all(of_vllm.fullmatch(name) for name in names)
    names = {name for name in keys(folders / "dinov2-portable") if ".attention." in name}
    of_4 = re.compile(r".+\.attention\.(attention\.(query|key|value)|output\.dense)\.(weight|bias)")
    assert names and all(of_4.fullmatch(name) for name in names if "vision_tower" in name)
    folder = folders / "clip-portable"
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    assert "rope_parameters" not in text and text["rope_theta"] == 500000.0
    assert text["rope_scaling"] == {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    assert config["torch_dtype"] == "float32" and "dtype" not in config
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == keys(folder)
    processor = json.loads((folder / "processor_config.json").read_text())
    assert "image_processor" not in processor and processor["auto_map"] and config["auto_map"]
    assert {path.name for path in folder.iterdir()} >= {"preprocessor_config.json", "chat_template.jinja"}
    assert len(list(folder.glob("*.py"))) == 5


@pytest.mark.parametrize("tower", TOWERS)
def test_names_come_back(folders, tower):
    kind = {"clip": "clip_vision_model", "dinov2": "dinov2"}[tower]
    native, portable = keys(folders / f"{tower}-native"), keys(folders / f"{tower}-portable")
    assert native != portable == {portable_name(name, kind) for name in native}
    for names in (native, portable):
        assert {native_name(name, kind) for name in names} == native


def test_another_tower_keeps_its_names():
    assert portable_name("model.vision_tower.encoder.x", "other") == "vision_tower.encoder.x"
    assert native_name("vision_tower.encoder.x", "other") == "model.vision_tower.encoder.x"


def test_every_auto_class_of_stock_opens_ours(folders):
    """All mappings of this Transformers that have stock's class or its base."""
    named = LlavaLlama31Config().to_diff_dict()["auto_map"]
    for name in dir(modeling_auto):
        mapping = getattr(modeling_auto, name)
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES") and "llava_next" in mapping:
            auto = next(
                kind
                for kind, cls in vars(modeling_auto).items()
                if isinstance(cls, type)
                and getattr(cls, "_model_mapping", None) is getattr(modeling_auto, name.removesuffix("_NAMES"))
            )
            assert auto in named, name
    for auto in (AutoModelForPreTraining, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto.from_pretrained(folders / "clip-portable", trust_remote_code=True)
        assert type(model).__name__ == "LlavaLlama31ForConditionalGeneration"
    assert type(AutoConfig.from_pretrained(folders / "clip-portable")).__name__ == "LlavaNextConfig"
    assert AutoTokenizer.from_pretrained(folders / "clip-portable").padding_side == "left"


@pytest.fixture(scope="module")
def answers_here(folders):
    """Of the native folders, by stock classes in this process."""
    native = [folders / f"{tower}-native" for tower in TOWERS]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        resize_by_pil(patch)
        patch.setattr(sys, "argv", ["", *asked(native, "stock")])
        exec(compile(ASK, "ask", "exec"), {})
    found = answers_in(printed.getvalue(), native, "stock")
    return {tower: found[f"{tower}-native", "stock"] for tower in TOWERS}


def assert_the_same(here, there):
    (_, _, faults, *answered), logits = there
    (_, _, _, *expected), expected_logits = here
    assert not faults and answered == expected
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-5)


def test_a_clean_process_gives_the_same_logits_and_answer(folders, answers_here):
    answers = ask([folders / f"{tower}-portable" for tower in TOWERS], "stock", "auto", "remote")
    for tower, door in itertools.product(TOWERS, ("stock", "auto", "remote")):
        there = answers[f"{tower}-portable", door]
        assert_the_same(answers_here[tower], there)
        assert there[0][1].startswith("LlavaLlama31" if door == "remote" else "LlavaNext")


@pytest.mark.skipif(not OLD, reason="OLD_TRANSFORMERS names no folder with another Transformers")
@pytest.mark.parametrize("transformers", OLD, ids=lambda folder: Path(folder).name)
def test_another_version_gives_the_same_logits_and_answer(folders, answers_here, transformers):
    portable = [folders / f"{tower}-portable" for tower in TOWERS]
    answers = ask(portable, "stock", "auto", transformers=transformers)
    if Version(answers[portable[0].name, "stock"][0][0]) >= FIRST_WITH_OUR_CODE:
        answers |= ask(portable, "remote", transformers=transformers)
    for (name, _), there in answers.items():
        assert_the_same(answers_here[name.removesuffix("-portable")], there)
