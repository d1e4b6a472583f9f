"""Makes everything that the recipe `tiny` starts from: a small vision tower, a small language model, and the data.

The tower stands in for CLIP: it learns to name the characters on random sheets of text. The language model stands in
for Llama: it learns to answer questions about pages of text, given as characters on a grid. Neither has seen what the
other sees; joining them is the work of the recipe's three stages.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import queue
import random
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_llama31.trainer.demo.tasks import write_tasks
from llava_llama31.trainer.worker_pools import spawned_pool

from .images import (
    ALPHABET,
    PATCH,
    PROMPT_SUFFIX,
    SHAPES,
    TILE,
    Glyph,
    Question,
    Scene,
    fitting_font,
    font_names,
    make_scene,
    paint,
    random_colours,
    write,
)


SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
STOP_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
CAPTION_PROMPTS = ("Describe the picture.", "What does the picture show?", "Write down the text in the picture.")
# Llama 3.1's split, except that digits stand alone: prices are read digit by digit
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
PATCHES = TILE // PATCH
SHEET = 240


@dataclass(frozen=True)
class TowerSettings:
    """Size and training of the tower; CLIP's architecture, or SigLIP's, which has no class token."""

    family: Literal["clip", "siglip"] = "clip"
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 4
    heads: int = 4
    sheets: int = 150
    steps: int = 900
    batch: int = 32
    learning_rate: float = 4e-3


@dataclass(frozen=True)
class LanguageModelSettings:
    """Size and training of the language model."""

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    vocabulary: int = 383
    scenes: int = 4000
    line_steps: int = 700
    page_steps: int = 400
    batch: int = 16
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Settings:
    """Everything that, with the seed, decides what `prepare` makes."""

    captions: int = 2400
    dialogues: int = 3000
    validation_pictures: int = 180  # its name is part of the fingerprint
    tower: TowerSettings = field(default_factory=TowerSettings)
    language_model: LanguageModelSettings = field(default_factory=LanguageModelSettings)

    def fingerprint(self, seed: int) -> str:
        """A hash of the settings and the seed."""
        content = asdict(self)
        if self.tower.family == "clip":  # as before there was another
            del content["tower"]["family"]
        return hashlib.sha256(json.dumps([content, seed, 2]).encode()).hexdigest()


SIGLIP = Settings(tower=TowerSettings(family="siglip"))


def prepare(folder: Path, *, seed: int, progress: Callable[[str], None], settings: Settings = Settings()) -> None:
    """Writes the tower, the language model and the data, whole or not at all; a finished folder is left as it is.

    Args:
        folder: receives `vision_tower/`, `language_model/` and `data/`.
        seed: the same seed and settings give the same files.
        progress: called with one line for each step done.
        settings: sizes and lengths of training.
    """
    fingerprint = settings.fingerprint(seed)
    done = folder / "fingerprint.txt"
    if done.is_file() and done.read_text() == fingerprint:
        progress(f"{folder} is complete for seed {seed}")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        staging.chmod(0o755)
        _train_parts(staging, seed, progress, settings)
        (staging / done.name).write_text(fingerprint)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _train_parts(folder: Path, seed: int, progress: Callable[[str], None], settings: Settings) -> None:
    # one thread each in two processes: twice as fast as one after the other on two threads, and repeatable
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as left:
        with _unseen_interrupts():
            messages = left.enter_context(context.Manager()).Queue()
            pool = left.enter_context(_ending_at_once(spawned_pool(2)))
            jobs = [
                pool.submit(train_tower, folder / "vision_tower", settings.tower, seed, messages),
                pool.submit(train_language_model, folder / "language_model", settings.language_model, seed, messages),
            ]
        write_data(folder / "data", settings, seed)
        progress(f"images: {settings.captions + settings.dialogues + settings.validation_pictures} drawn")
        while not all(job.done() for job in jobs) or not messages.empty():
            try:
                progress(messages.get(timeout=0.5))
            except queue.Empty:
                continue
        for job in jobs:
            job.result()


@contextlib.contextmanager
def _unseen_interrupts() -> Iterator[None]:
    """Processes started in it never see a Ctrl-C, which a terminal sends to them too; this one sees it afterwards."""
    resource_tracker.ensure_running()  # its start, with the first process, would let SIGINT through again
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextlib.contextmanager
def _ending_at_once(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """A pool whose workers an exception ends, that of a signal too; by itself a pool waits for their work."""
    before = set(multiprocessing.active_children())
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()
        raise
    finally:
        pool.shutdown()


# --- the data


def write_data(folder: Path, settings: Settings, seed: int) -> None:
    """Draws the images and writes `captions.json`, `instruct.json`, `validation.jsonl` and two tasks beside them."""
    (folder / "images").mkdir(parents=True)
    captions = [_caption_row(folder, f"caption-{n:05d}", seed) for n in range(settings.captions)]
    (folder / "captions.json").write_text(json.dumps(captions, indent=1))
    dialogues = [_dialogue_row(folder, f"dialogue-{n:05d}", seed) for n in range(settings.dialogues)]
    (folder / "instruct.json").write_text(json.dumps(dialogues, indent=1))
    names = [f"validation-{n:05d}" for n in range(settings.validation_pictures)]
    drawn = {name: _draw(folder, name, "validation", seed) for name in names}
    rows = [row for name, (scene, rng) in drawn.items() for row in _validation_rows(name, scene, rng)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tasks(folder, {name: scene for name, (scene, _) in drawn.items()}, seed)


def _draw(folder: Path, name: str, split: str, seed: int) -> tuple[Scene, random.Random]:
    rng = random.Random(f"{seed}/{name}")
    scene = make_scene(rng, split)
    paint(scene, rng)[0].save(folder / "images" / f"{name}.png", compress_level=1)
    return scene, rng


def _row(name: str, turns: list[tuple[str, str]]) -> dict:
    conversations = [
        part for asked, said in turns for part in ({"from": "human", "value": asked}, {"from": "gpt", "value": said})
    ]
    conversations[0]["value"] = "<image>\n" + conversations[0]["value"]
    return {"id": name, "image": f"images/{name}.png", "conversations": conversations}


def _caption_row(folder: Path, name: str, seed: int) -> dict:
    scene, rng = _draw(folder, name, "train", seed)
    return _row(name, [(rng.choice(CAPTION_PROMPTS), scene.caption)])


def _dialogue_row(folder: Path, name: str, seed: int) -> dict:
    scene, rng = _draw(folder, name, "train", seed)
    return _row(name, _question_turns(scene, rng, PROMPT_SUFFIX))


def _question_turns(scene: Scene, rng: random.Random, suffix: str) -> list[tuple[str, str]]:
    shuffled = rng.sample(scene.questions, len(scene.questions))
    return [(question.text + suffix, question.answer) for question in shuffled]


def _validation_rows(name: str, scene: Scene, rng: random.Random) -> list[dict]:
    return [
        {
            "question_id": f"{name}-{number}",
            "image_id": name,
            "image": f"images/{name}.png",
            "question": question.text,
            "answers": human_answers(question, rng),
        }
        for number, question in enumerate(scene.questions)
    ]


def human_answers(question: Question, rng: random.Random) -> list[str]:
    """Ten answers as ten people give them: the truth at least six times, other wordings, slips, `unanswerable`."""
    others = []
    for _ in range(rng.randrange(5)):
        slip = rng.randrange(len(question.answer))
        misread = question.answer[:slip] + question.answer[slip + 1 :]
        others.append(rng.choice((question.variant, question.variant, misread or "unanswerable", "unanswerable")))
    answers = [question.answer] * (10 - len(others)) + others
    rng.shuffle(answers)
    return answers


# --- the vision tower


def train_tower(folder: Path, settings: TowerSettings, seed: int, messages: queue.Queue) -> None:
    """Trains a vision tower to tell, for every patch, which character has its centre there, and saves it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = random.Random(f"{seed}/tower")
    tower = _new_tower(settings)
    first_patch = int(settings.family == "clip")  # after the class token
    _start_tower(tower, first_patch)
    head = nn.Linear(settings.hidden_size, 1 + len(ALPHABET))
    # a bare patch is an easy and frequent answer
    weight = torch.ones(1 + len(ALPHABET)).index_fill(0, torch.tensor(0), 0.3)
    sheets = [draw_sheet(rng) for _ in range(settings.sheets)]

    def loss() -> Tensor:
        tiles, characters = cut_tiles(sheets, rng, settings.batch)
        seen = head(tower(tiles).last_hidden_state[:, first_patch:])
        return cross_entropy(seen.flatten(0, 1), characters.flatten(), weight=weight)

    _train([*tower.parameters(), *head.parameters()], loss, settings.steps, settings.learning_rate, "tower", messages)
    with torch.no_grad():
        tiles, characters = cut_tiles([draw_sheet(rng) for _ in range(10)], rng, 400)
        right = head(tower(tiles).last_hidden_state[:, first_patch:]).argmax(-1) == characters
    messages.put(f"tower: reads {right[characters > 0].float().mean():.1%} of the characters on fresh sheets")
    _save_tower(tower, folder)


