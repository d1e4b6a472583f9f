"""Low-bit optimizers, compiled layers, checkpointed layers, fp8: right where they run, refused where they can't."""

import dataclasses
import json
import os
import signal
import types
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.utils import fresh_cache
from torch.compiler import set_stance
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import TrainingArguments

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.packed_llama_llava_llama31 import EAGER
from llava_llama31.trainer.checkpoint.atomic_folders import load_tree, save_tree
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.distributed.engine import fsdp_plugin
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.fault_tolerance.stage_guard import StopRequests
from llava_llama31.trainer.model import device_options
from llava_llama31.trainer.model.module_groups import freeze
from llava_llama31.trainer.model.stage_model import use_device_options
from llava_llama31.trainer.recipes.schema import Stage
from llava_llama31.trainer.training import optimizers, training_args
from llava_llama31.trainer.training.optimizers import AdamWBfloat16, round_stochastically
from llava_llama31.trainer.training.portable_state import load_portable_state, portable_state
from llava_llama31.trainer.training.training_args import (
    OWNED_BY_STAGE,
    PASSED_THROUGH,
    REFUSED,
    check_trainer_args,
)


def stage(**changes):
    content = {
        "trainable": ["multi_modal_projector", "language_model"],
        "learning_rate": 1e-3,
        "data": [{"name": "a", "path": "a.json"}],
        "global_batch": 8,
        "epochs": 1,
    }
    return Stage.model_validate({**content, **changes})


# optimizers


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in [(64, 96), (7,)]]


