"""`assemble`: every layout of every part against the modules that it came from, and every wrong part by name."""

import copy
import dataclasses
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from llava_llama31.assembly import AssemblyError, VisionChoices, plan_assembly, write_assembly
from llava_llama31.checkpoint_parts import Vocabulary
from llava_llama31.processing import CHAT_TOKENS, LlavaLlama31Processor
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.model.assemble import assemble, convert_original


TILE, PATCH = 28, 14
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def randomized(model, seed):
    """`model` with every parameter drawn again, so that no two tensors of it are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def vision_config(**changes):
    # one head of 64: LLaVA's original layout does not give the number of heads
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1}
    return CLIPVisionConfig(**(sizes | {"image_size": TILE, "patch_size": PATCH, "projection_dim": 768} | changes))


def text_config(vocab_size, **changes):
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_parameters": {**ROPE, "rope_theta": 5e5}, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    return LlamaConfig(**(sizes | rope | {"num_key_value_heads": 2, "vocab_size": vocab_size} | changes))


def write(folder, state, config):
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def renamed(state, *rules):
    """`state` with the first matching rule applied to each key."""
    result = {}
    for name, tensor in state.items():
        pattern, target = next((rule for rule in rules if re.match(rule[0], name)), ("^", ""))
        result[re.sub(pattern, target, name, count=1)] = tensor
    return result


OLD = [("^model.vision_tower.", "vision_tower.vision_model."), ("^model.language_model.", "language_model.model.")]
OLD += [("^lm_head", "language_model.lm_head"), ("^model.", "")]
ORIGINAL = [
    ("^model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("^model.language_model.", "model."),
]
ORIGINAL += [("^model.multi_modal_projector.linear_1", "model.mm_projector.0")]
ORIGINAL += [("^model.multi_modal_projector.linear_2", "model.mm_projector.2")]
LLAVA_RULES = {
    "llava-hf old keys": OLD,
    "llava-hf new keys": [("^model.vision_tower.", "model.vision_tower.vision_model.")],
    "native keys": [],
    "own keys of a renamed class": [("^model.language_model.", "model.language_model.model.")],
    "LLaVA-1.6 original": ORIGINAL,
}


def original_config(config):
    """config.json as LLaVA's own code writes it: Llama's fields at the top, the tower by name."""
    text = config.text_config.to_dict()
    rope = text.pop("rope_parameters")
    return text | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": 64,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": PINPOINTS,
        "use_mm_proj": True,
    }


@pytest.fixture(scope="module")
def donor(tokenizer):
    """A whole LLaVA model whose embedding has room for `<image>`."""
    config = LlavaNextConfig(
        vision_config=vision_config(),
        text_config=text_config(448),
        image_token_index=len(tokenizer),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(TILE // PATCH) ** 2,
    )
    return randomized(LlavaNextForConditionalGeneration(config), 1)


@pytest.fixture(scope="module")
def llava_folders(donor, tokenizer, tmp_path_factory):
    """The donor in every layout that LLaVA checkpoints come in, with a tokenizer that knows `<image>`."""
    root = tmp_path_factory.mktemp("llava")
    folders = {}
    for layout, rules in LLAVA_RULES.items():
        config = original_config(donor.config) if layout == "LLaVA-1.6 original" else donor.config.to_dict()
        folders[layout] = write(root / layout.replace(" ", "_"), renamed(donor.state_dict(), *rules), config)
        with_image = copy.deepcopy(tokenizer)
        with_image.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
        with_image.save_pretrained(folders[layout])
    return folders


@pytest.fixture(scope="module")
def tower_folders(donor, llava_folders, tmp_path_factory):
    """The donor's tower in every layout that towers come in."""
    root = tmp_path_factory.mktemp("towers")
    tower = donor.model.vision_tower
    state = {f"vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    clip = {"text_model.encoder.layers.0.layer_norm1.weight": torch.ones(4), "logit_scale": torch.ones(())}
    clip |= {"visual_projection.weight": torch.ones(4, 4), "vision_model.embeddings.position_ids": torch.arange(5)}
    tower.save_pretrained(root / "clip_vision_model")
    whole = {
        "model_type": "clip",
        "vision_config": tower.config.to_dict(),
        "text_config": {"model_type": "clip_text_model"},
    }
    return llava_folders | {
        "CLIPModel": write(root / "clip", state | clip, whole),
        "CLIPVisionModel": root / "clip_vision_model",
        "CLIPVisionModel of old": write(root / "clip_old", state, tower.config.to_dict()),
    }


@pytest.fixture(scope="module")
def language_model(tokenizer):
    return randomized(LlamaForCausalLM(text_config(len(tokenizer))), 2)


@pytest.fixture(scope="module")
def language_folder(language_model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("language") / "llama"
    language_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tower_folders):
    return tower_folders["CLIPVisionModel"]


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    size = len(tokenizer)
    return Vocabulary(size + 1, size, size, bos_token_id=0, pad_token_id=2, eos_token_ids=(1, 5, 6))


def stock(folder):
    """The folder in stock Transformers, with nothing missing from it and nothing left over."""
    model, info = LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_same_tower(model, tower, size=TILE):
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        theirs = tower(pixels, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def assert_same_language_model(model, language_model):
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        hidden = model.model.language_model(ids).last_hidden_state
        assert torch.equal(hidden, language_model.model(ids).last_hidden_state)
    rows = language_model.config.vocab_size
    assert torch.equal(model.lm_head.weight[:rows], language_model.lm_head.weight)


TOWERS = [*LLAVA_RULES, "CLIPModel", "CLIPVisionModel", "CLIPVisionModel of old"]


@pytest.mark.parametrize("layout", TOWERS)
def test_tower_of_every_layout(layout, tower_folders, donor, language_folder, language_model, tmp_path):
    assemble(tower_folders[layout], language_folder, tmp_path / "out", vision=VisionChoices(vision_feature_layer=-2))
    model = stock(tmp_path / "out")
    assert_same_tower(model, donor.model.vision_tower)
    assert_same_language_model(model, language_model)
    expected = PINPOINTS if layout in LLAVA_RULES else [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    assert model.config.image_grid_pinpoints == expected


@pytest.mark.parametrize("layout", LLAVA_RULES)
def test_whole_llava_checkpoint_keeps_its_logits(layout, llava_folders, donor, tmp_path, make_image):
    convert_original(llava_folders[layout], tmp_path / "out")
    processor = LlavaLlama31Processor.from_pretrained(tmp_path / "out")
    image = make_image(40, 70)
    ids = processor.encode_prompt(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}], [(40, 70)]
    )
    batch = {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.from_numpy(processor.tiles(image)),
        "image_sizes": torch.tensor([[40, 70]]),
    }
    with torch.no_grad():
        assert torch.equal(stock(tmp_path / "out")(**batch).logits, donor(**batch).logits)


@pytest.mark.parametrize("layout", LLAVA_RULES)
def test_projector_of_every_llava_layout(layout, llava_folders, donor, clip_folder, language_folder, tmp_path):
    assemble(clip_folder, language_folder, tmp_path / "out", projector=llava_folders[layout])
    model = stock(tmp_path / "out")
    for name, tensor in donor.model.multi_modal_projector.state_dict().items():
        assert torch.equal(model.model.multi_modal_projector.state_dict()[name], tensor)
    assert torch.equal(model.model.image_newline, donor.model.image_newline)


@pytest.mark.parametrize("prefix", ["", "mm_projector.", "model.mm_projector."])
def test_projector_from_a_file_of_its_own(prefix, donor, clip_folder, language_folder, tmp_path):
    weights = donor.model.multi_modal_projector.state_dict()
    names = {"linear_1": "0", "linear_2": "2"}
    state = {prefix + re.sub(r"linear_\d", lambda m: names[m[0]], name): tensor for name, tensor in weights.items()}
    save_file(state, tmp_path / "mm_projector.safetensors")
    assemble(clip_folder, language_folder, tmp_path / "out", projector=tmp_path / "mm_projector.safetensors")
    projector = stock(tmp_path / "out").model.multi_modal_projector
    assert all(torch.equal(projector.state_dict()[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("native", [True, False], ids=["native keys", "hub keys"])
@pytest.mark.parametrize("size", [28, 56, 70])
def test_dinov2_positions_are_resized_once(native, size, language_folder, tmp_path, make_image):
    config = Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=PATCH)
    tower = randomized(Dinov2Model(config), 3)
    tower.save_pretrained(tmp_path / "dino", save_original_format=not native)
    keys = load_file(tmp_path / "dino" / "model.safetensors")
    assert ("encoder.layer.0.attention.q_proj.weight" in keys) == native
    assemble(
        tmp_path / "dino",
        language_folder,
        tmp_path / "out",
        vision=VisionChoices(image_size=size, vision_feature_layer=2),
    )
    model = stock(tmp_path / "out")
    assert model.config.vision_config.image_size == size
    assert model.model.vision_tower.embeddings.position_embeddings.shape[1] == (size // PATCH) ** 2 + 1
    assert_same_tower(model, tower, size)  # which interpolates at every forward
    processor = LlavaLlama31Processor.from_pretrained(tmp_path / "out")
    assert list(processor.image_processor.image_mean) == [0.485, 0.456, 0.406]
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    ids = processor.encode_prompt([{"role": "user", "content": content}], [(30, 90)])
    tiles = torch.from_numpy(processor.tiles(make_image(30, 90)))
    assert (
        model(input_ids=torch.tensor([ids]), pixel_values=tiles, image_sizes=torch.tensor([[30, 90]]))
        .logits.isfinite()
        .all()
    )


@pytest.mark.parametrize("head_in_file", [False, True])
def test_tied_embeddings_stay_tied(head_in_file, clip_folder, tokenizer, tmp_path):
    tied = randomized(LlamaForCausalLM(text_config(len(tokenizer), tie_word_embeddings=True)), 4)
    tied.save_pretrained(tmp_path / "tied")
    if head_in_file:
        put(lm_head__weight=tied.lm_head.weight.detach().clone())(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    counts = assemble(clip_folder, tmp_path / "tied", tmp_path / "out")
    assert counts["lm_head"] == 0
    assert sum(counts.values()) == sum(parameter.numel() for parameter in stock(tmp_path / "out").parameters())
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = stock(tmp_path / "out")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert_same_language_model(model, tied)


@pytest.mark.parametrize(
    ("outer", "inner", "own_head", "is_tied"),
    [
        (False, True, True, False),  # the three of an own head: it was dropped in silence
        (True, True, True, False),
        ("none", True, True, False),
        (True, False, False, True),  # refused for the lack of a head
        (True, None, False, True),
        (None, True, False, True),
        (False, False, True, False),
    ],
)
def test_head_and_embedding_are_tied_as_transformers_reads_them(
    outer, inner, own_head, is_tied, clip_folder, tokenizer, tmp_path
):
    tied = randomized(LlamaForCausalLM(text_config(len(tokenizer), tie_word_embeddings=True)), 4)
    source = tmp_path / "source"
    tied.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    if outer == "none":  # a language model alone, as merged adapters leave it
        shutil.copytree(tmp_path / "tied", source)
    else:
        assemble(clip_folder, tmp_path / "tied", source)
        file = source / "config.json"
        config = json.loads(file.read_text())
        for level, value in ((config, outer), (config["text_config"], inner)):
            level.pop("tie_word_embeddings", None)
            if value is not None:
                level["tie_word_embeddings"] = value
        file.write_text(json.dumps(config))
    embedding = next(value for key, value in load_file(source / "model.safetensors").items() if "embed_tokens" in key)
    if own_head:
        put(lm_head__weight=embedding * 1.7)(source)
    assemble(clip_folder, source, tmp_path / "out")
    head = stock(tmp_path / "out").lm_head.weight
    wanted = embedding * 1.7 if own_head else embedding
    torch.testing.assert_close(head[: len(tokenizer) - 1], wanted[: len(tokenizer) - 1])
    written = "lm_head.weight" in load_file(tmp_path / "out/model.safetensors")
    assert written is not is_tied


def test_a_head_that_one_level_of_a_config_ties_and_the_other_does_not_is_refused(clip_folder, tokenizer, tmp_path):
    tied = randomized(LlamaForCausalLM(text_config(len(tokenizer), tie_word_embeddings=True)), 4)
    tied.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    assemble(clip_folder, tmp_path / "tied", tmp_path / "source")
    configure(tie_word_embeddings=False)(tmp_path / "source")
    with pytest.raises(UserError, match="tie_word_embeddings: false, its text_config true"):
        assemble(clip_folder, tmp_path / "source", tmp_path / "out")


def test_rows_ids_and_configs(clip_folder, language_folder, language_model, tokenizer, tmp_path):
    assemble(clip_folder, language_folder, tmp_path / "out")
    model, old = stock(tmp_path / "out"), len(tokenizer)
    assert model.config.image_token_id == old
    embedding = model.model.language_model.embed_tokens.weight
    assert embedding.shape[0] == -(-(old + 1) // 64) * 64 == model.config.text_config.vocab_size
    for grown, source in (
        (embedding, language_model.model.embed_tokens),
        (model.lm_head.weight, language_model.lm_head),
    ):
        assert torch.equal(grown[:old], source.weight)
        mean = source.weight.double().mean(0).float()
        assert torch.equal(grown[old:], mean.expand(grown.shape[0] - old, -1))
    ids = dict(zip(CHAT_TOKENS, tokenizer.convert_tokens_to_ids(list(CHAT_TOKENS)), strict=True))
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.pad_token_id == ids["<|finetune_right_pad_id|>"] != ids["<|eot_id|>"]
    assert set(generation.eos_token_id) == {ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]}
    assert model.config.text_config.rope_parameters == {**ROPE, "rope_theta": 5e5}
    assert model.config.text_config.rms_norm_eps == 1e-5
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.convert_tokens_to_ids("<image>") == old and len(again) == old + 1


def test_original_config_becomes_llamas_own(llava_folders, donor, tmp_path):
    convert_original(llava_folders["LLaVA-1.6 original"], tmp_path / "out")
    config = LlavaNextConfig.from_pretrained(tmp_path / "out")
    for field in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings"):
        assert config.text_config.to_dict()[field] == donor.config.text_config.to_dict()[field], field
    assert not [key for key in config.text_config.to_dict() if key.startswith("mm_")]
    ours, theirs = config.vision_config.to_dict(), donor.config.vision_config.to_dict()
    differing = {key for key in theirs if ours[key] != theirs[key]}
    assert differing <= {"dtype", "architectures"}  # what the modules were built for, and not their shape


def test_fresh_projector(clip_folder, language_folder, vocabulary):
    def fresh(seed):
        plan = plan_assembly(clip_folder, language_folder, vocabulary=vocabulary, seed=seed)
        return {
            name: tensor.read() for name, tensor in plan.tensors.items() if "projector" in name or "newline" in name
        }

    first, again, other = fresh(0), fresh(0), fresh(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    linear_1, linear_2 = (first[f"model.multi_modal_projector.linear_{i}.weight"] for i in (1, 2))
    assert linear_1.std() == pytest.approx(0.02, rel=0.1) and linear_1.mean() == pytest.approx(0, abs=1e-3)
    assert not torch.equal(linear_1.flatten()[:100], linear_2.flatten()[:100])
    assert not torch.equal(linear_1, other["model.multi_modal_projector.linear_1.weight"])
    assert first["model.image_newline"].std() == pytest.approx(48**-0.5, rel=0.4)
    assert not any(first[f"model.multi_modal_projector.linear_{i}.bias"].any() for i in (1, 2))


def test_missing_chat_tokens_are_named_or_made(clip_folder, language_model, tmp_path, caplog):
    folder = chatml_folder(language_model, tmp_path / "chatml")
    with pytest.raises(UserError, match=r"lacks <\|begin_of_text\|>, <\|start_header_id\|>.*add_chat_tokens"):
        assemble(clip_folder, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with caplog.at_level("INFO"):
        assemble(clip_folder, folder, tmp_path / "out", add_chat_tokens=True)
    assert "<|eot_id|>" in caplog.text
    tokenizer, embedding = AutoTokenizer.from_pretrained(tmp_path / "out"), stock(tmp_path / "out").lm_head.weight
    old = language_model.lm_head.weight
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*CHAT_TOKENS, "<image>")}
    assert sorted(ids.values()) == list(range(100, 108))
    assert torch.equal(embedding[ids["<|eot_id|>"]], old[1])
    assert torch.equal(embedding[ids["<|begin_of_text|>"]], old[0])
    stops = {ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"], 1}
    assert set(GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id) == stops
    assert torch.equal(embedding[ids["<|start_header_id|>"]], old[:100].double().mean(0).float())
    assert torch.equal(embedding[:100], old[:100])


def chatml_folder(language_model, folder):
    """The language model with a tokenizer of 100 tokens that knows other turn tokens than Llama 3.1's."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<|im_start|>": 0, "<|im_end|>": 1} | {f"w{i}": i for i in range(2, 100)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w2"))
    language_model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="w2"
    ).save_pretrained(folder)
    return folder


def test_shards_hold_the_plan_bit_for_bit(clip_folder, language_folder, vocabulary, tmp_path):
    plan = plan_assembly(clip_folder, language_folder, vocabulary=vocabulary, dtype=torch.bfloat16)
    write_assembly(plan, tmp_path / "one")
    write_assembly(plan, tmp_path / "many", max_shard_bytes=60_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        assert file.stat().st_size < 60_000 + 20_000  # data and header
    one = load_file(tmp_path / "one" / "model.safetensors")
    many = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert one.keys() == many.keys() == plan.tensors.keys()
    for name, planned in plan.tensors.items():
        assert one[name].dtype == torch.bfloat16
        assert torch.equal(one[name], planned.read().to(torch.bfloat16)) and torch.equal(one[name], many[name]), name
    assert stock(tmp_path / "many").dtype == torch.bfloat16
    assert index["metadata"]["total_size"] == plan.num_bytes == sum(t.nbytes for t in one.values())


def test_a_failed_write_leaves_nothing(clip_folder, language_folder, vocabulary, tmp_path):
    def broken():
        raise OSError("disk error")

    plan = plan_assembly(clip_folder, language_folder, vocabulary=vocabulary)
    last = list(plan.tensors)[-1]
    bad = dataclasses.replace(
        plan, tensors={**plan.tensors, last: dataclasses.replace(plan.tensors[last], read=broken)}
    )
    with pytest.raises(OSError, match="disk error"):
        write_assembly(bad, tmp_path / "parent" / "out")
    assert list((tmp_path / "parent").iterdir()) == []


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop(key):
    def change(folder):
        state = load_file(folder / "model.safetensors")
        del state[key]
        save_file(state, folder / "model.safetensors")

    return change


def put(**tensors):
    def change(folder):
        file = folder / "model.safetensors"
        save_file(load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, file)

    return change


def configure(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lost_shard(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def nothing(folder):
    pass


def overwrite(folder):
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")


def spoil_json(folder):
    (folder / "config.json").write_text("{")


NORM = "model.norm.weight"
SHAPE = r"linear_1.weight is \[48, 32\] and should be \[48, 64\].*vision tower is 64 wide, the language model 48"
ROWS = r"embed_tokens.weight is \[\d+, 48\] and should be \[\d+, 48\]"
PINPOINT = r"\[28, 50\] are not .*tile of 28 px"
OTHER_TOWER = "vit"  # a type that LLaVA has no use for
narrow, third = torch.zeros(48, 32), torch.zeros(2)
int8 = torch.zeros(48, dtype=torch.int8)
# which part is spoiled, how, further arguments, what the message says
WRONG_PARTS = {
    "projector of another width": ("projector", put(model__mm_projector__0__weight=narrow), {}, SHAPE),
    "deeper projector": (
        "projector",
        put(mm_projector__4__weight=third),
        {},
        "mm_projector.4.weight does not belong to a two",
    ),
    "no projector inside": ("projector", overwrite, {}, "no projector"),
    "projector of another layer": ("projector", nothing, {"vision_feature_layer": -1}, "on vision_feature_layer -2"),
    "image size and patch": (
        "tower",
        configure(image_size=30),
        {},
        "image_size 30 is not a multiple of patch_size 14",
    ),
    "pinpoints and tile": ("tower", nothing, {"image_grid_pinpoints": [[28, 50]]}, PINPOINT),
    "feature layer": (
        "tower",
        nothing,
        {"vision_feature_layer": 4},
        "vision_feature_layer is 4, but the tower has 3 layers",
    ),
    "image size of CLIP": ("tower", nothing, {"image_size": 56}, "embeddings are for 28 px, not for 56 px"),
    "tower lacks a tensor": ("tower", drop("vision_model.pre_layrnorm.weight"), {}, "lacks .*pre_layrnorm.weight"),
    "tower has a layer more": (
        "tower",
        configure(num_hidden_layers=2),
        {},
        r"layers.2.* and \d+ more not in the model",
    ),
    "tower of another kind": ("tower", configure(model_type=OTHER_TOWER), {}, f"vision tower of type '{OTHER_TOWER}'"),
    "tower without weights": ("tower", overwrite, {}, "contains no vision tower"),
    "language model lacks a tensor": ("language", drop(NORM), {}, "lacks model.language_model.norm.weight"),
    "language model of another family": ("language", configure(model_type="qwen2"), {}, "model of type 'qwen2'"),
    "language model's rows": ("language", configure(vocab_size=300), {}, ROWS),
    "cut file": ("language", truncate, {}, "model.safetensors: unreadable"),
    "config that is no JSON": ("language", spoil_json, {}, "config.json: unreadable"),
    "quantised weights": ("language", put(model__norm__weight=int8), {}, "contains I8 tensors"),
    "pickle only": ("language", only_pickle, {}, "contains no safetensors file; pickles .* are refused"),
    "lost shard": ("language", lost_shard, {}, "model-00002-of-00002.safetensors is in the index but missing"),
    "no tokenizer": ("language", lambda folder: (folder / "tokenizer.json").unlink(), {}, "no tokenizer"),
    "no such folder": ("language", shutil.rmtree, {}, "language"),
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_wrong_part_is_named_before_anything_is_written(case, tower_folders, llava_folders, language_folder, tmp_path):
    part, spoil, arguments, message = WRONG_PARTS[case]
    parts = {
        "tower": tower_folders["CLIPVisionModel of old"],
        "language": language_folder,
        "projector": llava_folders["LLaVA-1.6 original"],
    }
    for name, source in parts.items():
        shutil.copytree(source, tmp_path / name)
    before = sorted(path.name for path in tmp_path.iterdir())
    # unspoiled, the same call must work, so that the message is about the change and nothing else
    works = {"projector": tmp_path / "projector"} if part == "projector" else {}
    assemble(tmp_path / "tower", tmp_path / "language", tmp_path / "out", **works)
    shutil.rmtree(tmp_path / "out")
    spoil(tmp_path / part)
    before = sorted(set(before) - ({part} if not (tmp_path / part).exists() else set()))
    with pytest.raises(UserError, match=message) as error:
        assemble(
            tmp_path / "tower", tmp_path / "language", tmp_path / "out", **works, vision=VisionChoices(**arguments)
        )
    assert "\n" not in str(error.value) and "(fix: " in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_all_wrong_parts_are_named_at_once(tower_folders, language_model, tmp_path):
    language = chatml_folder(language_model, tmp_path / "language")
    drop(NORM)(language)
    shutil.copytree(tower_folders["CLIPVisionModel of old"], tmp_path / "tower")
    only_pickle(tmp_path / "tower")
    configure(model_type="gpt2")(language)
    with pytest.raises(UserError) as error:
        assemble(tmp_path / "tower", language, tmp_path / "out", projector=tmp_path / "nowhere")
    for word in ("<|eot_id|>", "'gpt2'", "pickles", "nowhere: no such file"):
        assert word in str(error.value)


def test_output_that_exists_is_kept(clip_folder, language_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UserError, match="already exists"):
        assemble(clip_folder, language_folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "mine").read_text() == "kept"


def test_full_disk_is_named_before_writing(clip_folder, language_folder, vocabulary, tmp_path):
    plan = plan_assembly(clip_folder, language_folder, vocabulary=vocabulary)
    huge = dataclasses.replace(plan.tensors["model.image_newline"], shape=(10**15,))
    with pytest.raises(AssemblyError, match=r"GB are needed but only .* GB are free"):
        write_assembly(dataclasses.replace(plan, tensors={"model.image_newline": huge}), tmp_path / "parent" / "out")
    assert list((tmp_path / "parent").iterdir()) == []


def test_command_line(clip_folder, language_folder, tmp_path, capsys):
    parts = ["assemble", "--vision-tower", str(clip_folder), "--language-model", str(language_folder)]
    assert main([*parts, "--dtype", "bfloat16", "--output", str(tmp_path / "out")]) == 0
    assert stock(tmp_path / "out").dtype == torch.bfloat16
    capsys.readouterr()
    assert main([*parts, "--image-size", "70", "--output", str(tmp_path / "other")]) == 2
    assert "px, not for 70 px" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()


def sparse_safetensors(file, shapes, dtype="BF16"):
    """A safetensors file whose data is a hole: right to the last byte, and hardly any room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with file.open("wb") as output:
        output.write(struct.pack("<Q", len(encoded)) + encoded)
        output.truncate(8 + len(encoded) + end)


def meta_shapes(model_class, config):
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}


def test_llama_31_8b_with_clip_large(tmp_path):
    """The real sizes: 16 GB of headers, no data, counts as published for LLaVA-NeXT-Llama-3.1-8B."""
    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    llama = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {**ROPE, "original_max_position_embeddings": 8192},
        "tie_word_embeddings": False,
    }
    for name, config, model_class in (
        ("clip", clip.to_dict(), CLIPVisionModel),
        ("llama", llama, LlamaForCausalLM),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        native = clip if name == "clip" else LlamaConfig(**{k: v for k, v in llama.items() if k != "model_type"})
        sparse_safetensors(tmp_path / name / "model.safetensors", meta_shapes(model_class, native))
    eos = (128001, 128008, 128009)
    vocabulary = Vocabulary(128257, 128256, 128256, bos_token_id=128000, pad_token_id=128004, eos_token_ids=eos)
    plan = plan_assembly(tmp_path / "clip", tmp_path / "llama", vocabulary=vocabulary)
    assert plan.parameter_counts() == {
        "vision_tower": 303_507_456,
        "multi_modal_projector": 20_979_712,
        "image_newline": 4_096,
        "embed_tokens": 525_598_720,
        "layers": 6_979_584_000,
        "norm": 4_096,
        "lm_head": 525_598_720,
    }
    assert sum(plan.parameter_counts().values()) == 8_355_276_800
    assert plan.dtype == torch.bfloat16 and plan.num_bytes == 2 * 8_355_276_800
    assert plan.config.image_grid_pinpoints == [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert plan.config.text_config.rope_parameters["rope_theta"] == 500000.0
    assert plan.config.text_config.rope_parameters["rope_type"] == "llama3"
    assert plan.config.image_seq_length == 576 and plan.config.image_token_id == 128256


MEASURE = """
import json, resource, sys
from llava_llama31.assembly import plan_assembly, write_assembly
from llava_llama31.checkpoint_parts import Vocabulary
tower, language, output = sys.argv[1:]
plan = plan_assembly(tower, language, vocabulary=Vocabulary(1025, 1024, 1024, 0, 1, (2,)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_assembly(plan, output, max_shard_bytes=128 * 2**20)
print(json.dumps([plan.num_bytes, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)]))
"""


@pytest.mark.slow
def test_writing_takes_the_memory_of_a_tensor_not_of_a_shard(clip_folder, tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 7, "num_attention_heads": 8}
    config = text_config(1024, **sizes)
    (tmp_path / "llama").mkdir()
    config.save_pretrained(tmp_path / "llama")
    sparse_safetensors(tmp_path / "llama" / "model.safetensors", meta_shapes(LlamaForCausalLM, config))
    arguments = [str(clip_folder), str(tmp_path / "llama"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    num_bytes, grown = json.loads(done.stdout)
    assert num_bytes > 200e6 and len(list(Path(tmp_path / "out").glob("*.safetensors"))) >= 2
    assert grown < 100 * 2**20, f"{grown / 2**20:.0f} MB"
