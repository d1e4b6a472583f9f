"""`llava-llama31`: train, check data, plan, doctor, assemble, evaluate, score, browse, export, publish.

llava-llama31 train tiny
"""

import argparse
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_llama31 import __version__
from llava_llama31.trainer.errors import EXIT_FAULT, EXIT_INTERRUPTED, EXIT_KEYBOARD, EXIT_MEMORY, EXIT_USER, EndedElsewhere, Interrupted, UserError
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.redaction import LONGEST_MESSAGE, SafeFormatter, printable, redacted, shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run one command, and return its exit code: 0, or one of docs/recipes.md."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    log = logging.StreamHandler()
    log.setFormatter(SafeFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    warnings.filterwarnings("ignore", module="PIL")  # one a metadata tag: a hostile image has thousands
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers fork after the tokenizer was used
    # read at torch's first allocation: huge pages, without which a CPU spends a tenth of a step on page faults
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what matters of its warnings is checked here
    try:
        return options.run(options)
    except UserError as error:
        return _say(str(error), error.exit_code, debug=options.debug)
    except EndedElsewhere as error:
        if error.untold:
            return _say(error.untold, error.exit_code, debug=options.debug)
        if options.debug:
            sys.stderr.write(shown(traceback.format_exc()))
        return error.exit_code
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED
    except MemoryError:
        return _say("the host has no memory left (fix: give this process more)", EXIT_MEMORY, debug=options.debug)
    except OSError as error:
        return _say(f"{error.filename or 'a file'}: {error.strerror or error}", EXIT_USER, debug=options.debug)
    except KeyboardInterrupt:
        print("stopped; run the same command to resume from the last checkpoint", file=sys.stderr)  # noqa: T201
        return EXIT_KEYBOARD
    except Exception:  # a fault of ours: Python's own traceback would show a secret that a message holds
        sys.stderr.write(shown(traceback.format_exc()))
        return EXIT_FAULT


def _say(error: str, exit_code: int, *, debug: bool) -> int:
    """Tell what the user can mend, and give back the exit code."""
    if debug:
        sys.stderr.write(shown(traceback.format_exc()))
    print(f"error: {printable(redacted(error), LONGEST_MESSAGE)}", file=sys.stderr)  # noqa: T201
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-llama31", description="LLaVA-NeXT on Llama 3.1, from parts to score.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _command(commands, "train", _train, "run a recipe's stages, evaluate and export")
    _recipe_arguments(train)

    plan = _command(commands, "plan", _plan, "what a recipe will do, without doing it")
    _recipe_arguments(plan)
    _plan_arguments(plan)
    _json_argument(plan)

    recipes = _command(commands, "recipes", _recipes, "list the shipped recipes, or copy one out")
    recipes.add_argument("copy", nargs="?", metavar="NAME", help="recipe to print as YAML")

    check = _command(commands, "check-data", _check_data, "go over all records and images before training")
    check.add_argument("data", nargs="+", metavar="RECIPE|FILE", help="one recipe, or data files")
    check.add_argument("--image-root", metavar="DIR", help="default: the folder of each file")
    check.add_argument("--processor", metavar="DIR", help="checkpoint whose processor counts the tokens of FILES")
    check.add_argument("--format", default="auto", choices=("auto", "llava", "sharegpt", "messages", "cauldron"))
    check.add_argument("--max-tokens", type=int, metavar="N", help="longest record, image tokens counted")
    check.add_argument("--max-pixels", type=int, metavar="N", help="largest image, height x width")
    check.add_argument("--on-bad", metavar="POLICY", help="error, skip or quarantine; or REASON=POLICY,...")
    check.add_argument("--rejects", metavar="FILE", help="where the unusable records are listed (JSON lines)")
    check.add_argument("--no-decode", action="store_true", help="read image headers only")
    check.add_argument("--output", metavar="DIR", help="the recipe's run folder; default: runs/RECIPE")
    check.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    _json_argument(check)

    doctor = _command(commands, "doctor", _doctor, "what this machine, or a launch, lacks, and how to mend it")
    doctor.add_argument("--output", metavar="DIR", help="folder that runs will write to; default: runs")
    _json_argument(doctor)

    parts = _command(commands, "assemble", _assemble, "vision tower + projector + Llama -> one checkpoint")
    parts.add_argument("--vision-tower", required=True, metavar="DIR", help="a LLaVA checkpoint, a CLIP or a DINOv2")
    parts.add_argument("--language-model", required=True, metavar="DIR", help="a Llama-family model with tokenizer")
    parts.add_argument("--projector", metavar="DIR", help="a LLaVA checkpoint or safetensors file; default: fresh")
    parts.add_argument("--output", required=True, metavar="DIR", help="new folder; it appears when it is complete")
    parts.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parts.add_argument("--image-size", type=int, metavar="PX", help="side of a tile; default: the tower's own")
    parts.add_argument("--vision-feature-layer", type=int, metavar="N", help="hidden state to project; default: -2")
    parts.add_argument("--add-chat-tokens", action="store_true", help="make Llama 3.1's turn tokens if missing")
    parts.add_argument("--seed", type=int, default=0, help="of a fresh projector")

    evaluate = _command(commands, "evaluate", _evaluate, "ask a model the questions of a TextVQA-format file")
    evaluate.add_argument("model", metavar="MODEL", help="a folder that stock Transformers opens as LlavaNext")
    evaluate.add_argument("--data", required=True, metavar="FILE", help="JSON lines, official JSON, or parquet")
    evaluate.add_argument("--questions", metavar="FILE", help="the questions that go with VQA-style annotations")
    evaluate.add_argument("--image-root", metavar="DIR", help="default: the folder of FILE")
    evaluate.add_argument(
        "--preset", choices=("card", "llava", "lmms-eval"), default="card", help="whose prompt; default: card"
    )
    evaluate.add_argument("--ocr", choices=("rapidocr",), help="read OCR tokens for --preset llava from the pictures")
    evaluate.add_argument(
        "--jpeg-rounds",
        type=int,
        choices=range(10),
        default=0,
        metavar="N",
        help="re-encode each picture N times; the card did it twice",
    )
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="ask only the first N questions")
    evaluate.add_argument(
        "--batch-size", type=_number_or_auto, metavar="N|auto", help="default: auto, by the device's memory"
    )
    evaluate.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    evaluate.add_argument(
        "--batch-invariant", action="store_true", help="bfloat16 answers that no batch size changes; slower"
    )
    evaluate.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    evaluate.add_argument("--device", metavar="NAME", help="torch's name; default: the GPU where there is one")
    evaluate.add_argument("--blind", action="store_true", help="shuffle the pictures between questions")
    evaluate.add_argument("--output", metavar="DIR", help="default: a folder under runs/evaluate")
    evaluate.add_argument("--no-browser", action="store_true", help="write no HTML file to browse")
    _json_argument(evaluate)

    score = _command(commands, "score", _score, "score a predictions file, or compare two; no model needed")
    score.add_argument(
        "predictions", metavar="PREDICTIONS", help="ours, LLaVA's answers, lmms-eval's JSON, VLMEvalKit's TSV or xlsx"
    )
    score.add_argument("other", nargs="?", metavar="OTHER", help="a second file, compared with the first")
    score.add_argument("--annotations", required=True, metavar="FILE", help="JSON lines, JSON, TSV or parquet")
    score.add_argument("--questions", metavar="FILE", help="the questions that go with VQA-style annotations")
    _json_argument(score)

    browse = _command(commands, "browse", _browse, "one HTML file with every question, picture, answer and score")
    browse.add_argument("predictions", metavar="PREDICTIONS")
    browse.add_argument("--data", required=True, metavar="FILE", help="JSON lines, official JSON, or parquet")
    browse.add_argument("--image-root", metavar="DIR", help="default: the folder of FILE")
    browse.add_argument("--output", metavar="FILE.html", help="default: beside PREDICTIONS, with its name")
    browse.add_argument("--limit", type=_positive, metavar="N", help="show only the first N questions")
    browse.add_argument("--image-side", type=_positive, default=512, metavar="PX", help="longest side of a picture")

    metric = _command(commands, "export-metric", _export_metric, "write the score as a Hugging Face `evaluate` metric")
    metric.add_argument("--output", default="textvqa_accuracy", metavar="DIR", help="default: textvqa_accuracy")

    export = _command(commands, "export", _export, "write a finished run's two-door folder again, with its card")
    export.add_argument("folder", metavar="RUN", help="folder of a finished run")
    export.add_argument("--output", metavar="DIR", help="default: RUN/export, or RUN/export-DIALECT")
    export.add_argument(
        "--dialect",
        choices=("native", "transformers-4.52"),
        default="native",
        help="transformers-4.52: for Transformers 4.52 to 5.5, stock classes only",
    )

    publish = _command(commands, "publish", _publish, "check a model, upload it, check what came up, and merge it")
    publish.add_argument("source", metavar="RUN|FOLDER", help="a finished run, or an exported folder")
    publish.add_argument(
        "--repo-id", required=True, metavar="OWNER/NAME", help="a model made from Llama: OWNER/Llama…"
    )
    publish.add_argument("--private", action="store_true", help="leave the repository private")
    publish.add_argument("--collection", metavar="SLUG", help="collection to put it into, as its address names it")
    publish.add_argument("--dry-run", action="store_true", help="check and show what would be done; write nothing")
    _json_argument(publish)
    return parser


