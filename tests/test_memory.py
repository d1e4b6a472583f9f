"""Parameters and memory by formula, beside the real model, DeepSpeed's estimators and traced steps."""

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, Dinov2Config, LlamaConfig

from llava_llama31 import LlavaLlama31Config, LlavaLlama31ForConditionalGeneration
from llava_llama31 import packed_llama_llava_llama31 as packed
from llava_llama31.trainer.costs import memory as costs
from llava_llama31.trainer.costs.flops import ModelShape
from llava_llama31.trainer.costs.matrix_peak import measure_cpu_speed
from llava_llama31.trainer.costs.memory import ENGINES, MicroBatch, Setup, estimate
from llava_llama31.trainer.costs.parameters import Parameters, adapter_parameters
from llava_llama31.trainer.costs.zero import ZeroSettings
from llava_llama31.trainer.model.module_groups import GROUPS, freeze, lora_target_pattern
from llava_llama31.trainer.planning.model_sizes import model_config
from llava_llama31.trainer.recipes.deepspeed_files import deepspeed_content
from llava_llama31.trainer.recipes.loading import load_recipe


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CLIP = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
)
DINO = Dinov2Config(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14)
SWIGLU = Dinov2Config(**DINO.to_dict() | {"use_swiglu_ffn": True})


@pytest.fixture(scope="module")
def trace_8b() -> ModuleType:
    """The benchmark, which imports its neighbour `gpu`."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("benchmark_trace_8b", BENCHMARKS / "trace_8b.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.mark.parametrize("vision", [CLIP, DINO, SWIGLU], ids=["clip", "dinov2", "swiglu"])
@pytest.mark.parametrize("layers", [-2, [1, -3]])
@pytest.mark.parametrize("is_tied", [False, True])
def test_parameters_are_those_of_the_real_model(vision, layers, is_tied):
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text = LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=is_tied, tie_word_embeddings=is_tied
    )
    config = LlavaLlama31Config(
        vision_config=vision, text_config=text, vision_feature_layer=layers, tie_word_embeddings=is_tied
    )
    with torch.device("meta"):
        model = LlavaLlama31ForConditionalGeneration(config, packable=True)
    report = freeze(model, dict.fromkeys(GROUPS, 1e-3))
    parameters = Parameters.of(config.to_dict())
    assert parameters.groups() == {line.group: line.num_parameters for line in report}
    assert parameters.trainable(GROUPS) == {line.group: line.num_trainable for line in report}


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_those_of_peft(tiny_config, dora):
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=lora_target_pattern(targets), use_dora=dora)
    adapted = get_peft_model(model, config)
    expected = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert adapter_parameters(ModelShape.of(tiny_config), 4, targets, dora=dora) == expected


def card(tmp_path: Path, **options) -> Setup:
    """The whole 8B model trained, from what the package knows of its parts."""
    config, _ = model_config(load_recipe("llama31-8b-card"), tmp_path)
    parameters = Parameters.of(config)
    return Setup(ModelShape.of(config), parameters, parameters.trainable(GROUPS), **options)


NOTHING = MicroBatch(0, 0, 0, 0, 0, 0)


def test_the_published_parts_make_the_model_that_assembly_makes(tmp_path, trace_8b):
    setup = card(tmp_path)
    assert sum(setup.parameters.groups().values()) == 8_355_276_800
    assert setup.model == ModelShape.of(trace_8b.SHAPES["8b"].config)


@pytest.mark.parametrize(("num_nodes", "per_node"), [(1, 1), (1, 8), (4, 8)])
def test_states_are_within_2_percent_of_deepspeeds_estimators(tmp_path, num_nodes, per_node):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    setup = card(tmp_path)
    # the estimators know no frozen parameters
    setup = dataclasses.replace(setup, trained=setup.parameters.groups())
    total, largest, devices = setup.num_trained, setup.parameters.largest, num_nodes * per_node
    # bfloat16 gradients are widened for the optimizer's step
    wide_gradients = 4 * total / devices

    def memory(engine, **sums):
        zero = dataclasses.replace(setup, zero=ZeroSettings(**sums))
        return estimate(zero, NOTHING, ENGINES[engine], devices, per_node)

    _, expected = estimate_zero2_model_states_mem_needs(total, per_node, num_nodes, cpu_offload=False)
    zero2 = memory("zero2", wide_sums=True)
    # theirs counts gradients of both types
    states = zero2.weights + zero2.gradients + zero2.optimizer + 2 * total / devices
    assert states == pytest.approx(expected, rel=0.02)

    options = {"num_gpus_per_node": per_node, "num_nodes": num_nodes}
    host, expected, _ = estimate_zero3_model_states_mem_needs(
        total, largest, **options, cpu_offload=False, cpu_offload_params=False
    )
    zero3 = memory("zero3")
    # theirs counts the largest layer's weights and gradient, but not the buffer of bfloat16 gradients
    states = zero3.weights + zero3.optimizer + wide_gradients + 4 * largest
    assert states == pytest.approx(expected, rel=0.02)
    assert zero3.gradients == pytest.approx(2 * total / devices)
    assert zero3.host == pytest.approx(host, rel=0.02)

    host, expected, _ = estimate_zero3_model_states_mem_needs(
        total, largest, **options, cpu_offload=True, cpu_offload_params=True
    )
    offload = memory("zero3-offload")
    assert offload.weights + offload.gradients + offload.optimizer + 4 * largest == pytest.approx(expected, rel=0.02)
    assert offload.host == pytest.approx(host, rel=0.02)


def test_frozen_groups_have_neither_gradients_nor_optimizer(tmp_path):
    setup = card(tmp_path)
    parameters = setup.parameters
    frozen = dataclasses.replace(setup, trained=parameters.trainable(["multi_modal_projector"]))
    memory = estimate(frozen, NOTHING, ENGINES["ddp"], 1)
    assert memory.gradients == 4 * parameters.multi_modal_projector
    assert memory.optimizer == 8 * parameters.multi_modal_projector
    narrow = dataclasses.replace(frozen, narrow_groups=frozenset({"vision_tower", "language_model"}))
    saved = memory.weights - estimate(narrow, NOTHING, ENGINES["ddp"], 1).weights
    assert saved == 2 * (parameters.vision_tower + parameters.language_model)


def test_a_save_is_a_phase_of_its_own(tmp_path):
    """FSDP joins the parts of one tensor at a time; the process that writes holds all weights, then all moments."""
    setup = card(tmp_path)
    parameters = setup.parameters
    projector = dataclasses.replace(setup, trained=parameters.trainable(["multi_modal_projector"]))
    row = MicroBatch(8, 8, 1, 1, 1, 4)
    memory = estimate(projector, row, ENGINES["fsdp2"], 64)
    states = memory.weights + memory.optimizer
    assert memory.save == memory.peak == states + 8 * parameters.largest > memory.of_a_step
    assert memory.host_save == 4 * sum(parameters.groups().values())
    assert estimate(setup, row, ENGINES["fsdp2"], 64).host_save == 8 * setup.num_trained
    single = estimate(setup, row, ENGINES["ddp"], 1)
    assert single.save == single.weights + single.optimizer


def traced(engine: str, *arguments: str) -> dict:
    """The benchmark in a process of its own: DeepSpeed keeps what a process group was."""
    command = [sys.executable, str(BENCHMARKS / "trace_8b.py"), "--engines", engine, "--json", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)["engines"][0]


def assert_planned(result: dict, tolerance: float) -> None:
    assert result["missing"] == []
    assert result["planned"]["peak"] == pytest.approx(result["traced"]["peak"], rel=tolerance)


def at_length(case: object) -> object:
    """A case that `make torture` alone runs; the others hold the same."""
    return pytest.param(case, marks=pytest.mark.torture)


def driven(trace_8b: ModuleType, engine: str, *arguments: str) -> dict:
    return trace_8b.compare(trace_8b.parse(["--engines", engine, "--shape", "small", *arguments]))


WIDE = ("--set", "precision=bfloat16-weights", "--set", "optimizer=adamw_bf16")
UNCHECKPOINTED = ("--set", "activation_checkpointing=false", "--accumulation", "2")
EVERYTHING = ("--set", "trainable=[vision_tower,multi_modal_projector,language_model]")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        at_length(()),
        at_length(UNCHECKPOINTED),  # under DDP below
        at_length(("--set", "micro_batch=4", "--set", "activation_checkpointing=2")),
        ("--set", "activation_checkpointing=selective"),
        at_length(("--stage", "projector")),
        at_length(("--set", "precision=float32")),
        at_length(WIDE),
        ("--set", "micro_batch=8", "--set", "activation_checkpointing=2", *WIDE),
        at_length(EVERYTHING),  # with SigLIP below
    ],
    ids=lambda arguments: " ".join(arguments).replace("--set ", "") or "card",
)
@pytest.mark.parametrize("engine", ["single", pytest.param("ddp", marks=pytest.mark.torture)])
def test_peak_is_within_3_percent_of_a_traced_small_step(trace_8b, engine, arguments):
    assert_planned(driven(trace_8b, engine, *arguments), 0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        pytest.param("small-siglip", EVERYTHING, id="small-siglip-tower trained"),
        pytest.param("small-tied", (), id="small-tied-tower frozen", marks=pytest.mark.torture),
        pytest.param("small-siglip", (), id="small-siglip-tower frozen", marks=pytest.mark.torture),
        pytest.param("small-tied", EVERYTHING, id="small-tied-tower trained", marks=pytest.mark.torture),
    ],
)
def test_peak_with_siglip_and_with_a_tied_head_is_within_3_percent_of_a_traced_small_step(trace_8b, shape, arguments):
    assert_planned(driven(trace_8b, "single", *arguments, "--shape", shape), 0.03)


def test_the_sum_of_a_tied_heads_gradients_is_planned(trace_8b):
    """It makes the peak of a small micro-batch: 3 % of it."""
    assert_planned(driven(trace_8b, "single", "--shape", "small-tied", "--set", "micro_batch=1"), 0.01)


@pytest.mark.slow
def test_peak_under_ddp_is_within_3_percent_of_a_traced_small_step(trace_8b):
    assert_planned(driven(trace_8b, "ddp", *UNCHECKPOINTED), 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [at_length("projector"), "pretrain"])
def test_peak_is_within_10_percent_of_a_traced_small_step_under_fsdp2(trace_8b, stage):
    assert_planned(driven(trace_8b, "fsdp2", "--stage", stage, "--set", "micro_batch=2"), 0.1)


@pytest.fixture
def real() -> list[str]:
    """Options for steps that are really computed, which take minutes where a CPU emulates bfloat16."""
    return ["--real", *(["--set", "precision=float32"] if measure_cpu_speed().is_slow_in_bfloat16 else [])]


@pytest.mark.torture
def test_a_trace_has_the_bytes_of_a_step_that_is_really_computed(trace_8b, real, monkeypatch):
    small = trace_8b.SHAPES["small"]
    smaller = dataclasses.replace(small, num_words=16_000, text=small.text | {"num_hidden_layers": 2})
    monkeypatch.setitem(trace_8b.SHAPES, "small", smaller)
    monkeypatch.setattr(trace_8b, "NUM_TEXT", 500)
    row = (*UNCHECKPOINTED, "--set", "micro_batch=1")
    result, computed = (driven(trace_8b, "ddp", *row, *arguments) for arguments in (real[1:], real))
    assert result["traced"] == pytest.approx(computed["traced"], rel=1e-3)  # indices, real in both, count in one


@pytest.mark.torture
@pytest.mark.parametrize("arguments", [(), ("--set", "lora={r: 64}")], ids=["card", "lora"])
def test_peak_is_within_10_percent_of_a_small_step_that_is_really_computed(trace_8b, real, arguments):
    assert_planned(driven(trace_8b, "single", *real, *arguments), 0.1)


ZERO_CASES = {
    "zero1": (),
    "zero1 accumulating": ("--accumulation", "2"),
    "zero2": (),
    "zero2 accumulating": ("--accumulation", "2"),
    "zero2 of the embedding": ("--rank", "0"),
    "zero3": (),
}


@pytest.fixture
def traced_zero(trace_8b, tmp_path, monkeypatch) -> Callable[[str], dict]:
    """A step under DeepSpeed with the shipped file, but for buckets in proportion, in a fork.

    DeepSpeed remembers its group, and ZeRO-3 changes how linear layers keep their inputs, in all of a process.
    """
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def traced_zero(case: str) -> dict:
        engine = case.split()[0]
        content = deepspeed_content(engine, "")
        sizes = {"reduce_bucket_size": 4e6}
        if engine == "zero3":
            sizes = {
                "reduce_bucket_size": 1.5e6,
                "stage3_prefetch_bucket_size": 7.5e5,
                "stage3_max_live_parameters": 7e6,
                "stage3_max_reuse_distance": 7e6,
            }
        content["zero_optimization"] |= sizes
        settings, answer = tmp_path / "deepspeed.json", tmp_path / "traced.json"
        settings.write_text(json.dumps(content))

        def trace() -> None:
            found = driven(trace_8b, engine, "--set", f"deepspeed={settings}", *ZERO_CASES[case])
            answer.write_text(json.dumps(found))

        fork = multiprocessing.get_context("fork").Process(target=trace)
        fork.start()
        fork.join()
        assert fork.exitcode == 0
        return json.loads(answer.read_text())

    return traced_zero


@pytest.mark.torture
@pytest.mark.parametrize("case", ZERO_CASES)
def test_peak_is_within_5_percent_of_a_traced_small_step_under_deepspeed(traced_zero, case):
    """The plan is of the device that holds most: of the first, ZeRO-2's has no head."""
    result = traced_zero(case)
    assert result["missing"] == []
    peak = result["planned"]["peak"]
    assert peak >= 0.95 * result["traced"]["peak"]
    if "embedding" not in case:
        assert peak == pytest.approx(result["traced"]["peak"], rel=0.05)
    assert result["planned"]["step"] == pytest.approx(result["traced"]["step"], rel=0.05)


