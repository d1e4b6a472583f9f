"""The class that `trust_remote_code=True` opens is stock's in all that a caller sees, unless asked for more."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from llava_llama31 import LlavaLlama31ForConditionalGeneration, LlavaLlama31Model
from llava_llama31 import modeling_llava_llama31 as modeling
from llava_llama31.packed_llama_llava_llama31 import LlavaLlama31TextModel, SupervisedHead
from llava_llama31.trainer.model.opening import open_model


# sizes (height, width) of the images, and the question
ROWS = [
    ([(40, 60), (90, 30)], "which?"),
    ([], "no image"),
    ([(20, 90)], "what is wide?"),
    ([(3, 2), (50, 50), (130, 25)], "and these?"),
]


@pytest.fixture(scope="module")
def weights(pristine_config):
    """Larger random weights than a fresh model's, so that logits and answers depend on every token."""
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(LlavaNextConfig.from_dict(copy.deepcopy(pristine_config).to_dict()))
    return {name: 0.2 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


@pytest.fixture
def doors(tiny_config, weights):
    """Stock's model and ours, with the same weights."""
    models = [
        LlavaNextForConditionalGeneration(LlavaNextConfig.from_dict(tiny_config.to_dict())),
        LlavaLlama31ForConditionalGeneration(tiny_config),
    ]
    for model in models:
        model.load_state_dict(weights)
        model.generation_config.pad_token_id = tiny_config.text_config.pad_token_id
    return [model.eval() for model in models]


@pytest.fixture(scope="module")
def make_inputs(processor, make_image):
    """Rows padded on the left, as for `generate`."""

    def make(*rows):
        prompts = [
            processor.encode_prompt(
                [{"role": "user", "content": [*({"type": "image"} for _ in sizes), {"type": "text", "text": text}]}],
                sizes,
            )
            for sizes, text in rows
        ]
        length, pad = max(map(len, prompts)), processor.tokenizer.pad_token_id
        inputs = {
            "input_ids": torch.tensor([[pad] * (length - len(ids)) + ids for ids in prompts]),
            "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]),
        }
        sizes = [size for row in rows for size in row[0]]
        if sizes:
            tiles = [torch.from_numpy(processor.tiles(make_image(*size, seed=sum(size)))) for size in sizes]
            inputs |= {"pixel_values": torch.cat(tiles), "image_sizes": torch.tensor(sizes)}
        return inputs

    return make


@pytest.fixture
def batch(make_inputs):
    return make_inputs(*ROWS)


@pytest.fixture
def labels(batch):
    labels = batch["input_ids"].clone()
    labels[:, :-5] = -100
    return labels


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# results of forward


def test_the_modules_are_stocks(doors):
    expected, got = ({name: type(module) for name, module in model.named_modules()} for model in doors)
    own = {"": LlavaLlama31ForConditionalGeneration, "model": LlavaLlama31Model}
    assert got == expected | own


def test_a_seed_gives_stocks_weights(tiny_config):
    states = []
    for make in (LlavaNextForConditionalGeneration, LlavaLlama31ForConditionalGeneration):
        torch.manual_seed(0)
        states.append(make(copy.deepcopy(tiny_config)).state_dict())
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


@pytest.mark.parametrize("trains", [False, True])
def test_results_under_labels_are_stocks(doors, batch, labels, trains):
    for model in doors:
        model.train(trains)
    expected, got = (model(**batch, labels=labels, output_hidden_states=True) for model in doors)
    assert list(got) == list(expected) and got.logits.shape == (*labels.shape, 448)
    for name in ("loss", "logits", "hidden_states", "image_hidden_states"):  # the last is no key since 5.24
        assert_same(getattr(got, name), getattr(expected, name))
    assert type(got.past_key_values) is type(expected.past_key_values)
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == labels.shape[1]
    expected, got = (model(**batch, labels=labels, return_dict=False) for model in doors)
    assert len(got) == len(expected) == 4
    assert_same(got[:2], expected[:2])
    expected, got = (model(**batch, labels=torch.full_like(labels, -100)) for model in doors)
    assert got.loss.isnan() and expected.loss.isnan()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_cache_is_taken_by_the_name_of_every_transformers(doors, batch, name):
    for packs in (False, True):  # Llama's layers are ours where rows may be packed
        ours = LlavaLlama31ForConditionalGeneration(doors[1].config, packable=packs).eval()
        ours.load_state_dict(doors[1].state_dict())
        with torch.no_grad():
            cache = transformers.DynamicCache()
            ours(**batch, **{name: cache})
            token = torch.full((len(ROWS), 1), 7)
            seen = torch.cat([batch["attention_mask"], torch.ones_like(token)], dim=1)
            got = ours(input_ids=token, attention_mask=seen, **{name: cache}).logits
            ids = torch.cat([batch["input_ids"], token], dim=1)
            whole = doors[1](**{**batch, "input_ids": ids, "attention_mask": seen}, logits_to_keep=1).logits
        assert cache.get_seq_length() == ids.shape[1]
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_generating_and_training_use_no_deprecated_name(doors, batch, labels):
    doors[1].generate(**batch, max_new_tokens=2, do_sample=False)
    doors[1](**batch, labels=labels, supervised_only=True).loss.backward()


@pytest.mark.parametrize(
    "keywords",
    [
        lambda labels: {"shift_labels": labels.roll(-3, dims=1)},
        lambda labels: {"labels": labels.clamp_min(0), "ignore_index": 0},
        lambda labels: {"num_items_in_batch": 7},
        lambda labels: {"logits_to_keep": 0, "use_cache": False},
    ],
    ids=["shift_labels", "ignore_index", "num_items_in_batch", "use_cache"],
)
def test_keywords_of_the_loss_count(doors, batch, labels, keywords):
    plain = doors[0](**batch, labels=keywords(labels).get("labels", labels)).loss
    expected, got = (model(**{**batch, "labels": labels, **keywords(labels)}) for model in doors)
    assert_same(got.loss, expected.loss)
    assert (got.past_key_values is None) == (expected.past_key_values is None)
    assert "use_cache" in keywords(labels) or not torch.equal(expected.loss, plain)


def test_hidden_states_have_stocks_type_under_autocast(doors, batch):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, got = (model(**batch, output_hidden_states=True).hidden_states for model in doors)
    assert_same(got, expected)  # the type too


# the vision tower


@pytest.mark.parametrize("part", ["outer", "inner"])
def test_image_features_are_stocks(doors, batch, part):
    images = {name: batch[name] for name in ("pixel_values", "image_sizes")}
    features = [(model if part == "outer" else model.model).get_image_features for model in doors]
    with torch.no_grad():
        for options in ({}, {"output_hidden_states": True}, {"vision_feature_layer": 1}):
            expected, got = (get(**images, **options) for get in features)
            assert list(got) == list(expected) and type(got) is type(expected)
            for name in expected:
                assert_same(got[name], expected[name])
        expected, got = (get(**images, return_dict=False) for get in features)
        assert len(got) == len(expected) > 1
        assert_same(got, expected)


def test_hooks_on_the_tower_fire(doors, batch):
    seen = []
    for number, model in enumerate(doors):
        tower = model.model.vision_tower
        for name, module in [("tower", tower), *tower.encoder.layers.named_children()]:
            module.register_forward_hook(lambda *_, key=(number, name): seen.append(key))
        with torch.no_grad():
            model(**batch)
    names = ["0", "1", "2", "tower"]
    assert seen == [(number, name) for number in (0, 1) for name in names]


@pytest.mark.parametrize("frozen", ["vision_tower", ""], ids=["tower", "all"])
def test_pixels_of_a_frozen_model_have_a_gradient(doors, batch, labels, frozen):
    gradients = []
    for model in doors:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        pixels = batch["pixel_values"].clone().requires_grad_()
        model(**{**batch, "pixel_values": pixels}, labels=labels).loss.backward()
        gradients.append(pixels.grad)
    assert gradients[0].norm() > 0
    assert_same(gradients[1], gradients[0])


def test_pixels_have_a_gradient_in_supervised_only_and_packed_rows(tiny_model, samples, collate):
    tiny_model.requires_grad_(False)
    [sample] = [s._replace(pixel_values=s.pixel_values.float()) for s in samples[:1]]
    gradients = []
    for options in ({"supervised_only": True}, {}):
        row = collate([sample], packed=not options)
        pixels = row["pixel_values"].clone().requires_grad_()
        tiny_model(**{**row, "pixel_values": pixels}, **options).loss.backward()
        gradients.append(pixels.grad)
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients)


