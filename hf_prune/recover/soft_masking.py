"""Soft masking: one training run that prunes, lets units come back, and ends within a budget.

Source: Humble et al., Soft Masking for Cost-Constrained Channel Pruning, ECCV 2022, arXiv 2211.02206.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_prune.allocate.allocators import Problem
from hf_prune.allocate.knapsack import knapsack
from hf_prune.allocate.plan import Plan
from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.errors import PlanError, RecipeError
from hf_prune.recover.loop import Objective
from hf_prune.score.gradients import unit_sums
from hf_prune.surgery.masks import Mask, Mode, add_masks, masked_weights, plan_of_masks, remove_masks, zero_masked
from hf_prune.surgery.norm_scaling import NormScale, add_norm_scales, fold_norm_scales

Ramp = Literal["exp", "exp2", "linear"]
NormScaling = Literal["none", "prune_frac", "importance_frac"]
# The published ramp falls by 0.05 an epoch over 55 epochs; here it has that shape however long it is.
STEEPNESS = 0.05 * 55


@dataclass(frozen=True, kw_only=True)
class RewiringSchedule:
    """When masks are decided anew, and how much may be masked then. Defaults: the published 10, 55 and 25 of 90 epochs.

    Attributes:
        every: Optimiser steps between two decisions.
        warmup_share: Share of training before the first one.
        cooldown_share: Share of training after the last one.
        ramp: How the pruning ratio grows in between: "exp" and "exp2" (of FORCE) are steep at first.

    Raises:
        RecipeError: If a number is out of range or there is no such ramp.
    """

    every: int = 80
    warmup_share: float = 10 / 90
    cooldown_share: float = 25 / 90
    ramp: Ramp = "exp"

    def __post_init__(self) -> None:
        shares = self.warmup_share, self.cooldown_share
        if self.every < 1 or min(shares) < 0 or sum(shares) >= 1:
            raise RecipeError(
                f"steps between two re-wirings must be 1 or more, and warm-up and cool-down leave a part of training "
                f"to prune in; got {self.every} steps and shares {shares[0]:g} and {shares[1]:g}"
            )
        if self.ramp not in get_args(Ramp):
            raise RecipeError(f"the ramp must be one of {', '.join(get_args(Ramp))}, got '{self.ramp}'")

    @property
    def end(self) -> float:
        """Share of training at which masks are final."""
        return 1 - self.cooldown_share

    def ratio(self, progress: float, final: float) -> float:
        """Return the share of the cost to remove after some share of training, up to `final` at the end of the ramp."""
        ramped = (progress - self.warmup_share) / (self.end - self.warmup_share)
        ramped = min(max(ramped, 0.0), 1.0)
        if self.ramp == "exp":
            return final * math.expm1(-STEEPNESS * ramped) / math.expm1(-STEEPNESS)
        return 1 - (1 - final) ** ramped if self.ramp == "exp2" else final * ramped


def maskable(axes: Iterable[AxisInfo]) -> list[AxisInfo]:
    """Return the axes whose cut is what a mask shows: read by layers alone, and seen together by no norm or average."""
    return [axis for axis in axes if axis.can_gate and axis.inexact is None]


@dataclass(frozen=True)
class Rewiring:
    """One decision about all masks.

    Attributes:
        step: After which optimiser step.
        pruning_ratio: Share of the cost that had to go.
        cost: Of the masked model, as a share of dense.
        num_returned: Units that came back.
        num_pruned: Units that went.
    """

    step: int
    pruning_ratio: float
    cost: float
    num_returned: int
    num_pruned: int


@dataclass
class SoftMasking:
    """Training under masks that are decided anew, by a knapsack over what every unit is worth, until they are final.

    The importance of a unit is the absolute sum of weight times gradient over the readers' slices, masked ones
    included, as a moving average over the steps since the last decision. Where a unit of the next layer is masked, no
    gradient flows back, so the sum is over what is active.

    Differs from the published code: the cost counts both sides of a layer as they will be, so that the masked model is
    within the budget when the cut is made; the last decision is made at the full ratio.

    Attributes:
        model: Gets masks (and scales on its batch norms), which `finish` takes off again.
        graph: Its analysis.
        learn: What is minimised.
        problem: The axes to mask and the budget that the last decision must meet; scores are ignored.
        accelerator: Whose processes decide together.
        mode: Of the masks; see `Mask`.
        schedule: When to decide.
        norm_scaling: How the scales of batch norms behind masked layers shrink: not at all, with the share of inputs
            that is kept, or with their share of the importance.
        pruned_decay: Weight decay of masked slices alone, added to their gradient.
        ema: Share of the old average of the importance.
        masks: By axis name.
        norm_scales: By the path of the batch norm.
        rewirings: All decisions so far.

    Raises:
        PlanError: If there is no axis to mask, or one is not silenced through its readers.
    """

    model: nn.Module
    graph: AxisGraph
    learn: Objective
    problem: Problem
    accelerator: Accelerator
    mode: Mode = "soft"
    schedule: RewiringSchedule = field(default_factory=RewiringSchedule)
    norm_scaling: NormScaling = "none"
    pruned_decay: float = 2e-4
    ema: float = 0.9
    masks: dict[str, Mask] = field(init=False)
    norm_scales: dict[str, NormScale] = field(init=False, default_factory=dict)
    rewirings: list[Rewiring] = field(init=False, default_factory=list)
    step: int = field(init=False, default=0)
    progress: float = field(init=False, default=0.0)
    final: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.problem.axes]
        if not names or not all(axis.can_gate for axis in self.problem.axes):
            raise PlanError(f"soft masking needs axes that are read by layers alone, got {names}; see `maskable`")
        self.masks = add_masks(self.model, self.graph, names, mode=self.mode)
        if self.norm_scaling != "none":
            self.norm_scales = add_norm_scales(self.model, self.graph, self.masks)

    def loss(self, model: nn.Module, batch: dict[str, Tensor], *, batch_number: int) -> Tensor:
        """Return the loss of `learn`."""
        return self.learn.loss(model, batch, batch_number=batch_number)

    def before_step(self, progress: float) -> None:
        """Note what every unit is worth, then pull masked slices towards zero."""
        self.learn.before_step(progress)
        self.progress = progress
        if not self.final:
            self._note_importance()
        for weight in masked_weights(self.model):
            if weight.original.grad is not None:
                weight.original.grad.add_(weight.original.detach() - weight.seen(), alpha=self.pruned_decay)

    def after_step(self) -> dict[str, float]:
        """Decide masks anew where it is time; report the latest decision."""
        self.step += 1
        logs = self.learn.after_step()
        due = self.progress >= self.schedule.warmup_share and self.step % self.schedule.every == 0
        last = self.progress >= self.schedule.end - 1e-9
        if not self.final and (due or last):
            self._rewire()
            self.final = last
        if self.rewirings:
            latest = self.rewirings[-1]
            logs |= {"cost": latest.cost, "returned": latest.num_returned, "pruned": latest.num_pruned}
        return logs

    def state_dict(self) -> dict[str, Any]:
        """Where training is; masks and what units are worth are part of the model."""
        rewirings = [asdict(rewiring) for rewiring in self.rewirings]
        return {"step": self.step, "final": self.final, "rewirings": rewirings, "learn": self.learn.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Where training is."""
        self.step, self.final = state["step"], state["final"]
        self.rewirings = [Rewiring(**rewiring) for rewiring in state["rewirings"]]
        self.learn.load_state_dict(state["learn"])

    def finish(self) -> Plan:
        """Take masks and scales off and return the plan that makes the model again what it was under them."""
        plan = plan_of_masks(self.graph, self.masks)
        fold_norm_scales(self.model)
        remove_masks(self.model)
        return plan

    @torch.no_grad()
    def _note_importance(self) -> None:
        """Take this step's weight times gradient into the averages, unless a number of it is not finite."""
        sums = {mask: torch.zeros_like(mask.importance) for mask in self.masks.values()}
        for weight in masked_weights(self.model):
            if weight.original.grad is None:
                continue
            products = weight.original.float() * weight.original.grad.float()
            for reader in weight.readers:
                sums[reader.mask] += unit_sums(products, reader.slice, len(reader.mask.kept))
        finite = torch.stack([total.isfinite().all() for total in sums.values()]).all()
        for mask, total in sums.items():
            mask.note(total.abs(), finite, decay=self.ema)

    @torch.no_grad()
    def _rewire(self) -> None:
        """Choose what to read within the budget of this moment."""
        for mask in self.masks.values():
            mask.importance.copy_(cast(Tensor, self.accelerator.reduce(mask.importance, reduction="mean")))
        dense, before = self.problem.cost({}), {name: mask.num_kept for name, mask in self.masks.items()}
        ratio = self.schedule.ratio(self.progress, 1 - self.problem.limit / dense)
        scores = {name: mask.importance.cpu() for name, mask in self.masks.items()}
        # At the start of the ramp rounding may leave a limit above dense.
        limit = min(max((1 - ratio) * dense, self.problem.limit), dense)
        sizes = knapsack(replace(self.problem, scores=scores, limit=limit), before)
        moves = [mask.keep_best(sizes[name]) for name, mask in self.masks.items()]
        if self.mode == "permanent":
            zero_masked(self.model)
        for scale in self.norm_scales.values():
            scale.follow(by_importance=self.norm_scaling == "importance_frac")
        for mask in self.masks.values():
            mask.forget()
        cost = self.problem.cost({name: mask.num_kept for name, mask in self.masks.items()})
        returned, pruned = map(sum, zip(*moves, strict=True))
        self.rewirings.append(Rewiring(self.step, ratio, cost / dense, returned, pruned))