def train(optimizer, parameters, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = (parameter.float() + torch.randn(parameter.shape, generator=generator)).to(
                parameter.dtype
            )
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def test_rounding_by_chance_is_right_on_average_and_keeps_what_is_not_finite():
    x = torch.tensor([1 + 2**-9, -3.0, 1e-30, 0.0, 7 + 2**-7]).repeat(20_000, 1)
    rounded = round_stochastically(x, torch.Generator().manual_seed(0)).float()
    spacing = torch.tensor([2**-7, 0, 1e-32, 0, 2**-5])
    assert ((rounded - x).abs() <= spacing).all() and rounded[:, 0].unique().numel() == 2
    torch.testing.assert_close(rounded.mean(0), x[0], rtol=1e-4, atol=0)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan")])
    odd = torch.cat([odd, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])  # a GPU's NaN
    kept = round_stochastically(odd, torch.Generator().manual_seed(0))
    assert kept[:2].tolist() == odd[:2].tolist() and kept[2:].isnan().all()


def test_bfloat16_moments_follow_adamw():
    mine, theirs, options = weights(), weights(), {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.1}
    start = [parameter.detach().clone() for parameter in mine]
    optimizer = AdamWBfloat16([{"params": mine}], **options)
    got, expected = train(optimizer, mine, 50), train(torch.optim.AdamW(theirs, **options), theirs, 50)
    for a, b, c in zip(got, expected, start, strict=True):
        assert (a - b).norm() < 0.01 * (b - c).norm()
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_the_second_moment_does_not_stand_still():
    (weight, _) = weights()
    optimizer = AdamWBfloat16([{"params": [weight]}], lr=0.0, betas=(0.9, 0.999))
    for _ in range(3000):
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
    # 1 - 0.999^3000 = 0.95; rounded to nearest it would stay at a sixteenth of that
    assert float(optimizer.state[weight]["exp_avg_sq"].float().mean()) == pytest.approx(4 * 0.95, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_kernel_a_parameter_does_what_the_chunks_do(dtype):
    """But for its random numbers, which are as evenly spread."""
    ends = []
    for compiled in (None, lambda function: function):
        parameters = weights(dtype)
        options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
        optimizer = AdamWBfloat16([{"params": parameters}], **options, compiled=compiled)
        ends.append((train(optimizer, parameters, 50), weights(dtype)))
    for one, other, start in zip(ends[0][0], ends[1][0], ends[0][1], strict=True):
        tolerance = 0.02 if dtype == torch.float32 else 0.1
        assert 0 < (one - other).float().norm() < tolerance * (one - start).float().norm()


def test_numbers_are_hashed_evenly_and_by_their_place_alone():
    seed, places = torch.tensor((3 << 24) + 7), torch.arange(1 << 16)
    bits = optimizers._hashed(places, seed)
    for shift in (0, 16, 32, 48):
        part = (bits >> shift) & 0xFFFF
        assert float(part.double().mean()) == pytest.approx(2**15, rel=0.01)
        assert 0.6 < part.unique().numel() / 2**16 < 0.66  # 1 - 1/e of all values
    assert torch.equal(optimizers._hashed(places[1000:], seed), bits[1000:])
    assert (optimizers._hashed(places, seed + 1) != bits).all()
    x = torch.full((1 << 16,), 1 + 2**-9)
    assert float(optimizers._rounded(x, bits & 0xFFFF).double().mean()) == pytest.approx(1 + 2**-9, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_processes_round_alike(dtype):
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.rand(seed)
        parameters = weights(dtype)
        ends.append(train(AdamWBfloat16([{"params": parameters}], lr=1e-2), parameters, 5))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def sharded(rank, run):
    """What a function returns on one of two ranks of a group that does not communicate."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        return run(init_device_mesh("cpu", (2,)))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shards_are_rounded_as_the_whole_is(dtype):
    """Seven rows, four of them on the first rank: the same bits, however many ranks there are."""
    generator = torch.Generator().manual_seed(0)
    weight, *grads = (torch.randn(7, 6, generator=generator).to(dtype) for _ in range(4))

    def stepped(parameter, grads, part):
        optimizer = AdamWBfloat16([{"params": [parameter]}], lr=1e-2, compiled=lambda function: function)
        for grad in grads:
            parameter.grad = grad
            optimizer.step()
        state = optimizer.state[parameter]
        return [part(x).detach().clone() for x in (parameter, state["exp_avg"], state["exp_avg_sq"])]

    whole = stepped(torch.nn.Parameter(weight.clone()), grads, lambda x: x)
    for rank, rows in enumerate((slice(0, 4), slice(4, 7))):

        def run(mesh, rows=rows):
            shard = lambda x: DTensor.from_local(  # noqa: E731
                x[rows].clone(), mesh, [Shard(0)], run_check=False, shape=x.shape, stride=x.stride()
            )
            return stepped(torch.nn.Parameter(shard(weight)), map(shard, grads), lambda x: x.to_local())

        for one, other in zip(sharded(rank, run), whole, strict=True):
            assert torch.equal(one, other[rows])


def make_optimizer(name, parameters):
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, (1e-2, 1e-3), strict=True)]
    if name.startswith("adamw_bf16"):
        return AdamWBfloat16(groups, lr=1.0, compiled=(lambda function: function) if "fused" in name else None)
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if name == "bitsandbytes":
        # on a CPU since then; the product uses it on GPUs alone
        return pytest.importorskip("bitsandbytes", "0.50").optim.AdamW(groups, optim_bits=8)
    return pytest.importorskip("torchao.optim").AdamW8bit(groups, lr=1.0)


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "adamw_bf16 fused", "adamw_8bit", "bitsandbytes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@set_stance("force_eager")
def test_state_in_a_checkpoint_is_all_of_it(tmp_path, name, dtype):
    """Bit for bit: training continues from what was written as it would have without."""
    parameters = weights(dtype)
    optimizer = make_optimizer(name, parameters)
    train(optimizer, parameters, 4)
    save_tree(tmp_path / "optimizer", portable_state(optimizer))
    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = make_optimizer(name, again)
    load_portable_state(resumed, load_tree(tmp_path / "optimizer"))
    for one, two in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert {key: type(value) for key, value in one.items()} == {key: type(value) for key, value in two.items()}
        tensors = [key for key, value in one.items() if isinstance(value, torch.Tensor)]
        assert [one[key].dtype for key in tensors] == [two[key].dtype for key in tensors]
    if name == "adamw_8bit":
        large = resumed.state[again[0]]
        assert large["exp_avg"].signed and not large["exp_avg_sq"].signed
    ends = train(optimizer, parameters, 4, seed=2), train(resumed, again, 4, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    saved = sum(tensor.nbytes for tensor in load_file(tmp_path / "optimizer.safetensors").values())
    bytes_a_number = {"adamw": dtype.itemsize, "adamw_bf16": 2, "adamw_bf16 fused": 2}.get(name, 1)
    assert saved < 2.5 * 64 * 96 * bytes_a_number + 3000


def test_state_of_an_unknown_kind_is_refused(tmp_path):
    parameters = weights()
    optimizer = pytest.importorskip("torchao.optim").AdamW4bit([{"params": parameters}], block_size=128)
    with set_stance("force_eager"):
        train(optimizer, parameters, 1)
    with pytest.raises(TypeError, match="OptimState4bit"):
        portable_state(optimizer)


# whole runs


def run(tmp_path, content, output):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return main(["train", str(path), "--output", str(tmp_path / output)]), tmp_path / output / "stages"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_8bit", pytest.param("adamw_bf16", marks=pytest.mark.torture)])
def test_a_stage_with_a_low_bit_optimizer_resumes_with_the_same_bits(tmp_path, recipe_content, name, monkeypatch):
    if name == "adamw_8bit":
        pytest.importorskip("torchao")
    del recipe_content["evaluation"], recipe_content["stages"]["projector"]
    recipe_content["stages"]["instruct"] |= {"optimizer": name, "warmup_ratio": 0.5}
    with set_stance("force_eager"):
        code, whole = run(tmp_path, recipe_content, "whole")
        assert code == 0

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(StopRequests, "on_step_begin", on_step_begin)
            assert run(tmp_path, recipe_content, "stopped")[0] == 75
        code, stopped = run(tmp_path, recipe_content, "stopped")
    assert code == 0
    for file in ("final/model.safetensors", "checkpoint-6/optimizer.safetensors"):
        one, two = (load_file(folder / "1-instruct" / file) for folder in (whole, stopped))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    state = load_tree(whole / "1-instruct/checkpoint-6/optimizer")["optimizer"]
    rates = [round(float(group["initial_lr"]), 6) for group in state["param_groups"]]
    assert set(rates) == {1e-3, 2e-3}
    history = json.loads((whole / "1-instruct/checkpoint-6/trainer_state.json").read_text())["log_history"]
    # warm-up and cosine of the group with the highest rate, which the log shows first
    assert len({entry["learning_rate"] for entry in history if "learning_rate" in entry}) > 3
    record = json.loads((whole / "1-instruct/final/stage.json").read_text())
    assert record["optimizer"] == name


@pytest.mark.torture
def test_the_8_bit_optimizer_as_it_is_compiled(tmp_path, recipe_content):
    pytest.importorskip("torchao")
    del recipe_content["evaluation"], recipe_content["stages"]["instruct"]
    recipe_content["stages"]["projector"] |= {"max_steps": 2, "epochs": None}
    ends = []
    for name in ("adamw", "adamw_8bit"):
        recipe_content["stages"]["projector"]["optimizer"] = name
        code, folder = run(tmp_path, recipe_content, name)
        assert code == 0
        ends.append(load_file(folder / "1-projector/final/model.safetensors"))
    key = "model.multi_modal_projector.linear_2.weight"
    start = load_file(os.path.join(recipe_content["model"]["checkpoint"], "model.safetensors"))[key]
    one, two = (end[key] for end in ends)
    assert 0 < (one - two).norm() < 0.1 * (one - start).norm()


# compiled layers


def gradients_of(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "autocast", "tolerance"),
    [
        pytest.param("aot_eager", False, 1e-4, id="traced"),
        pytest.param("inductor", False, 1e-4, id="float32", marks=pytest.mark.torture),
        pytest.param("inductor", True, 2e-2, id="bfloat16", marks=pytest.mark.torture),
    ],
)
def test_compiled_equals_eager(tiny_config, samples, collate, monkeypatch, backend, autocast, tolerance):
    """Inductor compiles each of the twelve graphs for seconds: `make torture`; else a part of one layer, below."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))

    def gradients(model, row):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return gradients_of(model, row)

    tiny_config.text_config.num_hidden_layers = 4
    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True).train()
    single = [s._replace(pixel_values=None if s.pixel_values is None else s.pixel_values.float()) for s in samples]
    rows = [collate(single[begin:], packed=True, share_prefix=True) for begin in (0, 3, 8)]
    expected = [gradients(model, row) for row in rows]
    torch.compiler.reset()
    counters.clear()
    use_device_options(model, stage(compile=True))
    num_graphs = []
    for recomputed in (False, True):
        if recomputed:
            use_device_options(model, stage(activation_checkpointing=2))
        for row, (loss, grads) in zip(rows, expected, strict=True):
            compiled_loss, compiled_grads = gradients(model, row)
            torch.testing.assert_close(compiled_loss, loss, rtol=tolerance / 100, atol=0)
            for name, grad in grads.items():
                assert (compiled_grads[name] - grad).norm() <= tolerance * (grad.norm() + 1e-2), name
            num_graphs.append(counters["stats"]["unique_graphs"])
    # before and after attention, for the first, the inner and the last layer; not once a layer or row
    assert num_graphs == [6] * 6
    with torch.no_grad():
        model.eval()(**rows[0])
    assert counters["stats"]["unique_graphs"] == num_graphs[-1]
    torch.compiler.reset()


@pytest.mark.torture
@pytest.mark.parametrize("part", ["before", "after"])
def test_a_compiled_part_of_a_layer_equals_the_eager_one(tiny_config, samples, collate, part):
    tiny_config.text_config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True).train()
    row = collate(
        [s._replace(pixel_values=s.pixel_values.float()) for s in samples[:3]], packed=True, share_prefix=True
    )
    loss, expected = gradients_of(model, row)
    torch.compiler.reset()
    counters.clear()
    use_device_options(model, stage(compile=True))
    (layer,) = model.model.language_model.layers
    layer.token_wise = EAGER._replace(**{part: getattr(layer.token_wise, part)})
    compiled_loss, grads = gradients_of(model, row)
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=0)
    for name, grad in expected.items():
        assert (grads[name] - grad).norm() <= 1e-4 * (grad.norm() + 1e-2), name
    torch.compiler.reset()


