"""Quantised twins: what the files hold is what compressed-tensors computes; what it costs is measured, and limited."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_pixels import resize_by_pil
from transformers import LlavaNextForConditionalGeneration

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.evaluation.settings import EvaluationSettings
from llava_llama31.trainer.evaluation.textvqa import evaluate
from llava_llama31.trainer.evaluation.vqa_accuracy import PROTOCOL
from llava_llama31.trainer.export.export import export_again
from llava_llama31.trainer.export.quantized import SCHEMES, dense_shapes, quantize
from llava_llama31.trainer.model.opening import open_model
from llava_llama31.trainer.publishing.door import open_door
from llava_llama31.trainer.publishing.gate import check_folder
from llava_llama31.trainer.recipes.schema import Recipe


pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def run(lively_folder, pristine_recipe, data_folder, tmp_path_factory) -> Path:
    """A finished run of one stage with its answers, as far as `export` reads it."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    content = copy.deepcopy(pristine_recipe)
    content["model"]["license"] = "apache-2.0"
    del content["stages"]["projector"]
    recipe = Recipe.model_validate(content).model_dump(mode="json")
    shutil.copytree(lively_folder, folder.stage("instruct", ["instruct"]).final)
    base = {"role": "language_model", "id": "me/base", "licence": "apache-2.0", "folder": str(folder.path)}
    record = {"name": "mine", "licence": "apache-2.0", "base_models": [base], "stages": [{"name": "instruct"}]}
    atomic_folders.write_json(folder.record, record | {"recipe": recipe})
    export_again(folder)
    model, processor = open_model(folder.export)
    questions = load_questions(data_folder / "questions.jsonl")
    found = evaluate(
        model, processor, questions, folder.evaluation / "after", EvaluationSettings(revision="x", max_new_tokens=4)
    )
    shutil.copyfile(found.predictions, folder.predictions)
    return folder.path


@pytest.fixture(scope="module")
def twins(run, tmp_path_factory) -> dict[str, Path]:
    """The export, quantised by each scheme."""
    root, twins = tmp_path_factory.mktemp("twins"), {}
    for scheme in SCHEMES:
        twins[scheme] = Path(shutil.copytree(run / "export", root / scheme))
        assert quantize(twins[scheme], scheme) == 14  # seven in each of two layers
    return twins


def reference_logits(plain: Path, twin: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """By compressed-tensors alone, from the plain weights: it finds the scales and rounds in the forward pass."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    config = json.loads((twin / "config.json").read_text())["quantization_config"]
    del config["version"]
    model = LlavaNextForConditionalGeneration.from_pretrained(plain).eval()
    config["quantization_status"] = "initialized"
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            groups = module.weight.unflatten(1, (-1, scheme.weights.group_size or module.weight.shape[1]))
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
            module.weight_scale.data = scale
            module.quantization_status = QuantizationStatus.FROZEN
    with torch.no_grad():
        return model(input_ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantised_logits_are_the_librarys_own(run, twins, samples, scheme, capsys):
    input_ids = torch.tensor([samples[9].input_ids])
    model = LlavaNextForConditionalGeneration.from_pretrained(twins[scheme]).eval()
    with torch.no_grad():
        logits = model(input_ids).logits
        plain = LlavaNextForConditionalGeneration.from_pretrained(run / "export").eval()(input_ids).logits
    torch.testing.assert_close(logits, reference_logits(run / "export", twins[scheme], input_ids), atol=1e-5, rtol=0)
    apart = (logits - plain).abs().max() / plain.std()
    assert 1e-3 < apart < 2
    capsys.readouterr()
    ours, _ = open_model(twins[scheme])
    assert capsys.readouterr().err == ""
    with torch.no_grad():
        assert torch.equal(ours(input_ids).logits, logits)
    assert all(
        module.weight.dtype == torch.float32 for module in model.modules() if isinstance(module, torch.nn.Linear)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_but_the_decoders_layers_is_left_alone(run, twins, scheme):
    before, after = (load_file(folder / "model.safetensors") for folder in (run / "export", twins[scheme]))
    quantized = {name for name in before if ".layers." in name and "language_model" in name and "_proj." in name}
    assert len(quantized) == 14
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - quantized)
    shapes = dense_shapes({name: tuple(tensor.shape) for name, tensor in after.items()})
    assert shapes == {name: tuple(tensor.shape) for name, tensor in before.items()}
    name = min(quantized)
    assert (
        after[name if scheme != "w4a16" else name + "_packed"].dtype
        == {
            "fp8": torch.float8_e4m3fn,
            "int8": torch.int8,
            "w4a16": torch.int32,
        }[scheme]
    )


def test_what_is_quantised_already_or_too_narrow_is_refused(twins, run, tmp_path):
    with pytest.raises(UserError, match="quantised already"):
        quantize(twins["fp8"], "int8")
    folder = Path(shutil.copytree(run / "export", tmp_path / "narrow"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 120
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="widths divide by 32; they are 64, 120"):
        quantize(folder, "w4a16")


@pytest.mark.slow
def test_a_twin_is_scored_shown_and_limited(run, data_folder, tmp_path, capsys, monkeypatch):
    resize_by_pil(monkeypatch)
    assert main(["export", str(run), "--quantize", "int8"]) == 0
    folder = run / "export-int8"
    assert capsys.readouterr().out.strip() == str(folder)
    assert atomic_folders.verify(folder) is None and check_folder(folder, "mine") == []
    twin = json.loads((folder / "twin.json").read_text())
    # the same as anybody gets from the two files of answers
    asked = ["--annotations", str(data_folder / "questions.jsonl"), "--json"]
    assert main(["score", str(run / "predictions.jsonl"), str(folder / "predictions.jsonl"), *asked]) == 0
    compared = json.loads(capsys.readouterr().out)["protocols"][PROTOCOL]
    assert {key: twin[key] for key in ("first", "second", "difference", "low", "high")} == {
        key: compared[key] for key in ("first", "second", "difference", "low", "high")
    }
    card = (folder / "README.md").read_text()
    assert "## Quantised twin" in card and "14 linear layers" in card
    shown = f"{100 * twin['difference']:+.2f} points, {100 * twin['low']:+.2f} to {100 * twin['high']:+.2f}"
    assert f"| difference, paired 95 % interval | {shown} |" in card
    # as the card's code opens it, through both doors
    doors = [open_door(door, str(folder), "", str(tmp_path / door)) for door in ("stock", "remote")]
    assert doors[0]["logits_sha256"] == doors[1]["logits_sha256"] and doors[0]["finite"]
    assert doors[0]["model"] == "LlavaNextForConditionalGeneration" != doors[1]["model"]
    for lost, what in ((-0.02, "cost 2.00 points"), (None, "does not say")):
        worse = Path(shutil.copytree(folder, tmp_path / str(lost)))
        (worse / "twin.json").write_text(json.dumps(twin | {"difference": lost}))
        found = [finding for finding in check_folder(worse, "mine") if finding.rule == "twin"]
        assert len(found) == 1 and what in found[0].what
