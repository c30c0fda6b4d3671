"""The embedded digits are scikit-learn's, all of them, split once and for all."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from hf_prune.data.digits import load_digits_dataset


@pytest.fixture(scope="module")
def digits():
    return load_digits_dataset()


def test_split_sizes_and_classes(digits):
    assert {name: len(rows) for name, rows in digits.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    assert digits["train"].features["label"].names == [str(digit) for digit in range(10)]


def test_every_source_image_is_in_exactly_one_split_with_its_label(digits):
    found = sorted((row["label"], np.asarray(row["image"]).tobytes()) for rows in digits.values() for row in rows)
    images, labels = load_digits(return_X_y=True)
    grey = np.floor(images * 255 / 16 + 0.5).astype(np.uint8)
    expected = sorted((int(label), image.tobytes()) for image, label in zip(grey, labels, strict=True))
    assert len(found) == 1797
    assert found == expected


def test_classes_are_shared_out_evenly(digits):
    for name, expected in {"train": 125.7, "validation": 18.0, "test": 36.0}.items():
        counts = np.bincount(digits[name]["label"][:])
        assert np.abs(counts / expected - 1).max() < 0.1


def test_images_are_grey_and_use_the_whole_range(digits):
    image = digits["test"][0]["image"]
    assert (image.mode, image.size) == ("L", (8, 8))
    assert np.asarray(image).max() == 255


def test_the_splits_never_change(digits):
    again = load_digits_dataset()
    for name, rows in digits.items():
        assert rows["label"][:] == again[name]["label"][:]
    assert digits["test"]["label"][:8] == [7, 6, 3, 7, 7, 3, 2, 8]
