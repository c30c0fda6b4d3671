"""Activation: units that say little to the layers that read them go first."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from hf_prune.analyse.graph import AxisGraph, AxisInfo, Slice
from hf_prune.analyse.running import quiet_run
from hf_prune.errors import CriterionError
from hf_prune.score.base import Criterion, finished, unit_rows
from hf_prune.score.batches import image_batches

# Modules whose input is what their weight reads, and whose output is what it writes.
LAYERS = (nn.Linear, _ConvNd, Conv1D)
# (layer, axis) -> number of values of a unit seen, and the mean over them.
Seen = dict[tuple[str, str], tuple[int, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Activation(Criterion):
    """Mean size of what arrives at the layers that read a unit, over images and positions, then over layers.

    For a head that is its attention output, for an MLP neuron its value behind the non-linearity, for an embedding
    channel the output of the norms. All positions count, prefix tokens too. Axes that no layer reads (the width of
    queries and keys) are seen at the outputs of their writers. Weights of the readers play no part.

    Source: the activation criterion of Muralidharan et al., Compact Language Models via Pruning and Knowledge
    Distillation (Minitron), NeurIPS 2024; aggregation over batch and positions is by a plain mean here.

    Attributes:
        statistic: "mean_abs", or "rms", the root of the mean square.

    Raises:
        CriterionError: If there is no such statistic.
    """

    name = "activation"
    needs = "forward"
    comparable = False

    statistic: Literal["mean_abs", "rms"] = "mean_abs"

    def __post_init__(self) -> None:
        if self.statistic not in ("mean_abs", "rms"):
            raise CriterionError(f"`statistic` must be 'mean_abs' or 'rms', got {self.statistic!r}")

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return mean sizes; see `Criterion.score`. One forward run a batch, data without labels will do.

        Raises:
            CriterionError: If the layers of an axis never run as modules (nn.MultiheadAttention is one that takes
                the weights out of its parts), so that there is nothing to watch.
        """
        squared = self.statistic == "rms"
        with watched(model, axes, torch.square if squared else torch.abs) as seen, quiet_run(model):
            for images in image_batches(self, model, data):
                model(images)
        of_axis: dict[str, list[Tensor]] = defaultdict(list)
        for (_, axis), (_, mean) in seen.items():
            of_axis[axis].append((mean.sqrt() if squared else mean).cpu())
        blind = [axis.name for axis in axes if axis.name not in of_axis]
        if blind:
            raise CriterionError(
                f"'activation' must see what arrives at the layers of an axis, but those of '{blind[0]}' are no linear "
                f"layers or convolutions that run as modules; protect {len(blind)} such axes or use 'taylor'"
            )
        return finished(self, {axis.name: torch.stack(of_axis[axis.name]).mean(0) for axis in axes})


@contextmanager
def watched(model: nn.Module, axes: Sequence[AxisInfo], size_of: Callable[[Tensor], Tensor]) -> Iterator[Seen]:
    """Give the running means of what layers see, filled while the model runs; one hook a layer, removed at the end."""
    inputs: dict[str, list[tuple[AxisInfo, Slice]]] = defaultdict(list)
    outputs: dict[str, list[tuple[AxisInfo, Slice]]] = defaultdict(list)
    for axis in axes:
        readers = [slice_ for slice_ in axis.readers if _is_layer(model, slice_)]
        writers = [slice_ for slice_ in axis.writers if _is_layer(model, slice_)]
        for slice_ in readers or writers:
            (inputs if readers else outputs)[_path(slice_)].append((axis, slice_))
    seen: Seen = {}

    def on_input(path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        note(module, (*args, *kwargs.values())[0], path, inputs[path])

    def on_output(path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        note(module, output, path, outputs[path])

    def note(module: nn.Module, x: Tensor, path: str, uses: list[tuple[AxisInfo, Slice]]) -> None:
        if not x.numel():
            return
        # The running mean over calls, each by the number of values it averages.
        count, means = channel_means(module, x, size_of)
        for axis, slice_ in uses:
            now = _of_units(means, slice_, axis.size)
            before, mean = seen.get((path, axis.name), (0, torch.zeros_like(now)))
            seen[path, axis.name] = before + count, mean + (now - mean) * (count / (before + count))

    handles = []
    try:
        for path in inputs:
            layer, hook = model.get_submodule(path), partial(on_input, path)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for path in outputs:
            layer, hook = model.get_submodule(path), partial(on_output, path)
            handles.append(layer.register_forward_hook(hook))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def channel_means(layer: nn.Module, x: Tensor, size_of: Callable[[Tensor], Tensor]) -> tuple[int, Tensor]:
    """Return of how many values the mean is, and the mean size of every channel a layer sees, `(channels,)`."""
    channels = x.ndim - (layer.weight.ndim - 1 if isinstance(layer, _ConvNd) else 1)
    means = size_of(x.detach().float()).movedim(channels, -1).flatten(0, -2).mean(0)
    return x.numel() // len(means), means


def _of_units(means: Tensor, slice_: Slice, size: int) -> Tensor:
    # The weight of a grouped convolution holds the channels of one group.
    units = slice_.units.repeat(len(means) // len(slice_.units))
    return unit_rows(means, replace(slice_, dim=0, units=units), size).mean(1)


def _path(slice_: Slice) -> str:
    return slice_.name.rpartition(".")[0]


def _is_layer(model: nn.Module, slice_: Slice) -> bool:
    return slice_.name.endswith("weight") and isinstance(model.get_submodule(_path(slice_)), LAYERS)
