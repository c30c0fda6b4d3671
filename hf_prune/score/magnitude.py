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
    """Mean over all layers on an axis of the norm of a unit's weights, each layer's norms divided by their mean.

    Every layer has the same say, whatever its scale; weight and bias of one are one row. So scores have mean 1 on
    every axis, which makes them comparable as far as magnitudes can be.

    Source: L1 of filters, Li et al., Pruning Filters for Efficient ConvNets, 2017 (`p=1, writers_only=True` is theirs,
    but for the division, which does not change the order on an axis of one layer); all coupled layers together, Fang
    et al., DepGraph, CVPR 2023, from which we differ by norms instead of their squares and by dividing layer by layer.

    Attributes:
        p: Of the norm: 1 or 2.
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
        roles = [axis.writers] if self.writers_only and axis.writers else [axis.writers, axis.readers, axis.carriers]
        norms = [relative(self._norms(rows)).cpu() for role in roles for rows in layer_rows(model, role, axis.size)]
        return torch.stack(norms).mean(0) if norms else torch.zeros(axis.size)

    def _norms(self, rows: Tensor) -> Tensor:
        # Torch's own norm is ten times slower on the columns of a matrix, which is what readers are.
        return rows.abs().sum(1) if self.p == 1 else rows.square().sum(1).sqrt()
