"""SigLIP and towers of CLIP's shape have all that CLIP has: parts, stock logits, packed rows, costs, keys, caches."""

import json
import queue
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import ROWS, make_tokenizer
from safetensors.torch import load_file, save_file
from stock_pixels import resize_by_pil
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)
from transformers.models.llava_next.modeling_llava_next import unpad_image

from llava_llama31 import LlavaLlama31Config, LlavaLlama31ForConditionalGeneration
from llava_llama31.processing import LlavaLlama31Processor, build_processor
from llava_llama31.tile_grids import GRID_SHAPES, shapes_up_to
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.costs.accelerators import ACCELERATORS
from llava_llama31.trainer.costs.flops import ModelShape, Work, needed_flops
from llava_llama31.trainer.costs.image_tokens import TileGrid
from llava_llama31.trainer.costs.parameters import Parameters
from llava_llama31.trainer.data.batches.collator import Sample
from llava_llama31.trainer.data.batches.device_tiles import DeviceTiles
from llava_llama31.trainer.data.batches.feature_cache import cache_key
from llava_llama31.trainer.data.check.row_checker import tiles_vanish
from llava_llama31.trainer.demo.parts import TowerSettings, train_tower
from llava_llama31.trainer.export.dialects import native_name, portable_name, to_portable
from llava_llama31.trainer.model.assemble import assemble
from llava_llama31.trainer.model.module_groups import GROUPS, freeze, layer_classes
from llava_llama31.trainer.planning.plan import Machine, plan_recipe
from llava_llama31.trainer.recipes.loading import SHIPPED, load_recipe, read_recipe_text


PATCH = 14
SIZES = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4}
# SigLIP so400m's 384 px are 27 patches of 14 px and 6 px that no patch reads; 30 px are 2 and 2 px
SIDES = {"siglip": 30, "siglip2": 30, "mlcd": 28}


