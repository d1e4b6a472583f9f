"""The check of all data: every reason found and acted on, exact counts, a cache that sees every change."""

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from llava_llama31.trainer import redaction
from llava_llama31.trainer.data import check as check_room
from llava_llama31.trainer.data import sources
from llava_llama31.trainer.data.batches.batch_order import BatchOrder, Lengths
from llava_llama31.trainer.data.batches.dataset import StageDataset
from llava_llama31.trainer.data.check import check as check_data
from llava_llama31.trainer.data.check import image_decoder as decoding
from llava_llama31.trainer.data.check import row_checker as check_rows
from llava_llama31.trainer.data.check.check import DataCheck, check_sources, show_report
from llava_llama31.trainer.data.check.image_decoder import Decoder
from llava_llama31.trainer.data.check.report import parse_policy, select_rows
from llava_llama31.trainer.data.check.row_checker import Limits
from llava_llama31.trainer.data.sources.records import open_records
from llava_llama31.trainer.data.sources.reject_reasons import REASONS
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import DataSource


SKIP = {"default": "skip"}
# test_where.py and test_contamination.py
IN_OTHER_TESTS = ("filtered", "evaluation_image", "evaluation_question")


def row(key: str, image: str | None = None, question: str = "What?", answer: str = "That", **more) -> dict:
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if image is None:
        return {"id": key, "conversations": talk} | more
    talk[0]["value"] = "<image>\n" + question
    return {"id": key, "image": image, "conversations": talk} | more


@pytest.fixture
def folder(tmp_path, make_image):
    """An image root with good.png (20 x 30), wide.png (20 x 70) and a file outside of it."""
    root = tmp_path / "data"
    root.mkdir()
    make_image(20, 30).save(root / "good.png")
    make_image(20, 70).save(root / "wide.png")
    make_image(4, 4).save(tmp_path / "secret.png")
    return root


@pytest.fixture
def write(folder):
    """Write rows (dicts, or text for what is no JSON) as JSON lines; returns the source."""

    def write_rows(*rows: dict | str, name: str = "data") -> DataSource:
        path = folder / f"{name}.jsonl"
        lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
        path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
        return DataSource(name=name, path=str(path))

    return write_rows


@pytest.fixture
def check(tmp_path, processor):
    """`check_sources` with this process's processor and a cache folder."""

    def run(*sources: DataSource, **options):
        options = {"processor": processor, "cache_dir": tmp_path / "cache", "num_workers": 0} | options
        outside = {name: options.pop(name) for name in ("policy", "cache_dir", "rejects") if name in options}
        enforce = options.pop("enforce", True)
        report = check_sources(sources, DataCheck(**options), **outside)
        if enforce:
            report.raise_for_policy()
        return report

    return run


def weighted(key: str, weight: object) -> dict:
    """Two questions and answers; the first answer has a weight."""
    talk = [*row("", question="q", answer="WRONG")["conversations"], *row("", answer="RIGHT")["conversations"]]
    talk[1]["weight"] = weight
    return {"id": key, "conversations": talk}


FATAL_SIZE = (66, 6)
# a decoder that an image of that size kills
FATAL_CODE = f"""
import os, sys
from PIL import Image
from llava_llama31.trainer.data.check.image_decoder import serve
convert = Image.Image.convert
Image.Image.convert = lambda self, mode: os.abort() if self.size == {FATAL_SIZE} else convert(self, mode)
serve(*map(int, sys.argv[1:]))
"""