def _new_tower(settings: TowerSettings) -> CLIPVisionModel | SiglipVisionModel:
    sizes: dict[str, Any] = {
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "image_size": TILE,
        "patch_size": PATCH,
    }
    if settings.family == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**sizes, hidden_act="gelu"))
    return SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))


def _start_tower(tower: CLIPVisionModel | SiglipVisionModel, first_patch: int) -> None:
    """Starts from weights fit for so narrow a tower, and from position embeddings that know the grid."""
    embeddings = tower.embeddings
    for parameter in tower.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.7 / math.sqrt(parameter.shape[1]))
    nn.init.normal_(embeddings.patch_embedding.weight, std=1 / math.sqrt(3 * PATCH**2))
    quarter = tower.config.hidden_size // 4
    frequencies = 1.5 * torch.exp(torch.arange(quarter) * (-math.log(10.0) / quarter))
    places = torch.arange(PATCHES, dtype=torch.float32)
    across, down = places.repeat(PATCHES)[:, None], places.repeat_interleave(PATCHES)[:, None]
    waves = [wave(axis * frequencies) for axis in (across, down) for wave in (torch.sin, torch.cos)]
    with torch.no_grad():
        embeddings.position_embedding.weight.zero_()
        embeddings.position_embedding.weight[first_patch:] = torch.cat(waves, dim=1)


