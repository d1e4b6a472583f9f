"""The card: every fact from the record, nothing without one, no string that escapes its place; the licence files."""

import ast
import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from llava_llama31.model_card import CardError, licence_files, licence_problems, render_card
from llava_llama31.model_card.card import LLAMA_LICENCES, QUESTION, card_for, quick_snippet, usage_snippet
from llava_llama31.model_card.curves import draw_curve
from llava_llama31.model_card.sections import FORMER_NOTE, NOTE, edited_sections
from llava_llama31.trainer.publishing.contents import Contents
from llava_llama31.trainer.publishing.gate import check_licence


ROOT = Path(__file__).parents[1]
MARKDOWN = MarkdownIt("commonmark").enable("table")
AGREEMENT = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n(text of the agreement, made up for this test)\n"
NOTICE = (
    "Llama 3.1 is licensed under the Llama 3.1 Community License, "
    "Copyright © Meta Platforms, Inc. All Rights Reserved."
)
STAGE = {
    "name": "projector",
    "trainable": ["multi_modal_projector"],
    "learning_rate": {"multi_modal_projector": 1e-5},
    "data": [
        {
            "name": "liuhaotian/LLaVA-Pretrain",
            "rows": 558128,
            "usable": 270001,
            "selected": 3000,
            "dropped": {"missing_image": 288127},
            "license": "CC BY 4.0 and OpenAI's terms of use",
        }
    ],
    "epochs": 1,
    "steps": 185,
    "global_batch": 16,
    "micro_batch": 2,
    "gradient_accumulation": 8,
    "num_processes": 1,
    "schedule": "cosine",
    "warmup_steps": 6,
    "weight_decay": 0.1,
    "precision": "bfloat16",
    "loss_first": 9.25,
    "loss": 2.125,
    "validation_loss": 2.375,
    "supervised_tokens": 123456,
    "supervised_tokens_per_second": 1033.4,
    "minutes": 3.5,
    "curve_image": "curves/1-projector.png",
}
ASKED = {"adam_beta2": 0.95, "deepspeed": "zero3", "quirks": [], "packing": True, "max_tokens": None}
RECORD = {
    "name": "Llama-3.1-8B-LLaVA",
    "recipe": {
        "name": "llama31-8b",
        "seed": 42,
        "device_watts": 400.0,
        "stages": {"projector": ASKED, "instruct": ASKED | {"deepspeed": None, "quirks": ["a"]}},
    },
    "lock": {"file": "constraints.txt", "sha256": "5e" * 32},
    "minutes": 12.0,
    "command": "llava-llama31 train llama31-8b --output /home/someone/runs/one --set a=~/x/y.json",
    "commit": "0123abcd",
    "licence": "llama3.1",
    "base_models": [
        {"role": "language_model", "id": "meta-llama/Llama-3.1-8B-Instruct", "licence": "llama3.1"},
        {"role": "vision_tower", "id": "/data/models/clip-vit", "licence": "mit"},
    ],
    "parameters": {"vision_tower": 303507456, "multi_modal_projector": 20979712},
    "stages": [
        STAGE,
        STAGE
        | {"name": "instruct", "data": [STAGE["data"][0] | {"name": "own", "hub_id": "me/own-set", "dropped": {}}]},
    ],
    "evaluation": {
        "dataset": "TextVQA val",
        "num_questions": 5000,
        "failed": 2,
        "missing": 0,
        "cut": 1204,
        "prompt": "{question}\nAnswer the question using a single word or phrase.",
        "decoding": "greedy, at most 16 new tokens",
        "protocols": {
            "vlmevalkit-2024": {"accuracy": 0.60482, "low": 0.5912, "high": 0.6188},
            "m4c": {"accuracy": 0.61, "low": 0.5964, "high": 0.6234},
        },
        "predictions": {"file": "predictions.jsonl", "sha256": "9a" * 32},
        "accuracy_protocol": "m4c",
        "accuracy_before": 0.0131,
        "accuracy_blind": 0.0842,
    },
    "samples": [
        {
            "question": "what brand?",
            "prediction": "dakota",
            "answers": ["dakota"] * 9 + ["no"],
            "image": "samples/0.png",
            "accuracy": 1.0,
        }
    ],
    "environment": {"hardware": "8 x A100", "python": "3.11.7", "torch": "2.13.0"},
}
TINY = {
    "name": "tiny",
    "stages": [{"name": "one", "data": [{"name": "made-up", "rows": 8}]}],
    "base_models": [{"role": "language_model", "id": "made by the run", "licence": "apache-2.0"}],
}


