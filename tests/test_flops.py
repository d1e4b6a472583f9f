"""Counted FLOPs equal those that PyTorch sees, and pairs those of a mask."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config

from llava_llama31 import LlavaLlama31Config, LlavaLlama31ForConditionalGeneration
from llava_llama31.trainer.costs.flops import (
    Flops,
    FlopsByPart,
    ModelShape,
    Work,
    adapter_ranks,
    attention_pairs,
    hfu,
    last_layer_attention,
    mfu,
    needed_flops,
)
from llava_llama31.trainer.costs.matrix_peak import measure_matrix_peak
from llava_llama31.trainer.costs.parameters import stage_adapters
from llava_llama31.trainer.model.adapters import adapt
from llava_llama31.trainer.model.device_options import checkpoint_activations
from llava_llama31.trainer.model.module_groups import GROUPS, freeze, group_parameters, lora_target_pattern
from llava_llama31.trainer.recipes.schema import Lora, Stage


IMAGES = [[(20, 90)], [(40, 60), (90, 30)], []]
# what no formula here counts: the rotary embedding's angles are made by a batched product, two a number
UNCOUNTED = 5e-4


@pytest.fixture
def make_batch(processor, make_image):
    """A padded batch with images or without, and the work that the unpacked path has with it."""

    def make(rows):
        encodings = [
            processor.encode(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}] * len(sizes) + [{"type": "text", "text": "what?"}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "a long answer, longer than most"}]},
                ],
                sizes,
            )
            for sizes in rows
        ]
        length = max(len(encoding.input_ids) for encoding in encodings)
        ids, labels = (
            torch.tensor([values + [pad] * (length - len(values)) for values in columns])
            for columns, pad in (
                ([e.input_ids for e in encodings], processor.tokenizer.pad_token_id),
                ([e.labels for e in encodings], -100),
            )
        )
        batch = {"input_ids": ids, "attention_mask": (ids != processor.tokenizer.pad_token_id).long()}
        sizes = [size for row in rows for size in row]
        num_tiles = 0
        if sizes:
            batch["pixel_values"] = torch.cat([torch.from_numpy(processor.tiles(make_image(*size))) for size in sizes])
            batch["image_sizes"] = torch.tensor(sizes)
            num_tiles = len(batch["pixel_values"])
        # eager attention computes every pair of a padded row, and the unpacked path projects every patch
        pairs = len(rows) * length**2
        work = Work(
            num_tiles=num_tiles,
            num_image_features=num_tiles * 4,
            num_tokens=ids.numel(),
            num_attention_pairs=pairs,
            num_supervised_tokens=int((labels[:, 1:] != -100).sum()),
            num_last_layer_queries=ids.numel(),
            num_last_layer_pairs=pairs,
            num_last_layer_outputs=ids.numel(),
        )
        return {**batch, "labels": labels}, work

    return make


def build(config, trainable, checkpointing=0):
    model = LlavaLlama31ForConditionalGeneration(config, packable=True)
    # FlopCounterMode has no formula for the CPU's fused attention, and on a GPU counts it as not causal
    model.set_attn_implementation("eager")
    freeze(model, dict.fromkeys(trainable, 1e-3))
    if checkpointing:
        checkpoint_activations(model, trainable, checkpointing)
    return model.train()


def seen_by_pytorch(model, batch):
    with FlopCounterMode(display=False) as counter:
        loss = model(**batch, supervised_only=True).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


def assert_equal_to_pytorch(model, batch, flops):
    forward, backward = seen_by_pytorch(model, batch)
    assert forward == pytest.approx(flops.total.forward, rel=UNCOUNTED)
    assert backward == pytest.approx(flops.total.backward + flops.total.recompute, rel=UNCOUNTED)


TRAINABLE = {
    "everything": GROUPS,
    "projector": ("multi_modal_projector",),
    "projector and language model": ("multi_modal_projector", "language_model"),
    "language model": ("language_model",),
    "tower": ("vision_tower",),
    "tower and projector": ("vision_tower", "multi_modal_projector"),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("trainable", TRAINABLE.values(), ids=TRAINABLE)
def test_counts_what_pytorch_computes(tiny_config, make_batch, trainable, checkpointing):
    batch, work = make_batch(IMAGES)
    flops = needed_flops(ModelShape.of(tiny_config), work, trainable, checkpointing=checkpointing)
    assert_equal_to_pytorch(build(tiny_config, trainable, checkpointing), batch, flops)
    assert (flops.total.recompute > 0) == checkpointing
    assert flops.total.hardware == flops.total.needed + flops.total.recompute


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("trainable", [GROUPS, ("multi_modal_projector", "language_model")], ids=str)
def test_every_nth_layer_is_recomputed(tiny_config, make_batch, trainable, every):
    tiny_config.text_config.num_hidden_layers, tiny_config.vision_config.num_hidden_layers = 5, 5
    batch, work = make_batch(IMAGES)
    shape = ModelShape.of(tiny_config)
    flops = needed_flops(shape, work, trainable, checkpointing=every)
    assert_equal_to_pytorch(build(tiny_config, trainable, every), batch, flops)
    whole = needed_flops(shape, work, trainable, checkpointing=1)
    assert 5 * flops.language_model.recompute == {2: 3, 3: 2}[every] * whole.language_model.recompute
    assert flops.total.needed == whole.total.needed


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_key_heads_are_counted_once_and_heads_may_be_wider_than_the_model(
    tiny_config, make_batch, num_key_value_heads, head_dim
):
    tiny_config.text_config.num_key_value_heads = num_key_value_heads
    tiny_config.text_config.head_dim = head_dim
    tiny_config.text_config.num_hidden_layers = 3
    batch, work = make_batch(IMAGES)
    flops = needed_flops(ModelShape.of(tiny_config), work, GROUPS)
    assert_equal_to_pytorch(build(tiny_config, GROUPS), batch, flops)


@pytest.mark.parametrize("feature_layer", [-1, 1, [-3, -2]], ids=str)
@pytest.mark.parametrize(
    ("swiglu", "checkpointing"),
    [
        (None, True),
        (False, True),
        *(pytest.param(*pair, marks=pytest.mark.torture) for pair in [(True, True), (None, False), (False, False)]),
        (True, False),
    ],
    ids=str,
)
def test_tower_is_counted_up_to_the_layer_that_is_read(tiny_config, make_batch, feature_layer, checkpointing, swiglu):
    tiny_config.vision_feature_layer = feature_layer
    if swiglu is not None:
        tiny_config.vision_config = Dinov2Config(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14, mlp_ratio=3
        )
        tiny_config.vision_config.use_swiglu_ffn = swiglu
    batch, work = make_batch(IMAGES)
    for trainable in (GROUPS, ("multi_modal_projector",)):
        flops = needed_flops(ModelShape.of(tiny_config), work, trainable, checkpointing=checkpointing)
        assert_equal_to_pytorch(build(tiny_config, trainable, checkpointing), batch, flops)
        assert (flops.vision_tower.backward > 0) == ("vision_tower" in trainable)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_text_only_rows(tiny_config, make_batch, checkpointing):
    batch, work = make_batch([[], []])
    shape = ModelShape.of(tiny_config)
    flops = needed_flops(shape, work, ("language_model",), checkpointing=checkpointing)
    assert flops.vision_tower == flops.multi_modal_projector == Flops()
    assert_equal_to_pytorch(build(tiny_config, ("language_model",), checkpointing), batch, flops)

    # a text-only row cannot train the projector: what runs for it, a blank tile with its CLS token, is not needed
    trainable = ("multi_modal_projector",)
    flops = needed_flops(shape, work, trainable, checkpointing=checkpointing)
    assert flops.total.backward == flops.total.recompute == 0
    blank = replace(work, num_tiles=1, num_image_features=5)
    flops = needed_flops(shape, blank, trainable, checkpointing=checkpointing)
    assert_equal_to_pytorch(build(tiny_config, trainable, checkpointing), batch, flops)


@pytest.mark.parametrize(
    ("trainable", "checkpointing"),
    [
        (("language_model",), False),
        (("multi_modal_projector", "language_model"), True),
        pytest.param(("language_model",), True, marks=pytest.mark.torture),
        pytest.param(("multi_modal_projector", "language_model"), False, marks=pytest.mark.torture),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], ["k_proj"], ["o_proj"], ["up_proj"], ["q_proj", "gate_proj", "down_proj"]],
    ids=str,
)
def test_adapters(tiny_config, make_batch, targets, trainable, checkpointing):
    peft = pytest.importorskip("peft")
    batch, work = make_batch(IMAGES)
    config = peft.LoraConfig(r=8, target_modules=lora_target_pattern(targets), task_type="CAUSAL_LM")
    model = peft.get_peft_model(build(tiny_config, ()), config)
    base = model.get_base_model()
    freeze(base, dict.fromkeys(trainable, 1e-3))
    if checkpointing:
        checkpoint_activations(base, trainable)
    shape = ModelShape.of(tiny_config)
    flops = needed_flops(shape, work, trainable, checkpointing=checkpointing, lora_rank=8, lora_targets=targets)
    assert_equal_to_pytorch(model.train(), batch, flops)


@pytest.mark.parametrize("groups", [("vision_tower",), ("multi_modal_projector",), GROUPS], ids=str)
@pytest.mark.parametrize(
    ("vision", "checkpointing"),
    [
        ("clip", 2),
        ("dinov2", 0),
        *(pytest.param(*pair, marks=pytest.mark.torture) for pair in [("clip", 0), ("dinov2", 2)]),
    ],
    ids=str,
)
def test_adapters_on_tower_and_projector(tiny_config, make_batch, vision, groups, checkpointing):
    """Groups beside the adapted ones are frozen, or trained whole."""
    if vision == "dinov2":
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
        tiny_config.vision_config = Dinov2Config(**sizes, image_size=28, patch_size=14)
    batch, work = make_batch(IMAGES)
    trainable = tuple({*groups, "multi_modal_projector"})
    content = {group: {"r": 4, "alpha": 8.0} for group in groups if group != "language_model"}
    stage = Stage.model_construct(trainable=list(trainable), lora=Lora.model_validate({"r": 4, **content}))
    base = build(tiny_config, ())
    adapted = adapt(base, stage.lora, seed=0, where="", groups=stage.adapted)
    freeze(base, dict.fromkeys(trainable, 1e-3))
    if checkpointing:
        checkpoint_activations(base, trainable, checkpointing)
    shape = ModelShape.of(tiny_config)
    flops = needed_flops(shape, work, trainable, checkpointing=checkpointing, **adapter_ranks(stage))
    assert_equal_to_pytorch(adapted.train(), batch, flops)
    count = {group: sum(p.numel() for _, p in group_parameters(base, group) if p.requires_grad) for group in groups}
    assert stage_adapters(shape, stage) == count


def test_the_8b_needs_two_operations_a_parameter_and_token():
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    text = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128320, **sizes}
    config = LlavaLlama31Config(text_config=text)
    shape = ModelShape.of(config)
    assert shape == ModelShape.of(config.to_dict())
    work = Work.unpruned([[2048]], num_supervised_tokens=100, num_tiles=5, num_image_features=2000)
    flops = needed_flops(shape, work, ("multi_modal_projector", "language_model"))
    num_norm_parameters = 32 * 2 * 4096
    assert flops.language_model.forward == 2 * 2048 * (6_979_584_000 - num_norm_parameters)
    assert flops.language_model.backward == 2 * flops.language_model.forward
    assert flops.lm_head.forward == 2 * 100 * 525_598_720
    assert flops.multi_modal_projector.forward == 2 * 2000 * (20_979_712 - 2 * 4096)
    # CLIP-L/336: 303,507,456 parameters with a last layer, norms, biases, positions and a CLS token that cost nothing
    assert flops.vision_tower.forward == pytest.approx(5 * 577 * 2 * 303_507_456 * 23 / 24, rel=0.1)
    # beside the linear layers' 6 operations a parameter and token
    assert flops.attention.needed == 3 * 4 * 32 * 4096 * (2048 * 2049 // 2)


def test_a_step_is_the_sum_of_its_rows(tiny_config):
    shape = ModelShape.of(tiny_config)
    rows = [Work.unpruned([[9]], 3), Work.pruned([[9, 4, 5]], [10, 16], num_tiles=3, num_image_features=8)]
    parts = [needed_flops(shape, row, ("multi_modal_projector",)) for row in rows]
    total = sum(parts, FlopsByPart()).total
    assert total.needed == parts[0].total.needed + parts[1].total.needed
    assert parts[0].total.backward == 0 < parts[1].total.backward
    doubled = Flops(total.forward, total.backward, recompute=total.needed)
    assert mfu(doubled, seconds=2.0, peak=total.needed / 8, num_devices=4) == pytest.approx(1.0)
    assert hfu(doubled, seconds=2.0, peak=total.needed / 8, num_devices=4) == pytest.approx(2.0)


def test_pruning_saves_queries_attention_and_mlp_of_the_last_layer_alone(tiny_config):
    shape = ModelShape.of(tiny_config)
    packing, supervised = [[20, 6, 7], [11]], [22, 25, 27, 40]
    whole = needed_flops(shape, Work.unpruned(packing, 4), ("language_model",))
    suffix = needed_flops(shape, Work.pruned(packing, supervised, to_segment_end=True), ("language_model",))
    least = needed_flops(shape, Work.pruned(packing, supervised), ("language_model",))
    assert whole.lm_head == suffix.lm_head == least.lm_head
    # queries of positions 22 to 25, 27 to 32 and 40 to 43; output and MLP at four positions in both
    hidden, inner = shape.hidden_size, shape.intermediate_size
    unread = 2 * ((44 - 14) * hidden**2 + (44 - 4) * (hidden**2 + 3 * hidden * inner))
    assert whole.language_model.forward - suffix.language_model.forward == unread
    assert suffix.language_model.forward - least.language_model.forward == 2 * (14 - 4) * hidden**2
    assert whole.attention.needed > suffix.attention.needed > least.attention.needed
    assert (whole.language_model.backward - least.language_model.backward) == 2 * (
        whole.language_model.forward - least.language_model.forward
    )


packings = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4)


def visible(packing):
    """Mask (S, S) of who sees whom, and each position's segment, position by position."""
    owners = [
        (tree, branch, step)
        for tree, lengths in enumerate(packing)
        for branch, length in enumerate(lengths)
        for step in range(length)
    ]
    mask = torch.tensor(
        [
            [tree == other and (step >= before if branch == part else part == 0) for other, part, before in owners]
            for tree, branch, step in owners
        ]
    )
    return mask, [owner[:2] for owner in owners]


