"""Question and task files of one's own: what is wrong in them is named, with its fix, before a question is asked."""

import json

import openpyxl
import pytest
import yaml

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.metrics.choices import BY_TEXT
from llava_llama31.trainer.evaluation.task_files import load_task
from llava_llama31.trainer.evaluation.task_questions import load_task_questions


HEADER = "image,question,answer,metric\n"
WITH_OPTIONS = "image,question,A,B,C,answer,metric\n"


def read(path):
    task = load_task(path)
    return load_task_questions(task, task.data, with_images=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # every answer is right or none is: neither says anything about the model
        (HEADER + "1.png,a?,,exact\n1.png,b?,x,exact\n", "q.csv:2: answer is '': the question has no answer"),
        (HEADER + "1.png,a?,\"['', ' ']\",anls\n", "q.csv:2: answer is '', ' ': the question has no answer"),
        (WITH_OPTIONS + "1.png,a?,red,blue,,A,choice\n" * 3 + "1.png,b?,red,blue,,C,choice\n", "the options are A, B"),
        (WITH_OPTIONS + "1.png,a?,red,blue,wet,blue,choice\n", "answer is 'blue', and the options are A, B, C"),
        (WITH_OPTIONS + "1.png,a?,red,blue,wet,\"['A', 'B']\",choice\n", "answer is 'A', 'B', and the options are"),
        (WITH_OPTIONS + "1.png,a?,red,blue,wet,a,choice\n", "answer is 'a', .* give the letter of the right option"),
        # its questions would join those of the metric in the table of scores
        ("group," + HEADER + "number,1.png,a?,9,anls\n", "the group 'number' has the name of a metric"),
        (
            "image;question;answer;metric\n1.png;a?;x;exact\n",
            "q.csv:1: the first line has one comma-separated cell, and",
        ),
        (
            HEADER.replace(",", "\t") + "1.png\ta?\tx\texact\n",
            r"and '\\t' in it \(fix: name it .tsv, or save it again",
        ),
        ("image, question,answer,metric\n1.png,a?,x,exact\n", "no question: the rows have image, ' question', answer"),
        (HEADER, "q.csv: has no row of a question"),
        ("", "q.csv: has no row of a question"),
    ],
)
def test_what_a_table_lacks_is_named(tmp_path, text, message):
    (tmp_path / "q.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "q.csv")


def test_a_right_option_may_have_spaces_around_its_letter(tmp_path):
    (tmp_path / "q.csv").write_text(WITH_OPTIONS + "1.png,a?,red,,wet, C ,choice\n")
    (question,) = read(tmp_path / "q.csv")
    assert question.answers == ("C",) and question.options == (("A", "red"), ("C", "wet"))


def test_a_group_may_have_the_name_of_its_own_metric(tmp_path):
    (tmp_path / "q.csv").write_text("group," + HEADER + "number,1.png,a?,9,number\n")
    assert read(tmp_path / "q.csv")[0].groups == ("number",)


def test_a_table_in_another_encoding_says_what_to_save(tmp_path):
    (tmp_path / "q.csv").write_bytes((HEADER + "1.png,Größe?,x,exact\n").encode("cp1252"))
    with pytest.raises(UserError, match="not UTF-8 text .*Excel calls it CSV UTF-8"):
        read(tmp_path / "q.csv")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("#N/A", "row 2: a cell is Excel's error #N/A"),
        (True, "answer is True .*write it as a text, such as yes or no"),
    ],
)
def test_cells_of_excel_that_are_no_answer(tmp_path, answer, message):
    book = openpyxl.Workbook()
    book.active.append(HEADER.strip().split(","))
    book.active.append(["1.png", "a?", answer, "yes_no"])
    book.save(tmp_path / "q.xlsx")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "q.xlsx")


