"""Tiny models, processors and images, made offline.

torch, Transformers and this package are imported where they are used: the first process of xdist, for which all others
wait, runs no test.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import fcntl
import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
# no test talks to a host that has a certificate, and reading the machine's 140 of them takes each HTTP client 50 ms
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(Path(__file__).with_name("quick_start"))
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at once: their threads would wait for each other's cores
    os.environ["OMP_NUM_THREADS"] = "1"

import brief_finish
import early_settings  # noqa: F401  # before all that is large
import numpy as np
import psutil
import pytest
import yaml
from chromium import started
from hypothesis import HealthCheck, settings
from PIL import Image


if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration, PreTrainedTokenizerFast

    from llava_llama31 import LlavaLlama31ForConditionalGeneration


# how long an example takes depends on what else the machine does, and proves nothing
settings.register_profile(
    "untimed",
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
settings.load_profile("untimed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if TORTURE:
        return
    long = [item for item in items if item.get_closest_marker("torture")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if not item.get_closest_marker("torture")]


num_modules = 0  # at the last freeze


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A stage's end collects garbage: among what the tests make, not among all that was imported until now."""
    global num_modules
    if len(sys.modules) > num_modules + 50:
        gc.collect()
        gc.freeze()
        num_modules = len(sys.modules)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    """Reports as UTF-8, as which xdist sends them: output may hold the name of a file that is not."""
    report = yield
    report.sections = [(name, sendable(text)) for name, text in report.sections]
    if report.longrepr is not None and sendable(str(report.longrepr)) != str(report.longrepr):
        report.longrepr = sendable(str(report.longrepr))
    return report


def sendable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


TORTURE = os.environ.get("TORTURE") == "1"
TILE = 28
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]


def make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from llava_llama31.processing import CHAT_TOKENS

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["user assistant system", "What does the sign say?", "Answer the question using a single word or phrase."]
    backend.train_from_iterator(corpus * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def processor():
    from llava_llama31.processing import build_processor

    return build_processor(
        make_tokenizer(),
        image_size=TILE,
        patch_size=14,
        image_mean=(0.48, 0.46, 0.41),
        image_std=(0.27, 0.26, 0.28),
        image_grid_pinpoints=PINPOINTS,
    )


@pytest.fixture(scope="session")
def pristine_config(processor):
    from transformers import CLIPVisionConfig, LlamaConfig

    from llava_llama31 import LlavaLlama31Config
    from llava_llama31.processing import STOP_TOKENS

    stop_ids = processor.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    text = LlamaConfig(
        vocab_size=448,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=stop_ids,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=14,
        projection_dim=32,
    )
    return LlavaLlama31Config(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=4,
    )


@pytest.fixture
def tiny_config(pristine_config):
    """A copy of its own for every test: models write into their configuration."""
    return copy.deepcopy(pristine_config)


@pytest.fixture
def tiny_model(tiny_config):
    import torch

    from llava_llama31 import LlavaLlama31ForConditionalGeneration

    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True)
    model.generation_config.eos_token_id = list(tiny_config.text_config.eos_token_id)
    model.generation_config.pad_token_id = tiny_config.text_config.pad_token_id
    return model.eval()


@pytest.fixture(scope="session")
def make_stock():
    """Stock LlavaNext in float64 with a model's weights; its norms, which stock rounds to float32, are exact."""
    import torch
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class ExactNorm(LlamaRMSNorm):
        def forward(self, hidden):
            return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def make(model: LlavaLlama31ForConditionalGeneration) -> LlavaNextForConditionalGeneration:
        stock = LlavaNextForConditionalGeneration(LlavaNextConfig.from_dict(model.config.to_dict())).double()
        stock.load_state_dict(model.state_dict())
        for module in stock.modules():
            if isinstance(module, LlamaRMSNorm):
                module.__class__ = ExactNorm
        return stock

    return make


