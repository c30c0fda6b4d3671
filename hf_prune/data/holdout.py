"""Holds out a part of a split, and cuts a split down to a number of rows."""

import hashlib
from pathlib import PurePath
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from sklearn.model_selection import train_test_split

from hf_prune.data.columns import read_labels
from hf_prune.data.source import Split
from hf_prune.errors import DataError

HASH_BYTES = 8


def hold_out(train: Split, fraction: float, *, image_column: str, label_column: str, seed: int) -> tuple[Split, Split]:
    """Divide a split into a part to train on and a part held out.

    Rows that can be counted are divided at random, by class if every class has enough rows. A stream is
    divided by a hash of each image, which needs no count of rows, puts equal images on one side, and
    keeps the parts apart however workers and processes share the stream. (Taking its first rows would
    not: `skip` and `take` of `datasets` count anew in every worker, and would mix the parts.)

    Args:
        train: Rows with undecoded images.
        fraction: Share of rows to hold out, in (0, 1).
        image_column: Column of `{"bytes": ..., "path": ...}`.
        label_column: Column of class numbers.
        seed: Decides which rows are held out.

    Returns:
        The rows to train on and the rows held out.

    Raises:
        DataError: If either part would be empty.
    """
    if isinstance(train, Dataset):
        return _hold_out_rows(train, fraction, label_column=label_column, seed=seed)
    return _hold_out_stream(train, fraction, image_column=image_column, seed=seed)


def _hold_out_rows(train: Dataset, fraction: float, *, label_column: str, seed: int) -> tuple[Dataset, Dataset]:
    if len(train) < 2:
        raise DataError(f"holding out images for validation needs at least 2, got {len(train)}")
    labels = read_labels(train, label_column)
    rows = np.arange(len(train))
    try:
        kept, held = train_test_split(rows, test_size=fraction, stratify=labels, random_state=seed)
    except ValueError:  # a class with a single image, or fewer held-out rows than classes
        num_held = min(max(round(fraction * len(train)), 1), len(train) - 1)
        kept, held = train_test_split(rows, test_size=num_held, random_state=seed)
    return train.select(np.sort(kept)), train.select(np.sort(held))


def _hold_out_stream(
    train: IterableDataset, fraction: float, *, image_column: str, seed: int
) -> tuple[IterableDataset, IterableDataset]:
    threshold = round(fraction * 2 ** (8 * HASH_BYTES))
    parts = []
    for part, held_out in (("train", False), ("validation", True)):
        rows = train.filter(
            _is_on_side,
            input_columns=[image_column],
            fn_kwargs={"threshold": threshold, "seed": seed, "held_out": held_out},
        )
        if next(iter(rows), None) is None:
            raise DataError(
                f"every split must hold at least one image, got none for {part} with `train_val_split` "
                f"{fraction}; bring a validation split or use `streaming=False`"
            )
        parts.append(rows)
    return parts[0], parts[1]


def _is_on_side(image: dict[str, Any] | None, *, threshold: int, seed: int, held_out: bool) -> bool:
    image = image or {}
    # Folder and file name, not the whole path: the same on every machine.
    content = image.get("bytes") or "/".join(PurePath(image.get("path") or "").parts[-2:]).encode()
    digest = hashlib.blake2b(content, digest_size=HASH_BYTES, salt=str(seed).encode()[:16])
    return (int.from_bytes(digest.digest(), "big") < threshold) == held_out


def limit_rows(split: Split, max_rows: int | None, *, seed: int) -> Split:
    """Cut a split down to a random choice of rows in their order, a stream to its first rows.

    Args:
        split: Rows of any kind.
        max_rows: At least 1; None keeps all.
        seed: Decides the choice.
    """
    if max_rows is None:
        return split
    if not isinstance(split, Dataset):
        return split.take(max_rows)
    if max_rows >= len(split):
        return split
    chosen = np.random.default_rng(seed).choice(len(split), size=max_rows, replace=False)
    return split.select(np.sort(chosen))
