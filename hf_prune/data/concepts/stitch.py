"""Super Stitching: segments of the concepts of a class laid out on one canvas."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from hf_prune.data.concepts.records import ClassConcepts, Concept
from hf_prune.data.concepts.segments import Picture
from hf_prune.errors import DataError

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class StitchSettings:
    """How segments are laid out.

    A reconstruction: of Super Stitching the papers' public material tells that patches of one class are stitched into
    images, and that sets of them are told apart by a number of images and a "ratio", 0.3 or 0.5. That the ratio is the
    share of the canvas that is covered, and everything else here, is ours.

    Attributes:
        coverage: Segments are added until this share of the canvas is covered.
        max_overlap: Share of a segment that may lie over others.
        max_segments: Segments on a canvas at most.
        num_tries: Places that are tried before a segment is made smaller.
        shrink: By which factor.
        min_side_px: A segment that is to be smaller than this is left out.
        draw: "in_turn" takes from one concept after the other, "by_score" from a random one in proportion to its score.
        flip_prob: Chance that the canvas is mirrored in the end, left to right.

    Raises:
        DataError: If a number is out of range.
    """

    coverage: float = 0.5
    max_overlap: float = 0.25
    max_segments: int = 12
    num_tries: int = 10
    shrink: float = 0.8
    min_side_px: int = 2
    draw: Literal["in_turn", "by_score"] = "in_turn"
    flip_prob: float = 0.5

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("coverage", "max_overlap", "flip_prob")}
        if not all(0 <= share <= 1 for share in shares.values()) or not 0 < self.shrink < 1:
            raise DataError(f"{', '.join(shares)} and `shrink` must be shares of one, got {self}")
        if min(self.max_segments, self.num_tries, self.min_side_px) < 1 or self.draw not in ("in_turn", "by_score"):
            raise DataError(f"counts must be at least 1 and `draw` 'in_turn' or 'by_score', got {self}")


@dataclass(frozen=True, eq=False)
class Pasted:
    """A segment on a canvas.

    Attributes:
        segment: Which one, as an index into the segments of the class.
        top: First row on the canvas, before it is mirrored.
        left: First column.
        mask: What of the box belongs to the segment, perhaps smaller than the original.
        overlap: Share of it that lies over what was there before.
    """

    segment: int
    top: int
    left: int
    mask: Mask
    overlap: float


@dataclass(frozen=True, eq=False)
class Stitched:
    """A canvas with segments on it.

    Attributes:
        picture: `(H, W, 3)` in bytes.
        covered: `(H, W)`, True where a segment lies.
        pasted: The segments, in the order in which they were added.
    """

    picture: Picture
    covered: Mask
    pasted: tuple[Pasted, ...]


def stitch(
    found: ClassConcepts,
    concepts: Sequence[Concept],
    settings: StitchSettings,
    background: Sequence[int],
    rng: np.random.Generator,
) -> Stitched:
    """Lay segments of some concepts of a class on a canvas of the size of its pictures; see `StitchSettings`.

    Each goes where its box covers most free canvas, at random among equally good places.

    Args:
        found: The class.
        concepts: Those to use.
        settings: How.
        background: Red, green and blue of the canvas.
        rng: Decides which segments, which of equally good places, and whether the canvas is mirrored.
    """
    canvas = np.empty(found.pictures.shape[1:], np.uint8)
    canvas[:] = background
    covered = np.zeros(canvas.shape[:2], bool)
    pasted: list[Pasted] = []
    for index in _drawn(concepts, settings, rng):
        if covered.mean() >= settings.coverage or len(pasted) == settings.max_segments:
            break
        segment = found.segments[index]
        pixels, mask = segment.box_of(found.pictures[segment.image]), segment.mask
        while min(mask.shape) >= settings.min_side_px and mask.any():
            place = _place(mask, covered, settings, rng)
            if place is not None:
                top, left, overlap = place
                box = np.s_[top : top + mask.shape[0], left : left + mask.shape[1]]
                canvas[box][mask] = pixels[mask]
                covered[box] |= mask
                pasted.append(Pasted(index, top, left, mask, overlap))
                break
            pixels, mask = _smaller(pixels, mask, settings.shrink)
    if rng.random() < settings.flip_prob:
        canvas, covered = canvas[:, ::-1].copy(), covered[:, ::-1].copy()
    return Stitched(canvas, covered, tuple(pasted))


def _drawn(concepts: Sequence[Concept], settings: StitchSettings, rng: np.random.Generator) -> Iterator[int]:
    """Yield every segment once, from one concept after the other or by score."""
    left = {number: rng.permutation(concept.segments).tolist() for number, concept in enumerate(concepts)}
    turn = -1
    while left:
        if settings.draw == "by_score":
            weights = np.array([concepts[number].score for number in left])
            # Where all scores are zero they say nothing.
            weights = weights / weights.sum() if weights.sum() else None
            number = int(rng.choice(list(left), p=weights))
        else:
            number = next((n for n in left if n > turn), min(left))
            turn = number
        yield left[number].pop()
        if not left[number]:
            del left[number]


def _place(
    mask: Mask, covered: Mask, settings: StitchSettings, rng: np.random.Generator
) -> tuple[int, int, float] | None:
    """Return row, column and overlap of a place with most free canvas, or None if the overlap is too large there."""
    height, width = mask.shape
    sums = np.pad(np.cumsum(np.cumsum(~covered, axis=0), axis=1), ((1, 0), (1, 0)))
    free = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    for top, left in rng.permutation(np.argwhere(free == free.max()))[: settings.num_tries].tolist():
        under = covered[top : top + height, left : left + width]
        overlap = float(under[mask].mean())
        if overlap <= settings.max_overlap:
            return top, left, overlap
    return None


def _smaller(pixels: Picture, mask: Mask, factor: float) -> tuple[Picture, Mask]:
    # Rounded down, so that even two pixels become one.
    size = (max(1, int(factor * mask.shape[1])), max(1, int(factor * mask.shape[0])))
    shrunk = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC))
    return shrunk, np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