@pytest.fixture(scope="session")
def make_image():
    def make(height: int, width: int, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture(scope="session")
def base_folder(make_once, pristine_config, processor):
    """A checkpoint to train from, as `assemble` would leave it."""
    import torch

    from llava_llama31 import LlavaLlama31ForConditionalGeneration

    def fill(folder: Path) -> None:
        torch.manual_seed(0)
        tiny_config = copy.deepcopy(pristine_config)
        model = LlavaLlama31ForConditionalGeneration(tiny_config, packable=True)
        model.generation_config.eos_token_id = list(tiny_config.text_config.eos_token_id)
        model.generation_config.pad_token_id = tiny_config.text_config.pad_token_id
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    return make_once("base", fill)


@pytest.fixture(scope="session")
def lively_folder(make_once, base_folder) -> Path:
    """A checkpoint with larger random weights than a fresh one's, so that its answers differ in length and content."""
    import torch

    from llava_llama31.trainer.model.opening import open_model

    def fill(folder: Path) -> None:
        weights, processor = open_model(base_folder)
        torch.manual_seed(1)
        for parameter in weights.parameters():
            parameter.data = 0.25 * torch.randn_like(parameter)
        weights.generation_config.eos_token_id = list(range(200, 448, 7))
        weights.save_pretrained(folder)
        processor.save_pretrained(folder)

    return make_once("lively", fill)


@pytest.fixture
def lively_model(tiny_model):
    """Answers of differing length and content: larger random weights, and stop ids that it really reaches."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    tiny_model.generation_config.eos_token_id = list(range(200, 448, 7))
    return tiny_model


@pytest.fixture(scope="session")
def exported(tmp_path_factory, base_folder) -> Path:
    """Folders as a run exports them: `llama`, made from Llama 3.1, and `other`."""
    from llava_llama31.trainer.export.export import write_export
    from llava_llama31.trainer.model.opening import open_model

    root = tmp_path_factory.mktemp("exported")
    (root / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n(text of the agreement, made up)\n")
    model, processor = open_model(base_folder)
    for name, licence in (("llama", "llama3.1"), ("other", "apache-2.0")):
        base = {"role": "language_model", "id": "meta/base", "licence": licence, "folder": str(root)}
        sample = {"question": "what?", "prediction": "red", "answers": ["red"], "image": "samples/1.png"}
        record = {"name": f"Llama-{name}", "licence": licence, "base_models": [base], "samples": [sample]}
        write_export(root / name, model, processor, record, {"samples/1.png": Image.new("RGB", (30, 40), "red")})
    return root


@pytest.fixture(scope="session")
def data_folder(make_once, make_image):
    """44 LLaVA records, every fourth without an image, and 6 TextVQA-format questions."""

    def fill(folder: Path) -> None:
        write_data(folder, make_image)

    return make_once("data", fill)


def write_data(folder: Path, make_image: Callable[..., Image.Image]) -> None:
    sizes = [(30, 50), (60, 20), (28, 28), (20, 90), (55, 57)]
    words = ["red", "blue", "a tall tree", "two dogs", "nothing at all"]
    rows = []
    for i in range(44):
        human, row = f"what is it, {i}?", {"id": f"r{i}"}
        if i % 4:
            make_image(*sizes[i % 5], seed=i).save(folder / f"{i}.png")
            row["image"], human = f"{i}.png", f"<image>\n{human}"
        row["conversations"] = [{"from": "human", "value": human}, {"from": "gpt", "value": words[i % 5]}]
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    questions = [
        {"question_id": i, "image_id": str(i), "image": f"{i}.png", "question": "what?", "answers": ["red"] * 10}
        for i in (1, 2, 3, 5, 6, 7)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))


@pytest.fixture(scope="session")
def pristine_recipe(base_folder, data_folder):
    """A two-stage recipe of seconds, as the mapping that its YAML file holds."""
    stage = {
        "data": [{"name": "rows", "path": str(data_folder / "rows.json")}],
        "global_batch": 8,
        "micro_batch": 4,
        "epochs": 1,
        "precision": "float32",
        "logging_steps": 1,
        "save_steps": 2,
        "dataloader_workers": 0,
    }
    return {
        "name": "test",
        "seed": 1,
        "model": {"checkpoint": str(base_folder), "dtype": "float32"},
        "stages": {
            "projector": {**stage, "trainable": ["multi_modal_projector"], "learning_rate": 1e-2},
            "instruct": {
                **stage,
                "trainable": ["multi_modal_projector", "language_model"],
                "learning_rate": {"multi_modal_projector": 1e-3, "language_model": 2e-3},
            },
        },
        "evaluation": {"data": str(data_folder / "questions.jsonl"), "baselines": True, "max_new_tokens": 4},
    }


@pytest.fixture
def short_runs(request, monkeypatch) -> None:
    """Runs end soon, see brief_finish.py, but those of a test that is marked `whole_finish`."""
    if request.node.get_closest_marker("whole_finish") is None:
        brief_finish.shorten(monkeypatch.setattr)


@pytest.fixture
def recipe_content(pristine_recipe, short_runs):
    """A copy of its own for every test."""
    return copy.deepcopy(pristine_recipe)


@pytest.fixture
def finished_run(make_once, pristine_recipe, short_runs) -> Path:
    """A run of the recipe without questions, for tests to copy; all share it."""
    from llava_llama31.trainer.cli import main

    def fill(folder: Path) -> None:
        content = {key: value for key, value in pristine_recipe.items() if key != "evaluation"}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        assert main(["train", str(folder / "recipe.yaml"), "--output", str(folder / "run")]) == 0

    return make_once("finished", fill) / "run"


@pytest.fixture(scope="session")
def adopted_orphans() -> None:
    """A launcher's ranks become children of the tests' process when the launcher is gone, and so are found."""
    if sys.platform == "linux":
        pr_set_child_subreaper = 36  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def children() -> set[psutil.Process]:
    """Of this process; looking at all processes of the machine is left out where one call says that it has none."""
    if sys.platform == "linux":
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return set()
    return set(psutil.Process().children())


def leftovers(before: set[psutil.Process]) -> set[psutil.Process]:
    """Children of this process that are not among those `before`, and all that they started.

    What a child of `before` starts is its own: a browser that serves many tests opens a renderer when it likes.
    """
    left = set()
    for child in children() - before:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            # multiprocessing keeps a fork server and a resource tracker for later tests
            if "from multiprocessing" not in " ".join(child.cmdline()):
                left |= {child, *child.children(recursive=True)}
    return left


@pytest.fixture(autouse=True)
def no_process_is_left(adopted_orphans) -> Iterator[None]:
    """What a test started ends with it, after a timeout too."""
    before = children()
    yield
    if left := leftovers(before):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """One folder for all workers of this run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def make_once(shared_folder) -> Callable[[str, Callable[[Path], object]], Path]:
    """A function that makes a folder by its name for all workers of this run; the first one makes it, others wait."""

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, part = shared_folder / f"once-{name}", shared_folder / f"once-{name}.part"
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                fill(part)
                part.rename(folder)
        return folder

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, shared_folder, monkeypatch):
    """No test reads or writes the user's caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    # all workers' own: C++ headers are compiled once
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared_folder / "inductor"))


@pytest.fixture(scope="session")
def fast_bfloat16() -> None:
    """For tests whose recipe insists on bfloat16, which `train` refuses on a CPU that emulates it."""
    from llava_llama31.trainer.costs.matrix_peak import measure_cpu_speed

    if (speed := measure_cpu_speed()).is_slow_in_bfloat16:
        pytest.skip(str(speed))


@pytest.fixture
def run_recipe(short_runs):
    """Train in this process, with these keys in all stages; returns the run's folder."""
    from llava_llama31.trainer.cli import main

    def run(content: dict, folder: Path, **keys) -> Path:
        for stage in content["stages"].values():
            stage |= keys
        recipe = folder.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump(content, sort_keys=False))
        assert main(["train", str(recipe), "--output", str(folder)]) == 0
        return folder

    return run


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    yield from started(tmp_path_factory.mktemp("profile"))


