"""What is kept or goes as one: a unit of an axis, or a single weight."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.score.gradients import gate_slices, unit_sums

Values = dict[str, Tensor]


class Parts(ABC):
    """Parts of a model that a saliency rates.

    Attributes:
        inputs: Example inputs of the model, of batch size 1.
        keep_ratio: Share of all parts that is to remain, for saliencies that remove parts while they rate them.
    """

    inputs: Any
    keep_ratio: float

    @abstractmethod
    def names(self) -> list[str]:
        """Return the parameters that the parts consist of, and perhaps some buffers."""

    @abstractmethod
    def total(self) -> int:
        """Return how many parts the whole model has."""

    @abstractmethod
    def sums(self, products: Mapping[str, Tensor]) -> Values:
        """Return the sum of something over every part, from a value for each weight of each parameter."""

    @abstractmethod
    def masks(self, kept: Mapping[str, Tensor]) -> Values:
        """Return parameter name -> factors that are zero where a part does not count, from a truth value a part."""

    @abstractmethod
    def best(self, values: Mapping[str, Tensor], number: int) -> Values:
        """Return the truth for exactly this many parts of the largest values, the first ones where they are equal."""


@dataclass(frozen=True)
class Units(Parts):
    """Units of axes, each with a gate on what reads it; every axis keeps one at least."""

    graph: AxisGraph
    axes: Sequence[AxisInfo]
    keep_ratio: float = 1.0

    @property
    def inputs(self) -> Any:
        """What the model was analysed with."""
        return self.graph.inputs

    def names(self) -> list[str]:
        """See `Parts`."""
        return list(dict.fromkeys(s.name for axis in self.axes for s in gate_slices(axis)))

    def total(self) -> int:
        """Return the number of units of all axes, whichever are rated."""
        return sum(axis.size for axis in self.graph.axes.values())

    def sums(self, products: Mapping[str, Tensor]) -> Values:
        """Return axis name -> `(size,)`, on the CPU."""
        sums = {}
        for axis in self.axes:
            sums[axis.name] = torch.zeros(axis.size)
            for s in gate_slices(axis):
                if s.name in products:
                    sums[axis.name] += unit_sums(products[s.name], s, axis.size).cpu()
        return sums

    def masks(self, kept: Mapping[str, Tensor]) -> Values:
        """Return factors that can be broadcast over the parameters."""
        masks: Values = {}
        for axis in self.axes:
            # Indices that are not on the axis read the one at the end.
            factors = torch.cat([kept[axis.name].float(), torch.ones(1)])
            for s in gate_slices(axis):
                shape = [-1 if d == s.dim else 1 for d in range(len(self.graph.shapes[s.name]))]
                factor = factors[s.units].view(shape)
                masks[s.name] = masks[s.name] * factor if s.name in masks else factor
        return masks

    def best(self, values: Mapping[str, Tensor], number: int) -> Values:
        """See `Parts`; more where there are more axes than that."""
        values = {name: line.double().clone() for name, line in values.items()}
        for line in values.values():
            line[line.argmax()] = torch.inf
        return best(values, max(number, len(values)))


@dataclass(frozen=True)
class Weights(Parts):
    """Single weights of parameters, each a part of its own."""

    sizes: Mapping[str, int]
    inputs: Any = None
    keep_ratio: float = 1.0

    def names(self) -> list[str]:
        """See `Parts`."""
        return list(self.sizes)

    def total(self) -> int:
        """See `Parts`."""
        return sum(self.sizes.values())

    def sums(self, products: Mapping[str, Tensor]) -> Values:
        """Return the products as they are."""
        return {name: products[name] for name in self.sizes}

    def masks(self, kept: Mapping[str, Tensor]) -> Values:
        """See `Parts`."""
        return dict(kept)

    def best(self, values: Mapping[str, Tensor], number: int) -> Values:
        """See `Parts`."""
        return best(values, number)


def best(values: Mapping[str, Tensor], number: int) -> Values:
    """Return the truth for exactly this many entries of the largest values of all tensors together."""
    together = torch.cat([tensor.flatten() for tensor in values.values()])
    if number >= len(together):
        chosen = torch.ones_like(together, dtype=torch.bool)
    elif number < 1:
        chosen = torch.zeros_like(together, dtype=torch.bool)
    else:
        # A sort of all of them would take far longer.
        least = together.kthvalue(len(together) - number + 1).values
        chosen = together > least
        chosen[(together == least).nonzero().flatten()[: number - int(chosen.sum())]] = True
    split = chosen.split([tensor.numel() for tensor in values.values()])
    return {name: line.view(tensor.shape) for line, (name, tensor) in zip(split, values.items(), strict=True)}


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of linear layers and convolutions by name: no biases, no norms, no tables."""
    parameters, found = dict(model.named_parameters()), {}
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        if isinstance(module, nn.Linear | _ConvNd) and name in parameters:
            found[name] = parameters[name]
    return found