def body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


def tables(card: str) -> list[list[list[list]]]:
    """Tables of a card as rows of cells of inline tokens."""
    found: list = []
    for token in MARKDOWN.parse(body(card)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("td_open", "th_open"):
            found[-1][-1].append(None)
        elif token.type == "inline" and found and found[-1] and found[-1][-1] and found[-1][-1][-1] is None:
            found[-1][-1][-1] = token.children
    return found


def text(cell: list) -> str:
    assert all(token.type == "text" for token in cell), [token.type for token in cell]
    return "".join(token.content for token in cell)


def table_starting(card: str, first: str) -> list[list[str]]:
    table = next(table for table in tables(card) if text(table[0][0]) == first)
    return [[text(cell) for cell in row] for row in table]


def test_every_fact_stands_in_its_place():
    card = render_card(RECORD)
    assert "# Llama-3.1-8B-LLaVA\n" in card and "**Built with Llama**" in card
    assert table_starting(card, "part")[1:] == [
        ["language_model", "meta-llama/Llama-3.1-8B-Instruct", "llama3.1"],
        ["vision_tower", "clip-vit", "mit"],
    ]
    assert ["vision_tower", "303,507,456"] in table_starting(card, "module group")
    licence = "CC BY 4.0 and OpenAI's terms of use"
    assert table_starting(card, "stage")[1:] == [
        ["projector", "liuhaotian/LLaVA-Pretrain", "558,128", "270,001", "3,000", "missing_image: 288,127", licence],
        ["instruct", "own (me/own-set)", "558,128", "270,001", "3,000", "none", licence],
    ]
    stages = {row[0]: row[1:] for row in table_starting(card, "")}
    assert list(stages)[0] == "" and stages[""] == ["projector", "instruct"]
    expected = {
        "trainable parts": "multi_modal_projector",
        "learning rate": "multi_modal_projector: 1e-5",
        "steps": "185",
        "global batch": "16",
        "batch per device": "2",
        "gradient accumulation": "8",
        "weight decay": "0.1",
        "training loss, first log entry": "9.25",
        "training loss, last log entry": "2.125",
        "validation loss": "2.375",
        "supervised tokens": "123,456",
        "supervised tokens per second": "1,033",
        "minutes": "3.5",
        "Adam beta 2": "0.95",
        "packed rows": "yes",
        "seed": "42",
    }
    assert stages["DeepSpeed"] == ["zero3", "none"] and stages["quirks"] == ["none", "a"]
    assert {label: stages[label] for label in expected} == {label: [fact] * 2 for label, fact in expected.items()}
    assert table_starting(card, "protocol")[1:] == [
        ["vlmevalkit-2024", "60.482 %", "59.12 % to 61.88 %"],
        ["m4c", "61.000 %", "59.64 % to 62.34 %"],
    ]
    for line in (
        "- questions: 5,000",
        "- failed questions, left out of the scores: 2",
        "- answers cut at the limit of new tokens: 1,204",
        "- decoding: greedy, at most 16 new tokens",
        "- accuracy before training (m4c): 1.31 %",
        "- accuracy with the images shuffled between the questions (blind) (m4c): 8.42 %",
        "- commit of the code: 0123abcd",
        f"- lock file: constraints.txt, SHA-256 {'5e' * 32}",
        f"- every answer: [predictions.jsonl](predictions.jsonl), SHA-256 {'9a' * 32}",
        '<img src="curves/1-projector.png" width="640" alt="Loss curve of stage 1">',
        "| hours of the whole run | 0.2 |",
        # 2 stages of 3.5 minutes on one device of 400 W
        "| hours of training x processes | 0.1167 |",
        "| energy of the devices in kWh | 0.04667 |",
    ):
        assert line in card
    assert "```text\n{question}\nAnswer the question using a single word or phrase.\n```" in card
    assert '<img src="samples/0.png" width="200" alt="Image of the question"> | what brand? | dakota |' in card
    assert "| dakota | dakota x 9, no | 100.00 % |" in card
    assert "Not recorded" not in card
    assert NOTICE in card and "https://llama.meta.com/llama3_1/use-policy" in card


def test_older_records_count_failed_questions_alone():
    evaluation = {key: value for key, value in RECORD["evaluation"].items() if key not in ("missing", "cut")}
    card = render_card(RECORD | {"evaluation": evaluation})
    assert "- failed questions, left out of the scores: 2" in card and "Not recorded" not in card
    assert "limit of new tokens" not in card and "without an answer" not in card
    card = render_card(RECORD | {"evaluation": evaluation | {"missing": 7}})
    assert "- questions without an answer, left out of the scores: 7" in card


def test_no_path_of_the_machine_is_published():
    card = render_card(RECORD)
    assert "llava-llama31 train llama31-8b --output one --set a=y.json" in card
    assert not re.search(r"/home|/data|someone|~", card)
    record = RECORD | {
        "environment": {"python": "file:///usr/x/python3", "data": "C:\\Users\\me\\set", "ratio": "3 / 4"}
    }
    card = render_card(record)
    assert "| python | python3 |" in card and "| data | set |" in card and "| ratio | 3 / 4 |" in card


def test_metadata_is_what_the_hub_reads():
    data = ModelCard(render_card(RECORD)).data
    assert data.license == "llama3.1" and data["license_link"] == "LICENSE"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert data.base_model == ["meta-llama/Llama-3.1-8B-Instruct"] and data["base_model_relation"] == "finetune"
    assert data.datasets == ["liuhaotian/LLaVA-Pretrain", "me/own-set"] and "conversational" in data.tags
    results = {result.metric_args["protocol"]: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"vlmevalkit-2024": 60.482, "m4c": 61.0}
    assert results["m4c"].metric_args == {
        "protocol": "m4c",
        "interval_95": [59.64, 62.34],
        "num_questions": 5000,
        "failed": 2,
        "missing": 0,
        "cut": 1204,
        "predictions": "predictions.jsonl",
        "predictions_sha256": "9a" * 32,
    }
    assert results["m4c"].source_url is None
    published = ModelCard(render_card(RECORD | {"model_id": "me/Llama-x"})).data.eval_results[0]
    assert published.source_url == "https://huggingface.co/me/Llama-x/blob/main/predictions.jsonl"
    assert data.model_name == RECORD["name"]


TASK = {
    "name": "pope",
    "title": "POPE, COCO",
    "dataset": "lmms-lab/POPE",
    "unit": "%",
    "protocol": "llava",
    "headline": "f1",
    "value": 85.947,
    "before": 12.5,
    "blind": 49.0,
    "protocols": {
        "vlmevalkit": {"headline": "f1", "metrics": {"f1": 85.93, "accuracy": 86.0}, "low": 85.2, "high": 86.6},
        "llava": {"headline": "f1", "metrics": {"f1": 85.947, "accuracy": 86.1}, "low": 85.25, "high": 86.63},
    },
    "num_questions": 8910,
    "failed": 1,
    "missing": 0,
    "cut": 2,
    "prompt": "<image>\n{question}",
    "decoding": "greedy, at most 16 new tokens",
    "predictions": {"file": "predictions-pope.jsonl", "sha256": "7b" * 32},
}


def test_tasks_are_listed_with_what_made_their_figures():
    card = render_card(
        RECORD | {"tasks": [TASK, TASK | {"name": "m|e", "title": None, "dataset": None, "unit": "sum"}]}
    )
    rows = [line for line in card.splitlines() if line.startswith("| POPE, COCO")]
    assert rows[0].startswith("| POPE, COCO | llava | f1 | 85.947 | 85.25 to 86.63 | accuracy: 86.1 |")
    assert rows[2] == "| POPE, COCO | llava | 12.500 | 85.947 | 49.000 |" and "f1 (sum)" in card
    assert "questions 8,910, failed 1, unanswered 0, cut 2; greedy" in card and "m&#124;e" in card
    assert f"[predictions-pope.jsonl](predictions-pope.jsonl), SHA-256 {TASK['predictions']['sha256']}" in card
    results = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    (pope,) = [result for result in results if result["dataset"]["type"] == "lmms-lab/POPE"]
    assert [metric["value"] for metric in pope["metrics"]] == [85.93, 85.947]
    assert pope["metrics"][1]["type"] == "f1" and pope["metrics"][1]["args"]["interval_95"] == [85.25, 86.63]
    assert pope["metrics"][1]["args"] | {"num_questions": 8910, "failed": 1, "cut": 2} == pope["metrics"][1]["args"]
    alone = {key: value for key, value in RECORD.items() if key not in ("evaluation", "samples")}
    without = render_card(alone | {"tasks": [TASK]})
    assert "## Other evaluations" in without and "\n- evaluation\n" not in without
    assert "## Other evaluations" not in render_card(RECORD)


def test_missing_facts_are_named_and_never_made_up():
    card = render_card(TINY)
    data = ModelCard(card).data
    assert data.license is data.base_model is data.datasets is data.eval_results is None
    assert "base_model_relation" not in data.to_dict()
    missing = card.split("## Not recorded\n")[1]
    for fact in (
        "licence of this model",
        "parameter counts",
        "evaluation",
        "sample answers",
        "environment",
        "command",
    ):
        assert f"- {fact}\n" in missing + "\n"
    assert "of stage one: trainable parts, learning rate, schedule" in missing
    assert table_starting(card, "stage")[1] == ["one", "made-up", "8", *["not recorded"] * 4]
    assert "- energy (the recipe has no device\\_watts)\n" in missing and "- lock file\n" in missing
    for heading in (
        "## Training\n",
        "## Evaluation",
        "## Sample",
        "## Environment",
        "## Reproduction",
        "Built with Llama",
        "None",
        "LICENSE",
    ):
        assert heading not in card
    without_blind = copy.deepcopy(RECORD)
    del without_blind["evaluation"]["accuracy_blind"]
    without_blind["evaluation"]["prompt"] = None
    assert (
        body(render_card(without_blind))
        .split("## Not recorded\n")[1]
        .startswith("\n- evaluation prompt\n- accuracy with shuffled images\n\n<!--")
    )
    assert "blind" not in body(render_card(without_blind))


def test_local_folders_are_no_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("models/llama")
    record = copy.deepcopy(RECORD)
    record["base_models"][0]["id"] = "models/llama"
    record["stages"][0]["data"][0]["name"] = "data/train.jsonl"
    record["stages"][1]["data"][0]["hub_id"] = "models/llama"
    data = ModelCard(render_card(record)).data
    assert data.base_model is None and data.datasets is None


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("path", "named"),
    [
        (("stages", 1, "loss"), r"stages\[1\].loss"),
        (("evaluation", "protocols", "m4c", "low"), "evaluation.protocols.m4c.low"),
        (("environment", "hours"), "environment.hours"),
        (("samples", 0, "score"), r"samples\[0\].score"),
    ],
)
def test_numbers_that_are_none_are_refused(number, path, named):
    record = copy.deepcopy(RECORD)
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = number
    with pytest.raises(CardError, match=rf"^{named} is (nan|-?inf)"):
        render_card(record)