def test_layers_are_compiled_where_the_stage_asks_for_it(tiny_model):
    layers = tiny_model.model.language_model.layers
    use_device_options(tiny_model, stage())
    assert all(layer.token_wise is EAGER for layer in layers)
    use_device_options(tiny_model, stage(compile=True))
    assert layers[0].token_wise is not EAGER and len({id(layer.token_wise) for layer in layers}) == 1


# activation checkpointing


def checkpointed(layers):
    return [layer.gradient_checkpointing for layer in layers]


@pytest.mark.parametrize("every", [False, True, 2])
@pytest.mark.parametrize("trainable", [["language_model"], ["vision_tower", "multi_modal_projector"]], ids=str)
def test_layers_are_counted_in_each_part_and_a_frozen_tower_is_left_alone(tiny_config, trainable, every):
    tiny_config.text_config.num_hidden_layers = 3  # and 3 of the tower
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True)
    freeze(model, dict.fromkeys(trainable, 1e-3))
    use_device_options(model, stage(trainable=trainable, activation_checkpointing=every))
    pattern = {False: [False] * 3, True: [True] * 3, 2: [True, False, True]}[every]
    assert checkpointed(model.model.language_model.layers) == pattern
    trains_tower = "vision_tower" in trainable
    assert checkpointed(model.model.vision_tower.encoder.layers) == (pattern if trains_tower else [False] * 3)
    embeds = model.get_input_embeddings()(torch.tensor([[1]]))
    assert embeds.requires_grad == ("language_model" in trainable)


