"""The search over schedules of tokens: each with the widths that the budget leaves beside it, tried on images."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_prune.allocate.allocators import Allocator, Limits, Problem, best
from hf_prune.allocate.joint_plan import Choice
from hf_prune.allocate.plan import Plan
from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.errors import BudgetError, PlanError
from hf_prune.measure.closing import cut_copy
from hf_prune.measure.joint_cost import JointCost, TokenGrid, is_inside, with_tokens
from hf_prune.recover.compensate import How, compensated
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.reducers.base import Merger
from hf_prune.tokens.reducers.registry import reducer_class
from hf_prune.tokens.schedule import geometric
from hf_prune.tokens.site import logits_of

# What stands for a method that learns which tokens go, until it has.
STAND_IN = "evit"
# A schedule, None for all tokens, and widths.
Trial = tuple[TokenPruningConfig | None, Plan]


@dataclass(frozen=True)
class Search:
    """What all schedules share.

    Attributes:
        model: Dense.
        graph: Its analysis.
        axes: Those that may be cut.
        scores: Of their units.
        cost: By tokens and sizes.
        limit: What the model may cost.
        limits: Which sizes are allowed.
        share_out: The allocator.
        reducers: Their settings, but for keep ratios.
    """

    model: nn.Module
    graph: AxisGraph
    axes: Sequence[AxisInfo]
    scores: Mapping[str, Tensor]
    cost: JointCost
    limit: float
    limits: Limits
    share_out: Allocator
    reducers: TokenPruningConfig

    def widths(self, tokens: TokenPruningConfig | None, limit: float) -> Plan:
        """Return the best widths beside some tokens.

        Raises:
            BudgetError: If the smallest ones cost too much.
        """
        if self.cost(tokens)({}) <= limit:
            return Plan({}, {})
        problem = Problem(self.axes, self.scores, self.cost(tokens), limit, self.limits)
        return Plan.of(self.graph, best(self.scores, self.share_out(problem)))

    def fits_alone(self, tokens: TokenPruningConfig | None) -> bool:
        """Return whether the model meets the budget with all its widths."""
        return self.cost(tokens)({}) <= self.limit

    def trials(self, keeps: Sequence[float], grid: TokenGrid) -> list[Trial]:
        """Return the schedules within the budget, each with its widths.

        Raises:
            BudgetError: If there is none.
        """
        found, dearer, least = [], 1.0, math.inf
        smallest = {axis.name: self.limits.apply(axis, 1) for axis in self.axes}
        for keep in sorted(set(keeps), reverse=True):
            tokens = schedule(self.reducers, keep) if keep < 1 else None
            if tokens is not None and not _can_merge(tokens, grid):
                continue
            if self.fits_alone(tokens):
                # Fewer tokens yet would only lose more: no width has to go any more.
                found.append((self._just_enough(dearer, keep), Plan({}, {})))
                break
            dearer, least = keep, min(least, self.cost(tokens)(smallest))
            if self.cost(tokens)(smallest) <= self.limit:
                found.append((tokens, self.widths(tokens, self.limit)))
        if not found:
            raise BudgetError(
                f"the smallest model within the limits and the schedules costs {least:,.4g}, the budget is "
                f"{self.limit:,.4g}; raise the budget, allow more kinds of axes, or give smaller `keeps`"
            )
        return found

    def _just_enough(self, above: float, below: float) -> TokenPruningConfig:
        """Return the schedule with most tokens that meets the budget alone, to a hundredth."""
        while above - below > 0.01:
            middle = (above + below) / 2
            above, below = (above, middle) if self.fits_alone(schedule(self.reducers, middle)) else (middle, below)
        return schedule(self.reducers, below)

    def choice(
        self,
        trial: Trial,
        images: Sequence[Tensor],
        dense: Tensor,
        batches: Sequence[Any],
        compensation: How | None,
    ) -> Choice:
        """Realise a schedule and its widths and see how far it takes the model from the dense one."""
        tokens, plan = trial
        small = self.realised(plan, tokens and standing_in(tokens), batches, compensation)
        found = log_probabilities(small, images)
        divergence = F.kl_div(found, dense, log_target=True, reduction="batchmean").item()
        sizes = {name: len(units) for name, units in plan.kept.items()}
        kept = sum(sizes.get(axis.name, axis.size) / axis.size for axis in self.axes) / len(self.axes)
        return Choice(tokens.keep_ratios if tokens else (), kept, self.cost(tokens)(sizes), divergence)

    def realised(
        self,
        plan: Plan,
        tokens: TokenPruningConfig | None,
        batches: Sequence[Any] = (),
        compensation: How | None = None,
    ) -> nn.Module:
        """Return a copy of the model with these widths and tokens."""
        model = self.model
        if compensation is not None and plan.kept:
            model = copy.deepcopy(model)
            with compensated(model, self.graph, plan, batches, how=compensation):
                return with_tokens(cut_copy(model, self.graph, plan.on(self.graph)), tokens)
        return with_tokens(cut_copy(model, self.graph, plan.on(self.graph)), tokens)


def schedule(reducers: TokenPruningConfig, keep: float) -> TokenPruningConfig:
    """Return settings under which every reduction keeps a share of what it sees."""
    return replace(reducers, keep_ratios=geometric(keep, len(reducers.before_blocks)))


def _can_merge(tokens: TokenPruningConfig, grid: TokenGrid) -> bool:
    """Return whether a method can take away so many tokens at once."""
    kind = reducer_class(tokens.method)
    counts = [grid.num_patches, *grid.num_kept(tokens)]
    return not issubclass(kind, Merger) or all(
        before - after <= kind.most * before for before, after in pairwise(counts)
    )


def standing_in(tokens: TokenPruningConfig) -> TokenPruningConfig:
    """Return settings whose reducers know which tokens to keep without having learned it."""
    return replace(tokens, method=STAND_IN) if reducer_class(tokens.method).learned else tokens


def axes_in_blocks(graph: AxisGraph, grid: TokenGrid, limits: Limits) -> list[AxisInfo]:
    """Return the axes that may be cut and lie inside one block: what is wider than that, reducers would have to fit."""
    axes = [
        axis
        for axis in limits.choose(list(graph.axes.values()))
        if any(all(is_inside(part.name, path) for part in axis.slices) for path in grid.block_paths)
    ]
    if not axes:
        raise PlanError(
            f"there must be an axis inside a block to cut beside tokens, but no free axis of kinds {limits.kinds} is; "
            f"allow 'heads', 'head_dim' or 'mlp'"
        )
    return axes


@torch.no_grad()
def log_probabilities(model: nn.Module, images: Iterable[Tensor]) -> Tensor:
    """Return `(images, classes)`."""
    return torch.cat([logits_of(model(batch)).float().log_softmax(-1) for batch in images])
