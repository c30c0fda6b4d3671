"""Pictures of a pruned model: how many patches stay per image, and what it buys."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from hf_prune.errors import DataError
from hf_prune.measure.report import ModelRow

INK, SOFT, BLUE, RED = "#222222", "#8a8a8a", "#0072b2", "#d55e00"
MAX_BYTES = 400_000


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
