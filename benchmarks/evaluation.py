"""Compares our evaluator's questions per second with the way VLMEvalKit and lmms-eval run the same model.

Their way: one question at a time, its image through processor and vision tower each time, `generate` on stock
Transformers. Both get the same folder, a small LlavaNext with random weights and answers of a few tokens, and the
same questions, with TextVQA's ratio of questions to images (5,000 : 3,166) and its image sizes. Each driver runs in a
separate process, taking turns.

python benchmarks/evaluation.py --dtype float32 bfloat16
python benchmarks/evaluation.py --dtype float32 --questions 96 --images 3    # GQA's ratio; MME's is 2 an image
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from llava_llama31.trainer.costs.matrix_peak import cpu_instructions, measure_cpu_speed


NUM_QUESTIONS, NUM_IMAGES = 95, 60
MAX_NEW_TOKENS = 16
SIZES = [(768, 1024), (1024, 768), (683, 1024), (1024, 683), (576, 1024), (1024, 1024), (1024, 577)]  # height, width
DRIVERS = ("theirs", "ours", "invariant")
TEXT = {
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
VISION = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 168,
    "projection_dim": 384,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("float32", "bfloat16"),
        help="default: both, on a CPU that emulates bfloat16 float32",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--questions", type=int, default=NUM_QUESTIONS)
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--drive", choices=DRIVERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        print(json.dumps(drive(options.drive, options.folder, options.dtype[0], options.batch_size)))
        return 0
    speed = measure_cpu_speed()
    if options.dtype is None:
        options.dtype = ["float32"] if speed.is_slow_in_bfloat16 else ["float32", "bfloat16"]
    if speed.is_slow_in_bfloat16:
        print(speed)
    if "bfloat16" in options.dtype and speed.is_slow_in_bfloat16:
        parser.error("--dtype bfloat16: a batch would take minutes; use float32")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "model"))
        make_questions(Path(folder), options.questions, options.images)
        print(
            f"{cpu_instructions()}; {options.questions} questions on {options.images} images, best of {options.rounds}"
        )
        return max(compare(Path(folder), dtype, options.rounds, options.batch_size) for dtype in options.dtype)


def compare(folder: Path, dtype: str, rounds: int, batch_size: int) -> int:
    """Print one table; returns 1 if float32 answers differ."""
    results = {driver: [] for driver in DRIVERS}
    for _ in range(rounds):
        for driver in DRIVERS:
            command = [sys.executable, __file__, "--drive", driver, "--folder", str(folder), "--dtype", dtype]
            command += ["--batch-size", str(batch_size)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[driver].append(json.loads(run.stdout.splitlines()[-1]))
    print(f"\n{dtype}; GFLOP/s are those of a large {dtype} matrix product, before and after")
    print(f"{'':10}{'questions/s':>13}{'seconds':>9}{'memory':>11}{'GFLOP':>9}{'GFLOP/s':>12}{'of the floor':>14}")
    for driver in DRIVERS:
        best = min(results[driver], key=lambda result: result["seconds"])
        speed = len(best["answers"]) / best["seconds"]
        share = best["flops"] / statistics.mean(best["products"]) / best["seconds"]
        memory, work = best["memory"] / 2**20, best["flops"] / 1e9
        products = ", ".join(f"{product / 1e9:.0f}" for product in best["products"])
        print(f"{driver:10}{speed:13.2f}{best['seconds']:9.2f}{memory:8.0f} MiB{work:9.0f}{products:>12}{share:14.0%}")
    theirs = results["theirs"][0]["answers"]
    for driver in DRIVERS[1:]:
        rounds_of = zip(results["theirs"], results[driver], strict=True)
        ratio = [before["seconds"] / after["seconds"] for before, after in rounds_of]
        answers = results[driver][0]["answers"]
        same = sum(a == b for a, b in zip(theirs, answers, strict=True))
        rounds_named, length = ", ".join(f"{x:.2f}" for x in ratio), statistics.mean(map(len, answers))
        print(f"{driver}: {statistics.median(ratio):.2f} times as fast as theirs (by round: {rounds_named});")
        print(f"  {same} of {len(theirs)} answers identical, {length:.1f} tokens on average")
    return int(dtype == "float32" and any(run["answers"] != theirs for driver in DRIVERS for run in results[driver]))


def drive(driver: str, folder: Path, dtype: str, batch_size: int) -> dict:
    """Token ids of the answers, seconds without loading, floating-point operations, and peak memory in bytes.

    A shared machine's speed changes within minutes: `products` has that of a matrix product right before and after.
    """
    import torch

    if driver == "theirs":
        ask = ask_one_by_one(folder, getattr(torch, dtype))
    else:
        ask = ask_together(folder, getattr(torch, dtype), batch_size, batch_invariant=driver == "invariant")
    ask(2 * batch_size)  # warm: the memory of full batches is there, as it is in an evaluation of thousands
    products = [matmul_peak(dtype)]
    started = time.perf_counter()
    answers = ask(None)
    seconds = time.perf_counter() - started
    products.append(matmul_peak(dtype))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        ask(None)
    flops = counter.get_total_flops()
    return {"answers": answers, "seconds": seconds, "memory": memory, "flops": flops, "products": products}


def ask_one_by_one(folder: Path, dtype):
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(folder / "model", dtype=dtype).eval()
    processor = AutoProcessor.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]

    def ask(limit):
        answers = []
        for row in rows[:limit]:
            text = f"{row['question']}\nAnswer the question using a single word or phrase."
            messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
            image = Image.open(folder / row["image"]).convert("RGB")
            # the template already contains BOS
            inputs = processor(images=image, text=prompt, return_tensors="pt", add_special_tokens=False).to(dtype)
            with torch.inference_mode():
                output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
        return answers

    return ask


def ask_together(folder: Path, dtype, batch_size: int, batch_invariant: bool):
    from llava_llama31.trainer.distributed.devices import keep_freed_memory
    from llava_llama31.trainer.evaluation.questions import load_questions
    from llava_llama31.trainer.evaluation.settings import EvaluationSettings
    from llava_llama31.trainer.evaluation.textvqa import evaluate
    from llava_llama31.trainer.model.opening import open_model

    model, processor = open_model(folder / "model", dtype=str(dtype).removeprefix("torch."))
    questions = load_questions(folder / "questions.jsonl")
    keep_freed_memory()  # as the command does

    def ask(limit):
        with tempfile.TemporaryDirectory() as output:
            done = evaluate(
                model,
                processor,
                questions[:limit],
                output,
                EvaluationSettings(
                    revision="", batch_size=batch_size, max_new_tokens=MAX_NEW_TOKENS, batch_invariant=batch_invariant
                ),
            )
            rows = [json.loads(line) for line in done.predictions.read_text().splitlines()]
        return [row["token_ids"] for row in rows]

    return ask


def matmul_peak(dtype: str) -> float:
    """Floating-point operations per second of a large matrix product, the best of ten."""
    import torch

    size = 2048
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def make_questions(folder: Path, num_questions: int, num_images: int) -> None:
    import numpy as np
    from PIL import Image

    draw = random.Random(0)
    for i in range(num_images):
        height, width = SIZES[i % len(SIZES)]
        coarse = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    rows = []
    for i in range(num_questions):
        words = draw.choices(["what", "is", "the", "brand", "of", "this", "camera", "number", "sign"], k=7)
        rows.append({"question_id": i, "image_id": str(i % num_images), "image": f"{i % num_images}.jpg"})
        rows[-1] |= {"question": f"{' '.join(words)}?", "answers": ["stop"] * 10}
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(folder: Path, text_size: Mapping[str, int] = TEXT, vision_size: Mapping[str, int] = VISION) -> None:
    """A model with random weights and a byte tokenizer; by default CLIP of 12 layers and Llama of 12."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

    from llava_llama31 import LlavaLlama31Config, LlavaLlama31ForConditionalGeneration
    from llava_llama31.processing import CHAT_TOKENS, build_processor

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ["Answer the question using a single word or phrase.", "what is the brand of this camera number sign"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(CHAT_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(words * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    tile, num_words = vision_size["image_size"], text_size["vocab_size"]
    grid = [[tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile], [3 * tile, tile], [tile, 3 * tile]]
    processor = build_processor(
        tokenizer, image_size=tile, patch_size=14, image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28],
        image_grid_pinpoints=grid,
    )  # fmt: skip
    text = LlamaConfig(
        **text_size, max_position_embeddings=4096, pad_token_id=processor.tokenizer.pad_token_id,
        # one id in four ends an answer, which makes answers about as short as TextVQA's
        eos_token_id=list(range(3, num_words, 4)), tie_word_embeddings=False,
    )  # fmt: skip
    vision = CLIPVisionConfig(**vision_size, patch_size=14)
    config = LlavaLlama31Config(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id, image_grid_pinpoints=grid
    )
    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration(config, packable=True)
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # larger than a fresh model's, or all images would look the same to it
            parameter.data.mul_(4)
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.pad_token_id = text.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