# derivatives

WEIGHT = "model.language_model.layers.0.mlp.up_proj.weight"


def test_second_derivatives_are_stocks(doors, batch, labels):
    found = []
    for model in doors:
        model.set_attn_implementation("eager")
        weight = model.get_parameter(WEIGHT)
        (first,) = torch.autograd.grad(model(**batch, labels=labels).loss, weight, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), weight)[0])
    assert found[0].norm() > 0
    assert_same(found[1], found[0])


def test_functorchs_gradients_are_stocks(doors, batch, labels):
    found = []
    for model in doors:
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

        def loss(weight, model=model, parameters=parameters):
            arguments = {**batch, "labels": labels}
            return torch.func.functional_call(model, {**parameters, WEIGHT: weight}, kwargs=arguments).loss

        found.append(torch.func.grad(loss)(parameters[WEIGHT]))
    assert found[0].norm() > 0
    assert_same(found[1], found[0])


# generate


@pytest.fixture(params=[False, True], ids=["", "zero3"])
def zero3(request, monkeypatch):
    """Images are encoded before the search, or, as under ZeRO-3, inside `forward`."""
    if request.param:
        monkeypatch.setattr(modeling, "is_deepspeed_zero3_enabled", lambda: True)
    return request.param


SEARCHES = {
    "beams": {"num_beams": 3},
    "several answers": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize(
    ("search", "padded"), [*((name, False) for name in SEARCHES), ("beams", True)], ids=[*SEARCHES, "beams, padded"]
)
def test_copies_of_a_row_see_its_own_images(doors, batch, zero3, search, padded):
    if padded:
        counts = [sum(doors[1].model.feature_layout([tuple(size)])[1]) for size in batch["image_sizes"].tolist()]
        tiles = batch["pixel_values"].split(counts)
        batch["pixel_values"] = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)
    options = {"max_new_tokens": 3, "output_scores": True, "return_dict_in_generate": True, **SEARCHES[search]}
    found = []
    for model in doors:
        torch.manual_seed(0)
        found.append(model.generate(**batch, **options))
    assert torch.equal(found[1].sequences, found[0].sequences)
    torch.testing.assert_close(found[1].scores, found[0].scores)


