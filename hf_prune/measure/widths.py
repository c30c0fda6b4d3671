"""A picture of what is left of every width of a model."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_prune.measure.figures import BLUE, INK, SOFT, save_figure

PANELS = {"heads": "heads", "head_dim": "width of heads", "hidden": "MLP neurons", "channels": "channels",
          "embed": "embedding widths", "groups": "groups"}  # fmt: skip


def plot_widths(widths: Mapping[str, tuple[int, int]], path: str | Path) -> None:
    """Save bars for every axis that was cut: its size before, and what is left, by kind in the order of the model.

    Args:
        widths: Axis name -> size before and after.
        path: PNG file to write.
    """
    panels: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, sizes in widths.items():
        panels[PANELS.get(name.rpartition(".")[2].rstrip("_0123456789"), "others")].append(sizes)
    figure = Figure(figsize=(8.4, 1.9 * max(1, len(panels)) + 0.9), layout="constrained")
    for axes, (title, sizes) in zip(
        figure.subplots(max(1, len(panels)), squeeze=False).flat, panels.items(), strict=False
    ):
        places = range(1, len(sizes) + 1)
        axes.bar(places, [before for before, _ in sizes], color=SOFT, alpha=0.35, width=0.8, label="dense")
        axes.bar(places, [after for _, after in sizes], color=BLUE, width=0.8, label="pruned")
        kept = sum(after for _, after in sizes) / sum(before for before, _ in sizes)
        axes.set_title(f"{title}: {kept:.0%} kept", fontsize=10.5, color=INK, loc="left")
        axes.set_xlim(0.3, max(len(sizes), 6) + 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(
        "What is left of the widths that were cut, from the first layer to the last",
        fontsize=12,
        color=INK,
        fontweight="bold",
    )
    figure.axes[0].legend(fontsize=8.5, frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1.0, 1.22))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
