"""Yes/no and multiple-choice questions about the validation images, with the files that say how they are scored."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from llava_llama31.trainer.demo.images import Question, Scene


NUM_OPTIONS = 4
FILES = ("yes_no.yaml", "choices.yaml")


def write_tasks(folder: Path, scenes: Mapping[str, Scene], seed: int) -> None:
    """Write `yes_no.jsonl` and `choices.jsonl` with their tasks; images are those of the validation set.

    Args:
        folder: of the data, with `images/`.
        scenes: image id -> what it says.
        seed: the same seed and scenes give the same files.
    """
    pool: dict[str, list[str]] = {}
    for scene in scenes.values():
        for question in scene.questions:
            pool.setdefault(_kind(question), []).append(question.answer)
    for name, rows_of in (("yes_no", _yes_no_rows), ("choices", _choice_rows)):
        rows = [
            {**row, "image": f"images/{image_id}.png", "kind": scene.kind}
            for image_id, scene in scenes.items()
            for row in rows_of(image_id, scene, pool, random.Random(f"{seed}/{image_id}/{name}"))
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in FILES:
        text = (resources.files(__package__) / file).read_text(encoding="utf-8")
        (folder / file).write_text(text, encoding="utf-8")


def _kind(question: Question) -> str:
    """What is asked, whatever the goods: prices are compared with prices."""
    return " ".join(question.text.split()[:2])


def _wrong_answers(
    scene: Scene, question: Question, pool: Mapping[str, Sequence[str]], rng: random.Random
) -> Iterator[str]:
    """Answers to other questions about the image, then those of other images to such a question."""
    near = [other.answer for other in scene.questions if _kind(other) == _kind(question)]
    others = pool[_kind(question)]
    yield from rng.sample(near, len(near))
    yield from rng.sample(others, len(others))


def _apart(text: str, others: Sequence[str]) -> bool:
    """Whether no text is a part of the other, so that an answer names one of them."""
    return not any(text in other or other in text for other in others)


def _yes_no_rows(
    image_id: str, scene: Scene, pool: Mapping[str, Sequence[str]], rng: random.Random
) -> list[dict[str, Any]]:
    question = rng.choice(scene.questions)
    wrong = (text for text in _wrong_answers(scene, question, pool, rng) if _apart(text, [question.answer]))
    said = [(question.answer, "yes"), *((text, "no") for text in islice(wrong, 1))]
    return [
        {"question_id": f"{image_id}-{answer}", "question": f"{question.text} is it {text}?", "answer": answer}
        for text, answer in rng.sample(said, len(said))
    ]


def _choice_rows(
    image_id: str, scene: Scene, pool: Mapping[str, Sequence[str]], rng: random.Random
) -> list[dict[str, Any]]:
    question = rng.choice(scene.questions)
    options = [question.answer]
    for text in _wrong_answers(scene, question, pool, rng):
        if len(options) < NUM_OPTIONS and _apart(text, options):
            options.append(text)
    shuffled = rng.sample(options, len(options))
    letter = "ABCD"[shuffled.index(question.answer)]
    return [{"question_id": image_id, "question": question.text, "options": shuffled, "answer": letter}]
