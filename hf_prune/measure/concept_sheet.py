"""A contact sheet of concepts: what the best-ranked ones of each class look like."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_prune.data.concepts.cache import ConceptCache
from hf_prune.data.concepts.records import ClassConcepts, Concept
from hf_prune.data.concepts.segments import Picture
from hf_prune.errors import DataError
from hf_prune.measure.figures import INK, SOFT, save_figure
from hf_prune.measure.patch_figures import WASH, WASH_STRENGTH

GAP = 0.06
MAX_CLASSES = 10


def plot_concept_sheet(
    concepts: ConceptCache,
    path: str | Path,
    *,
    labels: Iterable[int] | None = None,
    num_concepts: int = 4,
    num_patches: int = 3,
) -> None:
    """Save a grid of pictures: a row per class, a column per concept, best first, with its TCAV score.

    Each concept is shown by the segments that are nearest to its centre: above as pruning uses them, with grey around
    them, below with the rest of their picture faded. A p-value is set behind scores that do not differ from those of a
    random concept. A class without concepts has the reason in its row.

    Args:
        concepts: As `discover_concepts` returns them.
        path: PNG file to write.
        labels: Classes; the first ten that are there if None.
        num_concepts: Concepts per class at most.
        num_patches: Segments per concept at most.

    Raises:
        DataError: If there is no class to show, or one cannot be read.
    """
    chosen = list(islice(concepts.labels, MAX_CLASSES) if labels is None else labels)
    if not chosen or min(num_concepts, num_patches) < 1:
        raise DataError(
            f"a contact sheet must show at least one class, concept and patch, got {len(chosen)} classes from "
            f"'{concepts.folder}', {num_concepts} concepts and {num_patches} patches"
        )
    height, width = concepts.header.size_px
    size = (0.75 * num_patches * num_concepts + 1.2, (1.5 * height / width + 0.35) * len(chosen) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(chosen), num_concepts, squeeze=False)
    for row, label in zip(axes, chosen, strict=True):
        found = concepts.read(label)
        for axis in row:
            axis.set_axis_off()
        for axis, concept in zip(row, found.concepts, strict=False):
            _show(axis, found, concept, num_patches)
        name = concepts.header.label_names[label]
        row[0].text(-0.04, 0.5, name, **_STYLE, ha="right", va="center", rotation=90, transform=row[0].transAxes)
        if found.problem is not None:
            row[0].text(0.0, 0.5, found.problem, fontsize=9, color=SOFT, va="center", transform=row[0].transAxes)
    figure.suptitle("Concepts of each class by TCAV score, best first", fontsize=13, color=INK, fontweight="bold")
    figure.supxlabel(
        f"Features of layer {concepts.header.layer}. Above: segments as pruning sees them; below: where they are.",
        fontsize=9.5,
        color=INK,
        parse_math=False,
    )
    save_figure(figure, path)


_STYLE = {"fontsize": 11, "color": INK, "parse_math": False}


def _show(axis: Axes, found: ClassConcepts, concept: Concept, num_patches: int) -> None:
    shown = concept.segments[:num_patches]
    blank = [np.full_like(found.pictures[0], 255)] * (num_patches - len(shown))
    above = _strip([*(found.patch(index) for index in shown), *blank])
    below = _strip([*(_faded(found, index) for index in shown), *blank])
    gap = np.full((max(1, round(GAP * found.pictures.shape[1])), above.shape[1], 3), 255, np.uint8)
    axis.imshow(np.concatenate([above, gap, below]), interpolation="nearest")
    score = f"TCAV {concept.score:.2f}"
    doubt = "" if found.is_significant(concept) else f" (p {concept.p_value:.2f})"
    axis.set_title(score + doubt, fontsize=9.5, color=SOFT if doubt else INK)


def _strip(pictures: list[Picture]) -> Picture:
    """Put pictures side by side, with white between them."""
    height, width = pictures[0].shape[:2]
    gap = np.full((height, max(1, round(GAP * width)), 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)]
    return np.concatenate(parts[:-1], axis=1)


def _faded(found: ClassConcepts, index: int) -> Picture:
    """Return the whole picture of a segment, nearly white outside it."""
    segment = found.segments[index]
    picture = found.pictures[segment.image]
    faded = (0.6 * WASH_STRENGTH * 255 * WASH + (1 - 0.6 * WASH_STRENGTH) * picture).round().astype(np.uint8)
    segment.box_of(faded)[segment.mask] = segment.box_of(picture)[segment.mask]
    return faded
