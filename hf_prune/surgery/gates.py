"""Differentiable gates on any axis: scaling a unit is scaling what reads it.

A gate multiplies the readers' slices of each unit, so no activation is touched and no hook is needed; it works
wherever weights do: under accelerate, mixed precision and `torch.compile`. Folding multiplies the values into the
weights, exactly.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.errors import PlanError


class Gate(nn.Module):
    """One value for every unit of an axis.

    Attributes:
        values: `(size,)`, trainable.
        transform: Turns values into factors (a sigmoid, a straight-through mask); None takes them as they are.
    """

    def __init__(self, size: int, *, start: float = 1.0, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.full((size,), start))
        self.transform = transform

    def forward(self) -> Tensor:
        """Return the factors `(size,)`."""
        return self.values if self.transform is None else self.transform(self.values)


class ScaledReader(nn.Module):
    """A reader's weight as the model sees it: every unit's slice times its factor."""

    units: Tensor

    def __init__(self, gate: Gate, dim: int, ndim: int, units: Tensor) -> None:
        super().__init__()
        # One gate for all readers of the axis.
        self.gate = gate
        self.shape = [-1 if d == dim else 1 for d in range(ndim)]
        self.register_buffer("units", units, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the scaled weight, in its own precision."""
        factors = self.gate()
        # Indices that are not on the axis read the one at the end.
        factors = torch.cat([factors, factors.new_ones(1)])[self.units]
        return weight * factors.view(self.shape).to(weight.dtype)


def add_gates(
    model: nn.Module,
    graph: AxisGraph,
    axes: Iterable[str] | None = None,
    *,
    start: float = 1.0,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Gate]:
    """Put a gate on axes and return the gates by axis name; they are parameters of the model until folded.

    Args:
        model: Changed in place; computes the same as before while factors are one.
        graph: Its analysis.
        axes: Names; None takes every free axis that is silenced through its readers.
        start: First value.
        transform: See `Gate`.

    Raises:
        PlanError: If an axis is unknown or not read by layers alone, or the model has gates already.
    """
    if any(isinstance(module, ScaledReader) for module in model.modules()):
        raise PlanError("the model has gates already; fold them first with `fold_gates`")
    names = [name for name, axis in graph.axes.items() if axis.can_gate] if axes is None else list(axes)
    for name in names:
        if name not in graph.axes or not graph.axes[name].can_gate:
            raise PlanError(f"a gate needs a free axis that is read by layers alone, got '{name}'")
    modules = dict(model.named_modules())
    device = next(model.parameters()).device
    gates = {name: Gate(graph.axes[name].size, start=start, transform=transform).to(device) for name in names}
    for name, gate in gates.items():
        for s in graph.axes[name].readers:
            path, _, parameter = s.name.rpartition(".")
            ndim = len(graph.shapes[s.name])
            scaled = ScaledReader(gate, s.dim, ndim, s.units.to(device))
            parametrize.register_parametrization(modules[path], parameter, scaled, unsafe=True)
    return gates


@torch.no_grad()
def fold_gates(model: nn.Module) -> None:
    """Multiply the factors into the weights and take the gates off; the model computes what it did with them.

    Raises:
        PlanError: If there are none.
    """
    if not any(isinstance(module, ScaledReader) for module in model.modules()):
        raise PlanError("the model has no gates to fold")
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            stack = module.parametrizations[name]  # type: ignore[index]
            if all(isinstance(step, ScaledReader) for step in stack):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def norm_scales(model: nn.Module, axis: AxisInfo) -> list[nn.Parameter]:
    """Return the scales of the batch norms on an axis: the gates a convolutional network already has.

    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017.
    """
    modules = dict(model.named_modules())
    found = []
    for s in axis.carriers:
        path, _, name = s.name.rpartition(".")
        module = modules[path]
        if name == "weight" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            found.append(module.weight)
    return found
