"""Opens a labelled image dataset as train, validation and test splits that are checked and ready to read."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Image

from hf_prune.data.columns import find_columns, find_label_names, is_labelled
from hf_prune.data.holdout import hold_out, limit_rows
from hf_prune.data.source import EMBEDDED, Split, open_source
from hf_prune.errors import DataError

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}


@dataclass(frozen=True, kw_only=True)
class ImageSplits:
    """Labelled images in three splits, not yet decoded.

    Rows hold two columns: the image as stored (`{"bytes": ..., "path": ...}`) and its label number.
    """

    train: Split = field(repr=False)
    validation: Split = field(repr=False)
    test: Split = field(repr=False)
    label_names: tuple[str, ...]
    image_column: str
    label_column: str
    source: str
    notes: tuple[str, ...] = ()
    """What was replaced or left out, one sentence each, for logs and model cards."""

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.label_names)


def load_images(
    source: str | Path = EMBEDDED,
    *,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    train_val_split: float = 0.15,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> ImageSplits:
    """Open a labelled image dataset and settle its splits, columns and classes.

    Without a validation split, a part of train is held out for it: stratified by class where possible,
    and when streaming by a hash of each image, which needs no count of rows and stays the same
    however the stream is divided. Without a labelled test split, the validation split stands in for it.
    Nothing is decoded, and only label columns are read.

    Args:
        source: "digits" (embedded), a folder (class folders, split folders or parquet files), a parquet
            file or glob (all of it train), or a dataset id on the Hub.
        config_name: Configuration, for datasets that have several.
        image_column: Needed only if the dataset has several image columns, or one of another type.
        label_column: Needed only if several columns could be the label.
        streaming: Read rows while iterating; nothing is written to disk.
        train_val_split: Share of train held out for validation if there is no such split, in (0, 1).
        max_train_samples: Use at most so many training images: a random choice, or the first when streaming.
        max_eval_samples: The same for validation and for test, each.
        seed: Decides the held-out part and the random choices.
        cache_dir: Where `datasets` keeps downloads and Arrow files; its own default if None.

    Raises:
        DataError: If a setting is out of range, the dataset cannot be opened, its columns cannot be told,
            there is no train split, a split is empty, or labels are missing or out of range.
    """
    _check_settings(train_val_split, seed=seed, max_samples=(max_train_samples, max_eval_samples))
    found = open_source(source, config_name=config_name, streaming=streaming, cache_dir=cache_dir)
    source = str(source)
    splits = _choose_splits(found, source)
    features = splits["train"].features
    if features is None:
        raise DataError(f"'{source}' must state its columns, got a stream without; use `streaming=False`")
    image_column, label_column = find_columns(
        features, image_column=image_column, label_column=label_column, source=source
    )
    splits = {
        name: split.select_columns([image_column, label_column]).cast_column(image_column, Image(decode=False))
        for name, split in splits.items()
    }
    label_names = find_label_names(features[label_column], splits.values(), label_column=label_column, source=source)

    splits, notes = _drop_unlabelled(splits, label_column=label_column, num_labels=len(label_names), source=source)
    if "validation" not in splits:
        splits["train"], splits["validation"] = hold_out(
            splits["train"], train_val_split, image_column=image_column, label_column=label_column, seed=seed
        )
        notes.append(f"no validation split: {train_val_split:.0%} of train is held out for it")
    if "test" not in splits:
        notes.append("no test split: the validation split stands in for it")
    validation = limit_rows(splits["validation"], max_eval_samples, seed=seed)
    return ImageSplits(
        train=limit_rows(splits["train"], max_train_samples, seed=seed),
        validation=validation,
        test=limit_rows(splits["test"], max_eval_samples, seed=seed) if "test" in splits else validation,
        label_names=label_names,
        image_column=image_column,
        label_column=label_column,
        source=source,
        notes=tuple(notes),
    )


def _choose_splits(found: dict[str, Split], source: str) -> dict[str, Split]:
    chosen = {}
    for role, names in SPLIT_NAMES.items():
        name = next((name for name in names if name in found), None)
        if name is not None:
            chosen[role] = found[name]
    if "train" not in chosen:
        raise DataError(f"'{source}' must have a split called 'train', got {sorted(found)}; rename one of them")
    return chosen


def _drop_unlabelled(
    splits: dict[str, Split], *, label_column: str, num_labels: int, source: str
) -> tuple[dict[str, Split], list[str]]:
    kept, notes = {}, []
    for name, split in splits.items():
        where = f"the {name} split of '{source}'"
        if is_labelled(split, label_column=label_column, num_labels=num_labels, where=where):
            kept[name] = split
        elif name == "train":
            raise DataError(
                f"training images must be labelled, got none in '{label_column}' of {where}; choose a labelled dataset"
            )
        else:
            notes.append(f"{where} is not labelled and is left out")
    return kept, notes


def _check_settings(train_val_split: float, *, seed: int, max_samples: Iterable[int | None]) -> None:
    if not 0 < train_val_split < 1:
        raise DataError(f"`train_val_split` must lie between 0 and 1, got {train_val_split}")
    if seed < 0:
        raise DataError(f"`seed` must be at least 0, got {seed}")
    for limit in max_samples:
        if limit is not None and limit < 1:
            raise DataError(f"`max_train_samples` and `max_eval_samples` must be at least 1 or None, got {limit}")