def bad_row(reason: str, folder) -> dict | str:
    """A row that must be refused for `reason`, with the bad file that it takes."""
    image = folder / f"{reason}.png"
    question = row("bad", image.name)
    match reason:
        case "malformed_json":
            return '{"id": "bad", "conversations": ['
        case "malformed_record":
            return {"id": "bad"}
        case "invalid_text":
            return json.dumps(row("bad", question="caf\udce9"), ensure_ascii=False)
        case "unknown_role":
            return {"id": "bad", "conversations": [{"from": "observation", "value": "x"}]}
        case "non_alternating_turns":
            return {"id": "bad", "conversations": row("bad")["conversations"][::-1]}
        case "empty_question":
            return row("bad", question="")
        case "empty_answer":
            return row("bad", answer=" ")
        case "no_supervised_token":
            return {"id": "bad", "conversations": row("bad")["conversations"][:1]}
        case "turn_weight":
            return weighted("bad", 0.5)
        case "conflicting_system":
            return row("bad", system="Be brief.", system_prompt="Be kind.")
        case "tool_calls":
            talk = row("bad")["conversations"]
            return {"id": "bad", "conversations": [talk[0], talk[1] | {"tool_calls": [{"type": "function"}]}]}
        case "preference":
            return row("bad", rejected="This")
        case "grounding":
            return row("bad", answer="<bbox>", objects={"bbox": [[1, 2, 3, 4]]})
        case "video_or_audio":
            return row("bad", video="x.mp4")
        case "image_not_read":
            return row("bad", thumbnail="good.png")
        case "image_count_mismatch":
            return row("bad", question="<image>\nWhat?")
        case "misplaced_image":
            return row("bad", answer="<image>") | {"image": "good.png"}
        case "text_only":
            return row("bad")
        case "image_url":
            return row("bad", "https://host/bad.png")
        case "invalid_image_path":
            return row("bad", "bad\0.png")
        case "image_outside_root":
            return row("bad", "../secret.png")
        case "image_symlink_escape":
            image.symlink_to(folder.parent / "secret.png")
        case "image_not_a_file":
            os.mkfifo(image)
        case "missing_image":
            pass
        case "unreadable_image":
            image.symlink_to(image.name)
        case "unsupported_image_format":
            image.write_text("<html>404</html>")
        case "corrupt_image":
            image.write_bytes((folder / "good.png").read_bytes()[:-200])
        case "oversized_image":
            Image.new("1", (7000, 7000)).save(image)
        case "decoder_died":
            Image.new("RGB", FATAL_SIZE).save(image)
        case "too_thin_image":
            Image.new("RGB", (700, 3)).save(image)
        case "too_long":
            return row("bad", "good.png", question="why? " * 200)
        case "duplicate":
            return row("bad", "good.png", question="the first")
    return question


@pytest.fixture
def faulty(folder, write, monkeypatch):
    """A bad row for each reason, between two good ones; returns the rows by reason and the sources."""
    monkeypatch.setattr(decoding, "_CODE", FATAL_CODE)
    rows = {reason: bad_row(reason, folder) for reason in REASONS if reason not in IN_OTHER_TESTS}
    first, last = row("first", "good.png", question="the first"), row("last", "wide.png")
    with_text = write(first, *(bad for reason, bad in rows.items() if reason != "text_only"), last)
    images_only = write(first, rows["text_only"], last, name="images").model_copy(update={"images_only": True})
    return rows, [with_text, images_only]


LIMITS = Limits(max_tokens=300)


def rejects_of(folder: Path, rows: dict, action: str) -> dict[str, dict]:
    """The one reject of each reason, in the order of the rows."""
    places = [("data", number) for number in range(1, len(rows))]
    places.insert(list(rows).index("text_only"), ("images", 1))
    found = map(json.loads, (folder / "cache" / "rejects.jsonl").read_text().splitlines())
    rejects = {reject["reason"]: reject for reject in found}
    for reason, place in zip(rows, places, strict=True):
        reject = rejects[reason]
        assert (reject["source"], reject["row"], reject["action"]) == (*place, action) and reject["detail"]
        assert list(reject) == ["source", "row", "id", "image", "reason", "detail", "action"]
        assert reject["id"] == (f"data:{place[1]}" if reason == "malformed_json" else "bad")
        names_image = reason.endswith(("_image", "_path", "_root", "_escape", "_url", "_format", "_file", "_died"))
        assert (reject["image"] is not None) == (names_image and reason != "misplaced_image")
    return rejects


