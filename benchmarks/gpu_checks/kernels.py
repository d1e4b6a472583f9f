"""Kernels by themselves: products, attention, tiles, the head."""

from collections.abc import Sequence
from unittest import mock

import gpu
import numpy as np
import torch
from PIL import Image
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from gpu_checks.place import Detail, Place, expect, milliseconds
from llava_llama31 import packed_llama_llava_llama31 as packed
from llava_llama31.trainer.data.batches.device_tiles import resized_by_products
from llava_llama31.trainer.distributed.devices import device_name
from llava_llama31.trainer.model.flash_attention import installed_implementations


PACKINGS: dict[str, packed.Packing] = {
    "squares": [[300], [7], [1], [129]],
    "branches": [[257, 40, 1, 130], [64, 5, 64]],
    "rows of one": [[1], [1]],
    "many": [[12, 3]] * 60,
}
# of the largest number; bfloat16 has 8 bits
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
HEAD_SIZES = (64, 128)
IMAGE_SIZES = ((480, 640), (1024, 768), (3000, 4000))
HEAD_CHUNKS = ((256, 64), (1024, 256), (2048, 512), (4096, 1024))


def facts(place: Place) -> Detail:
    """Versions, the device, and whether torch computes on it."""
    found: Detail = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    found["device"] = device_name(place.device)
    if place.device.type == "cuda":
        properties = torch.cuda.get_device_properties(place.device)
        found |= {"capability": f"{properties.major}.{properties.minor}", "memory": properties.total_memory}
        found |= {"free": torch.cuda.mem_get_info(place.device)[0], "sms": properties.multi_processor_count}
    size = 64 if place.small else 4096
    ones = torch.ones(size, size, device=place.device)
    expect(float((ones @ ones).mean()) == size, "a product of ones is wrong")
    return found


def reference_attention(heads: Sequence[torch.Tensor], plan: packed.AttentionPlan) -> torch.Tensor:
    """Attention by masks, segment by segment."""
    query, key, value = heads
    groups, outputs = query.shape[1] // key.shape[1], []
    for segment in plan.segments:
        keys, values = (segment.keys(x)[0].repeat_interleave(groups, 0) for x in (key, value))
        scores = query[0, :, segment.queries] @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
        shape = (segment.num_queries, segment.num_keys)
        hidden = torch.ones(shape, dtype=torch.bool).triu(1 + shape[1] - shape[0])
        outputs.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values)
    return torch.cat(outputs, 1).transpose(0, 1)[None]


def attention(place: Place) -> Detail:
    """Packed attention, forward and backward, beside float64 masks: GQA, branches, rows of one, two head sizes.

    By PyTorch's own kernel, then by FlashAttention 3 and 4 where they are installed.
    """
    found = {"own": _largest_errors(place)}
    for name in installed_implementations(place.device):
        activate_flash_attention_impl(name)
        try:
            found[name] = _largest_errors(place)
        finally:
            restore_flash_attention_impl()
    return {"largest_error": found}


def _largest_errors(place: Place) -> dict[str, float]:
    """By type of the numbers."""
    worst: dict[str, float] = {}
    config = gpu.SHAPES["8b"].config.text_config
    for dtype in place.half_types:
        fault = packed.varlen_fault(config, place.device, dtype)
        expect(fault is None, f"{dtype}: the varlen kernel can't be used: {fault}")
    for dtype in (torch.float32, *place.half_types):
        for size in HEAD_SIZES:
            for name, packing in PACKINGS.items():
                error = _attention_error(packing, size, dtype, place.device)
                expect(error <= TOLERANCES[dtype], f"{dtype}, head size {size}, {name}: off by {error:.2g}")
                worst[str(dtype)] = max(error, worst.get(str(dtype), 0.0))
    return worst


def _attention_error(packing: packed.Packing, size: int, dtype: torch.dtype, device: torch.device) -> float:
    """The largest difference of output and gradients, as a share of the largest number; NaN where one is NaN."""
    torch.manual_seed(0)
    plan, length = packed.plan_row(packing, varlen=True), sum(map(sum, packing))
    drawn = [torch.randn(1, heads, length, size).to(dtype) for heads in (8, 2, 2)]
    weights = torch.randn(1, length, 8, size, dtype=torch.float64)
    exact = [x.double().requires_grad_() for x in drawn]
    expected = reference_attention(exact, plan)
    given = [x.to(device).requires_grad_() for x in drawn]
    output = packed.packed_attention(given[0], given[1], given[2], plan, size**-0.5)
    wanted = (expected, *torch.autograd.grad(expected, exact, weights))
    made = (output, *torch.autograd.grad(output, given, weights.to(device, dtype)))
    differences = [
        # the gradient of a query with one key is zero
        ((a.detach().double().cpu() - b.detach()).abs().max() / b.detach().abs().max().clamp_min(1.0)).item()
        for a, b in zip(made, wanted, strict=True)
    ]
    return max(differences) if all(map(np.isfinite, differences)) else float("nan")


def tiles(place: Place) -> Detail:
    """The bits of Pillow's resize, and milliseconds an image."""
    found = {}
    for height, width in IMAGE_SIZES[: 1 if place.small else None]:
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = torch.from_numpy(noise).to(place.device)
        wanted = np.asarray(Image.fromarray(noise).resize((336, 336), Image.Resampling.BICUBIC))
        made = resized_by_products(image, 336, 336).cpu().numpy()
        expect(np.array_equal(made, wanted), f"{height} x {width}: other bits than Pillow's")
        found[f"{height}x{width}"] = milliseconds(lambda image=image: resized_by_products(image, 336, 336), place)
    return {"milliseconds": found}


def head(place: Place) -> Detail:
    """The head's loss and gradients against plain cross-entropy, and milliseconds by chunk and softmax rows."""
    rows, hidden, words = (96, 32, 512) if place.small else (4096, 4096, 128_256)
    dtype = torch.float32 if place.device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    x = torch.randn(rows, hidden, device=place.device, dtype=dtype, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(words, hidden, device=place.device, dtype=dtype) * 0.02)
    targets = torch.randint(0, words, (rows,), device=place.device)
    some = slice(0, min(rows, 512))  # whose logits fit
    plain = torch.nn.functional.cross_entropy((x[some] @ weight.T).float(), targets[some], reduction="sum")
    (wanted,) = torch.autograd.grad(plain, x)
    ours = packed._LinearCrossEntropy.apply(x[some], weight, targets[some], None)
    (made,) = torch.autograd.grad(ours, x)
    tolerance, loss, plain_loss = TOLERANCES[dtype], ours.item(), plain.item()
    expect(abs(loss - plain_loss) <= tolerance * plain_loss, f"loss {loss}, plainly {plain_loss}")
    difference = ((made - wanted).abs().max() / wanted.abs().max()).item()
    expect(difference <= tolerance, f"a gradient is off by {difference:.2g}")
    found = {}
    for chunk, piece in HEAD_CHUNKS:
        sizes = packed.HeadSizes(chunk, piece, True)
        with mock.patch.multiple(packed, _HEAD_SIZES=sizes, _HEAD_SIZES_CUDA=sizes):
            run = lambda: packed._LinearCrossEntropy.apply(x, weight, targets, None).backward()  # noqa: E731
            found[f"{chunk}/{piece}"] = milliseconds(run, place)
    return {"milliseconds": found}
