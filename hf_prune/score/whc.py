"""WHC: units that are small, or parallel to others that are large, go first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.score.base import Criterion, finished
from hf_prune.score.similarity import unit_gram


@dataclass(frozen=True, kw_only=True)
class Whc(Criterion):
    """Norm of a unit times the sum over the others of their norm times (1 - |cosine| of the two).

    Orthogonal units are valued, parallel and antiparallel ones are redundant.

    Source: Chen et al., WHC: Weighted Hybrid Criterion for Filter Pruning, ICASSP 2023. Differs from it by taking
    all layers on the axis; see `unit_gram`.
    """

    name = "whc"
    needs = "none"
    comparable = False

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return weighted dissimilarities; see `Criterion.score`."""
        return finished(self, {axis.name: self._score(model, axis) for axis in axes})

    def _score(self, model: nn.Module, axis: AxisInfo) -> Tensor:
        gram = unit_gram(model, axis)
        norms = gram.diagonal().clamp_min(0).sqrt()
        # norm_i * norm_j * (1 - |cos|), without a division, so that dead units need no care.
        dissimilar = norms[:, None] * norms[None, :] - gram.abs()
        return dissimilar.clamp_min(0).fill_diagonal_(0).sum(1)
