"""Three pictures of a pruned model: which patches go, how many stay per image, and what it buys."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from hf_prune.errors import DataError
from hf_prune.measure.report import ModelRow

INK, SOFT, BLUE, RED = "#222222", "#8a8a8a", "#0072b2", "#d55e00"
WASH = 0.9
WASH_STRENGTH = 0.9
MAX_BYTES = 400_000


def grey_out(
    image: npt.NDArray[np.floating], keep: npt.NDArray[np.bool_], grid: tuple[int, int]
) -> npt.NDArray[np.floating]:
    """Blend the patches that are not kept into light grey and leave the others as they are.

    Args:
        image: Height x width x channels, in [0, 1].
        keep: One flag per patch, row by row.
        grid: Patch rows and columns.
    """
    height, width = image.shape[:2]
    # Indices, not np.repeat: the image need not be a whole number of patches high or wide.
    rows = np.arange(height) * grid[0] // height
    columns = np.arange(width) * grid[1] // width
    kept = keep.reshape(grid)[np.ix_(rows, columns)][..., None]
    return np.where(kept, image, (1 - WASH_STRENGTH) * image + WASH_STRENGTH * WASH)


def plot_dropped_patches(
    images: npt.ArrayLike,
    keep: Sequence[npt.ArrayLike],
    grid: tuple[int, int],
    *,
    titles: Sequence[str],
    stage_names: Sequence[str],
    path: str | Path,
) -> None:
    """Save a grid of pictures: a row per image, then the patches that are left after every stage.

    Args:
        images: Images x 3 x height x width, in [0, 1].
        keep: Per stage, images x patches: True where the patch is still alive.
        grid: Patch rows and columns.
        titles: What to write under each original, such as "label 3, predicted 3".
        stage_names: Head of each stage's column.
        path: PNG file to write.

    Raises:
        DataError: If the shapes do not fit each other.
    """
    pictures, masks = np.asarray(images), [np.asarray(flags, dtype=bool) for flags in keep]
    count, patches = len(pictures), grid[0] * grid[1]
    if not count or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise DataError(f"`images` must be images x 3 x height x width, got the shape {pictures.shape}")
    if any(mask.shape != (count, patches) for mask in masks):
        raise DataError(
            f"`keep` must hold {count} x {patches} flags per stage for {count} images and the grid {grid}, "
            f"got {[mask.shape for mask in masks]}"
        )
    if len(titles) != count or len(stage_names) != len(masks):
        raise DataError(
            "`titles` must name every image and `stage_names` every stage, got "
            f"{len(titles)} for {count} and {len(stage_names)} for {len(masks)}"
        )
    figure = Figure(figsize=(2.1 * (1 + len(masks)) + 0.2, 2.4 * count + 1.0), layout="constrained")
    axes = figure.subplots(count, 1 + len(masks), squeeze=False)
    for row, picture in enumerate(pictures.transpose(0, 2, 3, 1)):
        _show(axes[row, 0], picture, textwrap.fill(titles[row], 28))
        for axis, alive in zip(axes[row, 1:], (mask[row] for mask in masks), strict=True):
            _show(axis, grey_out(picture, alive, grid), f"{alive.sum()} of {patches} patches kept")
            _cross_out(axis, alive.reshape(grid), picture.shape[:2])
    for axis, name in zip(axes[0], ["original", *stage_names], strict=True):
        axis.set_title(name, fontsize=11, color=INK, parse_math=False)
    figure.suptitle("Which image patches the pruned model still looks at", fontsize=13, color=INK, fontweight="bold")
    figure.supxlabel(
        "Grey, struck-out patches (outlined in orange) were dropped:\n"
        "later blocks see only their weighted average, the package token.",
        fontsize=9.5,
        color=INK,
    )
    save_figure(figure, path)


def plot_token_histogram(
    kept: Sequence[npt.NDArray[np.integer]],
    num_patches: int,
    *,
    stage_names: Sequence[str],
    path: str | Path,
) -> None:
    """Save one histogram per stage: how many images keep how many patches, and the mean.

    Args:
        kept: Per stage, the number of patches kept in every image.
        num_patches: Patches of the dense model.
        stage_names: Head of each histogram.
        path: PNG file to write.

    Raises:
        DataError: If there is no stage or a stage without images.
    """
    if not kept or not all(len(counts) for counts in kept) or len(kept) != len(stage_names):
        raise DataError(
            "`kept` must hold one non-empty array per name in `stage_names`, got "
            f"{[len(counts) for counts in kept]} counts for {list(stage_names)}"
        )
    figure = Figure(figsize=(7.2, 1.7 * len(kept) + 1.1), layout="constrained")
    axes = figure.subplots(len(kept), 1, sharex=True, squeeze=False)[:, 0]
    step = max(1, round(num_patches / 64))
    edges = np.arange(0, num_patches + step + 1, step) - 0.5
    for axis, counts, name in zip(axes, kept, stage_names, strict=True):
        mean = float(np.mean(counts))
        axis.hist(counts, bins=edges, color=BLUE, edgecolor="white", linewidth=0.4)
        axis.axvline(mean, color=RED, linewidth=1.8)
        axis.set_title(name, fontsize=11, color=INK, loc="left", parse_math=False)
        share = f"mean {mean:.1f} of {num_patches} ({100 * mean / num_patches:.0f} %)"
        axis.set_title(share, fontsize=10, color=RED, loc="right")
        axis.set_ylabel("images", fontsize=10)
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        _tidy(axis)
    axes[-1].set_xlim(-0.5, num_patches + 0.5)
    axes[-1].set_xlabel(f"patches kept in an image (of {num_patches})", fontsize=10)
    figure.suptitle("How many patches an image keeps", fontsize=13, color=INK, fontweight="bold")
    save_figure(figure, path)


def plot_latency_accuracy(
    rows: Sequence[ModelRow], batch_size: int, path: str | Path, *, target_ms: float | None = None
) -> None:
    """Save accuracy against latency, with an arrow from the dense model to the pruned one.

    Args:
        rows: Dense first, pruned second; further ones are drawn as baselines.
        batch_size: Which of the measured latencies to show.
        path: PNG file to write.
        target_ms: Latency that was asked for, in ms per batch; None draws no line.

    Raises:
        DataError: If there are fewer than two rows or one was not timed at `batch_size`.
    """
    if len(rows) < 2 or any(batch_size not in row.latency for row in rows):
        raise DataError(
            f"`rows` must hold at least two models timed at batch size {batch_size}, got "
            f"{ {row.name: sorted(row.latency) for row in rows} }; measure them at that batch size"
        )
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axis = figure.subplots()
    points = [(row.latency[batch_size].median_ms, 100 * row.top1) for row in rows]
    axis.annotate(
        "",
        points[1],
        points[0],
        arrowprops={"arrowstyle": "-|>", "color": SOFT, "linewidth": 1.4, "shrinkA": 9, "shrinkB": 9},
    )
    _frame(axis, rows, points, batch_size, target_ms)
    # The arrow runs between the first two points, so their labels go to the far sides of it.
    falls = points[1][1] <= points[0][1]
    sides = [falls, not falls, *[True] * (len(rows) - 2)]
    colours = [INK, BLUE, *[SOFT] * (len(rows) - 2)]
    for row, (latency_ms, top1), above, colour in zip(rows, points, sides, colours, strict=True):
        stats = row.latency[batch_size]
        spread = [[max(0.0, latency_ms - stats.p10_ms)], [max(0.0, stats.p90_ms - latency_ms)]]
        axis.errorbar(latency_ms, top1, xerr=spread, fmt="o", color=colour, markersize=9, capsize=4)
        axis.annotate(
            f"{row.name}\n{latency_ms:.3g} ms, {top1:.2f} %",
            (latency_ms, top1),
            xytext=(0, 12 if above else -12),
            textcoords="offset points",
            ha="left" if latency_ms < 0.15 * axis.get_xlim()[1] else "center",
            va="bottom" if above else "top",
            fontsize=10,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
            parse_math=False,
        )
    speed = points[0][0] / points[1][0]
    figure.suptitle(
        f"{rows[1].name} against {rows[0].name}: {speed:.2f}x as fast, {points[1][1] - points[0][1]:+.2f} points top-1",
        fontsize=13,
        color=INK,
        fontweight="bold",
        parse_math=False,
    )
    save_figure(figure, path)


def _frame(
    axis: Axes,
    rows: Sequence[ModelRow],
    points: Sequence[tuple[float, float]],
    batch_size: int,
    target_ms: float | None,
) -> None:
    """Set the limits with room for the labels, name the axes and draw the target."""
    slowest = max(row.latency[batch_size].p90_ms for row in rows)
    lowest, highest = min(top1 for _, top1 in points), max(top1 for _, top1 in points)
    # Time starts at zero so that lengths compare; accuracy is zoomed, but never to less than four points.
    room = max(4.0, 2 * (highest - lowest))
    axis.set_xlim(0, 1.2 * max(slowest, target_ms or 0))
    bottom, top = (lowest + highest - room) / 2, (lowest + highest + room) / 2
    axis.set_ylim(bottom, top)
    axis.set_yticks([tick for tick in axis.get_yticks() if max(bottom, 0) <= tick <= min(top, 100)])
    if target_ms is not None:
        axis.axvline(target_ms, color=RED, linestyle="--", linewidth=1.4)
        axis.annotate(
            f"target {target_ms:.3g} ms",
            (target_ms, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            fontsize=10,
            color=RED,
        )
    axis.set_xlabel(f"latency in ms per batch of {batch_size} (dot: median, bar: p10 to p90)", fontsize=10)
    axis.set_ylabel("top-1 accuracy in %", fontsize=10)
    axis.grid(color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    _tidy(axis)


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


def _tidy(axis: Axes) -> None:
    axis.tick_params(labelsize=9.5, colors=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(SOFT)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG of at most `MAX_BYTES` if fewer colours, and then fewer dots, can reach that."""
    for dpi in (120, 100, 80):
        figure.savefig(path, dpi=dpi, bbox_inches="tight", pad_inches=0.15)
        if Path(path).stat().st_size > MAX_BYTES:
            with Image.open(path) as picture:
                rgb = picture.convert("RGB")
            rgb.quantize(palette=rgb.quantize(256), dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
        if Path(path).stat().st_size <= MAX_BYTES:
            break