def test_copies_without_ids_are_refused_where_images_cannot_be_placed(doors, batch, monkeypatch):
    monkeypatch.setattr(modeling, "is_deepspeed_zero3_enabled", lambda: True)
    embeds = doors[1].get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="need input_ids"):
        doors[1].generate(inputs_embeds=embeds, **batch, max_new_tokens=2, num_beams=2)


def test_prefill_may_be_chunked(doors, make_inputs):
    inputs = make_inputs(ROWS[2])
    expected, got = (model.generate(**inputs, max_new_tokens=3, prefill_chunk_size=16) for model in doors)
    assert torch.equal(got, expected)
    if Version(transformers.__version__) >= Version("5.21"):  # before it, stock's chunks changed the answer
        assert torch.equal(doors[1].generate(**inputs, max_new_tokens=3), expected)


# what is asked for


def test_every_auto_class_that_opens_stocks_model_is_mapped(tiny_config, tmp_path):
    automatic = [getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModel")]
    expected = {
        auto.__name__
        for auto in automatic
        if isinstance(auto, type)
        and issubclass(auto, _BaseAutoModelClass)
        and auto._model_mapping is not None
        and LlavaNextConfig in auto._model_mapping
    }
    assert len(expected) >= 4
    tiny_config.save_pretrained(tmp_path)
    mapped = transformers.PreTrainedConfig.get_config_dict(tmp_path)[0]["auto_map"]
    assert set(mapped) == expected | {"AutoConfig"}
    assert {mapped[name] for name in expected} == {"modeling_llava_llama31.LlavaLlama31ForConditionalGeneration"}


def test_the_trainer_and_the_evaluator_open_a_packable_model(base_folder):
    model, _ = open_model(base_folder)
    assert isinstance(model.model.language_model, LlavaLlama31TextModel)
    assert isinstance(model.lm_head, SupervisedHead)
    plain = LlavaLlama31ForConditionalGeneration.from_pretrained(base_folder)
    assert not isinstance(plain.model.language_model, LlavaLlama31TextModel)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_replaced_head_gives_the_same_loss_of_a_packed_row(tiny_model, samples, collate):
    [sample] = [s._replace(pixel_values=s.pixel_values.float()) for s in samples[:1]]
    row = collate([sample], packed=True)
    expected = tiny_model(**row).loss
    head = torch.nn.Linear(64, 448, bias=False)
    head.weight = tiny_model.lm_head.weight
    tiny_model.lm_head = head
    torch.testing.assert_close(tiny_model(**row).loss, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"packing": [[3]], "attention_mask": torch.ones(1, 3)}, "a packed row does not take attention_mask"),
        ({"packing": [[3]], "output_hidden_states": True}, "a packed row does not take output_hidden_states"),
        ({"packing": [[3]], "use_cache": True}, "a packed row does not take use_cache"),
        ({"image_positions": torch.tensor([1])}, "only a packed row takes image_positions"),
        ({"supervised_positions": [1]}, "only a packed row takes supervised_positions"),
        ({"supervised_only": True, "shift_labels": torch.ones(1, 3)}, "supervised_only does not take shift_labels"),
        ({"supervised_only": True, "ignore_index": 0}, "supervised_only does not take ignore_index"),
        ({"supervised_only": True, "logits_to_keep": 1}, "supervised_only does not take logits_to_keep"),
        ({"supervised_only": True, "labels": None}, "supervised_only needs labels"),
    ],
)
def test_nothing_is_left_unread(tiny_model, arguments, message):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=message):
        tiny_model(**{"input_ids": ids, "labels": ids, "position_ids": torch.arange(3)[None], **arguments})


def test_packing_needs_a_packable_model(doors):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="packable=True"):
        doors[1](input_ids=ids, labels=ids, position_ids=torch.arange(3)[None], packing=[[3]])


def test_original_keys_are_refused_and_not_silently_renamed(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="save_original_format is not supported"):
        tiny_model.save_pretrained(tmp_path / "out", save_original_format=True)
    assert not (tmp_path / "out").exists()