@pytest.mark.parametrize("name", [None, "", "  ", 5])
def test_a_record_without_a_name_is_refused(name):
    with pytest.raises(CardError, match="no name"):
        render_card(RECORD | {"name": name})


HOSTILE = [
    "<script>alert(1)</script>",
    "a | b || c \\| d \\",
    "](https://evil.example) [x](javascript:alert(1)) ![i](x)",
    "`code` ``` fence ~~~~",
    "x\n```\n# out of the block\n````\n",
    "# heading\n\n---\n\n- list\n1. one\n> quote",
    "*bold* _it_ **b** __b__ ~~s~~ $m$ ^x^",
    "{{ 7 * 7 }} {% raw %} {# c #}",
    "---\nlicense: mit\n---",
    "&lt;b&gt; &#124; &amp;",
    "https://evil.example www.evil.example",
    "right\u202eto left \ud800 \x00 \x1b[31m nul",
    "1. first",
    "- minus",
    "=",
    "''' \"\"\" : , & * ! % @ ` # yaml: [}",
    "ünïcode 日本語 हिन्दी 👨\u200d👩\u200d👧",
]


def shown(value: str) -> str:
    """What a reader sees: one line, without invisible characters."""
    return " ".join("".join(c if c.isprintable() or c in "\u200c\u200d" else " " for c in value).split())


