"""BatchNorm scale: channels that their norm makes small go first."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_prune.analyse.graph import AxisGraph, AxisInfo, Slice
from hf_prune.analyse.running import named_tensors
from hf_prune.errors import CriterionError
from hf_prune.score.base import Criterion, finished, relative, unit_rows

Statistic = Literal["scale", "expected_relu"]


@dataclass(frozen=True, kw_only=True)
class BnScale(Criterion):
    """Mean over the BatchNorms on an axis of what their parameters say about a channel.

    "scale" is |gamma|. "expected_relu" is the mean of ReLU(x) for x normal with mean beta and deviation |gamma|: it
    sees that a channel with a large gamma and a very negative beta is dead. It takes a ReLU behind every norm for
    granted.

    Axes without BatchNorm (a linear layer, squeeze-and-excitation, a transformer) have no such score. By default that
    is an error that names them; with a `fallback` they get its scores, scaled to the mean of the BatchNorm axes.

    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017 (without its
    training with a penalty on gamma); Oh et al., Batch Normalization Tells You Which Filter is Important, WACV 2022,
    for the idea of the second, whose formula we derived ourselves.

    Attributes:
        statistic: "scale" or "expected_relu".
        fallback: Criterion for axes without BatchNorm.

    Raises:
        CriterionError: If there is no such statistic.
    """

    name = "bn_scale"
    needs = "none"
    comparable = True

    statistic: Statistic = "scale"
    fallback: Criterion | None = None

    def __post_init__(self) -> None:
        if self.statistic not in ("scale", "expected_relu"):
            raise CriterionError(f"`statistic` must be 'scale' or 'expected_relu', got {self.statistic!r}")

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return the mean statistic; see `Criterion.score`.

        Raises:
            CriterionError: If an axis has no BatchNorm and there is no fallback.
        """
        tensors, scores, without = named_tensors(model), {}, []
        for axis in axes:
            found = [self._statistic(tensors, axis, weight) for weight in _batch_norms(model, axis)]
            if found:
                scores[axis.name] = torch.stack(found).mean(0)
            else:
                without.append(axis)
        if without:
            scores.update(self._of_others(model, graph, without, data, scores))
        return finished(self, {axis.name: scores[axis.name] for axis in axes})

    def _statistic(self, tensors: dict[str, Tensor], axis: AxisInfo, weight: Slice) -> Tensor:
        gamma = unit_rows(tensors[weight.name], weight, axis.size).abs()
        if self.statistic == "expected_relu":
            bias = next(s for s in axis.carriers if s.name == f"{weight.name.rpartition('.')[0]}.bias")
            return expected_relu(unit_rows(tensors[bias.name], bias, axis.size), gamma).mean(1).cpu()
        return gamma.mean(1).cpu()

    def _of_others(
        self,
        model: nn.Module,
        graph: AxisGraph,
        axes: list[AxisInfo],
        data: Iterable[Any] | None,
        scores: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        if self.fallback is None:
            names = ", ".join(f"'{axis.name}'" for axis in axes[:3]) + (", ..." if len(axes) > 3 else "")
            raise CriterionError(
                f"'bn_scale' scores axes with a BatchNorm, but {len(axes)} of {len(axes) + len(scores)} have none "
                f"({names}); protect them, prune other kinds, or use BnScale(fallback=Magnitude())"
            )
        level = torch.cat(list(scores.values())).mean() if scores else torch.tensor(1.0)
        others = self.fallback.score(model, graph, axes, data)
        return {name: relative(values) * level for name, values in others.items()}


def expected_relu(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return the mean of ReLU(x) for normal x, element by element: `s * pdf(m / s) + m * cdf(m / s)`."""
    # A deviation of zero leaves ReLU(mean), which a tiny one gives without dividing by zero.
    deviation = deviation.double().clamp_min(1e-12)
    ratio = mean.double() / deviation
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    return (deviation * density + mean.double() * torch.special.ndtr(ratio)).clamp_min(0).float()


def _batch_norms(model: nn.Module, axis: AxisInfo) -> list[Slice]:
    """Return the scales of the BatchNorms on an axis, plain, fused with an activation, or frozen into buffers."""
    return [
        carrier
        for carrier in axis.carriers
        if carrier.name.rpartition(".")[2] == "weight"
        and hasattr(model.get_submodule(carrier.name.rpartition(".")[0]), "running_var")
    ]
