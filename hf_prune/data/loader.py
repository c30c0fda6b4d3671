"""Batches of examples, in an order that depends on seed and epoch alone, ready for `Accelerator.prepare`."""

from collections.abc import Iterator

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from hf_prune.data.examples import ImageExamples, IterableExamples
from hf_prune.data.images import ImageSplits
from hf_prune.data.source import Split
from hf_prune.data.transforms import Transform
from hf_prune.errors import DataError


class EpochShuffle(Sampler[int]):
    """Shuffles the rows anew in every epoch, as a function of seed and epoch.

    Order and augmentation share one epoch, that of the dataset. `Accelerator.prepare` passes an epoch on
    to the sampler or to the dataset, whichever it finds behind its own wrappers, so both lead here. (With
    two processes and its `SeedableRandomSampler` the dataset never hears of an epoch, and the order
    depends on torch's global seed.)
    """

    def __init__(self, examples: ImageExamples, *, seed: int) -> None:
        self._examples = examples
        self._seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, and the augmentation with it."""
        self._examples.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self._seed, self._examples.epoch)).permutation(len(self._examples))
        yield from order.tolist()


def make_loader(
    split: Split,
    *,
    splits: ImageSplits,
    transform: Transform,
    batch_size: int,
    train: bool,
    seed: int = 0,
    num_workers: int = 0,
) -> DataLoader:
    """Make a loader of batches `{"pixel_values": (B, 3, H, W), "labels": (B,), "unreadable": (B,)}`.

    Pass it through `Accelerator.prepare`, which counts epochs and tells them to the loader; to begin at a
    later one, call `set_epoch` of the prepared loader. Without accelerate, call `loader.dataset.set_epoch`
    before each epoch. Workers are started anew for every epoch, or they would not learn of it.

    In training the last, smaller batch is dropped if there is a full one for every process. A streamed
    split keeps it, because its length is not known. Streams are evaluated with one worker at most: several
    would each end in a smaller batch, and accelerate cannot divide those without losing images.

    Args:
        split: Usually one of those in `splits`.
        splits: Says which columns to read, and how many classes there are.
        transform: From a PIL image to the model's input.
        batch_size: Images per process.
        train: Shuffle and augment; see `ImageExamples` for what becomes of unreadable images.
        seed: Decides order and augmentation.
        num_workers: Processes that decode; 0 decodes in this one.

    Raises:
        DataError: If `batch_size`, `num_workers` or `seed` is out of range, or the split is empty.
    """
    _check_settings(batch_size, num_workers, seed)
    # Workers are seeded from here, so that starting an epoch leaves torch's global stream alone.
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(split, datasets.Dataset):
        stream = IterableExamples(split, splits=splits, transform=transform, train=train, seed=seed)
        if not train:
            num_workers = min(num_workers, 1)
        return DataLoader(stream, batch_size=batch_size, num_workers=num_workers, generator=generator)
    if len(split) == 0:
        raise DataError(f"`split` must hold at least one image, got none from '{splits.source}'")
    examples = ImageExamples(split, splits=splits, transform=transform, train=train, seed=seed)
    return DataLoader(
        examples,
        batch_size=batch_size,
        sampler=EpochShuffle(examples, seed=seed) if train else None,
        drop_last=train and len(split) >= batch_size * _num_processes(),
        num_workers=num_workers,
        generator=generator,
    )


def _check_settings(batch_size: int, num_workers: int, seed: int) -> None:
    for name, value, smallest in (
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
        ("seed", seed, 0),
    ):
        if value < smallest:
            raise DataError(f"`{name}` must be at least {smallest}, got {value}")


def _num_processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
