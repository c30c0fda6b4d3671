"""From a picture in bytes to what a network gets: augmented, brightened, shuffled, or made up altogether."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from hf_prune.data.concepts.pictures import as_input
from hf_prune.data.examples import own_randomness
from hf_prune.data.transforms import Preprocessing, Transform

PLAIN = ("gauss", "ones", "zeros")
# After so many augmentations that lose the concept it is shown as it is.
MAX_TRIES = 20
AUGMENT, SHUFFLE = range(2)


@dataclass(frozen=True, eq=False)
class ShownPictures:
    """The input `(3, H, W)` for each of some pictures; the same one at every call.

    Attributes:
        pictures: `(N, h, w, 3)` in bytes.
        preprocessing: Of the network.
        augment: Transform for training images, or None for pictures that are shown whole.
        fill: Grey level around concepts, of which augmentation must leave something; None for other pictures.
        min_area: How much, as a share of the input.
        brightness: Factor for the pixels, before augmentation; they are cut off at white.
        shuffled: Whether all values of an input go to random places, from one channel to another too.
        seed: Decides augmentation and places, together with the index.
    """

    pictures: npt.NDArray[np.uint8]
    preprocessing: Preprocessing
    augment: Transform | None
    fill: int | None
    min_area: float
    brightness: float
    shuffled: bool
    seed: int

    def __call__(self, index: int) -> Tensor:
        """Return the input for a picture."""
        picture = Image.fromarray(self.pictures[index])
        if self.brightness != 1:
            picture = ImageEnhance.Brightness(picture).enhance(self.brightness)
        values = self._whole(picture) if self.augment is None else self._augmented(picture, self.augment, index)
        if self.shuffled:
            order = np.random.default_rng((self.seed, SHUFFLE, index)).permutation(values.numel())
            values = values.flatten()[torch.from_numpy(order)].view_as(values)
        return values

    def _whole(self, picture: Image.Image) -> Tensor:
        height, width = self.preprocessing.size_px
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling[self.preprocessing.interpolation.upper()])
        return as_input(np.asarray(picture)[None], self.preprocessing)[0]

    def _augmented(self, picture: Image.Image, augment: Transform, index: int) -> Tensor:
        for attempt in range(MAX_TRIES):
            key = (self.seed, AUGMENT, index, attempt)
            with own_randomness(*key):
                values = augment(picture)
            if self.fill is None:
                return values
            # With the same random numbers, what is no concept comes out like a picture of nothing but grey.
            with own_randomness(*key):
                grey = augment(Image.new("RGB", picture.size, (self.fill,) * 3))
            if float((values != grey).any(0).float().mean()) >= self.min_area:
                return values
        return self._whole(picture)


@dataclass(frozen=True)
class PlainInputs:
    """Inputs `(3, H, W)` that are no pictures: normal noise, ones or zeros, as the network gets them.

    Attributes:
        kind: "gauss", "ones" or "zeros".
        size_px: Height and width.
        seed: Decides the noise, together with the index.
    """

    kind: str
    size_px: tuple[int, int]
    seed: int

    def __call__(self, index: int) -> Tensor:
        """Return the input of an index."""
        if self.kind == "gauss":
            noise = np.random.default_rng((self.seed, index)).standard_normal((3, *self.size_px), np.float32)
            return torch.from_numpy(noise)
        return torch.full((3, *self.size_px), 1.0 if self.kind == "ones" else 0.0)
