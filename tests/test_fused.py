"""Fused norms, rotary embeddings and gates, and selective checkpointing: the step is the same one."""

import logging
import re
from contextlib import nullcontext

import pytest
import torch
from pydantic import ValidationError
from torch._dynamo.utils import counters

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31 import packed_llama_llava_llama31 as packed
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.model import fused_layers
from llava_llama31.trainer.model.adapters import adapt
from llava_llama31.trainer.model.module_groups import freeze
from llava_llama31.trainer.model.stage_model import use_device_options
from llava_llama31.trainer.recipes.schema import Lora, Stage


STAGE = {"trainable": ["language_model"], "learning_rate": 1e-3, "data": [{"name": "a", "path": "a.json"}]}
STAGE |= {"global_batch": 8, "epochs": 1}
CUDA = torch.device("cuda", 0)


def plain(function):
    return function


def make(tiny_config, trainable=("vision_tower", "multi_modal_projector", "language_model"), rank=0):
    tiny_config.text_config.num_hidden_layers = 3
    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True)
    if rank:
        adapt(model, Lora(r=rank), seed=0, where="")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and so would be the gradients of the others
                torch.nn.init.normal_(parameter, std=0.1)
    freeze(model, dict.fromkeys(trainable, 1e-3))
    return model.train()


def single(samples):
    return [s._replace(pixel_values=None if s.pixel_values is None else s.pixel_values.float()) for s in samples]


def gradients(model, row, autocast=False):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(**row).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected, tolerance=1e-6):
    """Loss by the tolerance, gradients by ten times that."""
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=0)
    assert got[1].keys() == expected[1].keys()
    least = 1e-4 * max(float(grad.norm()) for grad in expected[1].values())
    for name, grad in expected[1].items():
        assert (got[1][name] - grad).norm() <= 10 * tolerance * max(float(grad.norm()), least), name


@pytest.mark.parametrize("remakes", [False, True], ids=["kept", "remade"])
@pytest.mark.parametrize(
    ("trainable", "rank"),
    [
        (("vision_tower", "multi_modal_projector", "language_model"), 0),
        (("multi_modal_projector",), 0),
        (("multi_modal_projector", "language_model"), 4),
    ],
    ids=["all", "projector", "lora"],
)
def test_a_fused_step_is_todays(tiny_config, samples, collate, trainable, rank, remakes):
    model = make(tiny_config, trainable, rank)
    rows = [collate(single(samples)[begin:], packed=True, share_prefix=begin == 0) for begin in (0, 5)]
    expected = [gradients(model, row) for row in rows]
    model.model.language_model.fuse(plain, remakes=remakes)
    for row, wanted in zip(rows, expected, strict=True):
        assert_same(gradients(model, row), wanted)
    model.model.language_model.layers[0].gradient_checkpointing = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(model, rows[0]), expected[0])


@pytest.mark.parametrize("remakes", [False, True], ids=["kept", "remade"])
def test_under_autocast(tiny_config, samples, collate, remakes):
    model, row = make(tiny_config), collate(single(samples), packed=True, share_prefix=True)
    expected = gradients(model, row, autocast=True)
    model.model.language_model.fuse(plain, remakes=remakes)
    got = gradients(model, row, autocast=True)
    assert_same(got, expected, 2e-3)
    assert {name: grad.dtype for name, grad in got[1].items()} == dict.fromkeys(got[1], torch.float32)