@pytest.mark.parametrize("action", ["skip", "quarantine"])
def test_every_reason_is_found_and_its_row_left_out(faulty, check, action, tmp_path):
    rows, sources = faulty
    report = check(*sources, limits=LIMITS, policy={"default": "error"} | dict.fromkeys(rows, action))
    data, images = report.sources
    assert data.num_rows == len(rows) + 1 and data.rows.tolist() == [0, len(rows)]
    assert images.num_rows == 3 and images.rows.tolist() == [0, 2]
    assert data.dropped | images.dropped == dict.fromkeys(rows, 1)
    assert all(len(counts) == 2 for found in report.sources for counts in found.counts.values())
    rejects = rejects_of(tmp_path, rows, action)
    assert rejects.keys() == rows.keys() and (report.quarantine is None) == (action == "skip")
    if action == "quarantine":
        kept = {entry["reason"]: entry for entry in map(json.loads, report.quarantine.read_text().splitlines())}
        assert kept.keys() == rows.keys()
        for reason, bad in rows.items():
            entry, reject = kept[reason], rejects[reason]
            assert [entry[key] for key in ("source", "row", "id")] == [reject[key] for key in ("source", "row", "id")]
            as_written = bad if isinstance(bad, dict) or reason == "malformed_json" else json.loads(bad)
            assert entry["record"] == as_written


def test_every_reason_is_an_error_if_it_is_not_to_be_skipped(faulty, check, tmp_path):
    rows, sources = faulty
    with pytest.raises(UserError) as caught:
        check(*sources, limits=LIMITS, policy={"default": "error"})
    message, rejects = str(caught.value), rejects_of(tmp_path, rows, "error")
    assert f"{len(rows)} of {len(rows) + 4} records can't be used: " in message and "\n" not in message
    assert all(f"{reason} 1 ({rejects[reason]['id']})" in message for reason in rows)
    assert all(source.path in message for source in sources)
    assert str(tmp_path / "cache" / "rejects.jsonl") in message


@pytest.mark.parametrize("reason", ["malformed_json", "too_long"])
def test_one_reason_is_an_error_among_reasons_that_are_skipped(folder, write, check, reason):
    source = write(row("first", "good.png"), bad_row(reason, folder), bad_row("empty_answer", folder))
    with pytest.raises(UserError, match=f": 1 of 3 records can't be used: {reason} 1 "):
        check(source, limits=LIMITS, policy={"default": "skip", reason: "error"})


def test_counts_equal_encoding_one_by_one(write, check, processor):
    rows = [
        row("a", "good.png", question="Why?"),
        row("b", "wide.png", answer="a longer answer"),
        row("c", question="no image"),
        row("d", "gone.png"),
        row("e")
        | {"image": ["good.png", "wide.png"]}
        | {"conversations": row("", "", "<image> two?")["conversations"]},
    ]
    source = write(*rows)
    (found,) = check(source, policy=SKIP).sources
    assert found.rows.tolist() == [0, 1, 2, 4] and found.rows.dtype == np.int64
    assert {counts.dtype for counts in found.counts.values()} == {np.dtype(np.int32)}
    store = open_records(source)
    for position, index in enumerate(found.rows):
        record = store[index]
        sizes = [image.size() for image in record.images]
        encoding = processor.encode(record.messages, sizes)
        assert found.counts["num_tokens"][position] == len(encoding.input_ids)
        assert found.counts["num_image_tokens"][position] == encoding.input_ids.count(processor.image_token_id)
        assert found.counts["num_supervised_tokens"][position] == sum(label != -100 for label in encoding.labels)
        assert found.counts["num_tiles"][position] == sum(len(processor.tiles(i.open())) for i in record.images)
    tokens = sorted(found.counts["num_tokens"].tolist())
    statistics = found.statistics()["num_tokens"]
    assert statistics["p5"] == tokens[0] and statistics["max"] == tokens[-1] and statistics["total"] == sum(tokens)
    assert tokens[0] <= statistics["p50"] <= statistics["p95"] <= tokens[-1]