def replaced(value, hostile):
    """The same record with `hostile` for every string that is not a key."""
    if isinstance(value, str):
        return hostile
    if isinstance(value, dict):
        return {key: replaced(item, hostile) for key, item in value.items()}
    return [replaced(item, hostile) for item in value] if isinstance(value, list) else value


def without_files(record: dict) -> dict:
    """The same record without the names of images and predictions, which are shown only if they are plain."""
    record = copy.deepcopy(record)
    for place in (*record["stages"], *record["samples"], record["evaluation"]):
        for key in ("curve_image", "image", "predictions"):
            place.pop(key, None)
    return record


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_strings_stay_text(hostile):
    record = without_files(RECORD)
    card = render_card(replaced(record, hostile))
    card.encode()
    reference = MARKDOWN.parse(body(render_card(replaced(record, "x"))))
    tokens = MARKDOWN.parse(body(card))
    assert [token.type for token in tokens] == [token.type for token in reference]
    inline = [token for token in tokens if token.children]
    kinds = {"text", "strong_open", "strong_close", "softbreak", "code_inline"}
    assert {child.type for token in inline for child in token.children} <= kinds
    # renderers that make links of bare addresses must find none
    assert not any(re.search(r"www\.|[a-z]://", token.content) for token in inline)
    assert table_starting(card, "image")[1] == [
        "not recorded",
        *[shown(hostile)] * 2,
        f"{shown(hostile)} x 10",
        "100.00 %",
    ]
    data = ModelCard(card).data
    assert (data.license, data["license_name"], data.model_name) == ("other", shown(hostile), shown(hostile))


