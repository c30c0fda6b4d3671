"""LAMP: magnitudes as a share of what remains, so that layer rates come out by themselves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.score.base import Criterion, finished
from hf_prune.score.magnitude import Magnitude


@dataclass(frozen=True, kw_only=True)
class Lamp(Criterion):
    """Squared magnitude of a unit, divided by that of all units of its axis which are not smaller.

    The largest unit of every axis scores 1, so global ranking never empties an axis. To be ranked as it is: a
    normaliser on top would undo it. Among units of equal magnitude those further back score higher.

    Source: Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, there for single
    weights; for groups of weights as in Torch-Pruning, here on `Magnitude` (squares over all layers).
    """

    name = "lamp"
    needs = "none"
    comparable = True

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return shares from 0 to 1; see `Criterion.score`."""
        magnitudes = Magnitude(p=2).score(model, graph, axes)
        return finished(self, {name: lamp(values) for name, values in magnitudes.items()})


def lamp(squares: Tensor) -> Tensor:
    """Return each value divided by the sum of those that do not come before it in ascending order, `(size,)`."""
    ascending, order = squares.double().sort(stable=True)
    remaining = ascending.flip(0).cumsum(0).flip(0)
    shares = torch.where(remaining > 0, ascending / remaining, torch.zeros_like(remaining))
    # An axis without any weight still has a unit that goes last.
    shares[-1] = 1
    return torch.empty_like(shares).scatter_(0, order, shares).float()
