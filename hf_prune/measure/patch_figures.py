"""A picture of what is left of images: which patches go, and which are put together."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from hf_prune.errors import DataError
from hf_prune.measure.figures import INK, RED, SOFT, save_figure

WASH = 0.9
WASH_STRENGTH = 0.9
# What becomes of a dropped patch, by what happens to dropped tokens.
LEGENDS = {
    "none": "later blocks do not see them.",
    "single": "later blocks see only their weighted average, the package token.",
    "per_stage": "later blocks see only a weighted average for every stage, the package tokens.",
}


def grey_out(
    image: npt.NDArray[np.floating], keep: npt.NDArray[np.bool_], grid: tuple[int, int]
) -> npt.NDArray[np.floating]:
    """Blend the patches that are not kept into light grey and leave the others as they are.

    Args:
        image: Height x width x channels, in [0, 1].
        keep: One flag per patch, row by row.
        grid: Patch rows and columns.
    """
    kept = _by_pixel(keep.reshape(grid), image.shape)[..., None]
    return np.where(kept, image, (1 - WASH_STRENGTH) * image + WASH_STRENGTH * WASH)


def mean_colours(
    image: npt.NDArray[np.floating], source: npt.NDArray[np.integer], grid: tuple[int, int]
) -> npt.NDArray[np.floating]:
    """Paint patches that share a token in their mean colour, and grey those out that have none.

    Args:
        image: Height x width x channels, in [0, 1].
        source: The token that stands for each patch, row by row; -1 where none does.
        grid: Patch rows and columns.
    """
    painted, token_of = grey_out(image, source >= 0, grid), _by_pixel(source.reshape(grid), image.shape)
    tokens, counts = np.unique(source[source >= 0], return_counts=True)
    for token in tokens[counts > 1]:
        painted[token_of == token] = image[token_of == token].mean(0)
    return painted


def plot_patches(
    images: npt.ArrayLike,
    sources: Sequence[npt.ArrayLike],
    grid: tuple[int, int],
    *,
    titles: Sequence[str],
    stage_names: Sequence[str],
    path: str | Path,
    packages: str = "single",
) -> None:
    """Save a grid of pictures: a row per image, then what is left of it after every stage.

    Args:
        images: Images x 3 x height x width, in [0, 1].
        sources: Per stage, images x patches: the token that stands for each patch, -1 where it was dropped.
        grid: Patch rows and columns.
        titles: What to write under each original, such as "label 3, predicted 3".
        stage_names: Head of each stage's column.
        path: PNG file to write.
        packages: What becomes of dropped tokens, as in the settings.

    Raises:
        DataError: If the shapes do not fit each other.
    """
    pictures, stages = np.asarray(images), [np.asarray(source, dtype=int) for source in sources]
    _require_shapes(pictures, stages, grid, titles, stage_names)
    figure = Figure(figsize=(2.1 * (1 + len(stages)) + 0.2, 2.4 * len(pictures) + 1.0), layout="constrained")
    axes = figure.subplots(len(pictures), 1 + len(stages), squeeze=False)
    for row, picture in enumerate(pictures.transpose(0, 2, 3, 1)):
        _show(axes[row, 0], picture, textwrap.fill(titles[row], 28))
        for axis, source in zip(axes[row, 1:], (stage[row] for stage in stages), strict=True):
            _show(axis, mean_colours(picture, source, grid), _caption(source))
            _cross_out(axis, (source >= 0).reshape(grid), picture.shape[:2])
    for axis, name in zip(axes[0], ["original", *stage_names], strict=True):
        axis.set_title(name, fontsize=11, color=INK, parse_math=False)
    figure.suptitle("What the pruned model still looks at", fontsize=13, color=INK, fontweight="bold")
    figure.supxlabel(_legend(stages, packages), fontsize=9.5, color=INK)
    save_figure(figure, path)


def _require_shapes(
    pictures: npt.NDArray,
    stages: Sequence[npt.NDArray],
    grid: tuple[int, int],
    titles: Sequence[str],
    stage_names: Sequence[str],
) -> None:
    count, patches = len(pictures), grid[0] * grid[1]
    if not count or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise DataError(f"`images` must be images x 3 x height x width, got the shape {pictures.shape}")
    if any(source.shape != (count, patches) for source in stages):
        raise DataError(
            f"`sources` must hold {count} x {patches} numbers per stage for {count} images and the grid {grid}, "
            f"got {[source.shape for source in stages]}"
        )
    if len(titles) != count or len(stage_names) != len(stages):
        raise DataError(
            "`titles` must name every image and `stage_names` every stage, got "
            f"{len(titles)} for {count} and {len(stage_names)} for {len(stages)}"
        )


def _is_merged(source: npt.NDArray[np.integer]) -> bool:
    return len(np.unique(source[source >= 0])) < (source >= 0).sum()


def _caption(source: npt.NDArray[np.integer]) -> str:
    left = len(np.unique(source[source >= 0]))
    return f"{left} {'tokens' if _is_merged(source) else 'patches'} of {len(source)} left"


def _legend(stages: Sequence[npt.NDArray[np.integer]], packages: str) -> str:
    lines = []
    if any(_is_merged(source) for stage in stages for source in stage):
        lines.append("Patches in one flat colour share a token, and that is their mean.")
    if not lines or any((stage < 0).any() for stage in stages):
        lines.append(f"Grey, struck-out patches (outlined in orange) were dropped:\n{LEGENDS[packages]}")
    return "\n".join(lines)


def _by_pixel(values: npt.NDArray, shape: tuple[int, ...]) -> npt.NDArray:
    """Return height x width: for every pixel of an image the value of its patch."""
    # Indices, not np.repeat: the image need not be a whole number of patches high or wide.
    rows = np.arange(shape[0]) * values.shape[0] // shape[0]
    columns = np.arange(shape[1]) * values.shape[1] // shape[1]
    return values[np.ix_(rows, columns)]


def _show(axis: Axes, picture: npt.NDArray[np.floating], caption: str) -> None:
    height, width = picture.shape[:2]
    axis.imshow(np.clip(picture, 0, 1), extent=(0, width, height, 0), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(caption, fontsize=9.5, color=INK, parse_math=False)
    for spine in axis.spines.values():
        spine.set(color=SOFT, linewidth=0.6)


def _cross_out(axis: Axes, alive: npt.NDArray[np.bool_], size: tuple[int, int]) -> None:
    """Strike the dropped patches through and outline them: a wash alone is lost on a pale or grey image."""
    height, width = size[0] / alive.shape[0], size[1] / alive.shape[1]
    strokes = [[(x, y + 1), (x + 1, y)] for y, x in np.argwhere(~alive)]
    # A patch edge is part of the outline where exactly one of the two patches that share it is alive.
    edges = [[(x + 1, y), (x + 1, y + 1)] for y, x in np.argwhere(alive[:, 1:] != alive[:, :-1])]
    edges += [[(x, y + 1), (x + 1, y + 1)] for y, x in np.argwhere(alive[1:] != alive[:-1])]
    for lines, colour, linewidth in ((strokes, SOFT, 0.5), (edges, RED, 0.9)):
        scaled = [np.multiply(line, (width, height)) for line in lines]
        axis.add_collection(LineCollection(scaled, colors=colour, linewidths=linewidth))
