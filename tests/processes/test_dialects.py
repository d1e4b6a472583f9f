"""The export for older Transformers holds the same model: in this version, and in those that are named.

python -m pip install --no-deps --target old452 'transformers==4.52.*' 'huggingface_hub<1' 'tokenizers<0.22'
OLD_TRANSFORMERS=old452 pytest tests/test_dialects.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from llava_llama31.trainer.export.dialects import DIALECTS, to_transformers_4


# folders with a Transformers that is not installed, by os.pathsep
OLD = [folder for folder in os.environ.get("OLD_TRANSFORMERS", "").split(os.pathsep) if folder]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QUESTION = "What does the sign say?"
ASK = f"""
import json, sys, numpy as np, torch, transformers
from PIL import Image
from safetensors.numpy import save_file
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor
folder, picture, logits = sys.argv[1:]
options = {{"output_loading_info": True, "torch_dtype": torch.float32}}
model, info = LlavaNextForConditionalGeneration.from_pretrained(folder, **options)
processor = LlavaNextProcessor.from_pretrained(folder)
content = [{{"type": "image", "image": Image.open(picture)}}, {{"type": "text", "text": {QUESTION!r}}}]
inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    save_file({{"logits": model.eval()(**inputs).logits.numpy()}}, logits)
answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist()
faults = [*info["missing_keys"], *info["unexpected_keys"]]
print(json.dumps([transformers.__version__, faults, inputs["input_ids"][0].tolist(), answer]))
"""


@pytest.fixture(scope="module")
def folders(lively_folder, tmp_path_factory):
    """The same model with Llama 3.1's rotary embedding in native words and in older ones, in two files of weights."""
    from llava_llama31.trainer.evaluation.generation import load_model

    root = tmp_path_factory.mktemp("dialects")
    model, processor = load_model(lively_folder)
    model.config.text_config.rope_parameters = LLAMA3_ROPE
    for name in ("native", "older"):
        model.save_pretrained(root / name, max_shard_size="400KB")
        processor.save_pretrained(root / name)
    to_transformers_4(root / "older")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "sign.png")
    return root


def ask(folder: Path, transformers: str | None) -> tuple[list, np.ndarray]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": transformers} if transformers else {})
    logits = folder.parent / "logits.safetensors"
    command = [sys.executable, "-c", ASK, str(folder), str(folder.parent / "sign.png"), str(logits)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), load_file(logits)["logits"].numpy()


def test_the_older_folder_is_the_same_model_in_this_version(folders):
    models, answers = {}, {}
    for name in ("native", "older"):
        assert len(list((folders / name).glob("*.safetensors"))) > 1
        model, info = LlavaNextForConditionalGeneration.from_pretrained(folders / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        models[name] = model.state_dict()
        assert model.config.text_config.rope_parameters == LLAMA3_ROPE
        processor = LlavaNextProcessor.from_pretrained(folders / name)
        text = processor.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
        inputs = processor(text=text, images=None, return_tensors="pt", add_special_tokens=False)
        answers[name] = inputs["input_ids"].tolist(), processor.image_processor.to_dict()
    assert models["native"].keys() == models["older"].keys()
    assert all(torch.equal(tensor, models["older"][name]) for name, tensor in models["native"].items())
    assert answers["native"] == answers["older"]


def test_the_older_folder_says_what_older_versions_read(folders):
    config = json.loads((folders / "older" / "config.json").read_text())
    text = config["text_config"]
    assert "rope_parameters" not in text and text["rope_theta"] == 500000.0
    assert text["rope_scaling"] == {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    assert config["torch_dtype"] == "float32" and "auto_map" not in config and "dtype" not in config
    assert {path.name for path in (folders / "older").iterdir()} >= {"preprocessor_config.json", "chat_template.jinja"}
    assert not list((folders / "older").glob("*.py")) and "transformers-4.52" in DIALECTS


def test_another_tower_keeps_its_names(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "dtype": "float32",
                "vision_config": {"model_type": "dinov2"},
                "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            }
        )
    )
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {}, "processor_class": "P"}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    save_file({"model.vision_tower.encoder.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    to_transformers_4(tmp_path)
    assert list(load_file(tmp_path / "model.safetensors")) == ["model.vision_tower.encoder.x"]
    assert json.loads((tmp_path / "config.json").read_text())["text_config"] == {
        "rope_theta": 1e4,
        "rope_scaling": None,
    }


@pytest.mark.skipif(not OLD, reason="OLD_TRANSFORMERS names no folder with an older Transformers")
@pytest.mark.parametrize("transformers", OLD)
def test_an_older_version_gives_the_same_logits_and_answer(folders, transformers):
    (_, faults, ids, answer), logits = ask(folders / "native", None)
    (version, older_faults, older_ids, older_answer), older_logits = ask(folders / "older", transformers)
    assert not faults and not older_faults and version < "5.6"
    assert ids == older_ids and answer == older_answer
    np.testing.assert_allclose(older_logits, logits, rtol=0, atol=1e-5)
