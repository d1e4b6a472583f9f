"""lmms-eval's own llava_hf on an exported folder, beside our evaluator: the same answers, or exit code 1.

    make upstream, or
    python benchmarks/upstream_client.py EXPORT QUESTIONS.jsonl --number 50

lmms-eval needs packages of its own (Makefile); its class opens the folder with stock Transformers, words each prompt
by the tokenizer's chat template and generates one answer after the other. Questions are rows of question_id, image_id,
image, question and answers; the prompt is lmms-eval's for TextVQA.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.models.simple.llava_hf import LlavaHf

from llava_llama31.trainer.evaluation.presets import PRESETS
from llava_llama31.trainer.evaluation.questions import Question, load_questions
from llava_llama31.trainer.evaluation.settings import EvaluationSettings
from llava_llama31.trainer.evaluation.textvqa import evaluate
from llava_llama31.trainer.model.opening import open_model


TASK, SPLIT = "textvqa_val", "validation"
MAX_NEW_TOKENS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--number", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=MAX_NEW_TOKENS)
    options = parser.parse_args()
    questions = load_questions(options.questions, limit=options.number)
    theirs = answers_of_lmms_eval(options.export, questions, options.new_tokens)
    ours = answers_of_ours(options.export, questions, options.new_tokens)
    different = [q for q in questions if theirs[str(q.question_id)] != ours[str(q.question_id)]]
    for question in different:
        key = str(question.question_id)
        print(f"{key}: {question.question!r}: lmms-eval {theirs[key]!r}, ours {ours[key]!r}")
    equal = len(questions) - len(different)
    print(f"{equal} of {len(questions)} answers of lmms-eval's llava_hf are those of `evaluate --preset lmms-eval`")
    return int(bool(different) or not questions)


def answers_of_lmms_eval(folder: Path, questions: list[Question], max_new_tokens: int) -> dict[str, str]:
    """Question id -> the answer of its model class, asked as its task textvqa_val asks."""
    # its default device_map, an empty text, is refused by Transformers 5.23
    model = LlavaHf(pretrained=str(folder), device="cpu", device_map="auto")
    images = [question.image for question in questions]
    model.task_dict = {TASK: {SPLIT: dict(enumerate(images))}}

    def visual(image: Any) -> list[Any]:
        return [image.open()]

    def generation() -> dict[str, Any]:  # each its own: it writes into it
        return {"max_new_tokens": max_new_tokens, "temperature": 0, "top_p": None, "num_beams": 1, "do_sample": False}

    requests = [
        Instance(
            request_type="generate_until",
            arguments=(PRESETS["lmms-eval"].text(question), generation(), visual, number, TASK, SPLIT),
            idx=0,
            metadata={"task": TASK, "doc_id": number, "repeats": 1},
        )
        for number, question in enumerate(questions)
    ]
    answers = model.generate_until(requests)
    return {str(question.question_id): answer.strip() for question, answer in zip(questions, answers, strict=True)}


def answers_of_ours(folder: Path, questions: list[Question], max_new_tokens: int) -> dict[str, str]:
    """Question id -> our evaluator's answer."""
    model, processor = open_model(folder)
    settings = EvaluationSettings(revision="export", preset=PRESETS["lmms-eval"], max_new_tokens=max_new_tokens)
    with tempfile.TemporaryDirectory() as output:
        evaluation = evaluate(model, processor, questions, output, settings)
        rows = evaluation.predictions.read_text(encoding="utf-8").splitlines()
    return {str(row["question_id"]): row["answer"] for row in map(json.loads, rows)}


if __name__ == "__main__":
    sys.exit(main())