# fp8


def test_float8_replaces_the_decoder_s_linear_layers_but_the_last_one_s(tiny_config, samples, collate):
    pytest.importorskip("torchao")
    tiny_config.text_config.num_hidden_layers = 3
    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True).train()
    keys = list(model.state_dict())
    single = [s._replace(pixel_values=None if s.pixel_values is None else s.pixel_values.float()) for s in samples]
    row = collate(single, packed=True, share_prefix=True, multiple_of=16)
    loss, grads = gradients_of(model, row)
    names = device_options.use_float8(model, emulate=True)
    assert len(names) == 2 * 7 and {name.split(".")[1] for name in names} == {"0", "1"}
    assert list(model.state_dict()) == keys
    eight_loss, eight_grads = gradients_of(model, row)
    assert 0 < abs(eight_loss - loss) < 0.01 * loss
    # the further back, the more roundings lie between
    for layer, limit in ((2, 0.15), (1, 0.15), (0, 0.3)):
        name = f"model.language_model.layers.{layer}.mlp.down_proj.weight"
        assert 0 < (eight_grads[name] - grads[name]).norm() < limit * grads[name].norm()


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.torture
def test_float8_compiled_under_fsdp2_equals_float8_under_fsdp2(
    tiny_config, samples, collate, group_of_one, monkeypatch
):
    """Products in wider types; graphs are traced and differentiated as on a GPU, and then run by eager kernels."""
    pytest.importorskip("torchao")
    monkeypatch.setenv("FSDP_VERSION", "2")  # as `accelerate launch` sets it
    tiny_config.text_config.num_hidden_layers = 3
    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True).train()
    single = [s._replace(pixel_values=None if s.pixel_values is None else s.pixel_values.float()) for s in samples]
    rows = [collate(single[begin:], packed=True, share_prefix=True, multiple_of=16) for begin in (0, 3)]
    wide = [gradients_of(model, row)[1] for row in rows]
    assert len(device_options.use_float8(model, emulate=True)) == 2 * 7
    language_model, policy = model.model.language_model, fsdp_plugin(bfloat16=True).mixed_precision_policy
    for part in (*model.model.vision_tower.encoder.layers, *language_model.layers, model):
        fully_shard(part, mesh=group_of_one, mp_policy=policy)
    expected = [gradients_of(model, row) for row in rows]
    torch.compiler.reset()
    counters.clear()
    language_model.compile_token_wise()
    with set_stance(force_backend="aot_eager"):
        found = [gradients_of(model, row) for row in rows]
    # before and after attention, of the first, the inner and the last layer, for all rows; no graph is broken
    assert counters["stats"]["unique_graphs"] == 6 and not counters["graph_break"]
    first = "model.language_model.layers.0.mlp.down_proj.weight"
    for (loss, grads), (compiled_loss, compiled_grads), without in zip(expected, found, wide, strict=True):
        torch.testing.assert_close(compiled_loss, loss, rtol=1e-3, atol=0)
        # what a compiler that leaves float8 out would be off by
        assert (grads[first].to_local() - without[first]).norm() > 0.04 * without[first].norm()
        assert compiled_grads.keys() == grads.keys() and isinstance(grads["lm_head.weight"], DTensor)
        for name, grad in grads.items():
            assert (compiled_grads[name] - grad).norm() <= 0.02 * (grad.norm() + 1e-2), name
    torch.compiler.reset()


