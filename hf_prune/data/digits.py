"""The embedded dataset: scikit-learn's 1,797 handwritten digits, small enough to need no download."""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NUM_VALIDATION = 180
NUM_TEST = 360
# Fixed for good: accuracies quoted for these splits must stay comparable.
SPLIT_SEED = 0
# The source counts ink in steps of 0..16.
MAX_INK = 16

FEATURES = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})


def load_digits_dataset() -> DatasetDict:
    """Build the train (1,257), validation (180) and test (360) splits of the digits, in memory.

    Every split holds all ten digits in equal shares and is the same on every call. The images are
    8x8 pixels, greyscale; a model's transform makes them RGB and scales them up.

    Returns:
        Splits "train", "validation" and "test" with the columns "image" and "label".

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998), as
    packaged with scikit-learn.
    """
    ink, labels = load_digits(return_X_y=True)
    pixels = np.round(np.reshape(ink, (-1, 8, 8)) * (255 / MAX_INK)).astype(np.uint8)
    labels = np.asarray(labels)

    rows = np.arange(len(labels))
    rest, test = train_test_split(rows, test_size=NUM_TEST, stratify=labels, random_state=SPLIT_SEED)
    train, validation = train_test_split(rest, test_size=NUM_VALIDATION, stratify=labels[rest], random_state=SPLIT_SEED)
    return DatasetDict(
        {
            name: _to_dataset(pixels[chosen], labels[chosen])
            for name, chosen in {"train": train, "validation": validation, "test": test}.items()
        }
    )


def _to_dataset(pixels: np.ndarray, labels: np.ndarray) -> Dataset:
    images = [PILImage.fromarray(image) for image in pixels]
    return Dataset.from_dict({"image": images, "label": labels.tolist()}, features=FEATURES)
