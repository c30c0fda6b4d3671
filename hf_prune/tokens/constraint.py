"""Constraints on what tokens may cost, with multipliers that make training arrive at them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hf_prune.tokens.schedule import CostOfKept


def global_mean(value: Tensor, accelerator: Any = None) -> Tensor:
    """Return the mean of `value` over processes, with the gradient of the local one.

    Gradients are averaged over processes afterwards, so the gradient that arrives is that of a function of the
    global mean.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return value
    everywhere = accelerator.reduce(value.detach().clone(), reduction="mean")
    return value + (everywhere - value.detach())


class Constraint:
    """A penalty on the excess `e(k)` of the batch-mean keep ratios `k`, with a multiplier that finishes the job.

    `weight * mean(e^2) + sum(lambda * e)`, where lambda grows by `rate * e` an optimiser step. Only the mean over the
    whole batch is constrained, so easy images may keep few tokens and hard ones many.

    Source: the first term is SPViT's ratio loss (batch mean, weight 2) for `e_s = k_s - rho_s`. On its own it stops
    short, because the classification loss always pays a little for more tokens: the published training ends at
    0.71, 0.44, 0.20 for targets of 0.617, 0.369, 0.137. The multiplier (method of multipliers) is ours.

    Args:
        excess: Maps `(stages,)` keep ratios to what they exceed the constraint by.
        weight: Of the quadratic term.
        rate: Step size of the multipliers; 0 gives the paper's loss.
        one_sided: Staying below costs nothing, and multipliers are never negative.
    """

    def __init__(
        self,
        excess: Callable[[Tensor], Tensor],
        *,
        weight: float = 2.0,
        rate: float = 0.05,
        one_sided: bool = False,
    ) -> None:
        self.excess, self.weight, self.rate, self.one_sided = excess, weight, rate, one_sided
        self.multipliers: list[float] = []

    def loss(self, mean_keep: Tensor) -> Tensor:
        """Return the penalty for mean keep ratios `(stages,)`."""
        excess = self.excess(mean_keep)
        multipliers = excess.new_tensor(self.multipliers or [0.0] * len(excess))
        felt = excess.clamp_min(0) if self.one_sided else excess
        return (self.weight * felt.square().mean() + (multipliers * excess).sum()).to(mean_keep.dtype)

    def update(self, mean_keep: Tensor) -> None:
        """Move the multipliers; call once an optimiser step, with the global mean."""
        excess = self.excess(mean_keep.detach().cpu())
        moved = excess.new_tensor(self.multipliers or [0.0] * len(excess)) + self.rate * excess
        self.multipliers = (moved.clamp_min(0) if self.one_sided else moved).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return the multipliers, for checkpoints."""
        return {"multipliers": list(self.multipliers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the multipliers of a checkpoint."""
        self.multipliers = list(state["multipliers"])


def keep_constraint(keep_ratios: Sequence[float], *, weight: float = 2.0, rate: float = 0.05) -> Constraint:
    """Return the constraint that every selector keeps its share of the patches."""
    return Constraint(lambda mean_keep: mean_keep - mean_keep.new_tensor(keep_ratios), weight=weight, rate=rate)


def latency_constraint(cost: CostOfKept, target: float, before_blocks: Sequence[int], **settings: float) -> Constraint:
    """Return the constraint that the cost of the mean image is at most a target; who keeps what is left open."""

    def excess(mean_keep: Tensor) -> Tensor:
        return cost.of_kept(mean_keep[None] * cost.num_patches, before_blocks) / target - 1

    return Constraint(excess, one_sided=True, **settings)