@given(packing=packings, data=st.data())
def test_pairs_are_those_of_the_mask(packing, data):
    mask, segments = visible(packing)
    assert attention_pairs(packing) == int(mask.sum())
    rows = st.sets(st.integers(0, len(segments) - 1))
    supervised = sorted(data.draw(rows))
    assert last_layer_attention(packing, supervised) == (len(supervised), int(mask[supervised].sum()))
    queries = [i for i, own in enumerate(segments) if any(j <= i and segments[j] == own for j in supervised)]
    found = last_layer_attention(packing, supervised, to_segment_end=True)
    assert found == (len(queries), int(mask[queries].sum()))
    work = Work.pruned(packing, supervised)
    assert (work.num_tokens, work.num_attention_pairs) == (len(segments), int(mask.sum()))
    assert (work.num_last_layer_outputs, work.num_supervised_tokens) == (len(supervised),) * 2


def test_a_plain_sample_sees_itself_and_what_was_before():
    assert attention_pairs([[4]]) == 10
    assert attention_pairs([[4], [4]]) == 20
    assert attention_pairs([[4, 2]]) == attention_pairs([[6]])


@pytest.mark.parametrize("supervised", [[3, 2], [1, 1], [9], [-1], [7, 2]], ids=str)
def test_positions_that_cannot_be_are_refused(supervised):
    with pytest.raises(ValueError, match="supervised position"):
        last_layer_attention([[4], [4]], supervised)


