"""Pictures of a dataset as a model sees them, before its normalisation: read class by class, seeded."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from PIL import Image

from hf_prune.data.columns import read_labels
from hf_prune.data.concepts.segments import Picture
from hf_prune.data.decode import UNREADABLE, decode_image
from hf_prune.data.images import ImageSplits
from hf_prune.data.transforms import MAX_PIXEL, Preprocessing, eval_transform
from hf_prune.errors import DataError


def as_seen(preprocessing: Preprocessing) -> Callable[[Image.Image], Picture]:
    """Make what turns an image into the picture `(H, W, 3)` that evaluation cuts out of it, in bytes."""
    transform = eval_transform(preprocessing)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))

    def see(image: Image.Image) -> Picture:
        pixels = (transform(image) * std + mean) * MAX_PIXEL
        return pixels.round().clamp(0, MAX_PIXEL).to(torch.uint8).permute(1, 2, 0).numpy()

    return see


def as_input(pictures: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> torch.Tensor:
    """Normalise pictures `(N, H, W, 3)` in bytes to `(N, 3, H, W)`; nothing is cropped or resized."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    # A copy: torch warns of arrays that it must not write to.
    pixels = torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / MAX_PIXEL
    return (pixels - mean) / std


class Pictures:
    """The training split of a dataset as pictures of one size.

    Attributes:
        labels: Class of every row.
        label_names: Names of the classes.

    Raises:
        DataError: If the split is a stream, which cannot be read class by class.
    """

    def __init__(self, splits: ImageSplits, preprocessing: Preprocessing) -> None:
        if not isinstance(splits.train, Dataset):
            raise DataError(
                f"the training split of '{splits.source}' must be countable, because it is read class by class, "
                "got a stream; open it with `streaming=False`"
            )
        self._rows, self._column, self._source = splits.train, splits.image_column, splits.source
        self._see, self._size_px = as_seen(preprocessing), preprocessing.size_px
        self.labels = read_labels(splits.train, splits.label_column)
        self.label_names = splits.label_names

    def of_class(self, label: int, number: int, key: tuple[int, ...]) -> tuple[npt.NDArray[np.uint8], int]:
        """Return up to `number` random pictures `(n, H, W, 3)` of a class, and how many could not be read.

        Args:
            label: The class.
            number: How many.
            key: Decides which.
        """
        return self._first(np.flatnonzero(self.labels == label), number, key)

    def of_any_class(self, number: int, key: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Return up to `number` random pictures `(n, H, W, 3)` of the whole split."""
        return self._first(np.arange(len(self.labels)), number, key)[0]

    def _first(
        self, rows: npt.NDArray[np.intp], number: int, key: tuple[int, ...]
    ) -> tuple[npt.NDArray[np.uint8], int]:
        found: list[Picture] = []
        num_unreadable = 0
        for row in np.random.default_rng(key).permutation(rows).tolist():
            image = self._decoded(row)
            if image is None:
                num_unreadable += 1
                continue
            found.append(self._see(image))
            if len(found) == number:
                break
        empty = np.zeros((0, *self._size_px, 3), np.uint8)
        return np.stack(found) if found else empty, num_unreadable

    def _decoded(self, row: int) -> Image.Image | None:
        try:
            return decode_image(self._rows[row][self._column])
        except UNREADABLE:
            return None
