"""Random scores: the control that every criterion must beat."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.score.base import Criterion


@dataclass(frozen=True, kw_only=True)
class Random(Criterion):
    """Uniform numbers from 0 to 1, the same on every call.

    They hang on the position of a unit: a permuted model gets the same numbers, in the same order. Report means over
    three seeds or more, at equal sizes of the layers.

    Attributes:
        seed: Another seed, other numbers.
    """

    name = "random"
    needs = "none"
    comparable = True

    seed: int = 0

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Draw. An axis gets the same numbers whichever others are asked for."""
        return {axis.name: torch.rand(axis.size, generator=self._generator(axis.name)) for axis in axes}

    def _generator(self, axis: str) -> torch.Generator:
        return torch.Generator().manual_seed(crc32(f"{self.seed} {axis}".encode()))
