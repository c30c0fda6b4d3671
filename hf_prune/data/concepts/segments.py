"""Superpixels of a picture at several resolutions, and the two ways in which one is shown to a network."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import find_objects
from skimage.segmentation import slic

from hf_prune.data.concepts.settings import ConceptSettings

Picture = npt.NDArray[np.uint8]
"""Height x width x RGB."""


@dataclass(frozen=True, eq=False)
class Segment:
    """A piece of a picture.

    Attributes:
        image: Which picture, as an index.
        top: First row.
        left: First column.
        mask: Height x width of the smallest box around the piece; True inside it.
    """

    image: int
    top: int
    left: int
    mask: npt.NDArray[np.bool_]

    @property
    def area_px(self) -> int:
        """Number of pixels."""
        return int(np.count_nonzero(self.mask))

    def box_of(self, picture: Picture) -> Picture:
        """Return the smallest box around the piece, cut out of a picture (a view of it)."""
        height, width = self.mask.shape
        return picture[self.top : self.top + height, self.left : self.left + width]


def superpixels(picture: Picture, image: int, settings: ConceptSettings) -> list[Segment]:
    """Return the segments of a picture at all resolutions, without small ones and without near repetitions.

    Args:
        picture: As the teacher sees it, before normalisation.
        image: Its index, which the segments carry.
        settings: `segment_counts`, `compactness`, `sigma`, `min_area`, `max_jaccard`.
    """
    found: list[Segment] = []
    earlier: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]] = []
    for count in settings.segment_counts:
        # `start_label` must be said: 1, the default, would leave a label 0 that stands for nothing.
        labels = slic(picture, n_segments=count, compactness=settings.compactness, sigma=settings.sigma, start_label=0)
        keep = np.bincount(labels.ravel()) > settings.min_area * labels.size
        for coarser, kept in earlier:
            keep &= ~(_jaccard(labels, coarser)[:, kept] > settings.max_jaccard).any(axis=1)
        earlier.append((labels, keep))
        for label, box in enumerate(find_objects(labels + 1)):
            if box is not None and keep[label]:
                found.append(Segment(image, box[0].start, box[1].start, labels[box] == label))
    return found


def patch_of(picture: Picture, segment: Segment, fill: int) -> Picture:
    """Return a picture of the same size with grey everywhere but in the segment."""
    patch = np.full_like(picture, fill)
    segment.box_of(patch)[segment.mask] = segment.box_of(picture)[segment.mask]
    return patch


def resized_of(picture: Picture, segment: Segment, fill: int) -> Picture:
    """Return the smallest box around the segment, grey outside it, stretched to the size of the picture."""
    box = np.where(segment.mask[..., None], segment.box_of(picture), np.uint8(fill))
    size = (picture.shape[1], picture.shape[0])
    return np.asarray(Image.fromarray(box).resize(size, Image.Resampling.BICUBIC))


def rectangle(area_px: int, size_px: tuple[int, ...], rng: np.random.Generator, image: int = 0) -> Segment:
    """Return a rectangle of exactly so many pixels at a random place; its last row may be shorter.

    Its sides are in a random proportion, from one to two to two to one where that fits.

    Args:
        area_px: Number of pixels, from 1 to all.
        size_px: Height and width of the picture.
        rng: Decides place and proportion.
        image: What the segment is to say of its picture.
    """
    height, width = size_px
    proportion = np.exp(rng.uniform(-np.log(2), np.log(2)))
    rows = int(np.clip(round(np.sqrt(area_px * proportion)), -(-area_px // width), min(height, area_px)))
    columns = -(-area_px // rows)
    rows = -(-area_px // columns)
    mask = (np.arange(rows * columns) < area_px).reshape(rows, columns)
    top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
    return Segment(image, int(top), int(left), mask)


def _jaccard(labels: npt.NDArray[np.intp], others: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Return area shared over area covered, for every label of one partition with every label of another."""
    num_labels, num_others = int(labels.max()) + 1, int(others.max()) + 1
    pairs = np.bincount((labels * num_others + others).ravel(), minlength=num_labels * num_others)
    shared = pairs.reshape(num_labels, num_others)
    union = shared.sum(1, keepdims=True) + shared.sum(0, keepdims=True) - shared
    return shared / np.maximum(union, 1)
