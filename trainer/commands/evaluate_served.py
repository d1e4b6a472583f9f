"""`llava-llama31 evaluate --engine vllm` and `--url`: the same questions, prompts and scores, answered by a server."""

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_llama31.trainer.commands.evaluate_pages import print_files, write_page, write_task_pages
from llava_llama31.trainer.commands.evaluate_questions import (
    task_questions,
    tasks_to_ask,
    textvqa_questions,
    with_settings,
)
from llava_llama31.trainer.commands.score_tables import print_json, print_report, print_task_report
from llava_llama31.trainer.evaluation.presets import PRESETS


if TYPE_CHECKING:
    from rich.progress import Progress

    from llava_llama31.trainer.evaluation.answering import Answers, ToAsk
    from llava_llama31.trainer.evaluation.served import Sampled, Server
    from llava_llama31.trainer.evaluation.task_evaluation import TaskToAsk
    from llava_llama31.trainer.evaluation.textvqa import Evaluation


def run_served(options: argparse.Namespace) -> bool:
    """Ask a server all questions; whether every one is answered."""
    from llava_llama31.trainer.evaluation.answering import ToAsk
    from llava_llama31.trainer.evaluation.served import answer_by_server, other_models
    from llava_llama31.trainer.evaluation.textvqa import weights_revision
    from llava_llama31.trainer.model.locating import model_folder

    _check(options)
    read = task_questions(options) if options.task else []
    questions = [] if options.task else textvqa_questions(options)
    folder = model_folder(options.model, where="MODEL")
    revision = weights_revision(folder) or "unknown"
    named = f"served by {options.engine or 'a server'}"
    tasks: list[TaskToAsk | None] = list(tasks_to_ask(options, read, revision, named))
    asked = [part.to_ask for part in tasks if part is not None]
    if not options.task:
        settings = with_settings(options, revision, PRESETS[options.preset], options.data)
        output = Path(options.output) if options.output else settings.folder(options.model, named)
        tasks, asked = [None], [ToAsk(questions, output, settings)]
    with _server(options, folder, asked) as server, _progress() as progress:
        bar = progress.add_task(f"asking {server.client.url}", total=None)
        found = answer_by_server(
            server, asked, on_progress=lambda done, total: progress.update(bar, completed=done, total=total)
        )
        evaluations = [_scored(part, ask, answers) for part, ask, answers in zip(tasks, asked, found, strict=True)]
        pages = [] if options.no_browser else _pages(tasks, asked, evaluations, progress)
    samples = _samples(options, folder, asked, found)
    values = [evaluation.to_json() for evaluation in evaluations]
    for number, (value, answers) in enumerate(zip(values, found, strict=True)):
        more: dict[str, Any] = {"sample": samples[number].to_json()} if samples else {}
        if others := other_models(answers.rows):
            more["answered_by"] = others
            _say_who_answered(others, server.client.model)
        if more:
            value |= more
            answers.write_scores(value)
    if options.json_output:
        print_json(values[0] if len(values) == 1 else {"tasks": values})
    else:
        _print(options, tasks, evaluations, pages, samples)
    return all(evaluation.report.complete for evaluation in evaluations)


def _check(options: argparse.Namespace) -> None:
    from llava_llama31.trainer.errors import UserError

    if options.engine is not None and options.url is not None:
        raise UserError(
            "both a running server and an engine to start are named", where="--engine", fix="pass --engine or --url"
        )
    if options.ocr is not None:
        fix = "read the tokens with this package's engine first, and put them into the data"
        raise UserError("does not go with a server", where="--ocr", fix=fix)
    if options.url is not None and options.engine_options:
        raise UserError("the server runs already", where="--engine-options", fix="leave them out")
    if not options.task and options.data is None:
        raise UserError("no questions", where="--data", fix="name their file, or a benchmark with --task")


