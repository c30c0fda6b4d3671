"""Share a budget out among axes: from scores and a cost to the number of units that each axis keeps.

Three of the allocators turn scores into one order of removal: a function of one number, the pruning ratio from 0 to 1,
that tells what remains. What remains at a larger ratio is a part of what remains at a smaller one, so that a smaller
budget never gives a larger model, and the budget is met by bisection. The fourth is a knapsack; see `knapsack.py`.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from hf_prune.allocate.costs import CostModel, Sizes
from hf_prune.allocate.knapsack import knapsack
from hf_prune.analyse.graph import KINDS, AxisInfo
from hf_prune.errors import BudgetError, PlanError, did_you_mean

Scores = Mapping[str, Tensor]
KeepAt = Callable[[float], dict[str, int]]
# Heads and groups are few and large, head dimensions make attention blind, channels are many.
SAFE_KINDS = ("heads", "mlp", "channels", "embed", "groups")


@dataclass(frozen=True)
class Limits:
    """What an allocator must respect.

    Attributes:
        kinds: Kinds of axes that may be pruned; see `analyse.graph.KINDS`.
        protect: Patterns of axis names that stay whole (`*` stands for anything): `stages.0.*`.
        round_to: Sizes become multiples of this; 8, 16 or 32 suit most devices. Heads and groups are never rounded.
        min_keep_ratio: Share of every axis that stays.
        min_size: Units of every axis that stay.

    Raises:
        PlanError: If a kind is unknown or a number out of range.
    """

    kinds: Sequence[str] = SAFE_KINDS
    protect: Sequence[str] = ()
    round_to: int = 1
    min_keep_ratio: float = 0.05
    min_size: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise PlanError(f"`kinds` must be of {', '.join(KINDS)}, got '{kind}'" + did_you_mean(kind, KINDS))
        if self.round_to < 1 or not 0 <= self.min_keep_ratio <= 1:
            raise PlanError("`round_to` must be 1 or more and `min_keep_ratio` from 0 to 1")

    def choose(self, axes: Sequence[AxisInfo]) -> list[AxisInfo]:
        """Return the axes that may be pruned."""
        return [
            axis
            for axis in axes
            if axis.kind in self.kinds and not any(fnmatchcase(axis.name, pattern) for pattern in self.protect)
        ]

    def apply(self, axis: AxisInfo, num_keep: int) -> int:
        """Return the allowed number of units nearest to a wanted one, rounded up."""
        least = max(1, self.min_size.get(axis.kind, 1), round(self.min_keep_ratio * axis.size))
        num_keep = max(num_keep, least)
        if self.round_to > 1 and axis.kind not in ("heads", "groups"):
            num_keep = -(-num_keep // self.round_to) * self.round_to
        return min(num_keep, axis.size)


@dataclass(frozen=True)
class Problem:
    """What an allocator decides about.

    Attributes:
        axes: Those that may be pruned.
        scores: Axis name -> `(size,)`, larger is more worth keeping.
        cost: Of the whole model at given sizes; axes that are not named stay dense.
        limit: What the pruned model may cost.
        limits: Which sizes are allowed.
    """

    axes: Sequence[AxisInfo]
    scores: Scores
    cost: CostModel
    limit: float
    limits: Limits

    def require_reachable(self, smallest: Sizes) -> None:
        """Check that the smallest model is within the budget.

        Raises:
            BudgetError: If it is not, with its cost.
        """
        least = self.cost(smallest)
        if least > self.limit:
            raise BudgetError(
                f"the smallest model within the limits costs {least:,.4g}, the budget is {self.limit:,.4g}; raise the "
                f"budget, allow more kinds of axes, or lower `min_keep_ratio` and `round_to`"
            )


Allocator = Callable[[Problem], dict[str, int]]


def uniform(problem: Problem) -> dict[str, int]:
    """Take the same share of every axis."""
    return meet_budget(problem, lambda ratio: {axis.name: round(axis.size * (1 - ratio)) for axis in problem.axes})


def global_rank(problem: Problem) -> dict[str, int]:
    """Rank all units of all axes together."""
    return meet_budget(problem, _ranked([list(problem.axes)], problem.scores))


def isomorphic(problem: Problem) -> dict[str, int]:
    """Rank units among axes that play the same part (all MLPs, all heads, each width of a stage), each by itself.

    Source: the idea of Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024; axes play the same part
    when they are of one kind and size and their names differ in numbers only.
    """
    groups: dict[tuple[str, str, int], list[AxisInfo]] = defaultdict(list)
    for axis in problem.axes:
        groups[(*axis.part, axis.size)].append(axis)
    return meet_budget(problem, _ranked(list(groups.values()), problem.scores))


def _ranked(groups: list[list[AxisInfo]], scores: Scores) -> KeepAt:
    ranked = []
    for group in groups:
        members = {axis.name: scores[axis.name] for axis in group}
        ranked.append((members, torch.cat(list(members.values())).sort().values))

    def keep_at(ratio: float) -> dict[str, int]:
        keep = {}
        for members, together in ranked:
            cut = min(int(ratio * len(together)), len(together) - 1)
            keep.update({name: int((values >= together[cut]).sum()) for name, values in members.items()})
        return keep

    return keep_at


def meet_budget(problem: Problem, keep_at: KeepAt) -> dict[str, int]:
    """Return the sizes of the largest model within a budget, along an order of removal.

    Raises:
        BudgetError: If the smallest model still costs more, with its cost.
    """

    def sizes(ratio: float) -> dict[str, int]:
        wanted = keep_at(ratio)
        return {axis.name: problem.limits.apply(axis, wanted[axis.name]) for axis in problem.axes}

    problem.require_reachable(sizes(1.0))
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if problem.cost(sizes(middle)) <= problem.limit else (middle, high)
    return sizes(high)


ALLOCATORS: dict[str, Allocator] = {
    "uniform": uniform, "global_rank": global_rank, "isomorphic": isomorphic, "knapsack": knapsack,
}  # fmt: skip


def allocator_named(name: str | Allocator) -> Allocator:
    """Return an allocator by name, or the one given.

    Raises:
        BudgetError: If the name is unknown, with the nearest one.
    """
    if callable(name):
        return name
    if name not in ALLOCATORS:
        names = ", ".join(ALLOCATORS)
        raise BudgetError(f"`allocator` must be one of {names}, got '{name}'" + did_you_mean(name, ALLOCATORS))
    return ALLOCATORS[name]


def best(scores: Scores, num_keep: Mapping[str, int]) -> dict[str, list[int]]:
    """Return the units with the highest scores of every axis, ascending; the first ones where scores are equal."""
    return {
        name: sorted(scores[name].argsort(descending=True, stable=True)[:number].tolist())
        for name, number in num_keep.items()
    }
