"""Every fact of the LLaVA-LLaMA-3.1 model card has its place in ours, written from its recipe as we ship it."""

import re

import pytest
from hub_server import running_hub
from huggingface_hub import ModelCard, constants
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_model_card import MARKDOWN, RECORD, STAGE, body, replaced, table_starting, tables, text, without_files

from llava_llama31.model_card import render_card
from llava_llama31.trainer.export.provenance import base_models_of
from llava_llama31.trainer.recipes.derived import derive
from llava_llama31.trainer.recipes.loading import load_recipe


# what a run of the recipe would have found out; the card's own figures where it tells any
ROWS = {"projector": (558_128, 270_000, 3_000), "pretrain": (558_128, 270_000, 270_000), "instruct": (157_712,) * 3}
DEVICES = {"projector": 1, "pretrain": 8, "instruct": 8}
HOURS = {"projector": 1.0, "pretrain": 30.0, "instruct": 39.0}
QUESTION = "<image>\n{question}\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava_llama31.trainer.export.provenance.local_checkpoint", lambda name, where: tmp_path_factory)
        recipe = load_recipe("llama31-8b-card")
        return make_record(recipe, base_models_of(recipe))


def make_record(recipe, base_models) -> dict:
    stages = []
    for name, stage in recipe.stages.items():
        rows, usable, selected = ROWS[name]
        trained = selected - int(selected * stage.validation_fraction)
        derived = derive(stage, trained, DEVICES[name], where=name)
        (source,) = stage.data
        data = {"name": source.name, "hub_id": source.hub_id, "license": source.license, "rows": rows}
        data |= {"usable": usable, "selected": selected, "dropped": {"missing_image": rows - usable}}
        facts = {"trainable": stage.trainable, "learning_rate": stage.learning_rates(), "epochs": stage.epochs}
        facts |= {key: getattr(stage, key) for key in ("global_batch", "micro_batch", "schedule", "weight_decay")}
        facts |= {"gradient_accumulation": derived.gradient_accumulation, "num_processes": DEVICES[name]}
        facts |= {"steps": derived.steps, "warmup_steps": derived.warmup_steps, "precision": stage.precision}
        stages.append(STAGE | facts | {"name": name, "data": [data], "minutes": 60 * HOURS[name]})
    score = {"accuracy": 0.60482, "low": 0.592, "high": 0.618}
    evaluation = {"dataset": recipe.evaluation.name, "num_questions": 5000, "failed": 0, "prompt": QUESTION}
    evaluation |= {"decoding": "greedy, at most 64 new tokens", "protocols": {"vlmevalkit-2024": score}}
    return {
        "name": "Llama-3.1-8B-LLaVA",
        "recipe": recipe.model_dump(mode="json"),
        "command": "accelerate launch --num_processes 8 examples/train.py llama31-8b-card",
        "licence": recipe.model.license,
        "base_models": base_models,
        "stages": stages,
        "evaluation": evaluation,
        "environment": {"hardware": "8 x NVIDIA A100-SXM4-80GB"},
    }


# fact of the card -> first cell of a table of ours, row, and what stands there for the three stages
STAGE_FACTS = {
    "stages in this order": ("", ["projector", "pretrain", "instruct"]),
    "what each trains": ("trainable parts", ["multi_modal_projector", *["multi_modal_projector, language_model"] * 2]),
    "learning rates 1e-5, 2e-5, 1e-5": (
        "learning rate",
        [
            "multi_modal_projector: 1e-5",
            "multi_modal_projector: 2e-5, language_model: 2e-5",
            "multi_modal_projector: 1e-5, language_model: 1e-5",
        ],
    ),
    "epochs 1, 1, 2": ("epochs", ["1", "1", "2"]),
    "batch per device 1, 2, 2": ("batch per device", ["1", "2", "2"]),
    "accumulation 16": ("gradient accumulation", ["16"] * 3),
    "devices 1, 8, 8": ("processes", ["1", "8", "8"]),
    "global batches 16, 256, 256": ("global batch", ["16", "256", "256"]),
    "DeepSpeed none, ZeRO-3, ZeRO-3 with parameters offloaded": (
        "DeepSpeed",
        ["none", "zero3", "zero3-offload-params"],
    ),
    "warm-up ratio 0.03": ("warm-up, share of steps", ["0.03"] * 3),
    "weight decay 0.1": ("weight decay", ["0.1"] * 3),
    "beta 1": ("Adam beta 1", ["0.9"] * 3),
    "beta 2": ("Adam beta 2", ["0.95"] * 3),
    "Adam epsilon": ("Adam epsilon", ["1e-8"] * 3),
    "AdamW": ("optimizer", ["adamw"] * 3),
    "clip 1.0": ("maximum gradient norm", ["1"] * 3),
    "bf16": ("precision", ["bfloat16"] * 3),
    "gradient checkpointing": ("activation checkpointing", ["yes"] * 3),
    "schedule": ("schedule", ["cosine"] * 3),
    "seed 42": ("seed", ["42"] * 3),
    "length limit 2048, image tokens not counted": ("longest record, text tokens", ["2,048"] * 3),
    "1 % held out": ("share held out for validation", ["0.01"] * 3),
    "evaluated every 200 steps": ("steps between evaluations", ["200"] * 3),
    "saved every 200 steps": ("steps between checkpoints", ["200"] * 3),
    "2 checkpoints kept": ("checkpoints kept", ["2"] * 3),
    "incomplete batches dropped": ("incomplete last batch", ["drop"] * 3),
    "steps": ("steps", ["185", "1,044", "1,218"]),
}