@settings(max_examples=150)
@given(st.one_of(st.text(max_size=30), st.text(alphabet="\\`*_{}[]()#+-.!|~<>&$^=:/@\n 1a'\"w", max_size=14)))
def test_any_cell_reads_back_as_it_was(value):
    card = render_card({"name": "n", "samples": [{"question": value, "prediction": "after", "answers": ["last"]}]})
    row = table_starting(card, "image")[1]
    assert row == ["not recorded", shown(value), "after", "last", "not recorded"]


@pytest.mark.parametrize(
    "image", ["/etc/passwd", "../x.png", "https://e.org/x.png", 'x" onerror="alert(1)', "", 5, None]
)
def test_only_images_of_the_folder_are_shown(image):
    sample, stage = RECORD["samples"][0] | {"image": image}, STAGE | {"curve_image": image}
    evaluation = RECORD["evaluation"] | {"predictions": {"file": image, "sha256": ""}}
    card = render_card(RECORD | {"samples": [sample], "stages": [stage], "evaluation": evaluation})
    assert "<img" not in card and "every answer" not in card


def test_a_hostile_name_does_not_reach_the_snippet():
    card = render_card(RECORD | {"name": 'x"; import os; os.system("true"); "'})
    code = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert len(code) == 1 and "os." not in code[0]
    for block in code:
        ast.parse(block)


def test_the_cards_code_is_readmes_and_twelve_lines(tmp_path):
    sample = RECORD["samples"][0] | {"image": "samples/1.png", "question": QUESTION}
    record = RECORD | {"model_id": "OWNER/Llama-3.1-8B-mine", "samples": [sample]}
    (code,) = re.findall(r"```python\n(.*?)\n```", render_card(record), re.S)
    assert f"```python\n{code}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(code.splitlines()) == 13 and code.count("\n\n") == 1 and 'device_map="auto"' in code


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"samples": [{"question": QUESTION, "image": "samples/1.png"}]},
        {"adapter": {"base_model_name_or_path": "me/base", "revision": "0" * 40, "difference": 1e-6}},
    ],
)
def test_the_code_of_a_folders_card_can_name_another_repository(kind):
    """As if the card had been made for it; in a section that somebody edited the code stays."""
    record = {"name": "x", **kind}
    card = render_card(record)
    assert card_for(card, "me/y") == render_card(record | {"model_id": "me/y"}) != card
    assert edited_sections(card_for(card, "me/y")) == []
    edited = card.replace("AutoProcessor.from_pretrained(", "AutoProcessor.from_pretrained(  # mine\n")
    assert edited != card and card_for(edited, "me/y") == edited


@pytest.mark.parametrize("question", ['x"; import os; "', "a\\", "two\nlines", "{repo}", "", None, "é" * 5, "x" * 81])
def test_only_a_plain_question_reaches_the_code(question):
    sample = RECORD["samples"][0] | {"image": "samples/1.png", "question": question}
    (code,) = re.findall(r"```python\n(.*?)\n```", render_card(RECORD | {"samples": [sample]}), re.S)
    assert ast.parse(code) and f'"text": "{QUESTION}"' in code


