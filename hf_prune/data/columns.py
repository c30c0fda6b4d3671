"""Finds the image and label columns of a dataset, and reads what its labels say."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from hf_prune.data.source import Split
from hf_prune.errors import DataError

# `ClassLabel` stores -1 for "not labelled", as in the public test splits of competitions.
UNLABELLED = -1
INTEGER_LABEL_NAMES = ("label", "labels")

_TYPES = {"image_column": "a column of images", "label_column": "a column of class labels or integers"}


def find_columns(
    features: Features, *, image_column: str | None, label_column: str | None, source: str
) -> tuple[str, str]:
    """Find the column of images and the column of labels by their type.

    Labels may also be bare integers, if the caller names the column or it is called "label" or "labels".
    A named image column may also hold file paths or encoded bytes.

    Args:
        features: Column name -> type.
        image_column: Taken if it can hold images.
        label_column: Taken if it can hold labels.
        source: What the dataset was opened from, for the error.

    Returns:
        Names of the image column and of the label column.

    Raises:
        DataError: If a named column does not exist or is of the wrong type, or if none or several
            columns could be meant.
    """
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not labels:
        labels = [name for name in INTEGER_LABEL_NAMES if name in features and _is_integer(features[name])]
    if image_column is not None:
        images = [image_column] if image_column in features and _holds_images(features[image_column]) else []
    if label_column is not None:
        labels = [label_column] if label_column in features and _holds_labels(features[label_column]) else []
    for argument, named, candidates in (
        ("image_column", image_column, images),
        ("label_column", label_column, labels),
    ):
        if len(candidates) != 1:
            listing = ", ".join(f"'{name}' ({_type_name(feature)})" for name, feature in features.items())
            wanted = "exactly one column" if named is None else f"'{named}'"
            hint = f"pass `{argument}`" if candidates else "is it a dataset of labelled images?"
            raise DataError(
                f"`{argument}` must be {_TYPES[argument]}, and {wanted} of '{source}' must qualify, "
                f"got {candidates or 'none'} among {listing}; {hint}"
            )
    return images[0], labels[0]


def find_label_names(feature: object, splits: Iterable[Split], *, label_column: str, source: str) -> tuple[str, ...]:
    """Name the classes, in the order of their numbers.

    Bare integers get the names "0", "1", ... up to the largest label found in any split.

    Args:
        feature: Type of the label column.
        splits: Where to look for the largest of bare integers.
        label_column: Column of class labels or bare integers.
        source: What the dataset was opened from, for the error.

    Raises:
        DataError: If the labels are bare integers in a stream, whose number of classes cannot be known
            without reading all of it.
    """
    if isinstance(feature, ClassLabel):
        return tuple(str(name) for name in feature.names)
    largest = UNLABELLED
    for split in splits:
        if not isinstance(split, Dataset):
            raise DataError(
                f"a streamed dataset must name its classes (`ClassLabel`), got bare integers in "
                f"'{label_column}' of '{source}'; use `streaming=False`"
            )
        largest = max(largest, int(read_labels(split, label_column).max(initial=UNLABELLED)))
    return tuple(str(number) for number in range(largest + 1))


def is_labelled(split: Split, *, label_column: str, num_labels: int, where: str) -> bool:
    """Tell whether a split has labels, and check that all of them are in range.

    Of a stream only the first row is looked at.

    Raises:
        DataError: If the split is empty, cannot be read, or holds a label out of range beside others.
    """
    if not isinstance(split, Dataset):
        return _first_label(split, label_column, where=where) != UNLABELLED
    labels = read_labels(split, label_column)
    if len(labels) == 0:
        raise DataError(f"every split must hold at least one image, got none in {where}")
    if (labels == UNLABELLED).all():
        return False
    bad_rows = np.flatnonzero((labels < 0) | (labels >= num_labels))
    if len(bad_rows) > 0:
        row = bad_rows[0]
        raise DataError(
            f"labels must lie in 0..{num_labels - 1}, got {labels[row]} in row {row} of {where} "
            f"({len(bad_rows)} such rows, -1 means not labelled); drop or mend these rows"
        )
    return True


def _first_label(split: IterableDataset, label_column: str, *, where: str) -> int:
    try:
        row = next(iter(split), None)
    except Exception as err:  # fsspec and pyarrow each raise their own kinds
        raise DataError(f"the first row of {where} could not be read: {type(err).__name__}: {err}") from err
    if row is None:
        raise DataError(f"every split must hold at least one image, got none in {where}")
    label = row[label_column]
    return UNLABELLED if label is None else label


def read_labels(split: Dataset, label_column: str) -> np.ndarray:
    """Read the labels of all rows, without touching the images; a missing label reads as -1."""
    column = split.select_columns([label_column]).with_format("arrow")[:][label_column]
    return pc.fill_null(column.cast(pa.int64()), UNLABELLED).to_numpy()


def _is_integer(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))


def _holds_labels(feature: object) -> bool:
    return isinstance(feature, ClassLabel) or _is_integer(feature)


def _holds_images(feature: object) -> bool:
    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary")
    # Image files written to parquet by other tools come without the `Image` type, as a bare struct.
    return isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _type_name(feature: object) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__