def test_zero_1_keeps_a_share_of_the_gradients_and_all_of_them_between_micro_batches(tmp_path):
    setup = dataclasses.replace(card(tmp_path), zero=ZeroSettings(reduce_bucket=5e8))
    one, several = (
        estimate(dataclasses.replace(setup, accumulates=accumulates), NOTHING, ENGINES["zero1"], 8)
        for accumulates in (False, True)
    )
    states = one.weights + one.optimizer
    share, head = 2 * setup.num_trained / 8, 2 * setup.parameters.embedding
    assert (one.gradients, several.gradients) == (share, 2 * setup.num_trained)
    # the share, the head's gradient, the embedding's, both buckets and the numbers of one in the order of the devices
    assert one.backward == pytest.approx(states + share + 2 * head + 3 * 2 * 5e8)
    assert several.forward - one.forward == 2 * setup.num_trained
    assert one.step == several.step == states + share + 6 * setup.num_trained / 8


def test_zero_2_keeps_its_share_in_float32(tmp_path):
    setup = dataclasses.replace(card(tmp_path), zero=ZeroSettings(reduce_bucket=5e8, wide_sums=True))
    memory = estimate(setup, NOTHING, ENGINES["zero2"], 8)
    states, share = memory.weights + memory.optimizer, 4 * setup.num_trained / 8
    assert memory.gradients == share
    # the embedding's norm is taken in float64
    assert memory.step == states + share + 8 * setup.parameters.embedding