def _plan_arguments(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--devices", type=_positive, default=1, metavar="N", help="of all machines; default: 1")
    plan.add_argument("--devices-per-node", type=_positive, metavar="M", help="default: all in one machine")
    plan.add_argument("--device-memory", type=_above_zero, metavar="GB", help="10^9 bytes: does each stage fit?")
    plan.add_argument(
        "--engine", metavar="NAME", help="ddp, zero1 to zero3, zero3-offload-params, zero3-offload, fsdp2"
    )
    plan.add_argument("--mfu", type=_above_zero, metavar="X", help="share of the peak that training reaches: hours")
    plan.add_argument("--peak-tflops", type=_above_zero, metavar="X", help="of a device, in the stage's precision")
    plan.add_argument("--price", type=_above_zero, metavar="P", help="of a device for an hour: cost")
    plan.add_argument("--rows", action="append", default=[], metavar="NAME=N", help="of data that is not here")
    plan.add_argument("--tokens-per-row", type=_positive, metavar="N", help="of data that is not counted")


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    help_text: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help_text, description=help_text)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


def _number_or_auto(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", dest="json_output", help="print one JSON object on stdout")


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or a YAML file")
    parser.add_argument("--output", metavar="DIR", help="folder of the run; default: runs/RECIPE")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="e.g. stages.projector.epochs=2",
    )


