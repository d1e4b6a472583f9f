"""Packed rows and shared prefixes compute what each sample computes alone: loss and gradients."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.attention.varlen
from transformers import DynamicCache

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31 import packed_llama_llava_llama31 as packed_llama
from llava_llama31.packed_llama_llava_llama31 import CACHE_NAME
from llava_llama31.trainer.data.batches.collator import Collator


# the rows of the fixture `samples` by their image
GROUPS = [[0, 1, 2], [3, 4, 5], [6, 7], [8], [9, 10]]
NUM_ROWS = sum(map(len, GROUPS))


def stock_gradients(stock, batch):
    """Loss and gradients of stock Transformers, with the mean of the loss taken in float64."""
    labels = batch.pop("labels")
    logits = stock(**batch).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, expected, tolerance, relative=0.0):
    (loss, grads), (expected_loss, expected_grads) = got, expected
    torch.testing.assert_close(loss, expected_loss, rtol=relative, atol=tolerance)
    assert set(expected_grads) <= set(grads)
    # the bias of a key projection has no gradient but rounding
    least = 1e-4 * max(float(grad.norm()) for grad in expected_grads.values())
    for name, grad in grads.items():
        expected_grad = expected_grads.get(name, torch.zeros_like(grad))
        scale = max(float(expected_grad.norm()), least)
        assert float((grad - expected_grad).norm()) <= max(relative * 10, tolerance) * scale, name


@pytest.fixture(params=[False, True], ids=["as they are", "filled up"])
def filled(request, monkeypatch):
    """Segments as in float32 and wider, or filled up as in bfloat16, in several blocks each."""
    for name in ("_BLOCK_QUERIES", "_FILLED_BLOCK_QUERIES"):
        monkeypatch.setattr(packed_llama, name, 16)
    if request.param:
        monkeypatch.setattr(packed_llama, "_FILLED_DTYPES", (torch.float32, torch.float64))
        monkeypatch.setattr(packed_llama, "_SEGMENT_MULTIPLE", 8)


OPTIONS = [
    {"packed": True},
    {"packed": True, "share_prefix": True},
    {"packed": True, "share_prefix": True, "multiple_of": 64},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["packed", "shared", "shared, padded to 64"])
@pytest.mark.parametrize("chosen", [*GROUPS, list(range(NUM_ROWS))], ids=str)
def test_loss_and_gradients_equal_stock_transformers(
    tiny_config, samples, collate, make_stock, chosen, options, filled
):
    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True).double()
    chosen = [samples[i] for i in chosen]
    expected = stock_gradients(make_stock(model), collate(chosen))
    assert_equal(gradients(model, collate(chosen, **options)), expected, 1e-12)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=["packed", "shared"])
def test_in_float32(tiny_config, samples, collate, make_stock, options):
    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True)
    single = [s._replace(pixel_values=None if s.pixel_values is None else s.pixel_values.float()) for s in samples]
    exact = stock_gradients(make_stock(model), collate(samples))
    got = gradients(model, collate(single, **options))
    assert_equal((got[0].double(), {n: g.double() for n, g in got[1].items()}), exact, 0.0, relative=1e-6)


def test_heads_that_the_threads_do_not_share_evenly(monkeypatch):
    """Three heads of keys for two threads: the first two in one batched product, the third by itself."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(packed_llama, "_BLOCK_QUERIES", 16)
    batch_sizes = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, *others, **out: batch_sizes.append(len(a)) or bmm(a, *others, **out))
    generator = torch.Generator().manual_seed(0)
    plan = packed_llama.plan_row([(37, 5, 19), (21,)])
    results = []
    for attend in (packed_llama.packed_attention, packed_llama._segment_attention):
        inputs = [
            torch.randn(1, heads, 82, 8, generator=generator.manual_seed(heads), dtype=torch.float64)
            for heads in (9, 3, 3)
        ]
        for x in inputs:
            x.requires_grad_()
        output = attend(*inputs, plan, 8**-0.5)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    assert set(batch_sizes) == {2}
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_conversations_about_an_image_share_its_trunk(samples, collate):
    row = collate(samples, packed=True, share_prefix=True)
    branches = [len(tree) - 1 for tree in row["packing"]]
    #                  wide x 3, tall after words, tall under a system turn x 2, both x 2, tiny, two without images
    assert branches == [3, 0, 2, 2, 0, 0, 0]
    plain = collate(samples, packed=True)
    assert [len(tree) for tree in plain["packing"]] == [1] * len(samples)
    assert row["input_ids"].shape[1] < 0.8 * plain["input_ids"].shape[1]
    assert len(row["pixel_values"]) == sum(
        len(samples[i].pixel_values) for i in (0, 3, 4, 6, 8)
    )  # each trunk's tiles once