def test_layers_of_odd_width_stay_as_they_are(tiny_config):
    pytest.importorskip("torchao")
    tiny_config.text_config.intermediate_size = 120
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True)
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert device_options.use_float8(model, emulate=True) == [f"layers.0.self_attn.{name}" for name in projections]


# refusals


CONTRADICTIONS = [
    ({"optimizer": "adamw_8bit", "deepspeed": "zero3"}, "optimizer under DeepSpeed"),
    ({"compile": True, "deepspeed": "zero3"}, "compile under DeepSpeed"),
    ({"compile": True, "packing": False}, "compile is for packed rows"),
    ({"fp8": True}, "set compile: true"),
    ({"fp8": True, "compile": True, "precision": "float32"}, "contradict each other"),
    ({"fp8": True, "compile": True, "lora": {}}, "fp8 under lora"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS, ids=str)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stage(**changes)


@pytest.mark.parametrize("given", [0, -1, "yes", 1.5])
def test_a_wrong_number_of_layers_is_named_by_its_key(tmp_path, recipe_content, capsys, given):
    recipe_content["stages"]["instruct"]["activation_checkpointing"] = given
    assert run(tmp_path, recipe_content, "run")[0] == 2
    assert "stages.instruct.activation_checkpointing: " in capsys.readouterr().err


@pytest.mark.parametrize("key", ["optim", "torch_compile", "use_liger_kernel", "activation_checkpointing_kwargs"])
def test_what_the_stage_owns_is_not_taken_from_trainer_args(tmp_path, recipe_content, capsys, key):
    recipe_content["stages"]["instruct"]["trainer_args"] = {key: "x"}
    assert run(tmp_path, recipe_content, "run")[0] == 2
    assert f"trainer_args.{key}: the stage owns this" in capsys.readouterr().err


def test_every_field_of_training_arguments_is_in_one_table():
    tables = [*OWNED_BY_STAGE, *REFUSED, *PASSED_THROUGH]
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert len(tables) == len(set(tables)) and fields <= set(tables), fields - set(tables)


@pytest.mark.parametrize(
    ("trainer_args", "message"),
    [
        # each was taken before: a step of four times the samples, shifted labels, or no effect at all
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}}, "set global_batch and micro"),
        ({"label_smoothing_factor": 1e-6}, "label_smoothing_factor: is not supported"),
        ({"resume_from_checkpoint": "/nonexistent"}, "the same command resumes a run"),
        ({"do_train": False}, "do_train: is not supported: the command decides"),
        ({"dataloader_multiprocessing_context": "spawn"}, "data workers come from a fork server"),
        ({"dataloader_in_order": False}, "micro-batches keep their order"),
        ({"ddp_timeout": 60}, "set step_timeout instead"),
        ({"neftune_noise_alpha": 5}, "its noise depends on a row's length"),
        # these ended a later stage with a traceback
        ({"report_to": ["wandb"]}, "trainer_args.report_to: wandb is not installed (fix: install wandb"),
        ({"report_to": "tensorbord"}, "did you mean tensorboard?"),
        ({"report_to": 3}, "is not a list of trackers"),
        ({"lr_scheduler_kwargs": {"nosuch": 3}}, "trainer_args.lr_scheduler_kwargs: the schedule rejects it"),
        ({"lr_scheduler_kwargs": {"last_epoch": 5}}, "last_epoch is not an option"),
        ({"lr_scheduler_kwargs": {"num_cycles": "x"}}, "trainer_args.lr_scheduler_kwargs: the schedule rejects it"),
        ({"lr_scheduler_kwargs": "x"}, "'x' is not a mapping of options"),
        ({"log_level": "loud"}, "'loud' is not one of its values (fix: one of detail, debug"),
        ({"log_level_replica": 3}, "3 is of another type: input should be a valid string (fix: give text)"),
        # these were taken as true, or as numbers, by whatever they are
        ({"full_determinism": "no"}, "'no' is of another type: input should be a valid boolean"),
        ({"dataloader_pin_memory": [1]}, "(fix: give true or false)"),
        ({"neftune_noise_alpha": "x"}, "'x' is of another type"),
        ({"ddp_bucket_cap_mb": -1}, "-1 is negative"),
        ({"include_num_input_tokens_seen": "some"}, "one of all, non_padding, no"),
        ({"use_cpu": True}, "set the variable CUDA_VISIBLE_DEVICES instead"),
        ({"prediction_loss_only": False}, "validation has its own loop"),
    ],
)
def test_trainer_args_of_the_last_stage_are_checked_before_the_first_runs(
    tmp_path, recipe_content, capsys, trainer_args, message
):
    recipe_content["stages"]["instruct"]["trainer_args"] = trainer_args
    code, folder = run(tmp_path, recipe_content, "run")
    error = capsys.readouterr().err
    assert code == 2 and "stages.instruct.trainer_args." in error and message in error and "(fix: " in error
    assert not (folder / "base").exists() and not (folder / "stages").exists()


