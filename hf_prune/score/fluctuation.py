"""Fluctuation: units that hardly vary go first, for a bias can say what is always the same."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hf_prune.analyse.graph import AxisGraph, AxisInfo, Slice
from hf_prune.analyse.running import quiet_run
from hf_prune.errors import CriterionError
from hf_prune.score.activation import LAYERS
from hf_prune.score.base import Criterion, finished, relative, unit_rows
from hf_prune.score.batches import image_batches

# Layer -> values seen of a channel, their mean and the sum of squared deviations, one for every channel it reads.
Moments = dict[str, tuple[int, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Fluctuation(Criterion):
    """Variance of what arrives at the layers that read a unit, times the squared norm of their weights for it.

    This is the energy that the outputs of those layers lose when the unit goes and its mean is folded into their bias,
    as if units did not vary together. Every image and every position is a sample; the channels of a unit (a head) add
    up. Energies are divided by their mean over the axis, layer by layer, and averaged over the layers. Axes that no
    layer reads (the width of queries and keys) count by the variance at the outputs of their writers.

    Source: the fluctuation metric of An et al., Fluctuation-based Adaptive Structured Pruning for Large Language
    Models (FLAP), AAAI 2024. Differs from it by the division in place of a standardisation over all layers of a kind,
    by all readers of an axis, and by convolutions, whose kernel positions add up.
    """

    name = "fluctuation"
    needs = "forward"
    comparable = True

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return mean shares of energy; see `Criterion.score`. One forward run a batch, no labels needed.

        Raises:
            CriterionError: If the layers of an axis never run as modules, so that there is nothing to watch.
        """
        layers = {axis.name: _layers(model, axis) for axis in axes}
        inputs = {_path(s) for axis in axes for s in layers[axis.name] if s in axis.readers}
        outputs = {_path(s) for axis in axes for s in layers[axis.name] if s not in axis.readers}
        with _moments(model, inputs, outputs) as (seen_in, seen_out), quiet_run(model):
            for images in image_batches(self, model, data):
                model(images)
        scores = {}
        for axis in axes:
            found = []
            for slice_ in layers[axis.name]:
                path, reads = _path(slice_), slice_ in axis.readers
                seen = (seen_in if reads else seen_out).get(path)
                if seen is not None:
                    variance = seen[2] / seen[0]
                    energy = variance * _squared_norms(model.get_submodule(path)) if reads else variance
                    found.append(relative(_of_units(energy, slice_, axis.size)).cpu())
            if not found:
                raise CriterionError(
                    f"'fluctuation' must see what arrives at the layers of an axis, but those of '{axis.name}' are no "
                    f"linear layers or convolutions that run as modules; protect such axes or use 'taylor'"
                )
            scores[axis.name] = torch.stack(found).mean(0)
        return finished(self, scores)


@contextmanager
def _moments(model: nn.Module, inputs: set[str], outputs: set[str]) -> Iterator[tuple[Moments, Moments]]:
    """Give the moments at the inputs and outputs of layers, filled while the model runs."""
    seen_in: Moments = {}
    seen_out: Moments = {}

    def on_input(path: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        _note(seen_in, path, layer, (*args, *kwargs.values())[0])

    def on_output(path: str, layer: nn.Module, args: tuple, output: Tensor) -> None:
        _note(seen_out, path, layer, output)

    handles = []
    try:
        for path in inputs:
            layer = model.get_submodule(path)
            handles.append(layer.register_forward_pre_hook(partial(on_input, path), with_kwargs=True))
        for path in outputs:
            layer, hook = model.get_submodule(path), partial(on_output, path)
            handles.append(layer.register_forward_hook(hook))
        yield seen_in, seen_out
    finally:
        for handle in handles:
            handle.remove()


def _note(seen: Moments, path: str, layer: nn.Module, x: Tensor) -> None:
    """Merge the moments of a call with those before; a difference of large sums would lose what matters."""
    if not x.numel():
        return
    channels = x.ndim - (layer.weight.ndim - 1 if isinstance(layer, _ConvNd) else 1)
    rows = x.detach().float().movedim(channels, -1).flatten(0, -2)
    now, mean = len(rows), rows.mean(0)
    squares = (rows - mean).square().sum(0)
    before, old_mean, old_squares = seen.get(path, (0, torch.zeros_like(mean), torch.zeros_like(mean)))
    step, count = mean - old_mean, before + now
    seen[path] = count, old_mean + step * (now / count), old_squares + squares + step.square() * (before * now / count)


def _squared_norms(layer: nn.Module) -> Tensor:
    """Return the squared norm of the weights for every channel that a layer reads."""
    weight: Tensor = layer.weight.detach().float()  # type: ignore[assignment]
    if isinstance(layer, nn.Linear):
        return weight.square().sum(0)
    if not isinstance(layer, _ConvNd) or layer.transposed:
        return weight.square().flatten(1).sum(1)
    # A grouped convolution holds the channels of one group, the same for each of its outputs.
    return weight.square().unflatten(0, (layer.groups, -1)).flatten(3).sum((1, 3)).flatten()


def _of_units(energy: Tensor, slice_: Slice, size: int) -> Tensor:
    units = slice_.units.repeat(len(energy) // len(slice_.units))
    return unit_rows(energy, replace(slice_, dim=0, units=units), size).sum(1)


def _layers(model: nn.Module, axis: AxisInfo) -> list[Slice]:
    """Return the slices at which an axis is seen: readers, or writers where there is none."""
    for slices in (axis.readers, axis.writers):
        found = [s for s in slices if s.name.endswith("weight") and isinstance(model.get_submodule(_path(s)), LAYERS)]
        if found:
            return found
    return []


def _path(slice_: Slice) -> str:
    return slice_.name.rpartition(".")[0]