@pytest.mark.parametrize("changed", range(NUM_ROWS))
def test_a_sample_does_not_see_its_neighbours(tiny_model, samples, collate, processor, changed, filled):
    """Bit for bit: another token in one sample leaves the hidden states of all others as they were."""
    single = [s._replace(pixel_values=None if s.pixel_values is None else s.pixel_values.float()) for s in samples]

    def hidden(samples):
        row = collate(samples, packed=True, share_prefix=True)
        owners = []
        for number, tree in enumerate(row["packing"]):
            owners += [(number, branch) for branch, length in enumerate(tree) for _ in range(length)]
        with torch.no_grad():
            embeds = tiny_model.model.packed_embeds(
                row["input_ids"], row["pixel_values"], row["image_sizes"], row["image_positions"]
            )
            everywhere = range(embeds.shape[1])
            states = tiny_model.model.language_model.packed(embeds, row["position_ids"], row["packing"], everywhere)
        return states[0], owners

    before, owners = hidden(single)
    ids = list(single[changed].input_ids)
    ids[-2] = (ids[-2] + 1) % 300
    after, same_owners = hidden([*single[:changed], single[changed]._replace(input_ids=ids), *single[changed + 1 :]])
    assert owners == same_owners
    moved = {owner for owner, a, b in zip(owners, before, after, strict=True) if not torch.equal(a, b)}
    assert len(moved) == 1


@pytest.mark.parametrize("group", ["multi_modal_projector", "vision_tower", "language_model"])
def test_frozen_groups_and_activation_checkpointing(tiny_config, samples, collate, group):
    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True).double().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group in name or (group == "language_model" and "lm_head" in name))
    row = collate(samples, packed=True, share_prefix=True)
    expected = gradients(model, row)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(gradients(model, row), expected, 1e-12)
    assert expected[1] and all(group in name or "lm_head" in name for name in expected[1])


def test_a_row_that_counts_for_nothing_has_gradients_of_zero_everywhere(tiny_config, samples, collate):
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True).double()
    silent = samples[1]._replace(labels=[-100] * len(samples[1].labels))
    row = collate([silent], packed=True) | {"num_items_in_batch": 7}
    loss, grads = gradients(model, row)
    assert loss == 0
    for name, parameter in model.model.language_model.named_parameters():
        assert name.startswith("embed") or torch.equal(grads[f"model.language_model.{name}"], 0 * parameter)


def test_the_head_s_loss_is_the_same_in_chunks_and_under_autocast(monkeypatch):
    from llava_llama31 import packed_llama_llava_llama31 as packed

    torch.manual_seed(0)
    head = packed.SupervisedHead(16, 50, bias=False).double()
    hidden = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (37,))

    def run(loss):
        hidden.grad = head.weight.grad = None
        (3 * loss).backward()
        return loss.detach(), hidden.grad, head.weight.grad

    expected = run(torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum"))
    for rows in (256, 4, 1):
        monkeypatch.setattr(packed, "_HEAD_SIZES", packed.HeadSizes(rows, 64, True))
        for got, wanted in zip(run(head(hidden, targets)), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    loss = head(hidden, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # its gradients are given away once
        loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = head.float()(hidden.float(), targets)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), expected[0], rtol=1e-2, atol=0)


def test_a_gpus_gradient_of_the_head_adds_up_in_float32(monkeypatch):
    """Over 256 chunks of bfloat16: within a rounding of the exact sum, where sums in bfloat16 are further off."""
    torch.manual_seed(0)
    head = packed_llama.SupervisedHead(16, 50, bias=False).bfloat16()
    hidden = torch.randn(512, 16).bfloat16()
    targets = torch.randint(0, 50, (512,))
    exact = head.weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.double() @ exact.T, targets, reduction="sum").backward()

    def fault(wide_sums):
        monkeypatch.setattr(packed_llama, "_HEAD_SIZES", packed_llama.HeadSizes(2, 2, wide_sums))
        head.weight.grad = None
        head(hidden, targets).backward()
        assert head.weight.grad.dtype == torch.bfloat16
        return ((head.weight.grad.double() - exact.grad).abs().mean() / exact.grad.abs().mean()).item()

    rounding = torch.finfo(torch.bfloat16).eps / 2
    assert packed_llama._HEAD_SIZES_CUDA.wide_sums
    assert fault(wide_sums=True) < rounding < 2 * rounding < fault(wide_sums=False)


def test_a_wrong_row_is_refused(tiny_model, samples, collate):
    single = [s._replace(pixel_values=None if s.pixel_values is None else s.pixel_values.float()) for s in samples]
    row = collate(single[:2], packed=True)
    with pytest.raises(ValueError, match=r"packing has \d+ positions"):
        tiny_model(**{**row, "packing": [[3]]})
    with pytest.raises(ValueError, match="image placeholders but the images have"):
        tiny_model(**{**row, "image_positions": row["image_positions"][:-1]})
    with pytest.raises(ValueError, match="tiles, but the 2 images need"):
        tiny_model(**{**row, "pixel_values": row["pixel_values"][:-1]})
    with pytest.raises(ValueError, match="no label"):
        tiny_model(**{**row, "supervised_positions": []})
    wrong = single[0]._replace(input_ids=single[0].input_ids[:-1] + [single[0].input_ids[8]], num_image_tokens=1)
    with pytest.raises(ValueError, match="record r0 has"):
        collate([wrong], packed=True)