def test_what_sharing_saves_is_what_packing_one_group_saves(write, check, capsys, processor, tmp_path):
    about = [("a", "good.png"), ("b", "wide.png"), ("c", "good.png"), ("d", None), ("e", "good.png"), ("f", None)]
    source = write(*(row(name, image, answer=name) for name, image in about))
    (found,) = check(source).sources
    alone, together = (
        BatchOrder(
            Lengths(*(found.counts[f"num_{name}tokens"] for name in ("", "supervised_", "prefix_")), found.prefixes),
            global_batch=len(about), seed=0, keep_last=True, share_prefix=share,
        )
        for share in (1, len(about))
    )  # fmt: skip
    rows = np.argsort(found.prefixes, kind="stable").tolist()
    saved = alone.row_length(rows) - together.row_length(rows)
    assert found.sharing() == {"records": 2, "tokens": saved} and saved > 0
    show_report(check(source), json_output=False)
    assert f"saves up to {saved:,} tokens" in " ".join(capsys.readouterr().out.split())
    # images after an answer: the records begin alike, but there is no prefix to share
    counts = {"num_prefix_tokens": np.array([10, 10, 0, 0])}
    late = replace(found, prefixes=np.array([5, 5, 7, 7], np.uint64), counts=counts)
    assert late.sharing() == {"records": 1, "tokens": 10}


def test_headers_alone_let_a_truncated_image_pass(folder, write, check):
    source = write(bad_row("corrupt_image", folder))
    assert check(source, decode=False).sources[0].rows.tolist() == [0]
    with pytest.raises(UserError, match="corrupt_image"):
        check(source)


@pytest.mark.slow
def test_limits(folder, write, check):
    source = write(row("short", "good.png"), row("text", question="why? " * 60), row("image", "wide.png"))
    counts = check(source).sources[0].counts
    tokens, images = counts["num_tokens"].tolist(), counts["num_image_tokens"].tolist()
    text = [total - image for total, image in zip(tokens, images, strict=True)]
    assert check(source, limits=Limits(max_tokens=max(tokens))).dropped == {}
    assert check(source, limits=Limits(max_tokens=max(tokens) - 1), policy=SKIP).dropped == {"too_long": 1}
    only_text = check(source, limits=Limits(max_text_tokens=text[0]), policy=SKIP).sources[0]
    assert only_text.rows.tolist() == [0, 2] and only_text.first_ids == {"too_long": ["text"]}
    pixels = check(source.model_copy(update={"max_pixels": 20 * 30}), policy=SKIP).sources[0]
    assert pixels.rows.tolist() == [0, 1] and pixels.dropped == {"oversized_image": 1}
    Image.new("1", (7000, 7000)).save(folder / "huge.png")
    source = write(row("huge", "huge.png"))
    assert check(source, policy=SKIP, processor=None, enforce=False).dropped == {"oversized_image": 1}
    assert check(source.model_copy(update={"max_pixels": 49_000_000}), processor=None).dropped == {}


def test_duplicates_keep_the_first(write, check):
    same = [row(str(n), "good.png") for n in range(3)]
    others = [row("3", "wide.png"), row("4"), row("5", "good.png", answer="this"), row("4")]
    source = write(same[0], others[0], same[1], others[1], same[2], others[2], others[3])
    report = check(source, policy=SKIP)
    assert report.sources[0].rows.tolist() == [0, 1, 3, 5] and report.dropped == {"duplicate": 3}
    details = {reject["row"]: reject["detail"] for reject in report.sources[0].rejected()}
    assert {number: detail.split()[-2] for number, detail in details.items()} == {2: "0", 4: "0", 6: "3"}