def test_a_field_that_is_newer_than_the_tables_is_refused(monkeypatch):
    check_trainer_args({"run_name": "x"}, "stages.one")
    monkeypatch.setattr(training_args, "PASSED_THROUGH", set())
    with pytest.raises(UserError, match="trainer_args.run_name: is newer than this package"):
        check_trainer_args({"run_name": "x"}, "stages.one")


@pytest.fixture
def machine(monkeypatch):
    """A machine with these packages and, where given, a GPU of this compute capability."""

    def pretend(packages=(), capability=None):
        monkeypatch.setattr(device_options, "find_spec", lambda name: name if name in packages else None)
        device = torch.device("cpu" if capability is None else "cuda")
        monkeypatch.setattr(device_options, "uses_cpu", lambda: capability is None)
        monkeypatch.setattr(device_options, "default_device", lambda: device)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(device_options, "_check_compiler", lambda where, otherwise: None)

    return pretend


def test_the_8_bit_optimizer_is_the_one_that_is_there(machine):
    eight = stage(optimizer="adamw_8bit")
    machine(["torchao", "bitsandbytes"], (9, 0))
    assert device_options.optim_name(eight, "here") == "adamw_torch_8bit"
    machine(["bitsandbytes"], (8, 0))
    assert device_options.optim_name(eight, "here") == "adamw_bnb_8bit"
    assert device_options.optim_name(stage(), "here") == "adamw_torch_fused"
    machine(["bitsandbytes"])
    with pytest.raises(UserError, match=r"here\.optimizer: adamw_8bit needs torchao.*low-bit"):
        device_options.check_device_options(eight, "here")


