"""Prediction files that were damaged, or cannot be written: the command says which file, and what to do."""

import pytest

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.predictions import PredictionsFile


SETTINGS = {"revision": "r"}
ROWS = [{"question_id": i, "answer": "red"} for i in range(2)]


def opened(folder, check=None):
    return PredictionsFile(folder, SETTINGS, [[0], [1]], check=check)


@pytest.fixture
def answered(tmp_path):
    with opened(tmp_path) as file:
        file.append(ROWS)
        file.finish([0, 1])
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\0\0\0\0", r"predictions.jsonl:2: not JSON: .*\(fix: remove that line, or this folder, or pass another"),
        (b"\xff\xfe", "predictions.jsonl:2: not JSON"),
        (b"[1]", "predictions.jsonl:2: not a JSON object"),
        (b'{"question_id": 1}', "predictions.jsonl:2: not a row of an evaluation"),
        (b'{"question_id": [1], "answer": "x"}', "predictions.jsonl:2: not a row of an evaluation"),
    ],
)
def test_a_damaged_line_is_named(answered, line, message):
    path = answered / "predictions.jsonl"
    first = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(first + line + b"\n")
    with pytest.raises(UserError, match=message):
        opened(answered)
    path.write_bytes(first + line)  # cut by a kill: it is asked again
    with opened(answered) as file:
        assert file.left == [[1]]


def test_damaged_settings_are_named(answered):
    (answered / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings.json: not JSON: .*pass another --output"):
        opened(answered)


def test_a_row_of_another_image_is_named_with_its_file(answered):
    def check(row):
        raise UserError(f"question {row['question_id']} was answered from another image", fix="bring it back")

    with pytest.raises(UserError, match=f"{answered}/predictions.jsonl: question 0 was .*fix: bring it back"):
        opened(answered, check)


def test_a_full_disk_is_named_with_the_file(tmp_path):
    with pytest.raises(OSError) as caught, opened(tmp_path) as file:
        file._file.close()
        file._file = open("/dev/full", "a")  # noqa: SIM115
        file.append(ROWS)
    assert caught.value.filename == "/dev/full" and "No space left" in str(caught.value)
    with opened(tmp_path) as file:  # the lock is free again
        assert file.left == [[0], [1]]