@pytest.mark.slow
@pytest.mark.torture
def test_the_code_runs_in_a_process_without_this_package(processor, tiny_model, make_image, tmp_path):
    folder = tmp_path / "tiny-model"
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "samples").mkdir()
    for file in ("sign.png", "tiny-model/samples/1.png"):
        make_image(50, 70).save(tmp_path / file)
    sample = {"image": "samples/1.png", "question": QUESTION}
    (code,) = re.findall(r"```python\n(.*?)\n```", render_card({"name": "tiny-model", "samples": [sample]}), re.DOTALL)
    assert code == quick_snippet("tiny-model", image="samples/1.png").strip()
    code = f"{usage_snippet('tiny-model')}\n{code}".replace("print(", "texts.append(")
    code = f"texts = []\n{code}\nimport json, sys\nprint(json.dumps([texts, 'llava_llama31' in sys.modules]))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    texts, has_ours = json.loads(done.stdout.splitlines()[-1])
    assert len(texts) == 6 and len(set(texts)) == 1 and not has_ours


# --- what a person wrote stays


def test_a_card_written_again_is_the_same():
    card = render_card(RECORD)
    assert render_card(RECORD, card) == card and edited_sections(card) == []
    assert render_card(RECORD, card.replace(NOTE, FORMER_NOTE)) == card


def test_edited_sections_and_added_text_stay_and_the_rest_is_new():
    card = render_card(RECORD)
    mine = card.replace("intended for research", "intended for my thesis")
    mine = mine.replace("<!-- begin evaluation", "## My own part\n\nSee <b>here</b>.\n\n<!-- begin evaluation")
    mine = mine.replace("\ntags:\n", "\nlanguage: en\ntags:\n- my-tag\n").replace("license: llama3.1", "license: mit")
    assert edited_sections(mine) == ["intended_use"]
    now = copy.deepcopy(RECORD)
    now["evaluation"]["protocols"]["m4c"]["accuracy"] = 0.7
    again = render_card(now, mine)
    assert "for my thesis" in again and "intended for research" not in again
    assert again.index("</b>.\n\n<!-- begin evaluation") > again.index("## My own part")
    assert "70.000 %" in again and "61.000 %" not in again
    data = ModelCard(again).data
    assert data.language == "en" and data.license == "llama3.1" and {"my-tag", "llava"} <= set(data.tags)
    assert render_card(now, again) == again
    # an edited section outlives the facts that it was about, and one that is deleted with its markers comes back
    without = {key: value for key, value in RECORD.items() if key != "samples"}
    kept = render_card(without, card.replace("dakota | dakota x 9, no", "dakota | Dakota"))
    assert "dakota | Dakota" in kept and "- sample answers" in kept
    start, end = (re.search(f"<!-- {word} cost .*-->\n", card) for word in ("begin", "end"))
    assert "## Hardware" in render_card(RECORD, card[: start.start()] + card[end.end() :])


def test_data_cannot_forge_a_marker():
    forged = render_card(RECORD)
    record = RECORD | {"command": forged[forged.index("<!-- begin use") :], "model_id": "me/x"}
    card = render_card(record)
    assert edited_sections(card) == [] and render_card(record, card) == card
    assert render_card(RECORD, card) == forged


def test_broken_front_matter_of_the_former_card_is_named():
    with pytest.raises(CardError, match="^README.md: its front matter cannot be read"):
        render_card(RECORD, "---\nlicense: [\n---\nmine\n")


# --- loss curves


@pytest.mark.slow
@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e6, 1e6)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e-9, 1e9)), max_size=3),
)
def test_any_curve_is_drawn(training, validation):
    image = draw_curve("stage one", training, validation)
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert image.size == (1280, 640) and (0x2F, 0x7F, 0xD0, 0xFF) in colours
    assert bool(validation) == ((0xD1, 0x69, 0x0A, 0xFF) in colours)
    assert image.getpixel((0, 0))[3] == 0  # the page's own background


@pytest.mark.parametrize("points", [[], [(1, float("nan"))]])
def test_a_curve_of_nothing_is_refused(points):
    with pytest.raises(ValueError, match="finite"):
        draw_curve("x", points)


# --- licences


def llama(folder) -> dict:
    return {"role": "language_model", "id": str(folder), "licence": "llama3.1"}