@contextmanager
def _server(options: argparse.Namespace, folder: Path, asked: "Sequence[ToAsk]") -> "Iterator[Server]":
    from llava_llama31.trainer.engines.client import EngineClient
    from llava_llama31.trainer.engines.serving import vllm_server
    from llava_llama31.trainer.evaluation.served import Server

    if options.url is not None:
        with EngineClient(options.url, options.served_model, named_by="--served-model") as client:
            yield Server(client, f"OpenAI-compatible server, model {client.model}", options.concurrency)
        return
    dtype = [] if options.dtype == "auto" else ["--dtype", options.dtype]
    log = Path(asked[0].output, "vllm.log")
    with vllm_server(folder, log, [*dtype, *shlex.split(options.engine_options)]) as url, EngineClient(url) as client:
        yield Server(client, f"vllm {' '.join([*dtype, options.engine_options])}".strip(), options.concurrency)


def _samples(
    options: argparse.Namespace, folder: Path, asked: "Sequence[ToAsk]", found: "Sequence[Answers]"
) -> "list[Sampled]":
    """A sample of each set's answers beside this package's own, once the server is gone."""
    from llava_llama31.trainer.evaluation.served import compare_sample
    from llava_llama31.trainer.model.opening import open_model

    if not options.compare:
        return []
    model, processor = open_model(folder, dtype=options.dtype, device=options.device)
    return [
        compare_sample(model, processor, ask, answers.rows, options.compare)
        for ask, answers in zip(asked, found, strict=True)
    ]


def _scored(part: "TaskToAsk | None", ask: "ToAsk", found: "Answers") -> "Evaluation[Any]":
    from llava_llama31.trainer.evaluation.scoring import score_answers
    from llava_llama31.trainer.evaluation.task_evaluation import score_found
    from llava_llama31.trainer.evaluation.textvqa import Evaluation

    if part is not None:
        return score_found(part, found, writes=True)
    evaluation = Evaluation(score_answers(ask.questions, found.rows), found.path, found.seconds, found.settings)
    found.write_scores(evaluation.to_json())
    return evaluation


def _pages(
    tasks: "Sequence[TaskToAsk | None]",
    asked: "Sequence[ToAsk]",
    evaluations: "Sequence[Any]",
    progress: "Progress",
) -> list[Path]:
    named = [part for part in tasks if part is not None]
    if named:
        return write_task_pages(named, evaluations, progress)
    return [write_page(evaluations[0], asked[0].questions, progress)]


def _print(
    options: argparse.Namespace,
    tasks: "Sequence[TaskToAsk | None]",
    evaluations: "Sequence[Evaluation[Any]]",
    pages: Sequence[Path],
    samples: "Sequence[Sampled]",
) -> None:
    for number, (part, evaluation) in enumerate(zip(tasks, evaluations, strict=True)):
        name = Path(options.data).name if part is None else part.task.title
        title = f"{Path(options.model).name}, {name}, prompt {options.preset}"
        title = f"{title}, images shuffled" if options.blind else title
        (print_report if part is None else print_task_report)(evaluation.report, title)
        print_files(evaluation, part, pages[number : number + 1])
        for sample in samples[number : number + 1]:
            _print_sample(sample)


def _say_who_answered(others: dict[str, int], asked: str) -> None:
    """A warning on stderr: some servers answer with whatever model they have."""
    from llava_llama31.trainer.terminal import Terminal

    named = ", ".join(f"{name} ({count} questions)" for name, count in others.items())
    Terminal(stderr=True).print(f"the server was asked for {asked} and names what has answered: {named}")


def _print_sample(sample: "Sampled") -> None:
    from llava_llama31.trainer.terminal import Terminal

    facts = sample.to_json()
    Terminal().print(f"{facts['equal']} of {facts['compared']} sampled answers are those of this package's engine")
    if "first_difference" in facts:
        first = {name: json.dumps(value, ensure_ascii=False) for name, value in facts["first_difference"].items()}
        line = f"first difference: question {first['question_id']}: served {first['served']}, own {first['own']}"
        Terminal().print(f"{line}; `check-engine` looks for the cause")


def _progress() -> "Progress":
    from llava_llama31.trainer.terminal import Terminal

    return Terminal(stderr=True).progress(counted=True)
