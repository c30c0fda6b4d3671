"""What a timm model says of its widths, kept true: `features_only`, new heads and wrappers are built by it."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_prune.analyse.axes import Axis, size_after, size_of
from hf_prune.analyse.graph import AxisGraph

HEAD_WIDTHS = ("num_features", "head_hidden_size", "embed_dim")


def head_widths(model: nn.Module, graph: AxisGraph, sizes: dict[Axis, int]) -> dict[str, int]:
    """Return the attributes that tell what the classifier is given, after a cut."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    for name, parameter in model.named_parameters():
        if parameter is weight and name in graph.recording.dims:
            width = graph.recording.dims[name][1]
            return {a: size_after(width, sizes) for a in HEAD_WIDTHS if vars(model).get(a) == size_of(width)}
    return {}


def feature_channels(model: nn.Module, graph: AxisGraph, sizes: dict[Axis, int]) -> tuple[int, ...] | None:
    """Return the channels of the announced feature maps after a cut; None for models that announce none."""
    return tuple(_channels(graph, entry, sizes) for entry in _entries(model)) or None


def _channels(graph: AxisGraph, entry: dict[str, Any], sizes: dict[Axis, int]) -> int:
    path, dense = str(entry.get("module", "")), int(entry["num_chs"])
    steps = [s for s in graph.recording.steps if s.module == path or s.module.startswith(f"{path}.")]
    made = {size_after(d, sizes) for step in steps[-1:] for dims in step.outputs for d in dims if size_of(d) == dense}
    return min(made, default=dense)


def set_feature_channels(model: nn.Module, channels: Sequence[int] | None) -> None:
    """Write the channels where timm reads them."""
    for entry, number in zip(_entries(model), channels or (), strict=False):
        entry["num_chs"] = number


def _entries(model: nn.Module) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, list) or not all(isinstance(entry, dict) and "num_chs" in entry for entry in info):
        return []
    return info