def test_what_is_not_known_is_refused(tiny_config):
    shape, work = ModelShape.of(tiny_config), Work.unpruned([[4]], 1)
    with pytest.raises(ValueError, match="lm_head"):
        needed_flops(shape, work, ("language_model",), lora_rank=4, lora_targets=["lm_head"])
    with pytest.raises(ValueError, match="projector"):
        needed_flops(shape, work, ("projector",))
    fields = tiny_config.to_dict()
    with pytest.raises(ValueError, match="mixtral"):
        ModelShape.of({**fields, "text_config": {**fields["text_config"], "model_type": "mixtral"}})
    with pytest.raises(ValueError, match="pixtral"):
        ModelShape.of({**fields, "vision_config": {**fields["vision_config"], "model_type": "pixtral"}})
    del fields["text_config"]["vocab_size"]
    with pytest.raises(ValueError, match="vocab_size"):
        ModelShape.of(fields)


def test_peak_is_the_best_shape_by_the_clock_that_is_given():
    ticks = iter(range(10_000))
    shapes = ((8, 8, 8), (8, 16, 8))
    # every look at this clock is a second later, so that a measurement takes one second: readings of 8 products
    peak = measure_matrix_peak(torch.float32, "cpu", shapes=shapes, seconds=160.0, clock=lambda: next(ticks))
    assert peak == 8 * 2 * 8 * 16 * 8
    assert measure_matrix_peak(torch.float32, "cpu", shapes=shapes, seconds=1e-3) > 0


def test_a_busy_machine_does_not_hide_the_large_shapes(monkeypatch):
    """Small products that wait for the scheduler do not say how fast the others are."""
    now, calls = 0.0, 0

    def product(left, right, out):
        nonlocal now, calls
        calls += 1
        waits = left.shape[0] == 256 and calls != 4
        now += 8e-3 if waits else 2 * left.shape[0] * left.shape[1] * right.shape[1] / 160e9

    monkeypatch.setattr(torch, "mm", product)
    assert measure_matrix_peak(torch.float32, "cpu", clock=lambda: now) == pytest.approx(160e9)


def test_measuring_a_peak_takes_a_moment_where_products_are_slow(monkeypatch):
    """As bfloat16's on a CPU without instructions for it: 1.3 GFLOP/s."""
    now, products = 0.0, []

    def slow(left, right, out):
        nonlocal now
        now += 2 * left.shape[0] * left.shape[1] * right.shape[1] / 1.3e9
        products.append(left.shape)

    monkeypatch.setattr(torch, "mm", slow)
    assert measure_matrix_peak(torch.bfloat16, "cpu", clock=lambda: now) == pytest.approx(1.3e9)
    assert now < 0.5 and set(products) == {(256, 256)}
