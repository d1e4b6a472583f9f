"""`score`: every layout of annotations and of answers gives the same numbers, and two answer files are compared."""

import csv
import io
import json
import math
import random
import sys
import zipfile
from base64 import b64encode
from functools import partial
from pathlib import Path

import numpy as np
import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from openpyxl.worksheet.formula import ArrayFormula
from tables import write_xlsx

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.answer_files import read_answers
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.evaluation.row_files import any_rows
from llava_llama31.trainer.evaluation.scoring import compare_answers, score_answers
from llava_llama31.trainer.evaluation.task_files import load_task
from llava_llama31.trainer.evaluation.task_questions import load_task_questions
from llava_llama31.trainer.evaluation.vqa_accuracy import PROTOCOLS, is_normalized, normalize, vqa_accuracy


NAMES = tuple(PROTOCOLS)
# each answer is scored otherwise by some protocol, so that no reader may change a character
SAID = [
    ("what brand?", "New York,NY", ["new york ny"] * 4 + ["nyc"] * 6),
    ("whose shop?", "wendy's", ["wendy's"] * 3 + ["Wendys"] * 7),
    ("what number?", "8.", ["8"] * 2 + ["8."] * 8),
    ('what does "stop" say?', 'the "Stop"\tsign', ["stop sign", "stop"] * 5),
    ("what year?", "2013.", ["2013"] * 10),
    ("how much?", "$5.", ["$5"] * 10),
    ("what is up?", "whats up", ["whats up"] * 9 + ["what's up"]),
    ("is it closed?", "None", ["0", "none", "no"] * 3 + ["no"]),
    ("was steht da?", "Grüße — 日本", ["grüße — 日本"] * 9 + ["unanswerable"]),
    ("what is written?", "", ["answer"] * 10),
]
ROWS = [
    {"question_id": 34602 + i, "image_id": f"p{i // 2}", "question": question, "answers": answers}
    for i, (question, _, answers) in enumerate(SAID)
]
PREDICTIONS = [prediction for _, prediction, _ in SAID]
IDS = [row["question_id"] for row in ROWS]
EXPECTED = {
    name: math.fsum(vqa_accuracy(p, row["answers"], name) for p, row in zip(PREDICTIONS, ROWS, strict=True))
    / len(ROWS)
    for name in NAMES
}


def write_lines(path, objects):
    path.write_text("".join(json.dumps(value) + "\n" for value in objects), encoding="utf-8")
    return str(path)


def write_tsv(path, rows, quoting=csv.QUOTE_MINIMAL):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", quoting=quoting, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def image_bytes(make_image):
    """PNG bytes by image_id; those of p2 are larger than a cell that the csv module takes by itself."""
    encoded = {}
    for i in range(5):
        file = io.BytesIO()
        make_image(*((300, 301) if i == 2 else (9 + i, 20)), seed=i).save(file, "PNG")
        encoded[f"p{i}"] = file.getvalue()
    assert len(b64encode(encoded["p2"])) > 1 << 17
    return encoded


def vlmevalkit_table(image_bytes, start=None):
    """Rows as VLMEvalKit's TextVQA_VAL has them: one row of an image holds it, the other names that row."""
    table = []
    for i, row in enumerate(ROWS):
        index = row["question_id"] if start is None else start + i
        # p1 stands in its second row, so that the first one points forward
        holder = i % 2 == (1 if row["image_id"] == "p1" else 0)
        image = b64encode(image_bytes[row["image_id"]]).decode() if holder else str(index + (1 if i % 2 == 0 else -1))
        table.append({"index": index, "image": image, "question": row["question"], "answer": str(row["answers"])})
    return table


@pytest.fixture(scope="module")
def annotations(image_bytes, tmp_path_factory):
    """The same questions in every layout; layout -> arguments of `score`."""
    folder = tmp_path_factory.mktemp("annotations")
    for name, data in image_bytes.items():
        (folder / f"{name}.png").write_bytes(data)
    (folder / "official.json").write_text(json.dumps({"dataset_type": "val", "data": ROWS}), encoding="utf-8")
    (folder / "list.json").write_text(json.dumps(ROWS), encoding="utf-8")
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    columns["image"] = [{"bytes": image_bytes[row["image_id"]], "path": None} for row in ROWS]
    columns["ocr_tokens"] = [["x", "y"]] * len(ROWS)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "validation-00000-of-00001.parquet")
    answers = [
        {
            "question_id": row["question_id"],
            "image_id": row["image_id"],
            "question_type": "none of the above",
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": i}
                for i, answer in enumerate(row["answers"], 1)
            ],
        }
        for row in ROWS
    ]
    questions = [{name: row[name] for name in ("image_id", "question", "question_id")} for row in ROWS[::-1]]
    (folder / "v2_annotations.json").write_text(json.dumps({"annotations": answers}), encoding="utf-8")
    (folder / "v2_questions.json").write_text(json.dumps({"questions": questions}), encoding="utf-8")
    pair = [str(folder / "v2_annotations.json"), "--questions", str(folder / "v2_questions.json")]
    return {
        "jsonl": [write_lines(folder / "a.jsonl", ROWS)],
        "official": [str(folder / "official.json")],
        "list": [str(folder / "list.json")],
        "lmms-lab": [str(folder / "validation-00000-of-00001.parquet")],
        "vqa pair": pair,
        "vlmevalkit": [write_tsv(folder / "TextVQA_VAL.tsv", vlmevalkit_table(image_bytes))],
    }