TASK = {
    "name": "receipts",
    "title": "Receipts",
    "protocol": "own",
    "protocols": {"own": {"source": "guide", "metric": "fields", "rule": "verbatim", "headline": "accuracy"}},
    "layouts": [{"name": "rows", "image": "image", "answer_is": "json", "groups": ["shop"]}],
    "prompts": {"card": "{question}"},
    "max_new_tokens": 5,
    "data": "q.jsonl",
}
OPTIONS = [{"name": "rows", "image": "image", "options": "columns"}]


def write_task(folder, **changes):
    (folder / "own.yaml").write_text(yaml.safe_dump(TASK | changes))
    row = {"image": "1.png", "question": "a?", "answer": {"a": "1"}, "shop": "north"}
    (folder / "q.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "own.yaml"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protcols": {}}, r"own.yaml: protcols: no such key \(fix: did you mean protocols\?\)"),
        ({"layouts": [{"nam": "rows"}]}, r"layouts.0.nam: no such key \(fix: did you mean name\?\)"),
        ({"protocols": {"own": TASK["protocols"]["own"] | {"rules": "x"}}}, r"did you mean rule\?"),
        ({"protocols": {"own": TASK["protocols"]["own"] | {"metric": "feilds"}}}, r"not 'feilds' \(fix: did you mean"),
        ({"protocols": {"own": {"metric": "cer", "headline": "x"}}}, r"protocols.own.source: this key is missing"),
        ({"protocols": {}, "protocol": ""}, r"own.yaml: no protocols \(fix: give one, or a submission [a-z ]*\)$"),
        # cut to nothing, or said to the model as it stands: a wrong score, and nothing to see of it
        ({"max_new_tokens": 0}, "max_new_tokens: Input should be greater than 0, not 0"),
        ({"prompts": {"card": "{question} {optoins}"}}, r"has {optoins}, .*\(fix: did you mean {options}\?\)"),
        ({"prompts": {"card": "{question}{choices}"}}, r"has {choices}, which stands for nothing"),
        ({"prompts": {"card": "{question}"}, "layouts": OPTIONS}, "the prompt of card does not show the options"),
        ({"prompts": {"mine": "{question}"}}, "no preset is named 'mine'; there are card, llava"),
        # folders of answers are called so
        ({"name": "../x"}, "name is '../x', which no folder can be called"),
        ({"name": ""}, "name is '', which no folder can be called"),
        ({"name": " "}, "name is ' ', which no folder can be called"),
        ({"name": ".."}, r"name is '\.\.', which no folder can be called"),
    ],
)
def test_what_is_wrong_in_a_task_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_task(write_task(tmp_path, **changes))


@pytest.mark.parametrize("rule", BY_TEXT)
def test_options_may_be_hidden_where_a_rule_finds_them_by_text(tmp_path, rule):
    own = {"source": "guide", "metric": "choice", "rule": rule, "headline": "accuracy"}
    changes = {"protocols": {"own": own}, "layouts": OPTIONS}
    assert load_task(write_task(tmp_path, **changes)).hides_options("card")
    with pytest.raises(UserError, match="the prompt of card does not show the options"):
        load_task(write_task(tmp_path, **changes | {"protocols": {"own": own | {"rule": "letter"}}}))


def test_braces_around_other_than_a_name_are_the_prompts_own(tmp_path):
    prompt = '{question}\nAnswer as {"total": "9.50"}.'
    task = load_task(write_task(tmp_path, prompts={"card": prompt}))
    assert task.prompts["card"] == prompt and len(load_task_questions(task, task.data, with_images=False)) == 1