def test_first_of_equal_digests_against_a_dictionary():
    random = np.random.default_rng(0)
    digests = [bytes(random.integers(0, 2, 16, dtype=np.uint8)) for _ in range(500)]
    digests += [bytes(8) + bytes([n % 3] * 8) for n in range(100)]
    seen: dict[bytes, int] = {}
    expected = [seen.setdefault(digest, position) for position, digest in enumerate(digests)]
    assert check_data._first_equal(bytearray(b"".join(digests))).tolist() == expected


@pytest.mark.slow
def test_workers_find_what_one_process_finds_and_print_nothing_else(
    folder, write, check, monkeypatch, tmp_path, capfd
):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # as the command does
    monkeypatch.setattr(check_rows, "_CHUNK_ROWS", 7)
    images = ("good.png", "gone.png", None)
    rows = [row(str(n), images[n % 3], question=f"q{n // 2}", **{f"field{n % 2}": n}) for n in range(60)]
    source = write(*rows, '{"broken')
    alone = check(source, policy=SKIP).sources[0]
    said = capfd.readouterr().err
    pooled = check(source, policy=SKIP, num_workers=2, cache_dir=tmp_path / "other").sources[0]
    assert capfd.readouterr().err == said
    assert not pooled.cached and pooled.dropped == alone.dropped and pooled.first_ids == alone.first_ids
    assert pooled.rows.tolist() == alone.rows.tolist() and list(pooled.rejected()) == list(alone.rejected())
    assert pooled.not_read == alone.not_read and alone.not_read.keys() == {"field0", "field1"}
    for name, counts in alone.counts.items():
        assert pooled.counts[name].tolist() == counts.tolist()


def test_a_source_without_a_usable_record_stops_under_every_policy(write, check):
    with pytest.raises(UserError, match="no record can be used"):
        check(write(row("a", "gone.png")), policy=SKIP)
    assert check(write(row("a", "gone.png")), policy=SKIP, enforce=False).to_dict()["ok"] is False


def test_errors_of_all_sources_are_reported_together(write, check):
    bad = [row(f"m{n}", "gone.png", question=f"{n}") for n in range(7)]
    one, two = write(*bad, name="one"), write(row("x"), row("y", answer=""), name="two")
    with pytest.raises(UserError) as caught:
        check(one, two)
    message = str(caught.value)
    assert "8 of 9 records" in message and "missing_image 7 (m0, m1, m2, m3, m4, ...)" in message
    assert "empty_answer 1 (y)" in message and one.path in message and two.path in message


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("skip", {"default": "skip"}),
        ("error, duplicate=quarantine", {"default": "error", "duplicate": "quarantine"}),
        ("missing_image=skip", {"missing_image": "skip"}),
    ],
)
def test_policy_is_parsed(text, policy):
    assert parse_policy(text) == policy


@pytest.mark.parametrize("text", ["drop", "missing=skip", "missing_image=", "", "default=skip,corrupt_image=ignore"])
def test_unknown_policies_are_named(text):
    with pytest.raises(UserError, match="unknown (reason|action)"):
        parse_policy(text)


# what is not read, and not learnt


def test_fields_that_are_not_read_are_reported(write, check, capsys):
    talk = weighted("c", 1)["conversations"]
    talk[0]["name"] = talk[2]["name"] = "Ann"
    rows = [
        row("a", "good.png", model="x", score=None),
        row("a again", "good.png", model="x", extra=1),  # a duplicate, not used
        row("b", "gone.png", model="y"),
        {"id": "c", "conversations": talk, "model": "", "evil\x1b[31m[red]": 1},
        row("d"),
    ]
    source = write(*rows)
    expected = {"conversations[].name": 1, "evil\\x1b[31m[red]": 1, "model": 2}
    for cached in (False, True):
        report = check(source, policy=SKIP)
        (found,) = report.sources
        assert found.cached == cached and found.rows.tolist() == [0, 3, 4] and found.not_read == expected
        assert report.to_dict()["sources"][0]["not_read"] == expected
        show_report(report, json_output=False)
        out = capsys.readouterr().out
        assert (
            "not read: conversations[].name 1 record, evil\\x1b[31m[red] 1 record, model 2 records\n" in out
            and "\x1b" not in out
        )
    (found,) = check(source, policy=SKIP, processor=None).sources
    assert found.not_read == expected
    (found,) = check(write(row("a"), name="plain")).sources
    show_report(check(write(row("a"), name="plain")), json_output=False)
    assert found.not_read == {} and "not read" not in capsys.readouterr().out