def test_fp8_wants_a_gpu_that_has_it(machine):
    eight = stage(fp8=True, compile=True)
    for packages, capability, message in (
        (["torchao"], None, "needs a GPU, and this stage runs on cpu"),
        (["torchao"], (8, 6), r"8\.9 .* this one has 8\.6"),
        ([], (9, 0), "fp8 needs torchao"),
    ):
        machine(packages, capability)
        with pytest.raises(UserError, match=rf"here\.fp8: .*{message}"):
            device_options.check_device_options(eight, "here")
    for capability in ((8, 9), (9, 0), (10, 0)):
        machine(["torchao"], capability)
        device_options.check_device_options(eight, "here")


@pytest.mark.parametrize(("make", "has_it"), [("cpu", True), ("cuda", True), ("mps", False), ("xpu", False)])
def test_tiles_are_made_on_devices_with_float64(monkeypatch, make, has_it):
    monkeypatch.setattr(device_options, "default_device", lambda: torch.device(make))
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: types.SimpleNamespace(has_fp64=False))
    with nullcontext() if has_it else pytest.raises(UserError, match=rf"here\.device_tiles: .*float64.*\({make}\)"):
        device_options.check_device_options(stage(device_tiles=True), "here")


def test_tf32_is_for_gpus_that_have_it(machine, monkeypatch):
    machine(capability=(7, 5))
    narrow = stage(trainer_args={"tf32": True})
    with pytest.raises(UserError, match=r"here\.trainer_args\.tf32: needs an NVIDIA GPU, Ampere or newer"):
        device_options.check_device_options(narrow, "here")
    device_options.check_device_options(stage(trainer_args={"tf32": False}), "here")
    monkeypatch.setattr(device_options, "is_torch_tf32_available", lambda: True)
    device_options.check_device_options(narrow, "here")


@pytest.mark.parametrize(("name", "has_it"), [("gfx90a:sramecc+:xnack-", False), ("gfx942:sramecc+", True)])
def test_amds_capability_says_nothing_of_float8(machine, monkeypatch, name, has_it):
    machine(["torchao"], (9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(gcnArchName=name))
    with nullcontext() if has_it else pytest.raises(UserError, match=r"here\.fp8: .* this GPU is gfx90a"):
        device_options.check_device_options(stage(fp8=True, compile=True), "here")


def test_fsdp_takes_what_shards(machine, monkeypatch):
    """Torchao's tensors; bitsandbytes' have no shards."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    machine(["torchao", "bitsandbytes"], (9, 0))
    eight = {"optimizer": "adamw_8bit"}
    for supported in ({}, {"compile": True}, {"fp8": True, "compile": True}, {"optimizer": "adamw_bf16"}, eight):
        device_options.check_device_options(stage(**supported), "here")
    machine(["bitsandbytes"], (9, 0))
    with pytest.raises(UserError, match=r"here\.optimizer: adamw_8bit needs torchao under FSDP"):
        device_options.check_device_options(stage(**eight), "here")


def test_a_run_is_refused_before_it_starts(fast_bfloat16, tmp_path, recipe_content, capsys):
    recipe_content["stages"]["instruct"] |= {"fp8": True, "compile": True, "precision": "bfloat16"}
    code, stages = run(tmp_path, recipe_content, "run")
    assert code == 2 and not stages.exists()
    assert "stages.instruct.fp8: fp8 needs a GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_refused(tmp_path):
    torch.compiler.reset()
    with fresh_cache(), config.patch({"cpp.cxx": (None, str(tmp_path / "none"))}), pytest.raises(UserError) as caught:
        device_options._check_compiler("here", "set compile: false")
    torch.compiler.reset()
    assert str(caught.value).startswith("here: torch.compile does not work here: ")
    assert "(fix: install a C++ compiler, or set compile: false)" in str(caught.value)