@pytest.mark.slow
@pytest.mark.skipif("TRACE_8B" not in os.environ, reason="takes minutes: make trace-8b")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp2"])
def test_peak_is_within_5_percent_of_the_traced_8b_step(engine):
    result = traced(engine, "--set", "micro_batch=1")
    assert_planned(result, 0.05)
    assert result["shapes"] == {"positions": 4112, "tiles": 5, "supervised": 256}


# of each shipped recipe for a machine of its own: what its model and settings are at true shape
TRUE_SHAPES = {
    "llama31-8b-qlora-24gb": ("projector", "instruct"),
    "llava16-lora-24gb": ("instruct",),
    "llama32-1b": ("projector", "instruct"),
    "llama32-3b": ("projector", "instruct"),
}
# the same for eight devices; the other recipes of 8B differ in their data
TRUE_SHAPES_OF_8 = (
    ("llama31-8b", "instruct", "zero3"),
    ("llama31-8b-beyond", "projector", "ddp"),
    ("llama31-8b-beyond", "instruct", "zero3"),
)


@pytest.mark.skipif("TRACE_8B" not in os.environ, reason="takes minutes: make trace-8b")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("recipe", "stage", "engine"),
    [*((name, stage, "single") for name, each in TRUE_SHAPES.items() for stage in each), *TRUE_SHAPES_OF_8],
)
def test_peak_is_within_5_percent_of_the_traced_step_of_a_shipped_recipe(recipe, stage, engine):
    assert_planned(traced(engine, "--shape", "recipe", "--recipe", recipe, "--stage", stage), 0.05)