def test_rows_whose_keys_are_data_do_not_fill_the_memory(write, check, monkeypatch):
    monkeypatch.setattr(check_data, "_NUM_NOT_READ", 2)
    source = write(*(row(str(n), question=f"q{n // 2}", **{f"key{n // 2}": 1}) for n in range(10)))
    (found,) = check(source, policy=SKIP).sources
    assert found.not_read == {"key0": 1, "key1": 1, "(other fields)": 3} and len(found.rows) == 5


def test_a_turn_of_weight_0_has_no_labels(write, check, processor):
    source = write(weighted("plain", 1), weighted("masked", 0))
    (found,) = check(source).sources
    assert found.rows.tolist() == [0, 1]
    plain, masked = StageDataset([open_records(source)], [(0, 0), (0, 1)], processor)
    assert masked.input_ids == plain.input_ids and len(masked.labels) == len(masked.input_ids)
    end = processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    ends = [position for position, token in enumerate(plain.input_ids) if token == end]
    first_answer_ends = ends[1]
    expected = [-100] * (first_answer_ends + 1) + plain.labels[first_answer_ends + 1 :]
    assert masked.labels == expected and plain.labels[first_answer_ends] == end != masked.labels[first_answer_ends]
    learnt = [token for token in masked.labels if token != -100]
    assert processor.tokenizer.decode(learnt) == "RIGHT<|eot_id|>"
    supervised = found.counts["num_supervised_tokens"].tolist()
    assert supervised[1] == len(learnt) < supervised[0]


# the cache


@pytest.fixture
def cached(folder, write, check, monkeypatch, processor):
    """Check a source; the function checks it again and says whether that came from the cache, with no image opened."""
    source = write(row("a", "good.png"), row("b", "gone.png"), row("c", "wide.png"))
    first = check(source, policy=SKIP)

    def again(**options) -> bool:
        opened = []
        with monkeypatch.context() as patch:
            decoded_size, open_image = Decoder.size, Image.open
            patch.setattr(Decoder, "size", lambda *args: opened.append(args) or decoded_size(*args))
            patch.setattr(Image, "open", lambda *args, **kw: opened.append(args) or open_image(*args, **kw))
            report = check(source, policy=SKIP, **options)
        assert report.sources[0].cached == (not opened)
        if report.sources[0].cached:
            assert report.sources[0].rows.tolist() == first.sources[0].rows.tolist()
            assert report.dropped == first.dropped and len(report.rejects.read_text().splitlines()) == 1
        return report.sources[0].cached

    return again


def test_the_second_check_opens_no_image(cached):
    assert cached() and cached(decode=False)


def test_a_check_of_headers_does_not_serve_for_decoding(write, check):
    source = write(row("a", "good.png"))
    check(source, decode=False)
    assert not check(source).sources[0].cached and check(source, decode=False).sources[0].cached


