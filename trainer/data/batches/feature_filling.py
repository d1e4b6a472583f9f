"""Computes the vision tower's features of a stage's images and keeps them in the feature cache."""

import logging
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Subset

from llava_llama31.trainer.data.batches.collator import Sample
from llava_llama31.trainer.data.batches.dataset import StageDataset
from llava_llama31.trainer.data.batches.feature_cache import FeatureCache, image_key
from llava_llama31.trainer.terminal import Terminal


logger = logging.getLogger(__name__)


def fill(
    cache: FeatureCache,
    encode: Callable[[torch.Tensor], torch.Tensor],
    dataset: StageDataset,
    *,
    share: tuple[int, int] = (0, 1),
    wait_for_everyone: Callable[[], None] = lambda: None,
    num_workers: int = 0,
    console: Terminal | None = None,
) -> None:
    """Store the features of a data set's images, in its order, until the quota is full.

    Args:
        encode: tiles (T, 3, H, W) -> features (T, P, D).
        dataset: without features.
        share: (rank, number of processes) among those that share the folder and the work.
        wait_for_everyone: barrier of these processes.
        num_workers: processes that read and tile images.
        console: to show progress on, where it is a terminal.
    """
    wanted = _missing(cache, dataset, share)
    wait_for_everyone()  # all plan by the same state
    loader = DataLoader(
        Subset(dataset, [index for index, _ in wanted]),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,  # type: ignore[arg-type]  # without batches it gets a sample
        multiprocessing_context="forkserver" if num_workers else None,
        generator=torch.Generator(),  # the training's random numbers stay what they are
    )
    terminal = console or Terminal(stderr=True, quiet=True)
    with terminal.progress(visible=console is not None and console.is_terminal) as bar:
        samples = zip(wanted, loader, strict=True)
        for (_, image_ids), sample in bar.track(samples, total=len(wanted), description="features of images"):
            assert sample.pixel_values is not None
            counts = [dataset.processor.num_tiles(size) for size in sample.image_sizes]
            # an image at a time, as its bits are asked for
            features = (encode(tiles) for tiles in sample.pixel_values.split(counts))
            entries = zip(image_ids, sample.image_sizes, features, strict=True)
            if not all(cache.store(*entry) for entry in entries):
                logger.warning(
                    "%s: %d images are stored, no more fit in feature_cache_gb; the others are computed",
                    cache.features,
                    len(cache),
                )
                break
    wait_for_everyone()
    cache.refresh()


def _missing(
    cache: FeatureCache, dataset: StageDataset, share: tuple[int, int]
) -> list[tuple[int, tuple[bytes, ...]]]:
    """Samples, with their images, that bring an image which is not stored; of them this process's share."""
    rank, num_processes = share
    planned: set[bytes] = set()
    wanted = []
    for index in range(len(dataset)):
        image_ids = tuple(image_key(image) for image in dataset.record(index).images)
        new = [image_id for image_id in image_ids if image_id not in cache and image_id not in planned]
        planned.update(new)
        if new and new[0][0] % num_processes == rank:
            wanted.append((index, image_ids))
    return wanted


def _unchanged(sample: Sample) -> Sample:
    return sample