def _save_tower(tower: CLIPVisionModel | SiglipVisionModel, folder: Path) -> None:
    """Adds the last layer that LLaVA never uses, and saves the tower with what its images must go through."""
    tower.config.num_hidden_layers += 1
    whole = type(tower)(cast(Any, tower.config))
    whole.load_state_dict({**whole.state_dict(), **tower.state_dict()})
    whole.save_pretrained(folder)
    side = {"height": TILE, "width": TILE}
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": TILE},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


@dataclass(frozen=True)
class Sheet:
    """A square of random text: pixels (SHEET, SHEET, 3), and per patch 1 + the place in `ALPHABET`, or 0."""

    pixels: np.ndarray
    characters: np.ndarray


def draw_sheet(rng: random.Random) -> Sheet:
    """A sheet full of random letters and digits in random fonts, sizes and colours."""
    cell = rng.randint(12, 24)
    side = SHEET // PATCH
    image = Image.new("RGB", (side * cell, side * cell))
    canvas = ImageDraw.Draw(image)
    glyphs: list[Glyph] = []
    for row in range(0, side, 2):
        ground, ink = random_colours(rng)
        canvas.rectangle((0, (row - 0.5) * cell, image.width, (row + 1.5) * cell), fill=ground)
        if rng.random() < 0.2:
            canvas.line((0, (row - 0.5) * cell, image.width, (row - 0.5) * cell), fill=ink)
        font = fitting_font(rng.choice(font_names()), cell, rng)
        column = rng.randrange(3)
        while column < side:
            letters = ALPHABET[26:] if rng.random() < 0.35 else ALPHABET[:26]
            text = "".join(rng.choices(letters, k=rng.randint(1, 7)))[: side - column]
            glyphs += write(canvas, text, font, (column, row), cell, ink, rng)
            column += len(text) + rng.randint(1, 2)
    characters = np.zeros((side, side), dtype=np.int64)
    for glyph in glyphs:
        characters[glyph.row, glyph.column] = 1 + ALPHABET.index(glyph.character)
    return Sheet(np.asarray(image.resize((SHEET, SHEET), Image.Resampling.BICUBIC)), characters)