def test_the_model_finds_positions_by_itself(tiny_model, samples, collate):
    single = [s._replace(pixel_values=None if s.pixel_values is None else s.pixel_values.float()) for s in samples]
    row = collate(single, packed=True, share_prefix=True)
    bare = {key: value for key, value in row.items() if key not in ("image_positions", "supervised_positions")}
    bare["image_sizes"] = torch.tensor(bare["image_sizes"])
    assert torch.equal(tiny_model(**bare).loss, tiny_model(**row).loss)


def test_collator_is_frozen(processor):
    with pytest.raises(dataclasses.FrozenInstanceError):
        Collator(0, 1).packed = True


@pytest.mark.parametrize("supervised", [None, [3, 8, 9, 20, 29]], ids=["all positions", "last layer"])
def test_a_gpus_kernel_is_asked_for_the_same_attention(monkeypatch, supervised):
    """The varlen kernel's arguments by their documented meaning: causal towards the last key of each sequence."""
    plan = packed_llama.plan_row([[6, 4, 3], [9], [8]])
    if supervised is not None:
        plan = packed_llama.plan_last_layer(plan, supervised, torch.device("cpu"))
    num_queries = sum(segment.num_queries for segment in plan.segments)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (num_queries, 30, 30))

    def kernel(query, key, value, query_ends, key_ends, most_queries, most_keys, *, scale, window_size, enable_gqa):
        assert window_size == (-1, 0) and enable_gqa
        outputs = []
        for i in range(len(query_ends) - 1):
            q, (k, v) = (
                query[query_ends[i] : query_ends[i + 1]],
                (x[key_ends[i] : key_ends[i + 1]] for x in (key, value)),
            )
            assert len(q) <= most_queries and len(k) <= most_keys
            seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale)
            outputs.append(attended.transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    expected = packed_llama.packed_attention(query, key, value, plan, 0.5)
    torch.testing.assert_close(packed_llama._varlen_attention(query, key, value, plan, 0.5), expected)


def test_a_gpus_kernel_reads_keys_where_they_are_unless_branches_share_them(monkeypatch):
    query, key, value = (torch.randn(1, 2, 12, 4) for _ in range(3))
    read = []

    def kernel(query, key, value, *lengths, **options):
        read.append([x.data_ptr() for x in (key, value)])
        return torch.zeros_like(query)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    for packing in ([[5], [4], [3]], [[5, 4, 3]]):
        packed_llama._varlen_attention(query, key, value, packed_llama.plan_row(packing), 0.5)
    in_place = [key.data_ptr(), value.data_ptr()]
    assert read[0] == in_place and not set(read[1]) & set(in_place)


def test_heads_that_share_keys_read_them_once(tiny_config, make_stock):
    """Several new positions behind keys that not all rows have: stock's logits, and keys and values not repeated."""
    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True).double().eval()
    stock = make_stock(model).eval()
    ids = torch.randint(0, 300, (3, 9))
    visible = torch.ones(3, 1, 9, 9, dtype=torch.bool).tril()
    visible[0, :, :, 2:4] = visible[1, :, :, :1] = False
    visible[:, :, 2:4, 2:4] |= torch.eye(2, dtype=torch.bool)  # a row of padding still sees itself
    shapes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is attend:
                shapes.append((args[0].shape[1:3], args[1].shape[1]))
            return function(*args, **(kwargs or {}))

    logits = []
    with torch.no_grad():
        for one in (stock, model):
            cache = DynamicCache()
            one(input_ids=ids[:, :5], attention_mask=visible[:, :, :5, :5], **{CACHE_NAME: cache})
            with Watch() if one is model else contextlib.nullcontext():
                output = one(
                    input_ids=ids[:, 5:],
                    position_ids=torch.arange(5, 9).expand(3, 4),
                    attention_mask=visible[:, :, 5:],
                    **{CACHE_NAME: cache},
                )
            logits.append(output.logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-10, atol=1e-10)
    assert shapes == [((2, 8), 2)] * 2  # two heads of each key head, four positions each


def test_a_mask_that_differs_from_head_to_head_is_stocks(tiny_config, make_stock):
    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True).double().eval()
    visible = torch.ones(2, 4, 6, 6, dtype=torch.bool).tril()
    visible[:, 1, 3:, 1] = False
    asked = {"input_ids": torch.randint(0, 300, (2, 6)), "attention_mask": visible}
    with torch.no_grad():
        logits, expected = (
            one(**asked, **{CACHE_NAME: DynamicCache()}).logits for one in (model, make_stock(model).eval())
        )
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
