"""FPGM: units near the geometric median of an axis are replaceable and go first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.score.base import Criterion, finished, layer_rows


@dataclass(frozen=True, kw_only=True)
class Fpgm(Criterion):
    """Sum of the distances of a unit to all others of its axis.

    A dead unit scores low only while the others are spread around zero. Where they have a large common part, zero
    is far from all of them and a dead unit scores *highest*: that is the criterion, not an error.

    Source: He et al., Filter Pruning via Geometric Median, CVPR 2019. Differs from it by adding up the distances in
    all layers on the axis, norms and layer scales left out, and by scoring once, without its alternation of norm,
    distance and training.
    """

    name = "fpgm"
    needs = "none"
    comparable = False

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return summed distances; see `Criterion.score`."""
        return finished(self, {axis.name: self._score(model, axis) for axis in axes})

    def _score(self, model: nn.Module, axis: AxisInfo) -> Tensor:
        weights = [member for member in axis.slices if not member.name.endswith("bias")]
        total = torch.zeros(axis.size)
        for rows in layer_rows(model, weights, axis.size):
            # The one number of a scale is near 1 for every unit, and a dead unit, at 0, would be the farthest.
            if rows.shape[1] > 1:
                total += torch.cdist(rows.detach(), rows.detach()).sum(1).cpu()
        return total