def _run_folder(options: argparse.Namespace, recipe: str) -> Path:
    return Path(options.output) if options.output else Path("runs", Path(recipe).stem)


def _train(options: argparse.Namespace) -> int:
    with Signals().handled() as signals:
        from llava_llama31.trainer.recipes.loading import load_recipe

        output = _run_folder(options, options.recipe)
        recipe = load_recipe(options.recipe, output=output, overrides=options.overrides)
        sets = [argument for override in options.overrides for argument in ("--set", override)]
        command = shlex.join(["llava-llama31", "train", options.recipe, *sets])
        from llava_llama31.trainer.runs.run import run_recipe

        run_recipe(recipe, output, command=command, signals=signals)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.commands.plan import plan_command

    return plan_command(options, _run_folder(options, options.recipe))


def _recipes(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.recipes.loading import SHIPPED, load_recipe, read_recipe_text

    if options.copy:
        sys.stdout.write(read_recipe_text(options.copy)[0])
    else:
        for name in SHIPPED:
            sys.stdout.write(f"{name:28}{load_recipe(name).description}\n")
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.commands.check_data import check_files, check_recipe
    from llava_llama31.trainer.recipes.loading import SHIPPED

    is_recipe = options.data[0] in SHIPPED or Path(options.data[0]).suffix in (".yaml", ".yml")
    if is_recipe and len(options.data) > 1:
        raise UserError("a recipe is checked alone", where=options.data[1], fix="give one recipe, or data files")
    return check_recipe(options, _run_folder(options, options.data[0])) if is_recipe else check_files(options)


def _doctor(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.doctor.command import doctor_command

    return doctor_command(options.output, json_output=options.json_output, debug=options.debug)


def _assemble(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.model.assemble import assemble
    from llava_llama31.trainer.model.locating import local_checkpoint

    logging.getLogger("llava_llama31").setLevel(logging.INFO)
    assemble(
        local_checkpoint(options.vision_tower, where="--vision-tower"),
        local_checkpoint(options.language_model, where="--language-model"),
        options.output,
        projector=local_checkpoint(options.projector, where="--projector", file=True) if options.projector else None,
        image_size=options.image_size,
        vision_feature_layer=options.vision_feature_layer,
        add_chat_tokens=options.add_chat_tokens,
        dtype=options.dtype,
        seed=options.seed,
    )
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.commands.evaluate import evaluate_command

    return evaluate_command(
        options.model,
        data=options.data,
        questions_file=options.questions,
        image_root=options.image_root,
        preset=options.preset,
        ocr=options.ocr,
        jpeg_rounds=options.jpeg_rounds,
        limit=options.limit,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        batch_invariant=options.batch_invariant,
        dtype=options.dtype,
        device=options.device,
        blind=options.blind,
        output=options.output,
        browser=not options.no_browser,
        json_output=options.json_output,
    )


def _score(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.evaluation.scoring import score_command

    return score_command(
        options.predictions,
        options.other,
        annotations=options.annotations,
        questions=options.questions,
        json_output=options.json_output,
    )


def _browse(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.evaluation.browser import browse_command

    return browse_command(
        options.predictions,
        data=options.data,
        image_root=options.image_root,
        output=options.output,
        limit=options.limit,
        image_side=options.image_side,
    )


def _export_metric(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.evaluation.metric import export_metric

    print(export_metric(options.output), file=sys.stderr)  # noqa: T201
    return 0


def _export(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.checkpoint.run_folder import RunFolder
    from llava_llama31.trainer.export.export import export_again

    run, output = RunFolder(Path(options.folder)), Path(options.output) if options.output else None
    folder = export_again(run, output, options.dialect)
    print(folder, file=sys.stderr)  # noqa: T201
    return 0


def _publish(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.publishing.command import publish_command

    return publish_command(
        options.source,
        options.repo_id,
        private=options.private,
        collection=options.collection,
        dry_run=options.dry_run,
        json_output=options.json_output,
    )


if __name__ == "__main__":
    sys.exit(main())