def test_llama_duties_are_met_from_the_base_models_folder(tmp_path):
    (tmp_path / "LICENSE").write_text(AGREEMENT, encoding="utf-8")
    files = licence_files([llama(tmp_path), {"role": "vision_tower", "id": "openai/clip", "licence": "mit"}])
    assert files == {"LICENSE": AGREEMENT, "NOTICE": NOTICE + "\n"}
    entry = llama("meta-llama/Llama-3.1-8B-Instruct") | {"folder": str(tmp_path)}
    assert licence_files([entry])["LICENSE"] == AGREEMENT
    both = licence_files([{"role": "vision_tower", "id": "facebook/dinov2-small", "licence": "apache-2.0"}, entry])
    assert both["LICENSE"] == AGREEMENT and "Apache License" in both["LICENSE-Apache-2.0"]
    assert NOTICE in both["NOTICE"] and "modified weights of facebook/dinov2-small" in both["NOTICE"]


def test_the_agreement_is_never_written_from_memory(tmp_path):
    with pytest.raises(CardError, match=re.escape(f"put Meta's LICENSE of Llama 3.1 at {tmp_path / 'LICENSE'}")):
        licence_files([llama(tmp_path)])
    (tmp_path / "LICENSE").write_text("Apache License", encoding="utf-8")
    with pytest.raises(CardError, match="not the Llama 3.1 agreement"):
        licence_files([llama(tmp_path)])


@pytest.mark.parametrize(
    "key, name, words, refused",
    [
        ("llama3", "Llama-3-8B-mine", "**Built with Meta Llama 3**", "Llama-mine"),
        ("llama3.2", "Llama-mine", "**Built with Llama**", "mine-Llama-3.2"),
    ],
)
def test_other_llama_licences_have_duties_of_their_own(tmp_path, key, name, words, refused):
    licence = LLAMA_LICENCES[key]
    agreement = f"{licence.title}\n(text of the agreement, made up)\n"
    (tmp_path / "LICENSE").write_text(agreement, encoding="utf-8")
    base = llama(tmp_path) | {"licence": key}
    files = licence_files([base])
    version = key.removeprefix("llama")
    assert files["LICENSE"] == agreement and f"Llama {version} Community License, Copyright" in files["NOTICE"]
    record = RECORD | {"name": name, "licence": key, "base_models": [base]}
    card = render_card(record)
    data = ModelCard(card).data
    assert words in card and licence.policy in card and f"llama-{version}" in data.tags and data.license == key
    assert licence_problems(record) == []
    (problem,) = licence_problems(record | {"name": refused})
    assert f"must begin with {licence.name_begins!r}" in problem
    for file, text in {**files, "README.md": card}.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    assert list(check_licence(Contents(tmp_path, name))) == []
    (tmp_path / "README.md").write_text(card.replace(words, "").replace(licence.policy, ""), encoding="utf-8")
    assert len(list(check_licence(Contents(tmp_path, refused)))) == 3
    (tmp_path / "LICENSE").write_text(AGREEMENT, encoding="utf-8")
    with pytest.raises(CardError, match=f"not the {licence.family} agreement"):
        licence_files([base])


def test_other_licences_owe_what_is_due_and_no_more(tmp_path):
    assert licence_files([]) == {}
    assert licence_files([{"role": "vision_tower", "id": "me/llama3.1-lookalike", "licence": "mit"}]) == {}
    assert licence_files([{"role": "language_model", "id": "meta-llama/Llama-3.1-8B", "licence": None}]) == {}
    apache = licence_files([{"role": "language_model", "id": "/home/me/SmolLM2", "licence": "apache-2.0"}])
    assert set(apache) == {"LICENSE", "NOTICE"}
    assert (
        apache["LICENSE"].strip().startswith("Apache License") and "END OF TERMS AND CONDITIONS" in apache["LICENSE"]
    )
    assert "modified weights of SmolLM2," in apache["NOTICE"] and "Llama" not in apache["NOTICE"]


def test_publishing_problems_are_named():
    assert licence_problems(RECORD) == [] == licence_problems(TINY)
    problems = licence_problems(RECORD | {"name": "llava-llama3.1", "licence": "apache-2.0"})
    assert len(problems) == 2 and "must begin with 'Llama'" in problems[0] and "'apache-2.0'" in problems[1]


def test_the_record_survives_json():
    assert render_card(json.loads(json.dumps(RECORD))) == render_card(RECORD)
