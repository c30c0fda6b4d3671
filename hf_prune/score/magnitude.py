"""Magnitude: units with small weights go first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.errors import CriterionError
from hf_prune.score.base import Criterion, finished, layer_rows, relative


@dataclass(frozen=True, kw_only=True)
class Magnitude(Criterion):
    """Sum over the weights of all layers on an axis of their absolute values to the power `p`, for every unit.

    Biases are left out: a large one, such as the shift of a BatchNorm, may well switch a unit off. Scores are divided
    by their mean over the axis, for layers of different width and scale could not be compared otherwise.

    Source: L1 of filters, Li et al., Pruning Filters for Efficient ConvNets, 2017 (`p=1, writers_only=True` is theirs,
    but for the division, which does not change the order); all coupled layers together, Fang et al., DepGraph, CVPR
    2023.

    Attributes:
        p: Power, 1 or 2.
        writers_only: Look at the layers that produce a unit only; all layers where there is none.

    Raises:
        CriterionError: If `p` is neither 1 nor 2.
    """

    name = "magnitude"
    needs = "none"
    comparable = True

    p: int = 2
    writers_only: bool = False

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise CriterionError(f"`p` of a magnitude must be 1 or 2, got {self.p!r}")

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return the mean of relative norms; see `Criterion.score`."""
        return finished(self, {axis.name: self._score(model, axis) for axis in axes})

    def _score(self, model: nn.Module, axis: AxisInfo) -> Tensor:
        members = axis.writers if self.writers_only and axis.writers else axis.slices
        weights = [member for member in members if not member.name.endswith("bias")] or members
        total = torch.zeros(axis.size)
        for rows in layer_rows(model, weights, axis.size):
            total += (rows.abs() if self.p == 1 else rows.square()).sum(1).cpu()
        return relative(total)
