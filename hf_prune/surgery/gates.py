"""Differentiable gates on any axis: scaling a unit is scaling what reads it.

A gate multiplies the readers' slices of each unit, so no activation is touched and no hook is needed; it works
wherever weights do: under accelerate, mixed precision and `torch.compile`. Folding multiplies the values into the
weights, exactly.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_prune.analyse.graph import AxisGraph, AxisInfo, Slice
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


class OnUnits(nn.Module):
    """Base of parametrisations that multiply the slices of a weight by one factor a unit.

    Attributes:
        slice: The reader, and for every index along its dimension the unit.
    """

    units: Tensor

    def __init__(self, slice_: Slice, ndim: int) -> None:
        super().__init__()
        self.slice = slice_
        self.shape = [-1 if d == slice_.dim else 1 for d in range(ndim)]
        self.register_buffer("units", slice_.units, persistent=False)

    def scaled(self, weight: Tensor, factors: Tensor) -> Tensor:
        """Return the weight times the factors `(size,)` of its units, in its own precision."""
        # Indices that are not on the axis read the one at the end.
        factors = torch.cat([factors, factors.new_ones(1)])[self.units]
        return weight * factors.view(self.shape).to(weight.dtype)


class ScaledReader(OnUnits):
    """A reader's weight as the model sees it: every unit's slice times its gate."""

    def __init__(self, gate: Gate, slice_: Slice, ndim: int) -> None:
        super().__init__(slice_, ndim)
        # One gate for all readers of the axis.
        self.gate = gate

    def forward(self, weight: Tensor) -> Tensor:
        """Return the scaled weight."""
        return self.scaled(weight, self.gate())


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
    require_plain_readers(model)
    names = [name for name, axis in graph.axes.items() if axis.can_gate] if axes is None else list(axes)
    for name in names:
        if name not in graph.axes or not graph.axes[name].can_gate:
            raise PlanError(f"a gate needs a free axis that is read by layers alone, got '{name}'")
    device = next(model.parameters()).device
    gates = {name: Gate(graph.axes[name].size, start=start, transform=transform).to(device) for name in names}
    for name, gate in gates.items():
        parametrize_readers(model, graph, name, partial(ScaledReader, gate))
    return gates


def require_plain_readers(model: nn.Module) -> None:
    """Check that nothing scales units of a model yet.

    Raises:
        PlanError: If gates or masks do.
    """
    if any(isinstance(module, OnUnits) for module in model.modules()):
        raise PlanError("the model has gates or masks already; first fold gates with `fold_gates`, take masks off with "
                        "`remove_masks`")  # fmt: skip


def parametrize_readers(model: nn.Module, graph: AxisGraph, name: str, make: Callable[[Slice, int], OnUnits]) -> None:
    """Put a parametrisation, made from a slice and the dimensions of its weight, on every reader of an axis."""
    for s in graph.axes[name].readers:
        path, _, parameter = s.name.rpartition(".")
        module = model.get_submodule(path)
        on_units = make(s, len(graph.shapes[s.name])).to(getattr(module, parameter).device)
        parametrize.register_parametrization(module, parameter, on_units, unsafe=True)


@torch.no_grad()
def fold_gates(model: nn.Module) -> None:
    """Multiply the factors into the weights and take the gates off; the model computes what it did with them.

    Raises:
        PlanError: If there are none.
    """
    if not remove_parametrizations(model, ScaledReader, leave_parametrized=True):
        raise PlanError("the model has no gates to fold")


def remove_parametrizations(model: nn.Module, kind: type[nn.Module], *, leave_parametrized: bool) -> int:
    """Take all parametrisations of a kind off and return from how many weights.

    Args:
        model: Changed in place.
        kind: Weights that something else parametrises, too, are left alone.
        leave_parametrized: Whether weights become what the model saw, or what was underneath.
    """
    number = 0
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            if all(isinstance(step, kind) for step in module.parametrizations[name]):  # type: ignore[index]
                parametrize.remove_parametrizations(module, name, leave_parametrized=leave_parametrized)
                number += 1
    return number


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
