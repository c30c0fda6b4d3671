"""Rows to training examples: decodes, augments reproducibly and lives with broken image files."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import get_worker_info

from hf_prune.data.decode import UNREADABLE, decode_image
from hf_prune.data.images import ImageSplits
from hf_prune.data.transforms import Transform
from hf_prune.errors import DataError

IGNORED_LABEL = -100
"""Label of an image that could not be read; torch's cross-entropy leaves it out by default."""

MAX_UNREADABLE_RUN = 1_000
SHUFFLE_BUFFER_ROWS = 1_000

Example = dict[str, torch.Tensor | int]


class ImageExamples(torch.utils.data.Dataset[Example]):
    """Examples of a split whose rows can be counted.

    An example is `{"pixel_values": (3, H, W), "labels": int, "unreadable": 0 or 1}`. Its pixels depend on
    seed, epoch and index alone, so that a resumed run, or one with other workers or processes, sees the
    same ones; the global random streams are left as they were.

    An image that cannot be read does not end an epoch, but is counted. In training the next readable row
    stands in for it; in evaluation it becomes a black image with `IGNORED_LABEL`.
    """

    def __init__(
        self,
        split: datasets.Dataset,
        *,
        splits: ImageSplits,
        transform: Transform,
        train: bool,
        seed: int = 0,
    ) -> None:
        self.epoch = 0
        self._rows = split
        self._train = train
        self._reader = _Reader.of(splits, transform, seed)
        self._unreadable_run = 0

    def __len__(self) -> int:
        return len(self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation; workers that are already running do not hear of it."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> Example:
        """Read one example.

        Raises:
            DataError: If a label is out of range, or 1,000 rows in a row cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must lie in 0..{len(self) - 1}, got {index}")
        return self._train_example(index) if self._train else self._eval_example(index)

    def _train_example(self, index: int) -> Example:
        error, num_tries = None, min(MAX_UNREADABLE_RUN, len(self))
        for step in range(num_tries):
            row = (index + step) % len(self)
            stored = self._rows[row]
            label = self._reader.label(stored, row=row)
            try:
                image = self._reader.decode(stored)
            except UNREADABLE as err:
                error = err
                continue
            return self._reader.example(image, label, key=(self.epoch, index), unreadable=int(step > 0))
        raise self._reader.too_many_unreadable(num_tries, row=index) from error

    def _eval_example(self, index: int) -> Example:
        stored = self._rows[index]
        label = self._reader.label(stored, row=index)
        try:
            image = self._reader.decode(stored)
        except UNREADABLE as err:
            self._unreadable_run += 1
            if self._unreadable_run >= MAX_UNREADABLE_RUN:
                raise self._reader.too_many_unreadable(self._unreadable_run, row=index) from err
            return self._reader.ignored()
        self._unreadable_run = 0
        return self._reader.example(image, label, key=(self.epoch, index), unreadable=0)


class IterableExamples(torch.utils.data.IterableDataset[Example]):
    """Examples of a streamed split, as `ImageExamples` gives them.

    Training rows pass through a shuffle buffer of 1,000, and rows that cannot be read are skipped:
    `unreadable` of the next example tells how many (those at the very end of a stream are not told).
    In evaluation they become black images with `IGNORED_LABEL`, each counting 1.

    The files of the dataset are shared out among the workers of a loader, so workers beyond the number of
    files stay idle. Pixels depend on seed, epoch and position in the stream of one worker: they are the
    same on every run with as many workers and processes.

    Args:
        split: Rows to read.
        splits: Says which columns to read, and how many classes there are.
        transform: From a PIL image to the model's input.
        train: Shuffle and skip, rather than keep the order and report.
        seed: Decides order and augmentation.
        rank: This process, if each process reads its own share. Leave it alone where accelerate divides
            the stream, as `Accelerator.prepare` does: every row would be divided twice.
        world_size: Number of processes that read.
    """

    def __init__(
        self,
        split: datasets.IterableDataset,
        *,
        splits: ImageSplits,
        transform: Transform,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.epoch = 0
        self._train = train
        self._reader = _Reader.of(splits, transform, seed)
        self._rank, self._world_size = rank, world_size
        if train:
            split = split.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_ROWS)
        self._rows = split if world_size == 1 else split_dataset_by_node(split, rank, world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose order and augmentation; workers that are already running do not hear of it."""
        self.epoch = epoch
        if self._train:  # `datasets` would reorder the files of an unshuffled stream too
            self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        worker_index, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        lane, num_lanes = self._rank * num_workers + worker_index, self._world_size * num_workers
        unreadable_run = 0
        for position, stored in enumerate(self._rows):
            label = self._reader.label(stored, row=position)
            try:
                image = self._reader.decode(stored)
            except UNREADABLE as err:
                unreadable_run += 1
                if unreadable_run >= MAX_UNREADABLE_RUN:
                    raise self._reader.too_many_unreadable(unreadable_run, row=position) from err
                if not self._train:
                    yield self._reader.ignored()
                continue
            yield self._reader.example(
                image,
                label,
                key=(self.epoch, position * num_lanes + lane),
                unreadable=unreadable_run if self._train else 0,
            )
            unreadable_run = 0


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """What one row needs to become an example; small, because every worker gets a copy."""

    image_column: str
    label_column: str
    num_labels: int
    source: str
    transform: Transform
    seed: int

    @classmethod
    def of(cls, splits: ImageSplits, transform: Transform, seed: int) -> "_Reader":
        return cls(
            image_column=splits.image_column,
            label_column=splits.label_column,
            num_labels=splits.num_labels,
            source=splits.source,
            transform=transform,
            seed=seed,
        )

    def label(self, stored: dict[str, Any], *, row: int) -> int:
        label = stored[self.label_column]
        if label is None or not 0 <= label < self.num_labels:
            raise DataError(
                f"labels must lie in 0..{self.num_labels - 1}, got {label} in row {row} of '{self.source}'; "
                "drop or mend this row"
            )
        return int(label)

    def decode(self, stored: dict[str, Any]) -> Image.Image:
        return decode_image(stored[self.image_column])

    def example(self, image: Image.Image, label: int, *, key: tuple[int, int], unreadable: int) -> Example:
        with own_randomness(self.seed, *key):
            pixel_values = self.transform(image)
        return {"pixel_values": pixel_values, "labels": label, "unreadable": unreadable}

    def ignored(self) -> Example:
        with own_randomness(self.seed):
            shaped_alike = self.transform(Image.new("RGB", (64, 64)))
        return {"pixel_values": torch.zeros_like(shaped_alike), "labels": IGNORED_LABEL, "unreadable": 1}

    def too_many_unreadable(self, run: int, *, row: int) -> DataError:
        return DataError(
            f"no more than {MAX_UNREADABLE_RUN} images in a row may be unreadable, got {run} at row {row} "
            f"of '{self.source}' (the last error is above); check that the files are there and complete"
        )


@contextmanager
def own_randomness(*key: int) -> Iterator[None]:
    """Seed Python, NumPy and torch by `key`, and put their global streams back afterwards."""
    # timm draws from all three; NumPy's legacy stream is the one that it uses.
    python_seed, numpy_seed, torch_seed = (int(word) for word in np.random.SeedSequence(key).generate_state(3))
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        random.seed(python_seed)
        np.random.seed(numpy_seed)  # noqa: NPY002
        # `torch.manual_seed` would reseed the accelerators too, which are not put back.
        torch.default_generator.manual_seed(torch_seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
