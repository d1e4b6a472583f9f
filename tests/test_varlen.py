"""The varlen attention kernel of GPUs: called as the installed PyTorch wants it, tried before it is trusted."""

import configparser
import importlib
import inspect
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packaging.requirements import Requirement
from packaging.version import Version
from torch.nn.attention import _registry, current_flash_attention_impl, varlen

from llava_llama31 import packed_llama_llava_llama31 as packed
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.asker import FAILED_ALIKE, Asker
from llava_llama31.trainer.model import flash_attention
from llava_llama31.trainer.model.device_options import numerical_settings
from llava_llama31.trainer.model.opening import open_model
from llava_llama31.trainer.model.stage_model import check_attention
from llava_llama31.trainer.recipes.derived import derive
from llava_llama31.trainer.recipes.schema import Stage
from llava_llama31.trainer.training.training_args import training_arguments


SIGNATURE = inspect.signature(varlen.varlen_attn)
CPU = torch.device("cpu")


def reference(*arguments, top_left=False, groups_apart=False, factor=1.0, **options):
    """What the kernel computes, segment by segment; faults on request."""
    given = SIGNATURE.bind(*arguments, **options).arguments
    query, key, value, query_ends, key_ends = (given[name] for name in list(SIGNATURE.parameters)[:5])
    assert given["window_size"] == (-1, 0) and given["enable_gqa"]
    assert query_ends.dtype == key_ends.dtype == torch.int32
    lengths = [ends.diff().tolist() for ends in (query_ends, key_ends, key_ends)]
    outputs = []
    for part in zip(*(x.split(n) for x, n in zip((query, key, value), lengths, strict=True)), strict=True):
        queries, keys, values = (x.transpose(0, 1) for x in part)
        groups = queries.shape[0] // keys.shape[0]
        if groups_apart:
            keys, values = keys.repeat(groups, 1, 1), values.repeat(groups, 1, 1)
        else:
            keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
        shift = 0 if top_left else keys.shape[1] - queries.shape[1]
        mask = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril(shift)
        output = F.scaled_dot_product_attention(queries, keys, values, mask, scale=given["scale"])
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs) * factor


def refuses(*arguments, **options):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")


def of_an_older_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("unreachable")