def cut_tiles(sheets: list[Sheet], rng: random.Random, number: int) -> tuple[Tensor, Tensor]:
    """Random tiles (number, 3, TILE, TILE), and what is in each of their patches (number, patches)."""
    tiles = np.empty((number, TILE, TILE, 3), dtype=np.float32)
    targets = np.empty((number, PATCHES, PATCHES), dtype=np.int64)
    for tile, target in zip(tiles, targets, strict=True):
        sheet = rng.choice(sheets)
        column, row = (rng.randrange(SHEET // PATCH - PATCHES + 1) for _ in range(2))
        left, top = column * PATCH, row * PATCH
        tile[:] = sheet.pixels[top : top + TILE, left : left + TILE]
        target[:] = sheet.characters[row : row + PATCHES, column : column + PATCHES]
    pixels = (torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - PIXEL_MEAN) / PIXEL_STD
    return pixels.contiguous(), torch.from_numpy(targets).flatten(1)


# --- the language model


def train_language_model(folder: Path, settings: LanguageModelSettings, seed: int, messages: queue.Queue) -> None:
    """Trains a tokenizer, then a Llama that reads text given as characters and answers questions; saves both."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = random.Random(f"{seed}/language model")
    scenes = []
    for _ in range(settings.scenes):
        scene = make_scene(rng, "train")
        scenes.append((scene, paint(scene, rng)[1]))
    tokenizer = train_tokenizer([scene for scene, _ in scenes[:1000]], settings.vocabulary)
    model = LlamaForCausalLM(_language_config(tokenizer, settings))
    reader = _Reader(tokenizer)
    for name, rows, steps in (
        ("lines", [reader.line_row(scene, rng) for scene, _ in scenes], settings.line_steps),
        ("pages", [reader.page_row(scene, glyphs, rng) for scene, glyphs in scenes], settings.page_steps),
    ):
        batches = _batches(rows, settings.batch, rng)

        def loss(batches: Iterator[tuple[Tensor, Tensor]] = batches) -> Tensor:
            tokens, labels = next(batches)
            hidden = model.model(input_ids=tokens).last_hidden_state
            following = pad(labels[:, 1:], (0, 1), value=-100)
            supervised = following >= 0
            return cross_entropy(model.lm_head(hidden[supervised]), following[supervised])

        label = f"language model, {name}"
        _train(list(model.parameters()), loss, steps, settings.learning_rate, label, messages)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(list(STOP_TOKENS)),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _language_config(tokenizer: PreTrainedTokenizerFast, settings: LanguageModelSettings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=1024,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(list(STOP_TOKENS)),
        pad_token_id=tokenizer.pad_token_id,
    )


def train_tokenizer(scenes: list[Scene], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows how questions are put; the text of the images stays in single characters."""
    prompts = [question.text + PROMPT_SUFFIX for scene in scenes for question in scene.questions]
    texts = [*prompts, *CAPTION_PROMPTS * (len(scenes) // 5), *(scene.caption for scene in scenes)]
    corpus = ["user\n\nassistant\n\n" + re.sub(r"\b[A-Z]+\b", "", text) for text in texts]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        model_max_length=1024,
    )


class _Reader:
    """Puts scenes into Llama-3.1 turns, the image given as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.characters = {character: self._ids(character)[0] for character in f"{ALPHABET} \n"}
        self.start = self._ids("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n")

    def line_row(self, scene: Scene, rng: random.Random) -> tuple[list[int], list[int]]:
        """The lines of text as they are, a caption or bare questions."""
        return self._row("\n".join(" ".join(line) for line in scene.lines), self._turns(scene, rng, ""))

    def page_row(self, scene: Scene, glyphs: list[Glyph], rng: random.Random) -> tuple[list[int], list[int]]:
        """The text at its place, patch by patch, after a thumbnail; a caption or questions in full form."""
        columns, rows = SHAPES[scene.shape]
        page = thumbnail(glyphs, columns, rows) + lay_out(glyphs, columns, rows)
        return self._row(page, self._turns(scene, rng, PROMPT_SUFFIX))

    def _turns(self, scene: Scene, rng: random.Random, suffix: str) -> list[tuple[str, str]]:
        if rng.random() < 0.25:
            return [(rng.choice(CAPTION_PROMPTS), scene.caption)]
        return _question_turns(scene, rng, suffix)

    def _row(self, page: str, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        tokens = self.start + [self.characters[character] for character in page]
        labels = [-100] * len(tokens)
        opening = "\n"
        for asked, said in turns:
            prompt = self._ids(f"{opening}{asked}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
            answer = self._ids(f"{said}<|eot_id|>")
            tokens += prompt + answer
            labels += [-100] * len(prompt) + answer
            opening = "<|start_header_id|>user<|end_header_id|>\n\n"
        return tokens, labels

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def lay_out(glyphs: list[Glyph], columns: int, rows: int) -> str:
    """The text of an image, one character a patch, one line a row: what a perfect tower would see in its tiles."""
    page = [[" "] * columns + ["\n"] for _ in range(rows)]
    for glyph in glyphs:
        page[glyph.row][glyph.column] = glyph.character
    return "".join(character for row in page for character in row)


def thumbnail(glyphs: list[Glyph], columns: int, rows: int) -> str:
    """The same shrunk to one tile, where characters fall upon one another and the last one stays."""
    tile = [" "] * PATCHES**2
    for glyph in glyphs:
        tile[glyph.row * PATCHES // rows * PATCHES + glyph.column * PATCHES // columns] = glyph.character
    return "".join(tile)


def _batches(
    rows: list[tuple[list[int], list[int]]], size: int, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of rows of like length, padded."""
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order) - size + 1, 16 * size):
            near = sorted(order[start : start + 16 * size], key=lambda index: len(rows[index][0]))
            groups = [near[first : first + size] for first in range(0, len(near), size)]
            for group in rng.sample(groups, len(groups)):
                tokens = [torch.tensor(rows[index][0]) for index in group]
                labels = [torch.tensor(rows[index][1]) for index in group]
                yield (
                    nn.utils.rnn.pad_sequence(tokens, batch_first=True),
                    nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
                )


# --- both


def _train(
    parameters: list[nn.Parameter],
    loss_of_next_batch: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    name: str,
    messages: queue.Queue,
) -> None:
    """AdamW with a short warm-up and a cosine down to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    warm_up = max(1, min(50, steps // 5))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    for step in range(1, steps + 1):
        loss = loss_of_next_batch()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps:
            messages.put(f"{name}: step {step}/{steps}, loss {loss.item():.3f}")