def test_figures_of_several_metrics_are_named_each(tmp_path, capsys):
    """An error rate would stand under `f1`."""
    rate = {"source": "guide", "metric": "cer", "summary": "error_rate", "called": "cer", "headline": "cer"}
    task = write_task(tmp_path, protocols=TASK["protocols"] | {"cer": rate})
    for name, said in (("a", '{"a": "1"}'), ("b", "")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": "1.png#1", "response": said}) + "\n")
    paths = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    assert main(["score", paths[0], "--task", str(task)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["protocol", "metric", "value", "95", "%", "interval"] in table
    assert ["own", "*", "accuracy", "100.000", "100.00", "to", "100.00"] in table
    assert ["cer", "cer", "0.000", "0.00", "to", "0.00"] in table
    assert main(["score", *paths, "--task", str(task)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cer", "cer", "0.000", "100.000", "+100.000", "+100.00", "to", "+100.00"] in table


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "def near(answer, answers):\n    return float(answer)\n",
            "question 1: the function fails on 'b': ValueError",
        ),
        ("def near(answer):\n    return 1\n", "near cannot be called with an answer and the annotated ones: too many"),
        ("near = max\n", "question 1: the function fails on 'b': TypeError"),  # Python cannot say what max takes
    ],
)
def test_a_function_that_fails_is_named(tmp_path, capsys, body, message):
    tmp_path.chmod(0o700)
    (tmp_path / "mine.py").write_text(body)
    (tmp_path / "mine.py").chmod(0o600)
    protocol = {"source": "guide", "metric": "function", "rule": "mine:near", "headline": "accuracy"}
    layouts = [{"name": "rows", "id": "id", "image": "image"}]
    task = write_task(tmp_path, protocols={"own": protocol}, layouts=layouts)
    (tmp_path / "q.jsonl").write_text('{"id": 1, "image": "1.png", "question": "a?", "answer": "1"}\n')
    (tmp_path / "a.jsonl").write_text('{"id": 1, "response": "b"}\n')
    assert main(["score", str(tmp_path / "a.jsonl"), "--task", str(task)]) == 2
    assert message in capsys.readouterr().err
    if "too many" in message:  # before anything is asked
        assert main(["evaluate", "nowhere", "--task", str(task)]) == 2
        assert message in capsys.readouterr().err


def test_annotations_are_not_scored_as_answers(tmp_path, capsys):
    """Every one of them would be right."""
    rule = {"source": "guide", "metric": "exact", "rule": "verbatim", "headline": "accuracy"}
    layouts = [{"name": "rows", "id": "question_id", "image": "image"}]
    task = write_task(tmp_path, protocols={"own": rule}, layouts=layouts)
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "image": "1.png", "question": "a?", "answer": "1"}\n')
    assert main(["score", str(tmp_path / "q.jsonl"), "--task", str(task)]) == 2
    assert "these are labels: the answer of each of 1 rows is the annotated one" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [["--task", "q.csv"], ["--data", "q.jsonl"]])
def test_another_folder_than_that_of_the_images_is_named_before_the_model_is_opened(
    tmp_path, monkeypatch, capsys, asked
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.csv").write_text(HEADER + "1.png,a?,x,exact\n2.png,b?,x,exact\n")
    row = {"question_id": 1, "image_id": "1", "image": "1.png", "question": "a?", "answers": ["x"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["evaluate", "nowhere", *asked, "--image-root", "elsewhere"]) == 2
    error = capsys.readouterr().err
    assert "images is there; the first: missing_image: no file" in error and "--image-root" in error
    (tmp_path / "2.png").touch()
    (tmp_path / "1.png").touch()
    assert main(["evaluate", "nowhere", *asked]) == 2
    assert "MODEL: no folder 'nowhere'" in capsys.readouterr().err


def test_the_row_without_an_image_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.csv").write_text(HEADER + "1.png,a?,x,exact\n,b?,x,exact\n")
    assert main(["evaluate", "nowhere", "--task", "q.csv"]) == 2
    assert "no image, the first #1 ('b?') (fix: give each question one, in image)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere", "--data", "q.csv"], "questions of your own go with --task: --task q.csv"),
        (["score", "a.jsonl", "--annotations", "q.csv"], "questions of your own go with --task: --task q.csv"),
        (["score", "a.jsonl", "--task", "POPE"], "did you mean pope?"),
        (["score", "a.jsonl", "--task", "q.csv", "--columns", "answer=words"], "--columns id=FIELD"),
        (["score", ".", "--task", "q.csv"], "fix: name its predictions.jsonl"),
    ],
)
def test_a_wrong_option_says_which_is_right(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.csv").write_text(HEADER + "1.png,a?,x,exact\n")
    for name in ("a.jsonl", "predictions.jsonl"):
        (tmp_path / name).write_text('{"key": 1, "words": "x"}\n')
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["score", "a", "--columns", "id:key"], "--columns: 'id:key' is not NAME=VALUE,..."),
        (["evaluate", "m", "--compare", "-1"], "--compare: '-1' is not a whole number from 0 on"),
    ],
)
def test_a_malformed_option_is_shown_with_its_form(capsys, option, message):
    with pytest.raises(SystemExit):
        main(option)
    assert message in capsys.readouterr().err