FAULTS = {
    "refuses": (refuses, "RuntimeError: FlashAttention only supports Ampere GPUs or newer."),
    "older torch": (of_an_older_torch, "TypeError: "),
    "top left": (lambda *a, **o: reference(*a, top_left=True, **o), "its output is off by"),
    "groups": (lambda *a, **o: reference(*a, groups_apart=True, **o), "its output is off by"),
    "nan": (lambda *a, **o: reference(*a, factor=float("nan"), **o), "its output is off by nan"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_kernel_that_is_right_passes(tiny_config, monkeypatch, dtype):
    """And the call fits the signature of the installed PyTorch, to which `reference` binds it."""
    monkeypatch.setattr(varlen, "varlen_attn", reference)
    assert packed.varlen_fault(tiny_config.text_config, CPU, dtype) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_is_not_is_found(tiny_config, monkeypatch, fault):
    kernel, message = FAULTS[fault]
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    found = packed.varlen_fault(tiny_config.text_config, CPU, torch.bfloat16)
    assert found is not None and found.startswith(message) and "\n" not in found


def test_a_wrong_gradient_is_found(tiny_config, monkeypatch):
    def wrong(query, key, *rest, **options):
        return reference(query, key.detach() + 0 * key, *rest, **options)

    monkeypatch.setattr(varlen, "varlen_attn", wrong)
    found = packed.varlen_fault(tiny_config.text_config, CPU, torch.bfloat16)
    assert found is not None and found.startswith("its gradient of keys is off by 1 ")


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_gpus_before_ampere_are_asked_and_not_tried(tiny_model, monkeypatch, caplog, capability):
    """A T4 failed at its first packed step, and every question of `evaluate`."""
    text, cuda = tiny_model.model.language_model, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if capability >= (8, 0):  # would be tried
        monkeypatch.setattr(packed, "varlen_fault", lambda *arguments: None)
    with caplog.at_level(logging.WARNING):
        answers = {text.check_attention(cuda, torch.float16) for _ in range(3)}
    assert answers == {capability >= (8, 0)}
    warnings = warnings_of(caplog)
    assert len(warnings) == (capability < (8, 0))
    assert all("compute capability 8.0 (Ampere) or newer; this one has 7.5" in warning for warning in warnings)
    assert not text.check_attention(CPU, torch.float16) and not text.check_attention(cuda, torch.float32)


def test_without_the_kernel_segments_run_one_by_one(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(varlen, "varlen_attn", refuses)
    heads = [torch.randn(1, n, 9, 8, dtype=torch.float16) for n in (4, 2, 2)]
    with pytest.raises(RuntimeError, match="Ampere"):
        packed.packed_attention(*heads, packed.plan_row([[4, 3, 2]], varlen=True), 0.3)
    assert packed.packed_attention(*heads, packed.plan_row([[4, 3, 2]]), 0.3).shape == (1, 9, 4, 8)


@pytest.mark.parametrize("packing", [[[4, 3, 2]], [[9]]], ids=["branches", "square"])
def test_on_a_gpu_segments_have_a_key_head_for_each_query_head(monkeypatch, packing):
    """In float32, and before Ampere: with groups PyTorch took its plain kernel, whose scores fill the memory."""
    heads, plan = [torch.randn(1, n, 9, 8) for n in (4, 2, 2)], packed.plan_row(packing)
    expected = packed._segment_attention(*heads, plan, 0.3)
    attend, asked = F.scaled_dot_product_attention, []
    monkeypatch.setattr(packed, "_takes_groups", lambda device, right=packed._takes_groups: right(CUDA))
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, *a, **o: (asked.append((k, v, o)), attend(q, k, v, *a, **o))[1],
    )
    torch.testing.assert_close(packed._segment_attention(*heads, plan, 0.3), expected)
    assert asked and all(k.shape[1] == v.shape[1] == 4 and not options["enable_gqa"] for k, v, options in asked)


STAGE = {"trainable": ["language_model"], "learning_rate": 1e-3, "data": [{"name": "a", "path": "a.json"}]}
STAGE |= {"global_batch": 8, "epochs": 1}


def test_a_stage_asks_before_its_first_step(tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr(packed, "varlen_fault", lambda config, device, dtype: asked.append((device, dtype)))
    cuda = torch.device("cuda", 0)
    for changes in ({}, {"packing": False}, {"precision": "float32"}):
        check_attention(tiny_model, Stage.model_validate(STAGE | changes), cuda)
    assert asked == [(cuda, torch.bfloat16)]


# FlashAttention 3 and 4

CUDA = torch.device("cuda", 0)
FA3, FA4 = "flash_attn_interface", "flash_attn.cute.interface"


@pytest.fixture
def implementations(monkeypatch):
    """A GPU of a compute capability with packages of FlashAttention; returns what PyTorch took and left, in order."""
    events = []

    class Handle:
        def __init__(self, name):
            self.name = name
            events.append(name)

        def remove(self):
            events.append(f"not {self.name}")

    def pretend(capability, packages, fault=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(flash_attention, "find_spec", lambda name: name if name in packages else None)
        monkeypatch.setattr(flash_attention, "varlen_fault", lambda *arguments: fault)
        for name in ("FA3", "FA4"):
            monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, name, lambda name=name: Handle(name))
        return events

    yield pretend
    assert current_flash_attention_impl() is None


@pytest.mark.parametrize(
    ("capability", "packages", "expected"),
    [
        ((9, 0), [FA3, FA4], "FA3"),
        ((9, 0), [FA4], "FA4"),
        ((10, 0), [FA3, FA4], "FA4"),
        ((10, 0), [FA3], None),
        ((8, 0), [FA3, FA4], None),
        ((12, 0), [FA3, FA4], None),
        ((9, 0), [], None),
    ],
)
def test_a_stage_takes_the_best_flash_attention_that_is_there(implementations, capability, packages, expected):
    events = implementations(capability, packages)
    with flash_attention.faster_attention(CUDA):
        assert current_flash_attention_impl() == expected
        with flash_attention.faster_attention(CUDA):  # as after the user's own choice
            pass
        assert current_flash_attention_impl() == expected
    assert events == ([expected, f"not {expected}"] if expected else [])


def test_no_flash_attention_is_looked_for_elsewhere(implementations, monkeypatch):
    implementations((9, 0), [FA3])
    assert flash_attention.installed_implementations(CUDA) == ["FA3"]
    assert flash_attention.installed_implementations(CPU) == []
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert flash_attention.installed_implementations(CUDA) == []
    monkeypatch.undo()
    assert not flash_attention._has("llava_llama31_lacks.this")


def test_a_package_that_does_not_load_is_named_and_the_next_one_taken(implementations, monkeypatch, caplog):
    def broken():
        raise RuntimeError("undefined symbol\nmore")

    implementations((9, 0), [FA3, FA4])
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", broken)
    with flash_attention.faster_attention(CUDA):
        assert current_flash_attention_impl() == "FA4"
    assert warnings_of(caplog) == ["FA3 is installed but can't be used: undefined symbol"]


@pytest.mark.parametrize("fault", [None, "its output is off by 1 of the largest number", "tower"])
def test_a_faulty_implementation_is_left_before_the_first_step(
    implementations, tiny_model, monkeypatch, caplog, fault
):
    """The decoder's attention is tried, and the tower's."""
    events, asked = implementations((9, 0), [FA3], None if fault == "tower" else fault), []
    monkeypatch.setattr(packed, "varlen_fault", lambda *arguments: asked.append(current_flash_attention_impl()))
    right = F.scaled_dot_product_attention
    wrong = 2.0 if fault == "tower" else 1.0
    calls = iter([wrong, 1.0])
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *inputs: right(*inputs) * next(calls))
    tried = flash_attention._tower_fault
    monkeypatch.setattr(flash_attention, "_tower_fault", lambda n, size, device, dtype: tried(n, size, CPU, dtype))
    with flash_attention.faster_attention(CUDA):
        check_attention(tiny_model, Stage.model_validate(STAGE), CUDA)
        assert current_flash_attention_impl() == (None if fault else "FA3")
    assert events == ["FA3", "not FA3"] and asked == [None if fault else "FA3"]
    warnings = warnings_of(caplog)
    expected = "the tower's attention is off by 1 of the largest number" if fault == "tower" else fault
    assert warnings == ([f"FA3 isn't used: {expected}"] if fault else [])


@pytest.fixture
def by_cudnn():
    """As PyTorch begins."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_no_stage_attends_by_cudnn(by_cudnn):
    """Its gradients may be NaN on an H100 (pytorch #196678), where PyTorch prefers it."""
    with pytest.raises(KeyError), flash_attention.faster_attention(CPU):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        raise KeyError
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_no_answer_is_made_by_cudnn(by_cudnn, base_folder):
    """On a B200 it generates wrong tokens (pytorch #193893)."""
    open_model(base_folder, device="cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_a_deterministic_stage_runs_under_torchs_own_rule(is_deterministic, tiny_model, samples, collate):
    stage = Stage.model_validate(STAGE | {"deterministic": is_deterministic})
    rows = [s._replace(pixel_values=None if s.pixel_values is None else s.pixel_values.float()) for s in samples]
    row = collate(rows, packed=True, share_prefix=True)
    with numerical_settings(stage):
        assert torch.are_deterministic_algorithms_enabled() == is_deterministic
        tiny_model.train()(**row).loss.backward()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_float32_stage_uses_no_tf32(precision):
    """PyTorch's own choice is to use it in convolutions, as the patch embedding is one, and in no other product."""
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    with numerical_settings(Stage.model_validate(STAGE | {"precision": precision})):
        assert torch.backends.cudnn.allow_tf32 == (precision != "float32")
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stage_has_the_tf32_that_it_asks_for_and_the_next_one_has_not(precision, monkeypatch, tmp_path):
    """TrainingArguments set it for the whole process, when the first stage's were made to be checked."""
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    now = lambda: (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)  # noqa: E731
    before = now()
    derived = derive(Stage.model_validate(STAGE), 100, 1, where="stages.one")
    for given, expected in ((True, "tf32"), (False, "ieee"), (True, "tf32")):
        stage = Stage.model_validate(STAGE | {"precision": precision, "trainer_args": {"tf32": given}})
        training_arguments(stage, derived, output_dir=tmp_path, seed=0, where="stages.one")
        assert now() == before
        with numerical_settings(stage):
            assert now() == (expected, expected)
        assert now() == before
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


# evaluation


class Failing:
    in_step, processor, stop_ids = False, None, []

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)

    def answer(self, prompts):
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return [outcome for _ in prompts]


def asker(*outcomes):
    return Asker(Failing(*outcomes), {}, {}, None)


@pytest.mark.parametrize("error", [torch.AcceleratorError("no kernel image", 209), NotImplementedError("aten::x")])
def test_a_kernel_that_refuses_is_no_failed_answer(error):
    refusing = asker([1], error)
    assert refusing._answers([1, 2]) == [[1], [1]]
    with pytest.raises(UserError, match=f"no question can be answered here: {type(error).__name__}"):
        refusing._answers([1, 2])


def test_questions_that_all_fail_alike_end_the_evaluation():
    failing = asker(*[RuntimeError("same\nmore")] * FAILED_ALIKE)
    for _ in range(FAILED_ALIKE - 1):
        assert failing._answers([1]) == ["RuntimeError: same\nmore"]
    with pytest.raises(UserError, match="RuntimeError: same"):
        failing._answers([1])
    some = asker([7], *[RuntimeError("same")] * 2 * FAILED_ALIKE)
    assert [some._answers([1])[0] for _ in range(2 * FAILED_ALIKE)][-1] == "RuntimeError: same"


# versions

# what we call of optional or young APIs: name, and arguments that it must take
APIS = {
    "torch.nn.attention.varlen.varlen_attn": ("scale", "window_size", "enable_gqa"),
    "torch.nn.attention.activate_flash_attention_impl": ("impl",),
    "torch.nn.attention.list_flash_attention_impls": (),
    "torch.accelerator.get_memory_info": (),
    "torch.accelerator.max_memory_allocated": (),
    "torch.accelerator.reset_peak_memory_stats": (),
    "torch.accelerator.synchronize": (),
    "torch.get_device_module": (),
    "torch.AcceleratorError": None,
    "torch.distributed.get_default_backend_for_device": (),
    "torch.distributed.fsdp.MixedPrecisionPolicy": ("param_dtype", "reduce_dtype", "cast_forward_inputs"),
    "torch.distributed.tensor.distribute_tensor": ("src_data_rank",),
    "torch.compiler.set_stance": None,
    "accelerate.utils.memory.clear_device_cache": (),
    "accelerate.FullyShardedDataParallelPlugin": ("mixed_precision_policy",),
    "torchao.optim.subclass_8bit.OptimState8bit": ("codes", "scale", "qmap", "signed"),
    "torchao.float8.Float8LinearConfig": ("emulate",),
    "torchao.float8.convert_to_float8_training": ("module_filter_fn", "config"),
    "bitsandbytes.optim.AdamW": ("optim_bits",),
    "peft.LoraConfig": ("r", "lora_alpha", "lora_dropout", "target_modules", "use_dora"),
    "torch.distributed.distributed_c10d._set_pg_timeout": ("timeout", "group"),
    "torch.backends.cuda.enable_cudnn_sdp": (),
    "deepspeed.utils.groups._get_data_parallel_group": (),
    "deepspeed.utils.safe_get_full_fp32_param": (),
    "deepspeed.runtime.zero.GatheredParameters": ("modifier_rank",),
}


@pytest.mark.parametrize("name", APIS)
def test_what_we_call_is_there_and_takes_our_arguments(name):
    """In an environment of setup.cfg's lower bounds this says that they are none too low (docs/results/tests.md)."""
    module, _, attribute = name.rpartition(".")
    pytest.importorskip(module.split(".")[0])
    found = getattr(importlib.import_module(module), attribute)
    if APIS[name] is not None:
        parameters = inspect.signature(found).parameters
        missing = set(APIS[name]) - set(parameters)
        assert not missing or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_the_lower_bound_of_torch_has_the_varlen_call():
    """2.6 to 2.11 have no such module, or one that takes other arguments."""
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    required = [Requirement(line) for line in config["options"]["install_requires"].split()]
    [(bound,)] = [requirement.specifier for requirement in required if requirement.name == "torch"]
    assert bound.operator == ">=" and Version(bound.version) >= Version("2.12")


def test_the_lower_bound_of_deepspeed_waits_for_gradients():
    """Weights turn NaN otherwise, with `overlap_comm`, which all shipped files have.

    Up to 0.18.7 ZeRO-3 waits for another stream than theirs, which shows under PyTorch 2.10 and newer (#7898); up to
    0.18.9 ZeRO-1 and ZeRO-2 let go of buffers too soon (#7965), and up to 0.19.2 they wait for one stream of several,
    which shows with torch.compile (#8080).
    """
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    [line] = config["options.extras_require"]["deepspeed"].split()
    [bound] = Requirement(line).specifier
    assert bound.operator == ">=" and Version(bound.version) >= Version("0.19.3")
