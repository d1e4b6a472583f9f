"""Opens a model as a stranger would and records its answers: run by path, in a separate process.

    python door.py download REPO REVISION
    python door.py open MODEL REVISION FOLDER [CODE.py]

It imports nothing of this package; the last line of its output is one JSON object. `open` imports torch and
Transformers once and forks a process for each door: `stock` opens the model with Transformers' own classes and none of
the folder's code, `remote` with `trust_remote_code=True`. Logits, (1, tokens, vocabulary) in float32 on the CPU, go
into FOLDER/DOOR.safetensors. `snippet`, if there is CODE.py, runs the code of a card next to a `sign.png` and records
what it prints.
"""

import atexit
import gc
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


QUESTIONS = ("What does the sign say?", "What is shown here?", "Which colours do you see?")
NUM_NEW_TOKENS = 16


def download(repo_id: str, revision: str) -> dict[str, Any]:
    """Download a revision into the environment's cache; returns its folder, or the error and the Hub's status."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        return {"folder": snapshot_download(repo_id, revision=revision, max_workers=4)}
    except (HTTPError, OSError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        return {"error": str(error), "status": cause.response.status_code if cause else None}


def open_door(door: str, model_id: str, revision: str, logits_file: str) -> dict[str, Any]:
    """Class names, hash of the logits for one image, and three greedy answers."""
    import torch
    from safetensors.torch import save_file
    from transformers import (
        AutoModelForImageTextToText,
        AutoProcessor,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
    )

    remote = door == "remote"
    model_class = AutoModelForImageTextToText if remote else LlavaNextForConditionalGeneration
    processor_class = AutoProcessor if remote else LlavaNextProcessor
    options: dict[str, Any] = {"revision": revision or "main"}
    if remote:
        options["trust_remote_code"] = True
    weights_only: dict[str, Any] = {}
    whole, adapter = model_id, Path(model_id, "adapter_config.json")
    if adapter.is_file():  # the base that they belong to, in the cache
        config = json.loads(adapter.read_text(encoding="utf-8"))
        whole, options["revision"] = config["base_model_name_or_path"], config["revision"]
    if _is_quantized(model_id, revision):
        from transformers import CompressedTensorsConfig

        # as the card's code does: with rounded activations, Transformers can't generate from images
        weights_only["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model: Any = model_class.from_pretrained(whole, dtype="auto", use_safetensors=True, **options, **weights_only)
    processor = processor_class.from_pretrained(whole, **options)
    if adapter.is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, model_id)
    model = model.eval()
    torch.manual_seed(0)
    samples = []
    for number, question in enumerate(QUESTIONS):
        inputs = _inputs(processor, question, number).to(model.dtype)
        with torch.no_grad():
            if number == 0:
                logits = model(**inputs).logits.float().contiguous()
            output = model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        samples.append({"question": question, "answer": answer})
    save_file({"logits": logits}, logits_file)
    return {
        "model": type(model).__name__,
        "processor": type(processor).__name__,
        "logits_sha256": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
        "finite": bool(torch.isfinite(logits).all()),
        "samples": samples,
    }


def _is_quantized(model_id: str, revision: str) -> bool:
    from transformers import PreTrainedConfig

    if Path(model_id, "adapter_config.json").is_file():
        return False
    return "quantization_config" in PreTrainedConfig.get_config_dict(model_id, revision=revision or "main")[0]


def run_snippet(code_file: str) -> dict[str, Any]:
    """What a card's code prints, one text per call."""
    _image(0).save("sign.png")
    texts: list[str] = []
    with open(code_file, encoding="utf-8") as code:
        exec(compile(code.read(), code_file, "exec"), {"print": texts.append})
    return {"texts": texts}


def _image(number: int) -> Any:
    """Gradients with a few bars, the same on every machine."""
    import numpy as np
    from PIL import Image

    height, width = ((96, 160), (160, 96), (128, 128))[number]
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, (rows // 8 + columns // 16) % 2 * 255], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def _inputs(processor: Any, question: str, number: int) -> Any:
    content = [{"type": "image", "image": _image(number)}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def open_all(model_id: str, revision: str, folder: str, code_file: str = "") -> dict[str, Any]:
    """What each process found; of one that failed, the last line of its error, and nothing of those after it."""
    gc.disable()  # a fifth of the imports' time; this process and its forks soon end
    atexit.register(gc.freeze)  # and a search in all of them at its end
    # stock classes would resize with it, which gives other pixels than training: the doors differ by their code alone
    hidden: dict[str, Any] = {"torchvision": None}
    sys.modules.update(hidden)
    import torch  # noqa: F401  # before the forks, which then share it
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextForConditionalGeneration  # noqa: F401

    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for door in ("stock", "remote"):
        jobs[door] = partial(open_door, door, model_id, revision, f"{folder}/{door}.safetensors")
    if code_file:
        jobs["snippet"] = partial(run_snippet, code_file)
    results: dict[str, Any] = {}
    for name, job in jobs.items():
        results[name] = _forked(job, Path(folder, f"{name}.json"))
        if "error" in results[name]:
            break
    return results


def _forked(job: Callable[[], dict[str, Any]], file: Path) -> dict[str, Any]:
    """Run a job in a fork; its result comes back by the file."""
    child = os.fork()
    if child == 0:
        try:
            result = job() | {"imports_our_package": "llava_llama31" in sys.modules}
        except BaseException as error:
            result = {"error": traceback.format_exception_only(error)[-1].strip().splitlines()[-1]}
        file.write_text(json.dumps(result))
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return json.loads(file.read_text()) if status == 0 else {"error": "it was killed"}


def main(arguments: list[str]) -> None:
    kind, *rest = arguments
    result = download(*rest) if kind == "download" else open_all(*rest)
    sys.stdout.write(f"\n{json.dumps(result)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
