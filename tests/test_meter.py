"""The meters count what the step computes, and nothing of what stands beside it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_llama31.trainer.costs.flops import ModelShape
from llava_llama31.trainer.training import meter as meters
from llava_llama31.trainer.training.meter import Meter


@pytest.fixture
def make_meter(tiny_model, processor, monkeypatch):
    monkeypatch.setattr(meters, "matrix_peak", lambda dtype, device: 1e9)
    monkeypatch.setattr(meters, "measured_again", lambda dtype, device: 1e9)

    def make(trainable=("multi_modal_projector", "language_model"), **options):
        return Meter(
            ModelShape.of(tiny_model.config),
            trainable,
            processor.image_token_id,
            processor.tokenizer.pad_token_id,
            lambda sizes: int((tiny_model.model.feature_layout(sizes)[0] >= 0).sum()),
            processor.num_tiles,
            torch.device("cpu"),
            torch.float32,
            options,
        )

    return make


@pytest.mark.parametrize("trainable", [["multi_modal_projector"], ["multi_modal_projector", "language_model"]])
@pytest.mark.parametrize("share", [False, True])
def test_needed_flops_are_those_of_a_packed_step(tiny_model, samples, collate, make_meter, trainable, share):
    """PyTorch counts the products; of attention it knows only other forms, so that is counted apart (test_flops)."""
    from llava_llama31.trainer.costs.flops import Work, needed_flops

    for name, parameter in tiny_model.named_parameters():
        is_projector = "multi_modal_projector" in name or "image_newline" in name
        language = ("language_model" in name or "lm_head" in name) and "language_model" in trainable
        parameter.requires_grad_(is_projector or language)
    tiny_model.set_attn_implementation("eager")
    row = collate(samples, packed=True, share_prefix=share)
    row["pixel_values"] = row["pixel_values"].float()
    with FlopCounterMode(display=False) as counter:
        tiny_model(**row).loss.backward()
    images = {
        "num_tiles": len(row["pixel_values"]),
        "num_image_features": int((tiny_model.model.feature_layout(row["image_sizes"])[0] >= 0).sum()),
    }
    work = Work.pruned(row["packing"], row["supervised_positions"], to_segment_end=True, **images)
    flops = needed_flops(ModelShape.of(tiny_model.config), work, trainable)
    attention = sum(
        count for operation, count in counter.get_flop_counts()["Global"].items() if "bmm" in str(operation)
    )
    # the tower's attention, and blocks of the packed row's, are batched products
    tower = 2 * 2 * work.num_tiles * 5 * 5 * 32 * 2
    counted = counter.get_total_flops() - attention + tower
    expected = flops.total.needed - flops.attention.needed
    assert abs(counted / expected - 1) < 0.02


def test_known_features_need_no_tower(samples, collate, make_meter):
    batch = collate(samples, packed=True)
    known = {key: value for key, value in batch.items() if key != "pixel_values"}
    known |= {"image_features": batch["pixel_values"][:, 0], "has_features": [True] * len(batch["image_sizes"])}
    (computed, _), (stored, _) = (make_meter()._work(row) for row in (batch, known))
    assert computed.num_tiles == len(batch["pixel_values"]) and stored.num_tiles == 0
    assert stored.num_image_features == computed.num_image_features > 0


def test_pixels_count_as_the_tiles_they_become(samples, collate, make_meter):
    batch = collate(samples, packed=True)
    pixels = {key: value for key, value in batch.items() if key != "pixel_values"}
    pixels |= {"pixels": [torch.zeros((*size, 3), dtype=torch.uint8) for size in batch["image_sizes"]]}
    assert make_meter()._work(pixels) == make_meter()._work(batch)


def test_packed_and_padded_rows_need_the_same(samples, collate, make_meter):
    meter = make_meter()
    meter.add(collate(samples))
    padded_seconds, padded = meter.read()
    meter.add(collate(samples, packed=True))
    packed_seconds, packed = meter.read()
    assert padded["padding"] > 0.3 and packed["padding"] == 0
    assert packed["mfu"] * packed_seconds == pytest.approx(padded["mfu"] * padded_seconds, rel=1e-2)
    length = sum(len(sample.input_ids) for sample in samples)
    meter.add(collate(samples, packed=True, multiple_of=1000))
    assert meter.read()[1]["padding"] == pytest.approx(1 - length / 1000, abs=1e-3)


def test_a_sample_that_ends_with_the_pad_token_is_no_padding(samples, collate, make_meter):
    last = samples[-1]
    pad = make_meter().pad_token_id
    ending = last._replace(input_ids=[*last.input_ids[:-1], pad])
    work, num_padding = make_meter()._work(collate([*samples[:-1], ending], packed=True))
    assert num_padding == 0 and work == make_meter()._work(collate(samples, packed=True))[0]


def test_recomputation_is_no_use(samples, collate, make_meter):
    batch = collate(samples, packed=True)
    plain, recomputing = make_meter(), make_meter(checkpointing=True)
    plain.add(batch)
    recomputing.add(batch)
    assert torch.equal(plain._sums[0], recomputing._sums[0]) and recomputing._sums[1] > 1.2 * plain._sums[1]
    assert "hfu" not in plain.read()[1] and "hfu" in recomputing.read()[1]


def test_waiting_counts_and_evaluating_does_not(make_meter, monkeypatch):
    clock = iter([100.0, 100.0, 103.0, 103.0, 113.0, 116.0, 116.0])
    monkeypatch.setattr(meters.time, "monotonic", lambda: next(clock))
    meter = make_meter()
    with meter.waiting():
        pass  # 3 seconds
    with meter.aside():
        pass  # 10 seconds
    seconds, read = meter.read()
    assert seconds == 6 and read["data_wait"] == 0.5


def test_the_peak_of_a_cpu_is_measured_once_whatever_its_name(monkeypatch):
    measured = []
    monkeypatch.setattr(meters, "_peaks", {})
    monkeypatch.setattr(meters, "measure_matrix_peak", lambda dtype, device: measured.append(device) or 1e9)
    for name in ("cpu", "cpu:0", "cuda:0", "cuda:1", "cpu"):
        meters.matrix_peak(torch.float32, torch.device(name))
    assert [str(device) for device in measured] == ["cpu", "cuda:0", "cuda:1"]


def test_a_peak_that_a_step_exceeds_is_measured_again(samples, collate, make_meter, monkeypatch):
    """Other work had the device when it was measured; where a step is still faster, a few times at most."""
    readings = iter([2.0, 1e20])
    meter = make_meter()
    monkeypatch.undo()
    monkeypatch.setattr(meters, "_peaks", {})
    monkeypatch.setattr(meters, "measure_matrix_peak", lambda dtype, device: 1.0)
    monkeypatch.setattr(meters, "measure_beside_other_work", lambda dtype, device: next(readings))
    batch = collate(samples, packed=True)
    for peak, is_exceeded in ((2.0, True), (1e20, False), (1e20, False)):
        meter.add(batch)
        assert (meter.read()[1]["mfu"] > 1) is is_exceeded
        assert meters.matrix_peak(torch.float32, torch.device("cpu")) == peak
    assert meter.again == 1
