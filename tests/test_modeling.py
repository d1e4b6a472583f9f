"""The model equals stock LlavaNext: logits, loss and gradients, for every mix of images and text."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import LlavaNextConfig

from llava_llama31 import LlavaLlama31ForConditionalGeneration


def user(*parts):
    return {
        "role": "user",
        "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts],
    }


def answer(text):
    return {"role": "assistant", "content": text}


# sizes (height, width) of the images, and the turns
ROWS = {
    "wide": ([(20, 90)], [user(None, "what is wide?"), answer("this")]),
    "tall": ([(130, 25)], [user(None, "what is tall?"), answer("that one")]),
    "tiny": ([(3, 2)], [user(None, "tiny?"), answer("yes")]),
    "square": ([(50, 50)], [user("look: ", None), answer("a square")]),
    "two images": ([(40, 60), (90, 30)], [user(None, None, "which?"), answer("both"), user("why?"), answer("so")]),
    "text only": ([], [user("no image"), answer("none")]),
}
MIXES = [["wide"], ["tall"], ["tiny"], ["square"], ["two images"], ["text only"], list(ROWS)]


@pytest.fixture
def make_batch(processor, make_image):
    """Right-padded batch of rows, with the tiles of all images as one 4-D tensor."""

    def make(rows):
        encodings = [processor.encode(messages, sizes) for sizes, messages in rows]
        length = max(len(e.input_ids) for e in encodings)
        pad = processor.tokenizer.pad_token_id
        batch = {
            "input_ids": torch.tensor([e.input_ids + [pad] * (length - len(e.input_ids)) for e in encodings]),
            "attention_mask": torch.tensor(
                [[1] * len(e.input_ids) + [0] * (length - len(e.input_ids)) for e in encodings]
            ),
            "labels": torch.tensor([e.labels + [-100] * (length - len(e.labels)) for e in encodings]),
        }
        sizes = [size for row in rows for size in row[0]]
        if sizes:
            tiles = [torch.from_numpy(processor.tiles(make_image(*size, seed=sum(size)))) for size in sizes]
            batch["pixel_values"] = torch.cat(tiles).double()
            batch["image_sizes"] = torch.tensor(sizes)
        return batch

    return make


@pytest.fixture
def pair(tiny_config, make_stock):
    """Our model and the stock one with the same weights, in float64."""
    torch.manual_seed(0)
    ours = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True).double()
    return ours, make_stock(ours)


@pytest.mark.parametrize("names", MIXES, ids="+".join)
def test_loss_gradients_and_logits_equal_stock(pair, make_batch, names):
    ours, stock = pair
    batch = make_batch([ROWS[name] for name in names])
    labels = batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, stock(**batch).logits, rtol=0, atol=1e-10)
    expected, got = stock(**batch, labels=labels), ours(**batch, labels=labels, supervised_only=True)
    torch.testing.assert_close(got.loss.float(), expected.loss.float(), rtol=0, atol=2e-6)  # stock rounds to float32
    exact = torch.nn.functional.cross_entropy(expected.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(got.loss, exact, rtol=0, atol=1e-10)
    supervised = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
    torch.testing.assert_close(got.logits, expected.logits[supervised], rtol=0, atol=1e-10)
    exact.backward()
    got.loss.backward()
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        # where stock has no gradient, ours is none or, after the one-tile pass of a text-only batch, zero
        grad = torch.zeros_like(a) if a.grad is None else a.grad
        expected = torch.zeros_like(b) if b.grad is None else b.grad
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-10, msg=name)


def test_the_stock_processors_padded_images_give_the_same_logits(pair, make_batch, processor, make_image):
    ours, _ = pair
    batch = make_batch([ROWS["two images"]])
    labels = batch.pop("labels")
    assert labels.shape == batch["input_ids"].shape
    images = [make_image(*size, seed=sum(size)) for size in ROWS["two images"][0]]
    padded = torch.tensor(processor.image_processor(images, return_tensors="np")["pixel_values"]).double()
    assert padded.dim() == 5
    with torch.no_grad():
        torch.testing.assert_close(
            ours(**{**batch, "pixel_values": padded}).logits, ours(**batch).logits, rtol=0, atol=0
        )


@pytest.mark.parametrize("layer", [-1, -2, 1, 2, [-3, -1]])
def test_every_feature_layer_equals_stock(tiny_config, make_batch, make_stock, layer):
    config = LlavaNextConfig.from_dict({**tiny_config.to_dict(), "vision_feature_layer": layer})
    config = type(tiny_config).from_dict(config.to_dict())
    ours = LlavaLlama31ForConditionalGeneration(config, packable=True).double()
    stock = make_stock(ours)
    batch = make_batch([ROWS["wide"], ROWS["tall"]])
    batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, stock(**batch).logits, rtol=0, atol=1e-10)


def test_loss_is_the_sum_over_the_global_number_of_supervised_tokens(pair, make_batch):
    ours, _ = pair
    rows = list(ROWS.values())
    whole = ours(**make_batch(rows), supervised_only=True).loss
    batches = [make_batch(rows[:2]), make_batch(rows[2:5]), make_batch(rows[5:])]
    count = sum(int((b["labels"] != -100).sum()) for b in batches)
    parts = sum(ours(**b, supervised_only=True, num_items_in_batch=torch.tensor(count)).loss for b in batches)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_packed_equals_unpacked_and_no_sample_sees_its_neighbour(pair, make_batch):
    ours, _ = pair
    names = ["wide", "two images", "text only", "tall"]
    batches = [make_batch([ROWS[name]]) for name in names]

    def pack(batches):
        return {
            "input_ids": torch.cat([b["input_ids"] for b in batches], dim=1),
            "labels": torch.cat([b["labels"] for b in batches], dim=1),
            "position_ids": torch.cat([torch.arange(b["input_ids"].shape[1])[None] for b in batches], dim=1),
            "pixel_values": torch.cat([b["pixel_values"] for b in batches if "pixel_values" in b]),
            "image_sizes": torch.cat([b["image_sizes"] for b in batches if "image_sizes" in b]),
            "supervised_only": True,
        }

    packed = ours(**pack(batches))
    alone = [ours(**b, supervised_only=True) for b in batches]
    torch.testing.assert_close(packed.logits, torch.cat([o.logits for o in alone]), rtol=0, atol=1e-12)
    count = sum(int((b["labels"] != -100).sum()) for b in batches)
    total = sum(ours(**b, supervised_only=True, num_items_in_batch=count).loss for b in batches)
    torch.testing.assert_close(packed.loss, total, rtol=0, atol=1e-12)
    changed = dict(batches[0], input_ids=batches[0]["input_ids"].clone())
    changed["input_ids"][0, 3] += 1
    after = ours(**pack([changed, *batches[1:]]))
    own = len(alone[0].logits)
    assert not torch.equal(after.logits[:own], packed.logits[:own])
    assert torch.equal(after.logits[own:], packed.logits[own:])


def test_a_frozen_tower_has_no_graph_and_the_unused_layer_does_not_run(tiny_model, make_batch):
    calls = []
    for i, layer in enumerate(tiny_model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda _m, _i, out, i=i: calls.append((i, out.requires_grad)))
    batch = make_batch([ROWS["wide"]])
    batch["pixel_values"] = batch["pixel_values"].float()
    tiny_model(**batch, supervised_only=True).loss.backward()
    assert calls == [(0, True), (1, True)]
    calls.clear()
    tiny_model.model.vision_tower.requires_grad_(False)
    tiny_model(**batch, supervised_only=True).loss.backward()
    assert calls == [(0, False), (1, False)]


def test_placeholder_mismatch_names_rows_and_counts(tiny_model, make_batch, processor):
    batch = make_batch([ROWS["wide"], ROWS["tall"]])
    batch["pixel_values"] = batch["pixel_values"].float()
    features = int((batch["input_ids"] == processor.image_token_id).sum())
    position = (batch["input_ids"][1] == processor.image_token_id).nonzero()[0]
    batch["input_ids"][1, position] = 5
    for options in ({}, {"supervised_only": True}):
        with pytest.raises(
            ValueError, match=rf"{features - 1} image placeholders \(row 0: \d+, row 1: \d+\).*{features} features"
        ):
            tiny_model(**batch, **options)


def test_no_supervised_label_is_an_error_and_not_nan(tiny_model):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="no label of the batch is supervised"):
        tiny_model(input_ids=ids, labels=torch.full_like(ids, -100), supervised_only=True)


DIALECTS = {
    "llava-hf, old": [
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ],
    "llava-hf, new": [("model.vision_tower.", "model.vision_tower.vision_model.")],
    "own": [],
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_opens_every_key_dialect(tiny_model, tmp_path, dialect):
    from safetensors.torch import save_file

    tiny_model.save_pretrained(tmp_path)
    renamed = {}
    for key, tensor in tiny_model.state_dict().items():
        new = next((n + key[len(o) :] for o, n in DIALECTS[dialect] if key.startswith(o)), key)
        renamed[new] = tensor.contiguous()
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = LlavaLlama31ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, tiny_model.state_dict()[key]), key


DOOR = """
import importlib.abc, json, os, runpy, sys
runpy.run_path(sys.argv.pop())  # imports take half the time
import numpy as np, torch
from PIL import Image

class NoPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llava_llama31":
            raise ImportError("the package must not be needed")

sys.meta_path.insert(0, NoPackage())
import transformers
from transformers import AutoProcessor, LlavaNextForConditionalGeneration, LlavaNextProcessor

folder, remote = sys.argv[1], True
autos = ["AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"]
if child := os.fork():  # a process for each door, which have imported the same
    assert os.waitpid(child, 0)[1] == 0
else:
    remote, autos = False, autos[1:2]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=remote)

def seeded_image(seed, *size):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels)}

def chat(*parts):
    return [{"role": "user", "content": list(parts)}]

rows = [
    chat(seeded_image(0, 40, 80), {"type": "text", "text": "what?"}),
    chat(seeded_image(1, 90, 30), {"type": "text", "text": "what does the sign say?"}),
    chat({"type": "text", "text": "no image"}),
]
batch = processor.apply_chat_template(
    rows, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    processor_kwargs={"padding": True},
)
results = {}
for auto in autos:
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=remote)
    with torch.no_grad():
        logits = model(**batch).logits
    torch.save({"logits": logits, "input_ids": batch["input_ids"]}, f"{folder}/../{auto}-{remote}.pt")
    text = processor.batch_decode(model.generate(**batch, max_new_tokens=8, do_sample=False))
    results[auto] = {"model": type(model).__name__, "module": type(model).__module__, "text": text}
    results[auto]["processor"] = type(processor).__name__