def drawn(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of the towers as the Hub has them, and of a tied Llama of 3.2's kind."""
    root = tmp_path_factory.mktemp("parts")
    vision = SiglipVisionConfig(**SIZES, image_size=30, patch_size=PATCH)
    text = SiglipTextConfig(**SIZES, vocab_size=50)
    torch.manual_seed(0)
    for name in ("siglip", "siglip2"):  # of fixed resolution: one architecture
        whole = drawn(SiglipModel(SiglipConfig(vision_config=vision.to_dict(), text_config=text.to_dict())))
        whole.save_pretrained(root / name)
        config = {"model_type": "siglip", "vision_config": {**SIZES, "model_type": "siglip_vision_model"}}
        config["vision_config"] |= {"image_size": 30, "patch_size": PATCH}
        config["text_config"] = {"model_type": "siglip_text_model", "vocab_size": 50}
        (root / name / "config.json").write_text(json.dumps(config))  # only what differs from defaults, as there
    clip = CLIPVisionConfig(**SIZES, image_size=28, patch_size=PATCH, projection_dim=32, hidden_act="gelu")
    drawn(CLIPVisionModel(clip)).save_pretrained(root / "mlcd")
    tokenizer = make_tokenizer()
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        rope_parameters={"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 64, "rope_theta": 5e5},
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(root / "llama")
    tokenizer.save_pretrained(root / "llama")
    return root


@pytest.fixture(scope="module")
def assembled(parts, tmp_path_factory):
    root = tmp_path_factory.mktemp("assembled")
    for tower in SIDES:
        assemble(parts / tower, parts / "llama", root / tower, dtype="float32")
    return root


@pytest.fixture(params=list(SIDES))
def tower(request):
    return request.param


@pytest.fixture
def opened(assembled, tower):
    model = LlavaLlama31ForConditionalGeneration.from_pretrained(assembled / tower, packable=True)
    return model, LlavaLlama31Processor.from_pretrained(assembled / tower)


def samples_of(processor, make_image, dtype):
    found = []
    sizes = {"wide": [(20, 90)], "tall": [(130, 25)], "both": [(40, 60), (90, 30)], "tiny": [(3, 2)], "": []}
    for number, (name, messages) in enumerate(ROWS):
        encoding = processor.encode(messages, sizes[name])
        tiles = [torch.from_numpy(processor.tiles(make_image(*size, seed=sum(size)))) for size in sizes[name]]
        found.append(
            Sample(
                record_id=f"r{number}",
                input_ids=encoding.input_ids,
                labels=encoding.labels,
                pixel_values=torch.cat(tiles).to(dtype) if tiles else None,
                image_sizes=sizes[name],
                num_image_tokens=sum(processor.num_image_tokens(size) for size in sizes[name]),
                num_prefix_tokens=encoding.num_prefix_tokens,
                images=(name,) * len(sizes[name]),
            )
        )
    return found


def test_an_assembled_folder_is_stocks_and_holds_the_towers_own_weights(parts, assembled, tower, caplog):
    model, info = LlavaNextForConditionalGeneration.from_pretrained(assembled / tower, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    own = load_file(parts / tower / "model.safetensors")
    state = model.model.vision_tower.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, own.get(f"vision_model.{name}", own.get(name))), name
    assert not any(name.startswith("head.") for name in state)
    config = model.config
    assert config.vision_feature_select_strategy == ("default" if tower == "mlcd" else "full")
    side = SIDES[tower]
    assert config.image_grid_pinpoints == [[side * rows, side * columns] for rows, columns in GRID_SHAPES]
    assert config.text_config.tie_word_embeddings and model.lm_head.weight is model.get_input_embeddings().weight
    statistics = LlavaNextProcessor.from_pretrained(assembled / tower).image_processor.image_mean
    assert (list(statistics) == [0.5] * 3) == (tower != "mlcd")


def test_logits_are_stocks_and_so_are_the_processors_pixels_and_ids(assembled, tower, opened, make_image, monkeypatch):
    resize_by_pil(monkeypatch)
    model, processor = opened
    stock = LlavaNextForConditionalGeneration.from_pretrained(assembled / tower)
    stock_processor = LlavaNextProcessor.from_pretrained(assembled / tower)
    for size in ((40, 60), (20, 90), (130, 25), (61, 33)):
        image = make_image(*size, seed=sum(size))
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
        text = stock_processor.apply_chat_template(messages, add_generation_prompt=True)
        batch = stock_processor(images=[image], text=[text], return_tensors="pt")
        assert batch["input_ids"][0].tolist() == processor.encode_prompt(messages, [size])
        assert torch.equal(batch["pixel_values"][0], torch.from_numpy(processor.tiles(image)))
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, stock(**batch).logits)


@pytest.mark.parametrize("share", [False, True], ids=["packed", "shared"])
def test_packed_rows_have_the_loss_and_gradients_of_separate_ones(opened, collate, make_stock, make_image, share):
    model, processor = opened[0].double(), opened[1]
    rows = samples_of(processor, make_image, torch.float64)
    stock = make_stock(model)
    padded = collate(rows)
    labels = padded.pop("labels")
    logits = stock(**padded).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    loss = model(**collate(rows, packed=True, share_prefix=share)).loss
    loss.backward()
    assert abs(float(loss.detach() - expected.detach())) < 1e-12
    gradients = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize(("tile", "patch"), [(384, 14), (384, 16), (336, 14), (512, 16)])
@pytest.mark.parametrize("max_tiles", [None, 12])
def test_tokens_are_features_for_any_size(processor, tile, patch, max_tiles):
    shapes = GRID_SHAPES if max_tiles is None else shapes_up_to(max_tiles)
    pinpoints = [[tile * rows, tile * columns] for rows, columns in shapes]
    own = build_processor(
        processor.tokenizer, image_size=tile, patch_size=patch, image_mean=(0.5,) * 3, image_std=(0.5,) * 3,
        image_grid_pinpoints=pinpoints, has_class_token=False,
    )  # fmt: skip
    grid = TileGrid(tuple(map(tuple, pinpoints)), tile, tile // patch)
    random = np.random.default_rng(tile + patch)
    for size in np.exp(random.uniform(1, 8.3, (2500, 2))).astype(int):
        size = (int(size[0]), int(size[1]))
        tokens, features, tiles = grid.measure(size)
        assert tiles == own.num_tiles(size)
        # a view of one number: stock's unpadding without the memory of the features
        rows, columns = ((best // tile) * (tile // patch) for best in grid._best(*size))
        left = unpad_image(torch.zeros(1, 1, 1).expand(1, rows, columns), torch.tensor(size)).shape
        assert features == (tile // patch) ** 2 + left[1] * left[2], size
        assert tiles_vanish(size, pinpoints, patch, tile) == (left[1] * left[2] == 0)
        if left[1] * left[2]:
            assert tokens == own.num_image_tokens(size) == features + left[1], size


def test_the_model_makes_as_many_features_as_the_processor_counts(opened):
    model, processor = opened
    random = np.random.default_rng(0)
    for size in np.exp(random.uniform(0.7, 6, (400, 2))).astype(int):
        size = (int(size[0]), int(size[1]))
        if not tiles_vanish(size, processor.image_processor.image_grid_pinpoints, PATCH, processor.tile_size):
            assert len(model.model.feature_layout([size])[0]) == processor.num_image_tokens(size)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("layers", [-2, [1, -1]])
def test_parameters_and_flops_are_the_models(tiny_config, make_image, head, layers):
    vision = SiglipVisionConfig(**SIZES, image_size=30, patch_size=PATCH, vision_use_head=head)
    config = LlavaLlama31Config(
        vision_config=vision, text_config=tiny_config.text_config, vision_feature_layer=layers,
        vision_feature_select_strategy="full", image_grid_pinpoints=[[30, 60]], image_token_index=400,
    )  # fmt: skip
    model = LlavaLlama31ForConditionalGeneration(config, packable=True)
    report = freeze(model, dict.fromkeys(GROUPS, 1e-3))
    parameters = Parameters.of(config.to_dict())
    assert parameters.groups() == {line.group: line.num_parameters for line in report}
    assert parameters.trainable(GROUPS) == {line.group: line.num_trainable for line in report}
    assert not any(p.requires_grad for p in model.model.vision_tower.post_layernorm.parameters())
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model.model.tile_features(torch.rand(3, 3, 30, 30)).sum().backward()
    work = Work(3, 0, 0, 0, 0, 0, 0, 0)
    flops = needed_flops(ModelShape.of(config), work, ["vision_tower"]).vision_tower
    assert counter.get_total_flops() == flops.forward + flops.backward
    assert ModelShape.of(config).tower.num_positions == 4


def test_keys_of_both_dialects(assembled, tower, tmp_path, make_image):
    state = load_file(assembled / tower / "model.safetensors")
    kind = "clip_vision_model" if tower == "mlcd" else "siglip_vision_model"
    portable = {portable_name(name, kind) for name in state}
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in portable
    assert {native_name(name, kind) for name in portable} == set(state)
    folder = tmp_path / "portable"
    LlavaLlama31ForConditionalGeneration.from_pretrained(assembled / tower).save_pretrained(folder)
    LlavaLlama31Processor.from_pretrained(assembled / tower).save_pretrained(folder)
    to_portable(folder)
    model, info = LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name in state)


def test_device_tiles_and_feature_cache(opened, make_image):
    model, processor = opened
    sizes = [(20, 30), (64, 48), (7, 500), (333, 4), (60, 60)]
    images = [make_image(*size, seed=i) for i, size in enumerate(sizes)]
    expected = torch.cat([torch.from_numpy(processor.tiles(image)) for image in images])
    assert torch.equal(
        DeviceTiles(processor, torch.float32)([torch.from_numpy(np.array(i)) for i in images]), expected
    )
    with torch.no_grad():
        assert model.model.tile_features(expected).shape[1:] == (4, 32)
    keys = {}
    for strategy in ("default", "full"):
        model.config.vision_feature_select_strategy = strategy
        keys[strategy] = cache_key(model, processor, torch.device("cpu"), torch.float32, autocast=False)
    assert keys["default"] != keys["full"]


def test_layers_that_fsdp_wraps_are_those_of_the_tower(opened, tower):
    name = "CLIPEncoderLayer" if tower == "mlcd" else "SiglipEncoderLayer"
    assert layer_classes(opened[0]) == ["LlavaLlama31DecoderLayer", name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "siglip2", "vision_config": {"model_type": "siglip2_vision_model"}}, "NaFlex.*siglip2-so400m"),
        ({"model_type": "siglip2", "vision_config": {}}, "NaFlex"),
        ({"model_type": "mlcd_vision_model"}, "rotates its queries.*mlcd-vit-large-patch14-336"),
        ({"model_type": "siglip", "vision_config": {"image_size": [30, 60]}}, "tiles are square"),
    ],
)
def test_a_tower_that_llavanext_can_not_hold_is_named_before_anything_is_written(
    parts, tmp_path, config, message, capsys
):
    folder = shutil.copytree(parts / "siglip", tmp_path / "tower")
    (folder / "config.json").write_text(json.dumps(config))
    output = tmp_path / "out"
    command = ["assemble", "--vision-tower", str(folder), "--language-model", str(parts / "llama")]
    assert main([*command, "--output", str(output)]) == 2
    assert not output.exists()
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error


def test_a_llava_that_keeps_another_token_than_the_patches_is_refused(assembled, parts, tmp_path, capsys):
    for tower, strategy in (("siglip", "default"), ("mlcd", "full")):
        folder = shutil.copytree(assembled / tower, tmp_path / tower)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vision_feature_select_strategy": strategy}))
        command = ["assemble", "--vision-tower", str(folder), "--language-model", str(parts / "llama")]
        assert main([*command, "--output", str(tmp_path / "out")]) == 2
        assert f"vision_feature_select_strategy is '{strategy}'" in capsys.readouterr().err


def test_a_siglip_llava_is_taken_over_with_head_and_all(assembled, parts, tmp_path):
    """As others save them: with the pooling head, and under the older names."""
    state = load_file(assembled / "siglip" / "model.safetensors")
    head = {f"model.vision_tower.{n.removeprefix('vision_model.')}": t for n, t in
            load_file(parts / "siglip" / "model.safetensors").items() if "vision_model.head" in n}  # fmt: skip
    folder = shutil.copytree(assembled / "siglip", tmp_path / "llava")
    named = {portable_name(name, "siglip_vision_model"): tensor for name, tensor in (state | head).items()}
    save_file(named, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["vision_use_head"] = True
    (folder / "config.json").write_text(json.dumps(config))
    assemble(folder, folder, tmp_path / "out", projector=folder, dtype="float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_a_grid_of_any_number_of_tiles(parts, tmp_path):
    assert shapes_up_to(4) == [(1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1)]
    command = ["assemble", "--vision-tower", str(parts / "siglip"), "--language-model", str(parts / "llama")]
    assert main([*command, "--output", str(tmp_path / "out"), "--max-tiles", "9"]) == 0
    config = LlavaNextConfig.from_pretrained(tmp_path / "out")
    assert all(pair in config.image_grid_pinpoints for pair in ([30, 270], [90, 90], [120, 60]))
    assert len(config.image_grid_pinpoints) == len(shapes_up_to(9)) == 22


# recipe -> the GPU that it says it fits on, and how many of them
FITS = {
    "llama31-8b": ("a100-80", 8),
    "llama31-8b-beyond": ("a100-80", 8),
    "llama31-8b-beyond-data": ("a100-80", 8),
    "llama31-8b-beyond-siglip2": ("a100-80", 8),
    "llama31-8b-beyond-no-textvqa": ("a100-80", 8),
    "llama31-8b-qlora-24gb": ("rtx4090", 1),
    "llava16-lora-24gb": ("rtx4090", 1),
    "llama32-1b": ("rtx4090", 1),
    "llama32-3b": ("a100-80", 1),
}


@pytest.mark.parametrize("name", FITS)
def test_a_recipe_is_planned_within_its_devices_memory(name, tmp_path):
    device, number = FITS[name]
    machine = Machine(num_devices=number, device_memory=ACCELERATORS[device].memory)
    plan = plan_recipe(load_recipe(name), tmp_path, machine)
    assert [stage["fits"] for stage in plan["stages"]] == [True] * len(plan["stages"])
    for stage in plan["stages"]:  # a card's worth of learning rates, and not a typing error
        assert all(2e-6 <= rate <= 1e-3 for rate in stage["learning_rate"].values())


def test_every_shipped_recipe_with_a_gpu_is_in_the_list():
    assert set(FITS) == set(SHIPPED) - {"tiny", "tiny-siglip", "smol", "llama31-8b-card", "llama31-8b-card-commands"}


SMALL = ["tiny-siglip", "llama31-8b-beyond", "llama32-1b", "llava16-lora-24gb", "llama31-8b-qlora-24gb"]
SMALL_TOWER = TowerSettings(
    "siglip", hidden_size=32, intermediate_size=32, layers=1, heads=2, sheets=2, steps=2, batch=4
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_recipes_stages_run_at_a_small_shape(name, parts, assembled, data_folder, tmp_path, run_recipe):
    """All that the recipe says but its sizes: parts and rows here, one step a stage."""
    content = yaml.safe_load(read_recipe_text(name)[0])
    model = {key: value for key, value in content["model"].items() if "license" not in key}
    if name == "tiny-siglip":  # a tower that the demo has trained, for a moment
        content.pop("prepare")
        train_tower(tmp_path / "siglip2-tower", SMALL_TOWER, 3, queue.Queue())
        model |= {"vision_tower": str(tmp_path / "siglip2-tower"), "language_model": str(parts / "llama")}
    elif "checkpoint" in model:
        model["checkpoint"] = str(assembled / "mlcd")
    else:
        tower = "siglip2" if "siglip2" in model["vision_tower"] else "mlcd"
        model |= {"vision_tower": str(parts / tower), "language_model": str(parts / "llama")}
    content["model"] = model | {"dtype": "float32"}
    for stage in content["stages"].values():
        stage["data"] = [{"name": "rows", "path": str(data_folder / "rows.json")}]
        stage.pop("epochs")
        stage |= {"max_steps": 1, "global_batch": 4, "micro_batch": min(stage["micro_batch"], 2), "eval_steps": 1}
        stage["warmup_ratio"] = 0.0  # the only step would be one without a learning rate
        stage |= {"precision": "float32", "dataloader_workers": 0, "deepspeed": None, "validation_fraction": 0.05}
        stage |= {key: float(stage[key]) for key in ("learning_rate",) if isinstance(stage[key], str)}
        if isinstance(stage["learning_rate"], dict):
            stage["learning_rate"] = {group: float(rate) for group, rate in stage["learning_rate"].items()}
    del content["evaluation"]
    run = run_recipe(content, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["stages"]) == list(content["stages"])
    before, after = (load_file(next(folder.glob("*.safetensors"))) for folder in (
        assembled / "mlcd" if "checkpoint" in model else run / "base", run / "export"))  # fmt: skip
    kind = "siglip_vision_model" if "siglip2" in model.get("vision_tower", "") else "clip_vision_model"
    changed = {native_name(key, kind) for key in after if not torch.equal(after[key], before[native_name(key, kind)])}
    trained = {group for stage in content["stages"].values() for group in stage["trainable"]}
    assert {name.split(".")[1] for name in changed} - {"image_newline"} == trained
    stock, info = LlavaNextForConditionalGeneration.from_pretrained(run / "export", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
