"""Measures the speed and memory of the data check.

    python benchmarks/check_data.py [--records 1000000] [--with-tokens 20000]

Writes LLaVA records (JSON array) to a temporary folder and prints records per CPU second of one core: for the checks
of the JSON only, then with image headers, then with tokens by a small byte-level BPE tokenizer. Peak memory is that of
the measuring process. Times are CPU times, which a busy machine does not change much.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from llava_llama31.trainer.costs.matrix_peak import cpu_instructions
from llava_llama31.trainer.data.check.check import DataCheck, _first_equal, check_sources
from llava_llama31.trainer.data.check.row_checker import Limits, RowChecker, check_rows
from llava_llama31.trainer.data.sources.records import open_records
from llava_llama31.trainer.recipes.schema import DataSource


NUM_IMAGES = 200
TEXT = "the sign says stop a red bus on left of street and reads open from nine to five with two people near it"


def write_records(path: Path, num_records: int) -> None:
    """LLaVA records as long as those of LLaVA's instruction data: two questions with short answers."""
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(TEXT.split(), k=rng.randint(6, 24))) for _ in range(5000)]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(num_records):
            question, answer, second = rng.choices(sentences, k=3)
            record = {
                "id": f"{number:012d}",
                "image": f"images/{number % NUM_IMAGES:06d}.jpg",
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}?"},
                    {"from": "gpt", "value": answer},
                    {"from": "human", "value": f"{second}?\nAnswer the question using a single word or phrase."},
                    {"from": "gpt", "value": str(number)},
                ],
            }
            file.write("[" if number == 0 else ",\n")
            json.dump(record, file)
        file.write("]\n")


def write_images(folder: Path) -> None:
    """Write JPEGs with the sizes of photographs."""
    folder.mkdir()
    rng = random.Random(0)
    for number in range(NUM_IMAGES):
        size = rng.choice([(640, 480), (480, 640), (1024, 768), (500, 375), (1024, 683)])
        Image.effect_noise(size, 40).convert("RGB").save(folder / f"{number:06d}.jpg")


def json_side(folder: Path) -> Callable[[], int]:
    """Index, parse and check every row, and look for duplicates, without images or tokens."""

    def run() -> int:
        store = open_records(DataSource(name="million", path=str(folder / "million.json")))
        digests = bytearray()
        for found in check_rows(RowChecker(store, None, Limits(), "skip"), num_workers=0):
            digests += found.digests
            assert not found.rejects
        first = _first_equal(digests)
        assert (first == np.arange(len(store))).all()
        return len(store)

    return run


def whole_check(folder: Path) -> Callable[[], int]:
    """`check_sources` without a processor: JSON, image headers, report, cache."""
    source = DataSource(name="million", path=str(folder / "million.json"))

    def run() -> int:
        report = check_sources([source], DataCheck(decode=False, num_workers=0), cache_dir=folder / "cache")
        return report.sources[0].num_rows

    return run


def headers(folder: Path) -> Callable[[], int]:
    return _some(folder, None, decode=False)


def tokens(folder: Path) -> Callable[[], int]:
    return _some(folder, _processor(), decode=False)


def decoded(folder: Path) -> Callable[[], int]:
    return _some(folder, None, decode=True)


def _some(folder: Path, processor, *, decode: bool) -> Callable[[], int]:
    def run() -> int:
        store = open_records(DataSource(name="some", path=str(folder / "some.json")))
        checker = RowChecker(store, processor, Limits(), "decode" if decode else "header")
        for found in check_rows(checker, num_workers=0):
            assert not found.rejects
        return len(store)

    return run


def _processor():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from llava_llama31.processing import CHAT_TOKENS, build_processor

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=list(CHAT_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    return build_processor(
        PreTrainedTokenizerFast(tokenizer_object=backend),
        image_size=336,
        patch_size=14,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.25, 0.25, 0.25),
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )


def measured(prepare: Callable[[Path], Callable[[], int]], folder: Path) -> tuple[int, float, float]:
    """Records, CPU seconds (without imports) and peak memory in MB of a run in a separate process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(prepare, folder, sender))
    process.start()
    result = receiver.recv()
    process.join()
    return result


def _measure(prepare: Callable[[Path], Callable[[], int]], folder: Path, sender) -> None:
    run = prepare(folder)
    started = _cpu_seconds()
    number = run()
    seconds = _cpu_seconds() - started
    sender.send((number, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def _cpu_seconds() -> float:
    """CPU seconds of this process and its finished children: a separate process decodes the images."""
    return sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--with-tokens", type=int, default=20_000)
    args = parser.parse_args()
    rows = [
        ("JSON side: index, parse, check, duplicates", json_side),
        ("the same, image headers, report, cache", whole_check),
        ("found again in the cache", whole_check),
        ("JSON and image headers", headers),
        ("JSON, image headers and tokens", tokens),
        ("JSON and decoded images", decoded),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_records(folder / "million.json", args.records)
        write_records(folder / "some.json", args.with_tokens)
        write_images(folder / "images")
        print(f"{cpu_instructions()}; {(folder / 'million.json').stat().st_size / 2**20:.0f} MiB of JSON")
        print(f"{'check':45}{'records':>10}{'CPU s':>9}{'records/s a core':>18}{'peak MB':>9}")
        for label, prepare in rows:
            number, seconds, megabytes = measured(prepare, folder)
            print(f"{label:45}{number:>10,}{seconds:>9.2f}{number / seconds:>18,.0f}{megabytes:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