print(json.dumps(results))
"""


@pytest.mark.slow
def test_two_doors_open_in_clean_processes_with_equal_logits(tiny_model, processor, tmp_path):
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    script = tmp_path / "door.py"
    script.write_text(textwrap.dedent(DOOR))
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "OMP_NUM_THREADS": "1",
        "HIDDEN_PACKAGES": "bitsandbytes,torchao,torchvision",  # torchvision resizes otherwise
    }
    quick = Path(__file__).parent / "quick_start/sitecustomize.py"
    command = [sys.executable, "-I", str(script), str(folder), str(quick)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    stock, remote = map(json.loads, run.stdout.splitlines()[-2:])
    stock = stock["AutoModelForImageTextToText"]
    assert stock["module"].startswith("transformers.") and stock["model"] == "LlavaNextForConditionalGeneration"
    assert stock["processor"] == "LlavaNextProcessor"
    reference = torch.load(tmp_path / "AutoModelForImageTextToText-False.pt")
    for auto, ours in remote.items():
        assert ours["model"] == "LlavaLlama31ForConditionalGeneration"
        assert ours["module"].startswith("transformers_modules.") and ours["processor"] == "LlavaLlama31Processor"
        assert ours["text"] == stock["text"]
        logits = torch.load(tmp_path / f"{auto}-True.pt")
        assert torch.equal(logits["input_ids"], reference["input_ids"])
        assert (logits["logits"] - reference["logits"]).abs().max() == 0.0