def test_cache_sees_a_data_file_with_its_old_size_and_time(cached, folder):
    path = folder / "data.jsonl"
    before = path.stat()
    path.write_text(path.read_text().replace("That", "This"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert not cached() and cached()


@pytest.mark.parametrize("change", ["rewritten", "removed", "appeared", "touched"])
def test_cache_sees_images_that_change(cached, folder, make_image, write, check, change):
    match change:
        case "rewritten":
            make_image(20, 31).save(folder / "good.png")
        case "removed":
            (folder / "wide.png").unlink()
        case "appeared":
            make_image(9, 9).save(folder / "gone.png")
        case "touched":
            os.utime(folder / "good.png", ns=(1, 1))
    source = DataSource(name="data", path=str(folder / "data.jsonl"))
    report = check(source, policy=SKIP).sources[0]
    assert not report.cached
    assert len(report.rows) == {"removed": 1, "appeared": 3}.get(change, 2)
    assert check(source, policy=SKIP).sources[0].cached


@pytest.mark.slow
def test_cache_sees_settings_and_processor(cached, processor, tmp_path):
    assert not cached(limits=Limits(max_tokens=4000)) and cached(limits=Limits(max_tokens=4000))
    assert not cached(keep_data_newline=True) and cached()
    processor.tokenizer(["a", "bb"], padding=True)
    assert cached(), "what the tokenizer was last asked to do changes nothing"
    for change in (
        lambda changed: changed.image_processor.image_grid_pinpoints.append([84, 84]),
        lambda changed: setattr(changed, "chat_template", "{{ messages }}"),
        lambda changed: changed.tokenizer.add_tokens(["sign"]),
    ):
        changed = copy.deepcopy(processor)
        change(changed)
        assert not cached(processor=changed) and cached(processor=changed)
    assert cached()


@pytest.mark.slow
def test_cache_sees_the_code(cached, monkeypatch, tmp_path):
    copies = []
    for module in (redaction, sources, check_room):
        folder = tmp_path / module.__name__.rpartition(".")[2]
        shutil.copytree(
            Path(module.__file__).parent, folder, ignore=lambda _, names: {n for n in names if n[-3:] != ".py"}
        )
        monkeypatch.setattr(module, "__file__", str(folder / Path(module.__file__).name))
        copies += [folder / "redaction.py"] if module is redaction else folder.glob("*.py")
    assert cached(decode=False) and len(copies) > 10  # by headers: a decoder takes longer to start than all else
    for file in copies:
        file.write_text(file.read_text() + "# changed\n")
        assert not cached(decode=False), file
    assert cached(decode=False)


@pytest.mark.parametrize("suffix", [".json", ".npz", ".jsonl"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_a_damaged_cache_entry_counts_as_absent(cached, tmp_path, suffix, damage):
    (path,) = (path for path in (tmp_path / "cache").glob(f"*{suffix}") if path.name != "rejects.jsonl")
    if damage == "gone":
        path.unlink()
    elif suffix != ".jsonl":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "cut" else 0])
    else:
        return
    assert not cached() and cached()
    assert len(list((tmp_path / "cache").iterdir())) == 4, "the old entry's files are gone"


def test_a_check_that_dies_leaves_no_entry(write, check, monkeypatch, tmp_path):
    source = write(row("a", "good.png"))
    monkeypatch.setattr(np, "savez", lambda *args, **arrays: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        check(source)
    monkeypatch.undo()
    assert not list((tmp_path / "cache").glob("*.json")) and not check(source).sources[0].cached


# sampling


@pytest.fixture
def thousand(write, check):
    rows = (row(str(n), question=f"{n}", answer="" if n % 4 == 0 else "a") for n in range(1000))
    return check(write(*rows), policy=SKIP)


def test_sample_after_filtering_has_exactly_that_many_usable_rows(thousand):
    (report,) = thousand.sources
    drawn = select_rows(report, 300, "after_filtering", seed=1)
    assert len(set(drawn)) == 300 and drawn.tolist() == sorted(drawn) and drawn.max() < 750
    assert select_rows(report, None).tolist() == list(range(750))


def test_sample_before_filtering_loses_the_unusable(thousand):
    (report,) = thousand.sources
    drawn = select_rows(report, 300, "before_filtering", seed=1)
    assert 195 < len(drawn) < 255
    assert len(select_rows(report, 1000, "before_filtering")) == 750


def test_samples_are_seeded_nested_and_spread(thousand):
    (report,) = thousand.sources
    for when in ("before_filtering", "after_filtering"):
        small, large = (select_rows(report, n, when, seed=5) for n in (100, 400))
        assert set(small) < set(large) and small.tolist() == select_rows(report, 100, when, seed=5).tolist()
        assert len(set(small) & set(select_rows(report, 100, when, seed=6))) < 40
        assert 300 < report.rows[large].mean() < 700


def test_the_sample_is_that_of_splitmix64(thousand):
    def key(number: int) -> int:
        mixed = (number + 43 * 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        return mixed ^ mixed >> 31

    (report,) = thousand.sources
    rows = [number for number in range(1000) if number % 4]
    expected = sorted(sorted(rows, key=key)[:50])
    assert report.rows[select_rows(report, 50, seed=42)].tolist() == expected


def test_a_sample_larger_than_the_data_is_refused(thousand):
    (report,) = thousand.sources
    with pytest.raises(UserError, match="can't draw 751 rows, there are 750 usable ones"):
        select_rows(report, 751)
    with pytest.raises(UserError, match="can't draw 1001 rows, there are 1000 ones"):
        select_rows(report, 1001, "before_filtering")


# thin images


def test_tiles_vanish_exactly_where_the_model_unpads_them_away():
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    random = np.random.default_rng(0)
    vanished = 0
    for _ in range(3000):
        size = tuple(int(side) for side in np.exp(random.uniform(0, 9, 2)).astype(int))
        rows, columns = (side // 14 for side in select_best_resolution(size, pinpoints))
        left = unpad_image(torch.zeros(1, rows, columns), torch.tensor(size)).numel()
        assert check_rows.tiles_vanish(size, pinpoints, 14, 336) == (left == 0), size
        vanished += left == 0
    assert vanished > 50


# the command


def test_one_json_object_on_stdout(write, check, capsys):
    source = write(row("a", "good.png"), row("b", "gone.png"))
    with pytest.raises(UserError):
        show_report(check(source, enforce=False), json_output=True)
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert out.count("\n") == 1 and err == ""
    assert (printed["ok"], printed["rows"], printed["usable"]) == (False, 2, 1)
    assert printed["dropped"] == {"missing_image": 1} and printed["sources"][0]["tokens_counted"]
    assert printed["sources"][0]["statistics"]["num_tokens"]["max"] > 0


def test_tables(write, check, capsys):
    good, bad = row("a", "good.png"), row("evil\x1b[31m[red]", "gone.png")
    show_report(check(write(good, bad), policy=SKIP), json_output=False)
    out, err = capsys.readouterr()
    assert "1 of 2 records usable" in out and "missing_image" in out and "supervised tokens" in out
    assert "\x1b" not in out and "[red]" in "".join(out.split()) and "rejects.jsonl" in out and err == ""
    show_report(check(write(good, bad), policy=SKIP), json_output=False)
    assert "checked before" in capsys.readouterr().out


def test_without_a_processor_tokens_are_left_out_and_said_so(write, check, capsys):
    report = check(write(row("a", "good.png")), processor=None)
    show_report(report, json_output=False)
    assert report.sources[0].counts == {} and report.sources[0].rows.tolist() == [0]
    assert "Tokens were not counted" in capsys.readouterr().out


def test_rejects_go_where_they_are_asked_to(write, tmp_path, check):
    rejects = tmp_path / "run" / "why.jsonl"
    report = check(write(row("a"), row("b", "x.png")), policy={"default": "quarantine"}, rejects=rejects)
    assert report.rejects == rejects and report.quarantine == rejects.with_name("quarantine.jsonl")
    assert rejects.is_file() and report.quarantine.is_file()
    assert not list(rejects.parent.glob(".*"))