@pytest.mark.parametrize("fact", STAGE_FACTS)
def test_a_fact_of_the_stages(record, fact):
    row, expected = STAGE_FACTS[fact]
    assert {line[0]: line[1:] for line in table_starting(render_card(record), "")}[row] == expected


LICENCES = (
    "LAION, CC3M and SBU captions, each under its own terms",
    "CC BY 4.0 and OpenAI's terms (written by GPT-4)",
)
PRETRAIN = ["llava-pretrain (liuhaotian/LLaVA-Pretrain)", "558,128", "270,000"]
MISSING = "missing_image: 288,128"
TABLE_FACTS = {
    "LLaVA-1.6's vision encoder": ("part", ["vision_tower", "llava-hf/llava-v1.6-vicuna-7b-hf", "not stated"]),
    "Llama-3.1-8B-Instruct": ("part", ["language_model", "meta-llama/Llama-3.1-8B-Instruct", "llama3.1"]),
    "3,000 sampled for stage 1": ("stage", ["projector", *PRETRAIN, "3,000", MISSING, LICENCES[0]]),
    "558K rows, 270K usable, and why": ("stage", ["pretrain", *PRETRAIN, "270,000", MISSING, LICENCES[0]]),
    "the instruct set, written by GPT": (
        "stage",
        [
            "instruct",
            "llava-instruct-150k (liuhaotian/LLaVA-Instruct-150K)",
            *["157,712"] * 3,
            "missing_image: 0",
            LICENCES[1],
        ],
    ),
    "60.482 on TextVQA": ("protocol", ["vlmevalkit-2024", "60.482 %", "59.20 % to 61.80 %"]),
}


@pytest.mark.parametrize("fact", TABLE_FACTS)
def test_a_fact_in_a_table(record, fact):
    first, row = TABLE_FACTS[fact]
    assert row in table_starting(render_card(record), first)


TEXT_FACTS = {
    "its architecture": "LLaVA-1.6 (LLaVA-NeXT) architecture",
    "8 A100 of 80 GB": "| hardware | 8 x NVIDIA A100-SXM4-80GB |",
    # 1 x 1 h + 8 x (30 + 39) h
    "hours": "| hours of training x processes | 553 |",
    "TextVQA": "- set: TextVQA (val)",
    "greedy": "- decoding: greedy",
    "the evaluation's prompt": f"```text\n{QUESTION}\n```",
    "the command": "examples/train.py llama31-8b-card",
    "Llama's licence": "**Built with Llama**",
}


@pytest.mark.parametrize("fact", TEXT_FACTS)
def test_a_fact_in_the_text(record, fact):
    assert TEXT_FACTS[fact] in render_card(record)


def test_the_metadata(record):
    data = ModelCard(render_card(record)).data
    assert data.license == "llama3.1" and data["base_model_relation"] == "finetune"
    assert data.base_model == ["llava-hf/llava-v1.6-vicuna-7b-hf", "meta-llama/Llama-3.1-8B-Instruct"]
    assert data.datasets == ["liuhaotian/LLaVA-Pretrain", "liuhaotian/LLaVA-Instruct-150K"]
    assert [result.metric_value for result in data.eval_results] == [60.482]


# --- validates, renders, and holds up under hostile data


@pytest.fixture(scope="module")
def hub():
    with running_hub("hf_" + "c" * 34) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


PIECES = ["<", ">", "|", "`", "```", "\n", "---", "{{", "}}", "{%", "%}", "](", "![", "http://e.org", "<!--", "-->"]
PIECES += ["# ", "- ", "\\", "*", "_", "~~~", ": ", "&lt;", "'", '"', "license: mit", "<img src=x onerror=alert(1)>"]
PIECES += [
    "\u2028",
    "\u202e",
    "\x00",
    "\x85",
    "\ufeff",
    "a",
    " ",
    "<!-- end use 0123456789abcdef -->",
    "</td>",
    "\t",
    "%",
]
HOSTILE = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join) | st.text(min_size=1, max_size=20)


@pytest.mark.slow
@settings(max_examples=60)
@given(HOSTILE.filter(lambda value: value.strip()))
@example("x\n```\n<b>out of the block</b>\n")
def test_no_string_of_the_data_leaves_its_place(hub, value):
    plain = without_files(RECORD)
    card, reference = render_card(replaced(plain, value)), render_card(replaced(plain, "x"))
    card.encode()
    ModelCard(card).validate()
    assert list(ModelCard(card).data.to_dict()) == list(ModelCard(reference).data.to_dict())
    tokens, expected = (MARKDOWN.parse(body(text)) for text in (card, reference))
    assert [token.type for token in tokens] == [token.type for token in expected]
    markers = [token.content for token in tokens if token.type == "html_block"]
    assert all(re.fullmatch(r"<!-- [^<>]+ -->\n?", marker) for marker in markers)
    kinds = {child.type for token in tokens for child in token.children or []}
    assert kinds <= {"text", "strong_open", "strong_close", "softbreak", "code_inline"}
    assert all(len({len(row) for row in table}) == 1 for table in tables(card))
    assert [[len(row) for row in table] for table in tables(card)] == [
        [len(row) for row in table] for table in tables(reference)
    ]
    assert render_card(replaced(plain, value), card) == card
    assert text(tables(card)[0][0][0]) == "part"


def test_the_original_cards_twin_is_taken_by_a_hub(hub, record):
    ModelCard(render_card(record)).validate()
    assert hub.counts()["validate_yaml"] > 0