@pytest.fixture
def window(chromium):
    """Chromium; whatever the test does, no page may err or ask for anything but its own file."""
    chromium.resize(1280)
    chromium.prefer("light")
    chromium.console(), chromium.requests()
    yield chromium
    assert chromium.console() == []
    assert {re.sub(r"#.*", "", url) for url in chromium.requests()} == {
        re.sub(r"#.*", "", chromium.run("return location.href"))
    }


def user(*parts):
    return {
        "role": "user",
        "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts],
    }


def answer(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


SYSTEM = {"role": "system", "content": [{"type": "text", "text": "be short"}]}
# name of the images -> their (height, width); turns of each conversation about them
IMAGES = {"wide": [(20, 90)], "tall": [(130, 25)], "both": [(40, 60), (90, 30)], "tiny": [(3, 2)], "": []}
ROWS = [
    ("wide", [user(None, "what is wide?"), answer("this"), user("and?"), answer("no more than this one")]),
    ("wide", [user(None, "how wide?"), answer("very")]),
    ("wide", [user(None, "what is wide?"), answer("that")]),
    ("tall", [user("look: ", None), answer("a tree")]),
    ("tall", [SYSTEM, user(None, "tall?"), answer("yes")]),
    ("tall", [SYSTEM, user(None, "really?"), answer("yes, it is"), user("sure?"), answer("quite")]),
    ("both", [user(None, None, "which?"), answer("both"), user("why?"), answer("so")]),
    ("both", [user(None, None, "same?"), answer("no")]),
    ("tiny", [user(None, "tiny?"), answer("yes")]),
    ("", [user("no image"), answer("none")]),
    ("", [user("no image"), answer("none at all")]),
]


@pytest.fixture
def samples(processor, make_image):
    import torch

    from llava_llama31.trainer.data.batches.collator import Sample

    def sample(number):
        name, messages = ROWS[number]
        sizes = IMAGES[name]
        encoding = processor.encode(messages, sizes)
        tiles = [torch.from_numpy(processor.tiles(make_image(*size, seed=sum(size)))).double() for size in sizes]
        return Sample(
            record_id=f"r{number}",
            input_ids=encoding.input_ids,
            labels=encoding.labels,
            pixel_values=torch.cat(tiles) if tiles else None,
            image_sizes=sizes,
            num_image_tokens=sum(processor.num_image_tokens(size) for size in sizes),
            num_prefix_tokens=encoding.num_prefix_tokens,
            images=(name,) * len(sizes),
        )

    return [sample(number) for number in range(len(ROWS))]


@pytest.fixture
def collate(processor):
    from llava_llama31.trainer.data.batches.collator import Collator

    def collate(samples, **options):
        return Collator(processor.tokenizer.pad_token_id, processor.image_token_id, **options)(samples)

    return collate