ADAPTERS = "r: 16, vision_tower: {r: 8, alpha: 16}, multi_modal_projector: {r: 8, alpha: 16}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        at_length(("--set", "lora={r: 16}")),
        at_length(("--set", "lora={r: 16, quantize: nf4}")),
        at_length((*EVERYTHING, "--set", f"lora={{{ADAPTERS}}}")),
        (*EVERYTHING, "--set", f"lora={{{ADAPTERS}, quantize: nf4}}"),
    ],
    ids=["language model", "nf4", "all groups", "all groups, nf4"],
)
def test_peak_with_adapters_is_that_of_a_traced_small_step(trace_8b, arguments):
    checkpointed = ("--set", "activation_checkpointing=true")
    assert_planned(driven(trace_8b, "single", *arguments, *checkpointed), 0.04)


@pytest.mark.torture
def test_a_parameter_without_gradient_fails_the_trace(trace_8b):
    # the tower's last layer is read by nothing
    config = trace_8b.SHAPES["small"].config
    stage = load_recipe("llama31-8b-card", overrides=["stages.projector.trainable=[vision_tower]"]).stages["projector"]
    row = trace_8b.make_row(config, 1, 1184, 16)

    class Unfrozen(trace_8b._Run):
        def without_gradient(self):
            for parameter in self.model.model.vision_tower.parameters():
                parameter.requires_grad_(True)
            return super().without_gradient()

    runs = dict(trace_8b._RUNS)

    def single(*arguments):
        model, run = runs["single"](*arguments)
        run.__class__ = Unfrozen
        return model, run

    trace_8b._RUNS["single"] = single
    try:
        missing = trace_8b.trace(config, stage, row, "single", 1).missing
    finally:
        trace_8b._RUNS["single"] = runs["single"]
    assert missing and all("encoder.layers.3" in name or "post_layernorm" in name for name in missing)


def test_the_plan_and_the_model_agree_on_the_rows_whose_logits_exist_at_once():
    assert packed._HEAD_SIZES_CUDA == (costs._HEAD_ROWS, costs._SOFTMAX_ROWS, True)