@pytest.fixture(scope="module")
def questions(annotations):
    return load_questions(annotations["jsonl"][0], with_images=False)


def score(capsys, files, annotations, code=0):
    files = [files] if isinstance(files, str) else files
    assert main(["score", *files, "--annotations", *annotations, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def accuracies(result):
    return {name: result["protocols"][name]["accuracy"] for name in NAMES}


# --- annotations


def test_every_layout_of_annotations_gives_the_same_score(annotations, tmp_path, capsys):
    predictions = [{"question_id": i, "answer": text} for i, text in zip(IDS, PREDICTIONS, strict=True)]
    file = write_lines(tmp_path / "p.jsonl", predictions)
    results = {layout: score(capsys, file, arguments) for layout, arguments in annotations.items()}
    for layout, result in results.items():
        assert accuracies(result) == EXPECTED, layout
        assert result == results["jsonl"], layout
    assert len(set(EXPECTED.values())) == 3
    counts = {name: results["jsonl"][name] for name in ("num_questions", "missing", "failed", "duplicates", "unknown")}
    assert counts == {"num_questions": 10, "missing": 0, "failed": 0, "duplicates": 0, "unknown": 0}


@pytest.mark.parametrize("layout", ["jsonl", "official", "list", "lmms-lab", "vqa pair", "vlmevalkit"])
def test_every_layout_of_annotations_brings_its_images(annotations, image_bytes, layout):
    data, *rest = annotations[layout]
    loaded = load_questions(data, questions=rest[1] if rest else None)
    assert csv.field_size_limit() == 1 << 17  # the module's own, for whoever else reads a table
    for question, row in zip(loaded, ROWS, strict=True):
        assert [question.question_id, question.question] == [row["question_id"], row["question"]]
        assert list(question.answers) == row["answers"]
        assert question.ocr_tokens == (("x", "y") if layout == "lmms-lab" else None)
        content = question.image.data or Path(question.image.path).read_bytes()
        assert content == image_bytes[row["image_id"]]
    assert [question.image_id for question in loaded] == (
        [str(34602 + (3 if i // 2 == 1 else i - i % 2)) for i in range(10)]
        if layout == "vlmevalkit"
        else [row["image_id"] for row in ROWS]
    )
    assert len({id(question.image) for question in loaded}) == 5
    assert load_questions(data, questions=rest[1] if rest else None, limit=3) == loaded[:3]


def test_a_vlmevalkit_table_may_name_images_and_ids(image_bytes, tmp_path):
    """As VLMEvalKit's `_local.tsv` and tables of one's own have them."""
    (tmp_path / "train_images").mkdir()
    table = []
    for i, row in enumerate(ROWS):
        path = tmp_path / "train_images" / f"{row['image_id']}.png"
        path.write_bytes(image_bytes[row["image_id"]])
        named = {"index": i, "image_path": str(path), "question": row["question"], "answer": str(row["answers"])}
        table.append(named | {"question_id": row["question_id"]})
    loaded = load_questions(write_tsv(tmp_path / "t.tsv", table, csv.QUOTE_ALL))
    assert [(q.question_id, q.image_id) for q in loaded] == [(row["question_id"], row["image_id"]) for row in ROWS]
    assert all(np.asarray(question.image.open()).ndim == 3 for question in loaded)
    with pytest.raises(UserError, match="not under"):
        load_questions(tmp_path / "t.tsv", image_root=tmp_path / "elsewhere")


VQA = [{"question_id": 1, "image_id": 7, "answers": [{"answer": "a"}]}]
ASKED = [{"question_id": 1, "image_id": 7, "question": "?"}]
TSV = {"index": "1", "question": "?", "answer": "['a']"}


@pytest.mark.parametrize(
    ("annotations", "questions", "message"),
    [
        ({"annotations": VQA}, None, r"a.json: annotations without their questions \(fix: name the file with --quest"),
        ({"data": []}, {"questions": ASKED}, "a.json: questions in a file of their own go with VQA-style annotations"),
        (
            {"questions": ASKED},
            None,
            "a.json: neither a list nor an object with a list under 'data'; it has questions",
        ),
        ({"annotations": VQA}, {"data": ASKED}, "q.json: neither a list nor .* under 'questions'; it has data"),
        ({"annotations": VQA}, {"questions": ASKED * 2}, r"q.json\[1\]: question_id 1 occurs twice, .*q.json\[0\]"),
        ({"annotations": VQA}, {"questions": []}, r"a.json\[0\]: question_id 1 is not in q.json"),
        ({"annotations": VQA * 2}, {"questions": ASKED}, r"a.json\[1\]: question_id 1 occurs twice, .*a.json\[0\]"),
        ({"annotations": []}, {"questions": ASKED}, "q.json: 1 questions have no annotation, the first 1"),
        ({"annotations": VQA}, {"questions": [ASKED[0] | {"image_id": 8}]}, "image_id 7, but 8 in q.json"),
        ({"annotations": [VQA[0] | {"answers": [{"text": "a"}]}]}, {"questions": ASKED}, "answers is not a list of t"),
        ([TSV | {"answer": "['a'"}], None, r"a.tsv:2: answer is .\['a'., not a list of texts \(fix: write the annot"),
        ([TSV | {"answer": "stop"}], None, "a.tsv:2: answer is 'stop', not a list of texts"),
        ([TSV | {"answer": "__import__('os')"}], None, "a.tsv:2: answer is .__import__.*, not a list of texts"),
        ([TSV | {"answer": "[" * 9000}], None, r"a.tsv:2: answer is '\[{80}'... \(9,000 characters\), not a list"),
        (
            [TSV | {"answer": f"['{'a' * 100_000}']"}],
            None,
            r"a.tsv:2: answer is .* \(100,004 characters\)",
        ),
        ([TSV | {"answer": "[8, '8']"}], None, "a.tsv:2: answer is .*, not a list of texts"),
        ([TSV | {"answer": "[]"}], None, r"a.tsv:2: answer is '\[\]', not a list of texts"),
        ([TSV | {"answer": ""}], None, "a.tsv:2: answer is empty"),
        ([TSV | {"question": ""}], None, "a.tsv:2: question is empty"),
        ([TSV | {"index": ""}], None, "a.tsv:2: index is empty"),
        ([TSV, TSV], None, "a.tsv:3: index 1 occurs twice, first in .*a.tsv:2"),
        ([{"question": "?", "answer": "['a']"}], None, "a.tsv:2: there is no column index; .* names question, answer"),
        ([{"index": "1", "answer": "['a']"}], None, "a.tsv:2: there is no column question; .* names index, answer"),
        ([TSV | {"image": "2"}], None, "a.tsv:2: image is '2', neither base64 nor the index of a row that holds an"),
        ([TSV | {"image": "a.png"}], None, "a.tsv:2: image is 'a.png', neither .* a path goes into a column `image_"),
        ([TSV | {"image": "%" * 65}], None, "a.tsv:2: image begins '%{20}' and is neither base64 .*: it has '%'"),
        ([TSV | {"image": "A" * 65}], None, "a.tsv:2: image begins .*: its base64 is cut short .fix: download the f"),
        ([TSV | {"image_path": "['a', 'b']"}], None, "a.tsv:2: image_path lists 2 images"),
    ],
)
def test_bad_annotations_are_named(tmp_path, annotations, questions, message):
    name = "a.json" if isinstance(annotations, dict) else "a.tsv"
    if name == "a.tsv":
        write_tsv(tmp_path / name, annotations)
    else:
        (tmp_path / name).write_text(json.dumps(annotations))
    (tmp_path / "q.json").write_text(json.dumps(questions))
    with pytest.raises(UserError, match=message) as caught:
        load_questions(tmp_path / name, questions=None if questions is None else tmp_path / "q.json")
    assert "(fix: " in str(caught.value) and "\n" not in str(caught.value)


def test_base64_of_a_table_may_have_lines_and_a_data_uri(tmp_path, make_image):
    """VLMEvalKit decodes both."""
    make_image(9, 7).save(tmp_path / "a.png")
    text = b64encode((tmp_path / "a.png").read_bytes()).decode()
    rows = [TSV | {"image": f"data:image/png;base64,{text[:70]}\n{text[70:]}"}]
    write_tsv(tmp_path / "a.tsv", rows)
    assert load_questions(tmp_path / "a.tsv")[0].image.open().size == (7, 9)
    write_tsv(tmp_path / "a.tsv", [rows[0], TSV | {"index": "2", "image": "1"}, TSV | {"index": "3", "image": "2"}])
    for read in (load_questions, partial(load_task_questions, load_task("docvqa"))):
        with pytest.raises(UserError, match="a.tsv:5: image is '2', .*index of a row that"):
            read(tmp_path / "a.tsv")


def test_a_broken_table_is_named(tmp_path):
    (tmp_path / "cells.tsv").write_text("index\tquestion\tanswer\n1\t?\n")
    with pytest.raises(UserError, match="cells.tsv:2: 2 cells under 3 column names"):
        load_questions(tmp_path / "cells.tsv")
    (tmp_path / "latin.tsv").write_bytes("index\tquestion\tanswer\n1\tGrüße\t['a']\n".encode("latin-1"))
    with pytest.raises(UserError, match="latin.tsv: not UTF-8"):
        load_questions(tmp_path / "latin.tsv")


# --- answers


def predictions_of(table, start=None):
    """Rows as VLMEvalKit writes them: the table's columns without the image, then `prediction`."""
    return [
        {"index": row["question_id"] if start is None else start + i}
        | {"question": row["question"], "answer": str(row["answers"]), "prediction": text}
        for i, (row, text) in enumerate(zip(ROWS, table, strict=True))
    ]


def samples():
    """Rows of lmms-eval's --log_samples file for a textvqa task."""
    return [
        {
            "doc_id": i,
            "target": str(row["answers"]),
            "filtered_resps": [text],
            "doc_hash": "0",
            "input": "?",
            "exact_match": 0.3,
            "submission": {"question_id": row["question_id"], "answer": normalize(text, "m4c")},
        }
        for i, (row, text) in enumerate(zip(ROWS, PREDICTIONS, strict=True))
    ]


def write_answers(folder, layout):
    """One answer file, and what it has to be recognised as."""
    pairs = list(zip(IDS, PREDICTIONS, strict=True))
    if layout == "ours":
        rows = [{"question_id": i, "answer": text, "token_ids": [1], "seconds": 0.1} for i, text in pairs]
        return write_lines(folder / "p.jsonl", rows), "question ids and answers"
    if layout == "ours as a list":
        (folder / "p.json").write_text(json.dumps([{"question_id": str(i), "answer": text} for i, text in pairs]))
        return str(folder / "p.json"), "question ids and answers"
    if layout == "llava":
        return write_lines(folder / "l.jsonl", llava_answers()), "LLaVA's answers"
    if layout == "lmms-eval samples":
        return write_lines(folder / "samples_textvqa_val.jsonl", samples()), "lmms-eval's samples"
    suffix, start = layout.removeprefix("vlmevalkit ").split()[0], 0 if layout.endswith("by order") else None
    rows, path = predictions_of(PREDICTIONS, start), folder / f"m_TextVQA_VAL.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows, indent=4, ensure_ascii=False), encoding="utf-8")
    else:
        write_xlsx(path, rows) if suffix == "xlsx" else write_tsv(path, rows, csv.QUOTE_ALL)
    return str(path), "VLMEvalKit's predictions"


LAYOUTS = [
    *("ours", "ours as a list", "llava", "lmms-eval samples", "vlmevalkit tsv", "vlmevalkit xlsx", "vlmevalkit json"),
    *("vlmevalkit tsv by order", "vlmevalkit xlsx by order"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_answers_gives_the_same_score(annotations, tmp_path, capsys, layout):
    path, recognised = write_answers(tmp_path, layout)
    result = score(capsys, path, annotations["jsonl"])
    assert accuracies(result) == EXPECTED
    assert result["layout"] == recognised
    assert result["note"] == "1 of 10 answers are empty, or nan, and are scored as they stand"


def test_a_submission_of_lmms_eval_scores_under_m4c_what_lmms_eval_says(annotations, questions, tmp_path, capsys):
    """Its answers are normalised: `whats up` is `what's up` by then, and a second round would make it `what 's up`."""
    rows = [{"question_id": i, "answer": normalize(text, "m4c")} for i, text in zip(IDS, PREDICTIONS, strict=True)]
    (tmp_path / "textvqa_submission.json").write_text(json.dumps(rows))
    result = score(capsys, str(tmp_path / "textvqa_submission.json"), annotations["jsonl"])
    assert result["protocols"]["m4c"]["accuracy"] == EXPECTED["m4c"]
    assert result["layout"] == "lmms-eval's submission" and "normal form already" in result["note"]
    assert accuracies(result)["vlmevalkit-2024"] != EXPECTED["vlmevalkit-2024"]
    assert score_answers(questions, rows).protocols["m4c"].accuracy < EXPECTED["m4c"]
    assert main(["score", str(tmp_path / "textvqa_submission.json"), "--annotations", *annotations["jsonl"]]) == 0
    assert "note: these answers are in m4c's normal form already" in capsys.readouterr().out


@pytest.mark.slow
@settings(max_examples=1000)
@given(
    st.one_of(
        st.text(max_size=12), st.lists(st.sampled_from(["whats", "it's", "Ü", "a", "1.", "ten", ","])).map(" ".join)
    )
)
def test_what_a_protocol_makes_is_recognised_as_its_normal_form(answer):
    assume(answer.count(".") < 32)
    for name in NAMES:
        assert is_normalized(normalize(answer, name), name)
    if answer != normalize(answer, "m4c") and "'s" not in answer:
        assert not is_normalized(answer, "m4c")


def test_vlmevalkit_rows_are_separated_by_what_they_ask(annotations, questions, tmp_path):
    """Ids count where they ask what is annotated; in another order or as part of the questions too."""
    rows = predictions_of(PREDICTIONS)
    shuffled = random.Random(0).sample(rows, len(rows))
    read = read_answers(write_tsv(tmp_path / "s.tsv", shuffled), questions).rows
    assert {str(row["question_id"]): row["answer"] for row in read} == dict(
        zip(map(str, IDS), PREDICTIONS, strict=True)
    )
    part = read_answers(write_tsv(tmp_path / "part.tsv", predictions_of(PREDICTIONS, 0)[:4]), questions).rows
    assert [row["question_id"] for row in part] == IDS[:4]
    # running numbers that happen to be annotated ids of other questions
    overlap = predictions_of(PREDICTIONS, 34605)
    assert [row["question_id"] for row in read_answers(write_tsv(tmp_path / "o.tsv", overlap), questions).rows] == IDS
    with_ids = [row | {"question_id": i} for row, i in zip(predictions_of(PREDICTIONS, 0), IDS, strict=True)]
    read = read_answers(write_xlsx(tmp_path / "i.xlsx", random.Random(1).sample(with_ids, 10)), questions).rows
    assert {row["question_id"]: row["answer"] for row in read} == dict(zip(IDS, PREDICTIONS, strict=True))


def test_a_cell_keeps_its_lines(questions, tmp_path):
    texts = ["two\r\nlines", 'a "quoted"\tword', *PREDICTIONS[2:]]
    table = write_tsv(tmp_path / "p.tsv", predictions_of(texts))
    assert [row["answer"] for row in read_answers(table, questions).rows] == texts
    # XML knows one end of line
    texts[0] = "two\nlines"
    workbook = write_xlsx(tmp_path / "p.xlsx", predictions_of(texts))
    assert [row["answer"] for row in read_answers(workbook, questions).rows] == texts


def test_what_vlmevalkit_could_not_answer_has_failed(annotations, tmp_path, capsys):
    texts = [
        "Failed to obtain answer via API.",
        "Failed to obtain answer: <class 'RuntimeError'> out of memory",
        *PREDICTIONS[2:],
    ]
    result = score(capsys, write_xlsx(tmp_path / "f.xlsx", predictions_of(texts)), annotations["jsonl"], code=3)
    assert result["failed"] == 2 and result["failed_ids"]["34602"] == "Failed to obtain answer via API."


def llava_answers():
    """As LLaVA's scripts write them: the id is the image's, and the prompt begins with the question."""
    prompt = "\nReference OCR token: stop, 8\nAnswer the question using a single word or phrase."
    return [
        {"question_id": row["image_id"], "prompt": row["question"] + prompt, "text": text}
        for row, text in zip(ROWS, PREDICTIONS, strict=True)
    ]


def test_llavas_answers_belong_to_the_questions_that_they_were_asked(annotations, tmp_path, capsys):
    """Two questions of one image the other way round were given each other's answers, without a word."""
    rows = llava_answers()
    swapped = [rows[i ^ 1] for i in range(10)]
    assert accuracies(score(capsys, write_lines(tmp_path / "s.jsonl", swapped), annotations["jsonl"])) == EXPECTED
    shuffled = random.Random(0).sample(rows, 10)
    assert accuracies(score(capsys, write_lines(tmp_path / "r.jsonl", shuffled), annotations["jsonl"])) == EXPECTED
    chunk = score(capsys, write_lines(tmp_path / "chunk.jsonl", rows[3:7]), annotations["jsonl"], code=3)
    assert chunk["missing"] == 6 and chunk["missing_ids"] == IDS[:3] + IDS[7:]


def test_llavas_answers_without_a_prompt_are_refused_where_an_image_has_two_questions(questions, tmp_path):
    rows = [{name: row[name] for name in ("question_id", "text")} for row in llava_answers()]
    with pytest.raises(UserError, match="2 annotated questions could be meant"):
        read_answers(write_lines(tmp_path / "l.jsonl", rows), questions)
    one_each = questions[::2]
    read = read_answers(write_lines(tmp_path / "o.jsonl", rows[::-2]), one_each).rows
    assert {row["question_id"]: row["answer"] for row in read} == dict(zip(IDS[::2], PREDICTIONS[1::2], strict=True))


def test_logs_of_lmms_eval_before_0_2_4(annotations, tmp_path, capsys):
    path = tmp_path / "textvqa_val.json"
    path.write_text(json.dumps({"args": {}, "model_configs": {}, "logs": samples(), "time": "0725_1530"}))
    result = score(capsys, str(path), annotations["jsonl"])
    assert accuracies(result) == EXPECTED and result["layout"] == "lmms-eval's samples"


def test_an_annotated_answer_is_never_scored(annotations, questions, tmp_path, capsys):
    rows = [{"question_id": i, "answer": row["answers"][0]} for i, row in zip(IDS, ROWS, strict=True)]
    unclear = [row | {"text": text} for row, text in zip(rows, PREDICTIONS, strict=True)]
    path = write_lines(tmp_path / "t.jsonl", unclear)
    with pytest.raises(UserError, match="the row does not tell which of text and answer the model said"):
        read_answers(path, questions)
    chosen = [path, "--columns", "id=question_id,answer=text"]
    assert accuracies(score(capsys, chosen, annotations["jsonl"])) == EXPECTED
    clear = [row | {"response": text} for row, text in zip(rows, PREDICTIONS, strict=True)]
    result = score(capsys, write_lines(tmp_path / "r.jsonl", clear), annotations["jsonl"])
    assert accuracies(result) == EXPECTED and result["layout"] == "question_id and response"


def test_tables_with_commas_and_pickles(annotations, questions, tmp_path, capsys):
    rows = predictions_of(PREDICTIONS)
    with (tmp_path / "p.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert accuracies(score(capsys, str(tmp_path / "p.csv"), annotations["jsonl"])) == EXPECTED
    (tmp_path / "p.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="a pickle, which can run code when it is opened, is not read"):
        read_answers(tmp_path / "p.pkl", questions)


ROW = {"index": 1, "question": "?", "prediction": "a"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", [], "p.jsonl: no answers"),
        ("p.jsonl", [{"id": 1, "answer": "a"}], "p.jsonl:1: no question_id, or no answer: the row has id, answer"),
        ("p.jsonl", [{"question_id": 1, "answer": "a"}, {"question_id": 2, "text": "a"}], "p.jsonl:2: no question_id"),
        ("p.jsonl", [{"question_id": 1, "answer": ["a"]}], r"p.jsonl:1: the answer is \['a'\]"),
        ("p.jsonl", [{"question_id": 1.5, "answer": "a"}], "p.jsonl:1: question_id or index is 1.5"),
        ("p.jsonl", [{"question_id": None, "answer": "a"}], "p.jsonl:1: question_id or index is None"),
        ("p.jsonl", [{"submission": {}, "filtered_resps": ["a"]}], "p.jsonl:1: no question_id in submission"),
        (
            "p.jsonl",
            [{"submission": {"question_id": 1}, "filtered_resps": ["a", "b"]}],
            "not one text in filtered_resps",
        ),
        ("p.json", {"34602": 1}, "p.json: not a list of answers"),
        ("p.json", [{"image": None, "answer": "a"}], r"p.json\[0\]: the image is None"),
        ("p.json", ["a"], r"p.json\[0\]: not an object"),
        ("p.tsv", [{"index": 1, "answer": "a"}], "p.tsv:2: no question_id, or no answer: the row has index, answer"),
        ("p.tsv", [ROW], r"p.tsv:2: the indices are not .* in order: '\?' instead of 'what brand\?'"),
        ("p.tsv", [{"index": 1, "prediction": "a"}], "p.tsv:2: the indices are not the annotated question_ids"),
        ("p.tsv", [{"index": i, "prediction": "a"} for i in (34602, 1)], "p.tsv:2: the indices are not the annotated"),
        ("p.tsv", [ROW | {"index": i} for i in range(11)], "p.tsv: the indices .* in order: 11 rows for 10 questions"),
        ("p.tsv", [ROW | {"index": 34602}], "p.tsv:2: the indices are not the annotated question_ids"),
        ("p.xlsx", [ROW], "p.xlsx, row 2: the indices are not the annotated question_ids"),
        ("p.xlsx", None, "p.xlsx: cannot be read: No such file"),
    ],
)
def test_bad_answer_files_are_named(questions, tmp_path, name, content, message):
    path = tmp_path / name
    if name.endswith(".jsonl"):
        write_lines(path, content)
    elif name.endswith(".json"):
        path.write_text(json.dumps(content))
    elif content is not None:
        write_xlsx(path, content) if name.endswith(".xlsx") else write_tsv(path, content)
    with pytest.raises(UserError, match=message) as caught:
        read_answers(path, questions)
    assert "(fix: " in str(caught.value) and "\n" not in str(caught.value)


def test_excel_files(questions, tmp_path, monkeypatch, capsys):
    book = openpyxl.load_workbook(write_xlsx(tmp_path / "p.xlsx", predictions_of(PREDICTIONS)))
    book.create_sheet("more")
    book.save(tmp_path / "two.xlsx")
    with pytest.raises(UserError, match="two.xlsx: has 2 sheets"):
        read_answers(tmp_path / "two.xlsx", questions)
    (tmp_path / "text.xlsx").write_text("index,prediction")
    with pytest.raises(UserError, match="text.xlsx: not an Excel file"):
        read_answers(tmp_path / "text.xlsx", questions)
    # numbers, as a hand that edited the file leaves them
    edited = [row | {"index": float(row["index"]), "prediction": 8} for row in predictions_of(PREDICTIONS)]
    assert read_answers(write_xlsx(tmp_path / "e.xlsx", edited), questions).rows[0] == {
        "question_id": 34602,
        "answer": "8",
    }
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    arguments = ["score", str(tmp_path / "p.xlsx"), "--annotations", write_lines(tmp_path / "a.jsonl", ROWS)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "openpyxl is needed" in error and "pip install" in error and error.count("\n") == 1


def test_excel_files_that_cannot_be_read_in_full(questions, tmp_path):
    """Merged cells hold one value for several rows, which were read as empty answers."""
    whole = write_xlsx(tmp_path / "p.xlsx", predictions_of(PREDICTIONS))
    book = openpyxl.load_workbook(whole)
    book.active.merge_cells("C4:C5")
    book.save(tmp_path / "merged.xlsx")
    with pytest.raises(UserError, match=r"merged.xlsx: the cells C4:C5 are merged \(fix: unmerge them"):
        read_answers(tmp_path / "merged.xlsx", questions)
    # in a long sheet, across the end of a block that is read at once
    with zipfile.ZipFile(tmp_path / "merged.xlsx") as old, zipfile.ZipFile(tmp_path / "long.xlsx", "w") as new:
        for part in old.namelist():
            data = old.read(part)
            if "sheet1" in part:
                start = data.index(b"<mergeCells")
                spaces = (1 << 20) - data.index(b"<mergeCell ref") - 5
                data = data[:start] + b" " * spaces + data[start:]
            new.writestr(part, data)
    with pytest.raises(UserError, match="long.xlsx: the cells C4:C5 are merged"):
        read_answers(tmp_path / "long.xlsx", questions)
    for name, change in [
        ("cut", lambda data: data[: len(data) // 2]),
        ("empty", lambda data: b""),
        ("words", lambda data: data.replace(b'<c r="A2"', b'<c r="?"')),
    ]:
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / f"{name}.xlsx", "w") as new:
            for part in old.namelist():
                new.writestr(part, change(old.read(part)) if "sheet1" in part else old.read(part))
        with pytest.raises(UserError, match=f"{name}.xlsx: (not an Excel file|no answers)"):
            read_answers(tmp_path / f"{name}.xlsx", questions)
    data = (tmp_path / "p.xlsx").read_bytes()
    with zipfile.ZipFile(whole) as archive:
        sheet = next(info for info in archive.infolist() if "sheet1" in info.filename)
    start = sheet.header_offset + 60
    (tmp_path / "bits.xlsx").write_bytes(
        data[:start] + bytes(255 - byte for byte in data[start : start + 40]) + data[start + 40 :]
    )
    with pytest.raises(UserError, match="bits.xlsx: not an Excel file"):
        read_answers(tmp_path / "bits.xlsx", questions)


def test_formulas_are_words_of_a_model_and_no_annotated_answers(questions, tmp_path):
    """A program that writes tables makes a formula of an answer that begins with an equals sign."""
    rows = [row | {"prediction": "=8"} for row in predictions_of(PREDICTIONS)]
    path = write_xlsx(tmp_path / "f.xlsx", rows)
    assert read_answers(path, questions).rows[0]["answer"] == "=8"
    book = openpyxl.load_workbook(path)
    cell = next(cell for cell in book.active[2] if cell.value == "=8")
    cell.value = ArrayFormula(cell.coordinate, "=SUM(1,2)")
    book.save(path)
    assert read_answers(path, questions).rows[0]["answer"] == "=SUM(1,2)"
    with pytest.raises(
        UserError, match=r"f.xlsx, row 2: a cell is the formula '=SUM\(1,2\)', whose value is not read"
    ):
        list(any_rows(Path(path)))


def test_columns_without_a_name_do_no_harm(questions, tmp_path):
    rows = [row | {None: "", "": "x"} for row in predictions_of(PREDICTIONS)]
    assert len(read_answers(write_xlsx(tmp_path / "u.xlsx", rows), questions).rows) == len(rows)


@pytest.mark.parametrize("row", ['1\t?\t"5 pipe', '1\t"5" pipe\ta'])
def test_a_quotation_mark_that_is_not_closed_takes_in_no_rows(questions, tmp_path, row):
    """Two rows below it were lost, and the rest was scored."""
    lines = ["index\tquestion\tprediction", row, "2\t?\ta", "3\t?\ta"]
    (tmp_path / "q.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"q.tsv:\d: not a table of tab-separated cells: .*quote every cell"):
        read_answers(tmp_path / "q.tsv", questions)


# --- two files


def write_pair(folder):
    """B answers two questions better than A and one worse; each leaves out a question that the other answers."""
    first = dict(zip(IDS, PREDICTIONS, strict=True))
    second = first | {IDS[0]: "nyc", IDS[5]: "wrong", IDS[9]: "answer"}
    del first[IDS[7]], second[IDS[8]]
    lines = [[{"question_id": i, "answer": text} for i, text in answers.items()] for answers in (first, second)]
    lines[0].append({"question_id": 77, "answer": "?"})
    return [write_lines(folder / f"{name}.jsonl", rows) for name, rows in zip("ab", lines, strict=True)]


def test_two_files_are_compared_on_the_questions_that_both_answer(annotations, tmp_path, capsys):
    files = write_pair(tmp_path)
    result = score(capsys, files, annotations["jsonl"], code=3)
    assert (result["num_questions"], result["compared"]) == (10, 8)
    assert (result["only_first_ids"], result["only_second_ids"], result["neither"]) == ([IDS[8]], [IDS[7]], 0)
    assert result["first"]["unknown_ids"] == ["77"] and result["first"]["missing_ids"] == [IDS[7]]
    both = [i for i in range(10) if i not in (7, 8)]
    for name in NAMES:
        pair = result["protocols"][name]
        before = [vqa_accuracy(PREDICTIONS[i], ROWS[i]["answers"], name) for i in both]
        changed = {0: "nyc", 5: "wrong", 9: "answer"}
        after = [vqa_accuracy(changed.get(i, PREDICTIONS[i]), ROWS[i]["answers"], name) for i in both]
        assert pair["first"] == pytest.approx(np.mean(before)) and pair["second"] == pytest.approx(np.mean(after))
        assert pair["difference"] == pytest.approx(np.mean(after) - np.mean(before))
        gained = [IDS[i] for i, a, b in zip(both, before, after, strict=True) if b > a]
        lost = [IDS[i] for i, a, b in zip(both, before, after, strict=True) if b < a]
        assert (pair["gained_ids"], pair["lost_ids"]) == (gained, lost)
        assert pair["gained"] + pair["lost"] + pair["tied"] == 8
        assert pair["low"] <= pair["difference"] <= pair["high"]
    assert result["protocols"]["vlmevalkit-2025"]["lost"] < result["protocols"]["m4c"]["lost"]
    assert main(["score", *files, "--annotations", *annotations["jsonl"]]) == 3
    out = capsys.readouterr().out
    assert "8 of 10 questions answered by both" in out and f"only B answers, left out: 1: {IDS[7]}" in out
    assert f"lost under vlmevalkit-2024, m4c: 1: {IDS[5]}" in out and "A, not annotated: 1: 77" in out


def test_the_first_five_changed_questions_are_named(annotations, tmp_path, capsys):
    right = write_lines(
        tmp_path / "r.jsonl", [{"question_id": r["question_id"], "answer": r["answers"][0]} for r in ROWS]
    )
    wrong = write_lines(tmp_path / "w.jsonl", [{"question_id": i, "answer": "?"} for i in IDS])
    assert main(["score", wrong, right, "--annotations", *annotations["jsonl"]]) == 0
    gained = "gained under vlmevalkit-2024, vlmevalkit-2025, m4c: 10: 34602, 34603, 34604, 34605, 34606 and 5 more"
    assert gained in capsys.readouterr().out


@pytest.mark.slow
def test_a_paired_interval_is_narrower_than_that_of_its_two_sides(questions):
    draw = random.Random(3)
    asked = [questions[i % 10] for i in range(600)]
    asked = [type(q)(i, q.image_id, None, q.question, ("x",) * 10) for i, q in enumerate(asked)]
    right = [draw.random() < 0.5 for _ in asked]
    first = [{"question_id": i, "answer": "x" if ok else "y"} for i, ok in enumerate(right)]
    second = [{"question_id": i, "answer": "x" if ok != (i % 20 == 0) else "y"} for i, ok in enumerate(right)]
    comparison = compare_answers(asked, first, second)
    pair, alone = comparison.protocols["m4c"], comparison.first.protocols["m4c"]
    assert pair.high - pair.low < 0.6 * (alone.high - alone.low)
    # the width that the differences' own deviation gives
    differences = np.array([b["answer"] == "x" for b in second], float) - np.array(right, float)
    assert pair.high - pair.low == pytest.approx(2 * 1.96 * differences.std() / math.sqrt(600), rel=0.15)
    same = compare_answers(asked, first, first).protocols["m4c"]
    assert (same.difference, same.low, same.high, same.num_tied) == (0, 0, 0, 600)
    with pytest.raises(UserError, match="no question is answered by both"):
        compare_answers(asked, first[:5], first[5:])
