"""LoRA and QLoRA: what the adapters start from, what is kept in which type, and what is published."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from stock_pixels import resize_by_pil
from transformers import LlavaNextForConditionalGeneration

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.costs.memory import ENGINES
from llava_llama31.trainer.engines.questions import fixed_questions
from llava_llama31.trainer.engines.reference import inputs_of, read_reference
from llava_llama31.trainer.export.adapter import TOLERANCE, export_adapter
from llava_llama31.trainer.model.adapters import adapt, quantization
from llava_llama31.trainer.model.module_groups import GROUPS
from llava_llama31.trainer.model.opening import open_model
from llava_llama31.trainer.planning.plan import setup_of
from llava_llama31.trainer.publishing.door import open_door
from llava_llama31.trainer.publishing.gate import check_folder
from llava_llama31.trainer.recipes.loading import load_recipe
from llava_llama31.trainer.recipes.schema import Lora, Stage
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer


pytest.importorskip("peft")


@pytest.fixture
def run_adapters(recipe_content, tmp_path):
    """Train the second stage alone, with adapters; returns its folder."""

    def run(lora: dict, base=None, **stage):
        del recipe_content["evaluation"], recipe_content["stages"]["projector"]
        recipe_content["stages"]["instruct"] |= {"learning_rate": 1e-2, "lora": {"r": 4, "alpha": 8, **lora}, **stage}
        if base is not None:
            recipe_content["model"]["checkpoint"] = str(base)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_content))
        assert main(["train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]) == 0
        return tmp_path / "run/stages/1-instruct"

    return run


@pytest.fixture
def bfloat16_base(base_folder, tmp_path):
    """The base with weights that bfloat16 holds exactly, as released models have."""
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: w.bfloat16().float() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def adapters_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_adapters_start_from_the_seed_alone(base_folder):
    def drawn(seed, noise):
        torch.manual_seed(noise)
        model = LlavaLlama31ForConditionalGeneration.from_pretrained(base_folder)
        return adapters_of(adapt(model, Lora(r=4), seed=seed, where="s"))

    first, same, other = drawn(1, 0), drawn(1, 5), drawn(2, 0)
    assert all(torch.equal(first[name], same[name]) for name in first)
    grown = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], other[name]) for name in grown)
    bound = 1 / 64**0.5  # uniform, as nn.Linear's own draw: 1 / sqrt(width of the input)
    narrow = torch.cat([first[name].flatten() for name in grown if first[name].shape[1] == 64])
    assert narrow.abs().max() <= bound and narrow.std() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.usefixtures("fast_bfloat16")
def test_frozen_weights_under_adapters_are_bfloat16_and_merged_ones_are_exact(
    run_adapters, bfloat16_base, monkeypatch
):
    types = {}
    train = LlavaTrainer.train

    def looked_at(self, *args, **kwargs):
        types.update({name: p.dtype for name, p in self.model.named_parameters()})
        return train(self, *args, **kwargs)

    monkeypatch.setattr(LlavaTrainer, "train", looked_at)
    stage = run_adapters({}, bfloat16_base, precision="bfloat16")
    trained = {name for name in types if "lora_" in name or "projector" in name or "image_newline" in name}
    assert {types[name] for name in trained} == {torch.float32}
    assert {types[name] for name in types.keys() - trained} == {torch.bfloat16}
    before, after = load_file(bfloat16_base / "model.safetensors"), load_file(stage / "final/model.safetensors")
    adapters = load_file(stage / "checkpoint-6/trainable.safetensors")
    name = "model.language_model.layers.0.self_attn.q_proj"
    up, down = (adapters[f"base_model.model.{name}.lora_{side}.default.weight"] for side in "BA")
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 2 * up @ down, atol=1e-7, rtol=0)
    assert up.abs().max() > 0 and torch.equal(after["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.slow
def test_what_qlora_publishes_computes_what_it_trained(run_adapters, base_folder, samples):
    pytest.importorskip("bitsandbytes")
    stage = run_adapters({"quantize": "nf4"})
    groups = json.loads((stage / "final/stage.json").read_text())["groups"]
    assert [group["num_parameters"] for group in groups] == [44768, 6336, 131392 + 8192]  # two numbers to a byte
    quantized = LlavaLlama31ForConditionalGeneration.from_pretrained(
        base_folder, quantization_config=quantization(torch.float32)
    )
    layer = quantized.model.language_model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == torch.uint8
    assert quantized.model.multi_modal_projector.linear_1.weight.dtype == torch.float32
    adapted = adapt(quantized, Lora(r=4, alpha=8), seed=9, where="s")
    _, unexpected = adapted.load_state_dict(load_file(stage / "checkpoint-6/trainable.safetensors"), strict=False)
    assert not unexpected
    published = LlavaLlama31ForConditionalGeneration.from_pretrained(stage / "final")
    assert published.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    input_ids = torch.tensor([samples[9].input_ids])
    # in training: without gradients bitsandbytes takes a CPU kernel that rounds to bfloat16
    trained = adapted.train()(input_ids).logits.detach()
    with torch.no_grad():
        merged = published.eval()(input_ids).logits
        plain = LlavaLlama31ForConditionalGeneration.from_pretrained(base_folder).eval()(input_ids).logits
    torch.testing.assert_close(merged, trained, atol=1e-5, rtol=0)
    assert (merged - plain).abs().max() > 1e-2


@pytest.mark.parametrize("key, value", [("deepspeed", "zero3"), ("compile", True)])
def test_quantized_weights_are_refused_where_nothing_shows_that_they_work(recipe_content, key, value):
    stage = {**recipe_content["stages"]["instruct"], "lora": {"quantize": "nf4"}, key: value}
    with pytest.raises(ValidationError, match=f"quantized weights under {key}"):
        Stage.model_validate(stage)


@pytest.fixture(scope="session")
def adapted_run(pristine_recipe, make_once):
    """A run that trained adapters on all three groups, each with its own rank and rate, and nothing else."""
    recipe = copy.deepcopy(pristine_recipe)
    del recipe["evaluation"], recipe["stages"]["projector"]
    recipe["model"]["license"] = "apache-2.0"
    lora = {"r": 4, "alpha": 8, "vision_tower": {"r": 2, "alpha": 6}, "multi_modal_projector": {"r": 3, "alpha": 3}}
    rates = {"vision_tower": 2e-2, "multi_modal_projector": 5e-3, "language_model": 1e-2}
    only = {"trainable": list(rates), "learning_rate": rates, "lora": lora, "save_steps": 6}
    recipe["stages"]["instruct"] |= only

    def fill(folder: Path) -> None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert main(["train", str(folder / "recipe.yaml"), "--output", str(folder / "run")]) == 0

    return make_once("adapted", fill) / "run"


@pytest.mark.slow
def test_each_group_has_its_own_rank_scale_and_learning_rate(adapted_run, base_folder):
    final = adapted_run / "stages/1-instruct/final"
    adapters = load_file(final / "adapter/adapter_model.safetensors")
    ranks = {}
    for name, weight in adapters.items():
        group = name.removeprefix("base_model.model.model.").partition(".")[0]
        ranks.setdefault(group, set()).add(weight.shape["lora_B" in name])
    assert ranks == {"vision_tower": {2}, "multi_modal_projector": {3}, "language_model": {4}}
    # the layers behind the one that is read have none
    assert {name.split(".")[6] for name in adapters if "vision_tower" in name} == {"0", "1"}
    before, after = (load_file(folder / "model.safetensors") for folder in (base_folder, final))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name.removeprefix('base_model.model.').partition('.lora_')[0]}.weight" for name in adapters}
    for name, scale in (
        ("model.multi_modal_projector.linear_1", 1),
        ("model.vision_tower.encoder.layers.1.mlp.fc2", 3),
    ):
        down, up = (adapters[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        expected = before[f"{name}.weight"] + scale * up @ down
        torch.testing.assert_close(after[f"{name}.weight"], expected, atol=1e-6, rtol=0)
    record = json.loads((final / "stage.json").read_text())
    assert [(line["num_trainable"], line["learning_rate"]) for line in record["groups"]] == [
        (sum(w.numel() for name, w in adapters.items() if group in name), rate)
        for group, rate in (("vision_tower", 2e-2), ("multi_modal_projector", 5e-3), ("language_model", 1e-2))
    ]
    plan = setup_of(
        load_recipe(str(adapted_run.parent / "recipe.yaml")).stages["instruct"],
        _config(base_folder),
        ENGINES["ddp"],
        frozenset(),
        False,
    )
    assert plan.trained == {line["group"]: line["num_trainable"] for line in record["groups"]}


def _config(folder):
    return LlavaLlama31ForConditionalGeneration.config_class.from_pretrained(folder).to_dict()


def test_merged_adapters_compute_in_float64_what_they_computed_beside_the_weights(base_folder, processor, make_image):
    model = LlavaLlama31ForConditionalGeneration.from_pretrained(base_folder, dtype=torch.float64).eval()
    lora = Lora.model_validate(
        {"r": 4, "dora": True, "vision_tower": {"r": 2, "alpha": 6}, "multi_modal_projector": {"r": 3, "alpha": 3}}
    )
    adapted = adapt(model, lora, seed=3, where="s", groups=GROUPS)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=chance) / 10)
    encoding = processor.encode([{"role": "user", "content": [{"type": "image"}]}], [(30, 50)])
    asked = {
        "input_ids": torch.tensor([encoding.input_ids]),
        "pixel_values": torch.from_numpy(processor.tiles(make_image(30, 50))).double(),
        "image_sizes": torch.tensor([[30, 50]]),
    }
    with torch.no_grad():
        beside = adapted(**asked).logits
        merged = adapted.merge_and_unload()(**asked).logits
    torch.testing.assert_close(merged, beside, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "lora, trainable, message",
    [
        (
            {"vision_tower": {"r": 2, "alpha": 4.0}},
            ["language_model"],
            "lora.vision_tower adapts a group that is frozen",
        ),
        ({}, ["vision_tower"], "lora adapts the language_model, which is frozen"),
        ({"vision_tower": {"r": 2, "alpha": 4.0}, "quantize": "nf4"}, ["vision_tower"], "lora.quantize is for"),
        ({"vision_tower": {"r": 2}}, ["vision_tower"], "alpha"),
    ],
)
def test_adapters_on_what_is_frozen_are_refused(recipe_content, lora, trainable, message):
    stage = {**recipe_content["stages"]["instruct"], "lora": lora, "trainable": trainable, "learning_rate": 1e-3}
    with pytest.raises(ValidationError, match=message):
        Stage.model_validate(stage)


@pytest.mark.slow
def test_adapters_exported_as_adapters_give_the_merged_exports_logits(
    adapted_run, base_folder, processor, samples, tmp_path, capsys
):
    from peft import PeftModel

    assert main(["export", str(adapted_run), "--adapter"]) == 2
    assert "names no base on the Hub" in capsys.readouterr().err
    assert main(["export", str(adapted_run), "--adapter", "--base", str(base_folder)]) == 0
    folder = adapted_run / "export-adapter"
    assert capsys.readouterr().out.strip() == str(folder)
    assert atomic_folders.verify(folder) is None and not (folder / "model.safetensors").exists()
    # as anybody opens it, without this package's classes
    base = LlavaNextForConditionalGeneration.from_pretrained(base_folder)
    adapted = PeftModel.from_pretrained(base, folder).eval()
    merged = LlavaNextForConditionalGeneration.from_pretrained(adapted_run / "export").eval()
    grids = processor.image_processor.image_grid_pinpoints
    asked = inputs_of(processor, fixed_questions(grids, processor.tile_size)[0].messages())
    assert asked["pixel_values"].abs().sum() > 0  # tower and projector count
    input_ids = torch.tensor([samples[9].input_ids])
    with torch.no_grad():
        logits, wanted, plain = (
            model(**asked).logits
            for model in (adapted, merged, LlavaNextForConditionalGeneration.from_pretrained(base_folder).eval())
        )
    assert (logits - wanted).abs().max() < TOLERANCE * wanted.std() < (plain - wanted).abs().max() / 10
    # whatever opens a model opens it too
    opened, _ = open_model(folder)
    torch.testing.assert_close(opened(**asked).logits, logits)
    assert torch.isfinite(opened(input_ids).logits).all()
    assert [item.answer for item in read_reference(folder).recorded] == [
        item.answer for item in read_reference(adapted_run / "export").recorded
    ]


def test_a_base_that_the_adapters_do_not_belong_to_is_refused(adapted_run, lively_folder, capsys):
    other = adapted_run / "export-other"
    assert main(["export", str(adapted_run), "--adapter", "--base", str(lively_folder), "--output", str(other)]) == 2
    assert "is not the trained model: the logits differ by" in capsys.readouterr().err
    assert not other.exists()


@pytest.mark.slow
def test_what_adapters_can_not_hold_is_refused(run_adapters, base_folder, tmp_path, capsys):
    """The projector was trained beside them."""
    run_adapters({})
    assert main(["export", str(tmp_path / "run"), "--adapter", "--base", str(base_folder)]) == 2
    assert "also trained what adapters can't hold" in capsys.readouterr().err


@pytest.mark.slow
def test_adapters_are_published_for_a_base_at_a_revision(adapted_run, base_folder, monkeypatch, tmp_path):
    """Of a base in the Hub's cache; the gate takes the folder, and both doors open it on that base."""
    resize_by_pil(monkeypatch)
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub/models--me--base"
    shutil.copytree(base_folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = export_adapter(RunFolder(adapted_run), "me/base@main", tmp_path / "export")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", revision)
    assert check_folder(folder, "mine") == []
    card = ModelCard((folder / "README.md").read_text())
    assert (card.data.library_name, card.data.base_model) == ("peft", ["me/base"])
    assert card.data.to_dict()["base_model_relation"] == "adapter" and f"me/base at {revision}" in card.text
    doors = [open_door(door, str(folder), "", str(tmp_path / door)) for door in ("stock", "remote")]
    assert doors[0]["logits_sha256"] == doors[1]["logits_sha256"] and doors[0]["finite"]
    assert doors[0]["model"].startswith("Peft")