def test_options_may_stand_between_two_files(tmp_path, capsys):
    (tmp_path / "q.csv").write_text("id," + HEADER + "1,1.png,a?,x,exact\n2,1.png,b?,y,exact\n")
    paths = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    for path, said in zip(paths, "xy", strict=True):
        with open(path, "w") as file:
            file.write("".join(json.dumps({"key": i, "words": said}) + "\n" for i in (1, 2)))
    columns = ["--columns", "id=key, answer=words"]  # with a space after the comma
    assert main(["score", paths[0], "--task", str(tmp_path / "q.csv"), paths[1], *columns, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["protocols"]["own"]["first"] == 50
    assert main(["score", paths[0], "--task", str(tmp_path / "q.csv"), *paths, *columns]) == 2
    assert "unexpected argument" in capsys.readouterr().err


def test_answers_that_choose_nothing_are_counted_whatever_metric_a_row_names(tmp_path, capsys):
    """The count was 0 for own questions."""
    rows = "1,1.png,a?,red,blue,A,choice\n2,1.png,b?,,,yes,yes_no\n3,1.png,c?,,,x,exact\n"
    (tmp_path / "q.csv").write_text(f"id,image,question,A,B,answer,metric\n{rows}4,1.png,d?,red,blue,B,choice\n")
    said = dict(zip("1234", ("neither", "perhaps", "y", "B"), strict=True))
    with open(tmp_path / "a.jsonl", "w") as file:
        file.write("".join(json.dumps({"id": key, "response": words}) + "\n" for key, words in said.items()))
    assert main(["score", str(tmp_path / "a.jsonl"), "--task", str(tmp_path / "q.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unclear"] == 2


def test_a_list_of_answers_to_own_questions_is_not_taken_for_normalised_ones(tmp_path, capsys):
    (tmp_path / "q.csv").write_text("id," + HEADER + "1,1.png,a?,yes,yes_no\n")
    (tmp_path / "a.json").write_text('[{"question_id": 1, "answer": "yes"}]')
    assert main(["score", str(tmp_path / "a.json"), "--task", str(tmp_path / "q.csv"), "--json"]) == 0
    assert "note" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("questions", [["--task", "q.csv"], ["--data", "q.jsonl"]])
def test_a_page_takes_the_answer_files_that_score_takes(tmp_path, monkeypatch, capsys, questions):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.csv").write_text("id," + HEADER + "1,1.png,a?,x,exact\n")
    row = {"question_id": 1, "image_id": "1", "question": "a?", "answers": ["x"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    rows = [{"key": 1, "words": said, "method": said} for said in "xy"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["browse", "a.jsonl", *questions, "--columns", "id=key,answer=words"]
    assert main([*arguments, "--where", "method=y"]) == 0
    assert "a.html: 1 question" in capsys.readouterr().out
    page = (tmp_path / "a.html").read_text()
    shown = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert [entry["prediction"] for entry in shown["questions"]] == ["y"] and shown["unknown"] == []
    assert main([*arguments, "--where", "method=z"]) == 2
    assert "no row has method=z" in capsys.readouterr().err