def test_every_function_has_the_gradient_that_autograd_finds():
    generator = torch.Generator().manual_seed(0)
    x, added, weight, up = (
        torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in ((1, 5, 8), (1, 5, 8), (8,), (1, 5, 8))
    )
    heads = torch.randn(1, 5, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    angles = [torch.randn(1, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    check, rest = torch.autograd.gradcheck, (1e-5, torch.float64, packed.PLAIN)
    assert check(lambda *given: packed._FusedNorm.apply(*given, *rest)[0], (x, weight))
    assert check(lambda *given: packed._FusedSumNorm.apply(*given, *rest)[:2], (x, added, weight))
    assert check(lambda given: packed._FusedRotary.apply(given, *angles, packed.PLAIN), (heads,))
    assert check(lambda *given: packed._FusedGate.apply(*given, packed.PLAIN), (x, up))


def saved(model, row):
    """Numbers that autograd keeps for the backward pass, of what is no parameter, each storage once."""
    kept = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(**row).loss.backward()
    return sum(x.untyped_storage().nbytes() // x.element_size() for x in kept.values())


def test_what_is_made_again_is_not_kept(tiny_config, samples, collate):
    """Norms' results and the gated product of every layer; a hook that is set later sees what is left."""
    model = make(tiny_config, ("language_model",))
    row = collate(single(samples), packed=True, share_prefix=True)
    text, numbers = tiny_config.text_config, {}
    for remakes in (False, True):
        model.model.language_model.fuse(plain, remakes=remakes)
        numbers[remakes] = saved(model, row)
    positions = row["input_ids"].shape[1]
    inner = positions * (2 * text.hidden_size + text.intermediate_size) * (text.num_hidden_layers - 1)
    assert numbers[False] - numbers[True] >= inner


def test_a_tensor_is_made_once_for_all_that_read_it_and_again_in_another_pass():
    made = []
    x = torch.randn(4, 3, requires_grad=True)
    weights = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    normed = x * 2

    def again():
        made.append(1)
        return x.detach() * 2

    total = packed._without_keeping(normed, again, lambda: sum((normed[1:] @ weight.T).sum() for weight in weights))
    expected = torch.autograd.grad(sum(((x * 2)[1:] @ weight.T).sum() for weight in weights), weights)
    for times in (1, 2):
        found = torch.autograd.grad(total, weights, retain_graph=True)
        assert len(made) == times
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# where it is used


def token_wise(model):
    (used,) = {id(layer.token_wise): layer.token_wise for layer in model.model.language_model.layers}.values()
    return used


@pytest.mark.parametrize(
    ("changes", "device", "fused"),
    [
        ({}, CUDA, True),
        ({}, torch.device("cpu"), False),
        ({"packing": False}, CUDA, False),
        ({"activation_checkpointing": "selective"}, CUDA, True),
        ({"activation_checkpointing": 2}, CUDA, True),
    ],
    ids=str,
)
def test_layers_are_fused_on_gpus_by_themselves(tiny_model, monkeypatch, changes, device, fused):
    monkeypatch.setattr(fused_layers, "fused_fault", lambda *_: None)
    stage = Stage.model_validate(STAGE | changes)
    use_device_options(tiny_model, stage, device)
    used = token_wise(tiny_model)
    assert (used is not packed.EAGER) == fused
    if fused:
        assert used.before.__self__.remakes == (stage.recomputed == "selective")
        assert used.before.__self__.arithmetic.norm is not packed.norm


def test_selective_checkpointing_works_on_a_cpu_too(tiny_model):
    use_device_options(tiny_model, Stage.model_validate(STAGE | {"activation_checkpointing": "selective"}))
    fused = token_wise(tiny_model).before.__self__
    assert fused.remakes and fused.arithmetic == packed.PLAIN
    assert not tiny_model.model.language_model.layers[0].gradient_checkpointing


def test_a_gpu_that_cant_compile_says_so_once_and_runs_eager(tiny_model, monkeypatch, caplog):
    monkeypatch.setattr(fused_layers, "fused_fault", lambda *_: "no Triton")
    with caplog.at_level(logging.WARNING):
        use_device_options(tiny_model, Stage.model_validate(STAGE), CUDA)
    assert token_wise(tiny_model) is packed.EAGER
    assert [record.getMessage() for record in caplog.records] == [
        "norms, rotary embeddings and MLPs run unfused, which is slower: no Triton"
    ]


def refuses(*arguments):
    raise RuntimeError("ptxas is missing\nand more")


@pytest.mark.parametrize("least", [0, 1000], ids=["always", "for many rows"])
@pytest.mark.parametrize("name", packed.Arithmetic._fields)
def test_a_compiler_that_is_wrong_or_missing_is_found(tiny_model, name, least):
    """What is compiled for the first number of rows is not what a stage's other rows run."""
    language_model = tiny_model.model.language_model
    assert fused_layers.fused_fault(language_model, torch.device("cpu"), plain) is None

    def off(function):
        def wrong(*arguments):
            made = function(*arguments)
            if arguments[0].shape[1] < least:
                return made
            return tuple(1.1 * x for x in made) if isinstance(made, tuple) else 1.1 * made

        return wrong if function.__name__ == name else function

    found = fused_layers.fused_fault(language_model, torch.device("cpu"), off)
    assert found is not None and re.match(rf"compiled {name} is off by 0\.(1|09)", found)
    missing = fused_layers.fused_fault(
        language_model, torch.device("cpu"), lambda function: refuses if function.__name__ == name else function
    )
    assert missing == "torch.compile does not work here: ptxas is missing"


def test_other_language_models_are_left_alone_or_refused(tiny_config):
    tiny_config.text_config.hidden_act = "gelu"
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True)
    with pytest.raises(ValueError, match="only MLPs with SiLU are fused, not with gelu"):
        model.model.language_model.fuse(plain)
    stock = LlavaLlama31ForConditionalGeneration(tiny_config)
    fused_layers.fuse_layers(stock, CUDA)
    with pytest.raises(UserError, match="selective activation checkpointing is for Llama"):
        fused_layers.fuse_layers(stock, CUDA, remakes=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": False}, "is for packed rows .fix: set packing: true, or true"),
        ({"compile": True}, "keeps what the compiler chooses .fix: set compile: false, or true"),
    ],
)
def test_selective_checkpointing_that_would_do_nothing_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Stage.model_validate(STAGE | changes | {"activation_checkpointing": "selective"})


@pytest.mark.torture
def test_inductors_own_code_for_the_fused_functions(tiny_config, samples, collate):
    """Compiled for this CPU, with one graph a function for all lengths."""
    model = make(tiny_config)
    rows = [collate(single(samples)[begin:], packed=True, share_prefix=True) for begin in (0, 3, 8)]
    expected = [gradients(model, row) for row in rows]
    torch.compiler.reset()
    counters.clear()
    assert fused_layers.fused_fault(model.model.language_model, torch.device("cpu")) is None
    model.model.language_model.fuse(torch.compile, remakes=True)
    for row, wanted in zip(rows, expected, strict=True):
        assert_same(gradients(model, row), wanted)
    graphs = counters["stats"]["unique_graphs"]
    assert_same(gradients(model, rows[0]), expected[0])
    assert counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()
