"""The concepts of a class as arrays and plain data, and back: nothing that is read is believed unchecked."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_prune.data.concepts.arrays import Form
from hf_prune.data.concepts.records import ClassConcepts, Concept
from hf_prune.data.concepts.segments import Segment
from hf_prune.data.concepts.settings import ConceptSettings


def class_forms(settings: ConceptSettings, size_px: tuple[int, int]) -> dict[str, Form]:
    """Return what the arrays of a class look like: `pictures`, `boxes` and `bits`.

    A box is (picture, top, left, height, width); `bits` are the masks of all segments one after the other.
    """
    height, width = size_px
    most = settings.num_clusters * settings.max_segments + settings.unranked_segments
    return {
        "pictures": (np.uint8, ((0, settings.images_per_class), (height, height), (width, width), (3, 3))),
        "boxes": (np.int32, ((0, most), (5, 5))),
        "bits": (np.uint8, ((0, most * height * width // 8 + 1),)),
    }


def to_arrays(found: ClassConcepts) -> dict[str, npt.NDArray]:
    """Return pictures and segments as arrays."""
    boxes = [(s.image, s.top, s.left, *s.mask.shape) for s in found.segments]
    bits = np.concatenate([np.zeros(0, bool), *(segment.mask.ravel() for segment in found.segments)])
    return {
        "pictures": found.pictures,
        "boxes": np.array(boxes, np.int32).reshape(-1, 5),
        "bits": np.packbits(bits),
    }


def to_json(found: ClassConcepts) -> dict[str, Any]:
    """Return all but the arrays as plain data."""
    return {
        "problem": found.problem,
        "num_found": found.num_found,
        "num_unreadable": found.num_unreadable,
        "unranked": list(found.unranked),
        "concepts": [vars(concept) for concept in found.concepts],
    }


def class_from(
    label: int, data: Mapping[str, Any], arrays: Mapping[str, npt.NDArray], settings: ConceptSettings
) -> ClassConcepts:
    """Put a class together.

    Raises:
        ValueError: If anything is out of range; also `TypeError` and `KeyError` for data of another form.
    """
    segments = _segments(arrays)
    problem = data["problem"]
    if problem is not None and not isinstance(problem, str):
        raise ValueError(f"`problem` must be text or nothing, got {problem!r}")
    return ClassConcepts(
        label=label,
        pictures=arrays["pictures"],
        segments=segments,
        concepts=tuple(_concept(concept, len(segments), settings) for concept in data["concepts"]),
        unranked=_indices(data["unranked"], len(segments)),
        settings=settings,
        num_found=_count(data["num_found"]),
        num_unreadable=_count(data["num_unreadable"]),
        problem=problem,
    )


def _segments(arrays: Mapping[str, npt.NDArray]) -> tuple[Segment, ...]:
    boxes, (num_pictures, height, width, _) = arrays["boxes"].astype(np.int64), arrays["pictures"].shape
    image, top, left, rows, columns = boxes.T
    inside = (image >= 0) & (image < num_pictures) & (top >= 0) & (left >= 0) & (rows > 0) & (columns > 0)
    if not (inside & (top + rows <= height) & (left + columns <= width)).all():
        raise ValueError("segments must lie in the pictures")
    sizes = rows * columns
    if len(arrays["bits"]) != -(-int(sizes.sum()) // 8):
        raise ValueError(f"`bits` must hold {int(sizes.sum())} bits for the boxes, got {len(arrays['bits'])} bytes")
    masks = np.split(np.unpackbits(arrays["bits"], count=int(sizes.sum())).astype(bool), np.cumsum(sizes)[:-1])
    if not all(mask.any() for mask in masks[: len(boxes)]):
        raise ValueError("segments must not be empty")
    return tuple(
        Segment(i, t, x, mask.reshape(h, w)) for (i, t, x, h, w), mask in zip(boxes.tolist(), masks, strict=False)
    )


def _concept(data: Mapping[str, Any], num_segments: int, settings: ConceptSettings) -> Concept:
    scores = tuple(_share(score) for score in data["scores"])
    sensitivity = float(data["sensitivity"])
    segments = _indices(data["segments"], num_segments)
    if len(scores) != settings.num_random_sets or not segments or not math.isfinite(sensitivity):
        raise ValueError(
            f"a concept must have segments, and a score for each of {settings.num_random_sets} random sets"
        )
    return Concept(
        segments=segments,
        num_segments=_count(data["num_segments"]),
        num_images=_count(data["num_images"]),
        scores=scores,
        p_value=_share(data["p_value"]),
        cav_accuracy=_share(data["cav_accuracy"]),
        sensitivity=sensitivity,
    )


def _indices(values: Any, most: int) -> tuple[int, ...]:
    found = tuple(_count(value) for value in values)
    if any(index >= most for index in found):
        raise ValueError(f"indices of segments must lie below {most}, got {max(found)}")
    return found


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a count must be an integer from 0, got {value!r}")
    return value


def _share(value: Any) -> float:
    # Also false for what is not a number.
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"a share must lie between 0 and 1, got {value!r}")
    return float(value)
