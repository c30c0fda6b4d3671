"""Whole models side by side: what a cut does to the latency, and how a plan is fitted to it."""

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hf_prune.allocate.plan import Plan
from hf_prune.analyse.axes import Axis
from hf_prune.analyse.graph import AxisGraph
from hf_prune.analyse.inputs import batch_of
from hf_prune.analyse.running import call_model
from hf_prune.errors import BudgetError
from hf_prune.measure.latency import time_side_by_side
from hf_prune.surgery.apply import cut
from hf_prune.surgery.probe import rehearse

MIN_REPEATS, MAX_REPEATS, SECONDS = 9, 40, 4.0
CLOSE, CLOSE_ENOUGH, MOST_TRIES = 0.02, 0.05, 5


def cut_copy(model: nn.Module, graph: AxisGraph, kept: Mapping[Axis, Tensor]) -> nn.Module:
    """Return a copy of a model that is cut, neither verified nor noted."""
    small = copy.deepcopy(model)
    with cut(small, graph, kept, rehearse(graph, dict(kept), graph.held.copy())):
        pass
    return small


def time_cut(model: nn.Module, graph: AxisGraph, kept: Mapping[Axis, Tensor], batch_size: int) -> tuple[float, float]:
    """Return milliseconds a batch of the dense model and of a cut copy of it, medians of runs in turns.

    Memory: a copy of the model, while it lasts.
    """
    return time_beside(model, cut_copy(model, graph, kept), graph, batch_size)


def time_beside(model: nn.Module, small: nn.Module, graph: AxisGraph, batch_size: int) -> tuple[float, float]:
    """Return milliseconds a batch of a dense model and of what became of it, medians of runs in turns."""
    device = next(model.parameters()).device
    batch = tree_map_only(Tensor, lambda t: t.to(device), batch_of(graph.inputs, batch_size))
    modes = {module: module.training for module in model.modules()}
    runs = {"dense": lambda _: call_model(model, batch), "cut": lambda _: call_model(small, batch)}
    try:
        model.eval()
        small.eval()
        with torch.inference_mode():
            once_ms = sum(map(sum, time_side_by_side(runs, device, repeats=1).values()))
            repeats = int(min(max(SECONDS * 1e3 / once_ms, MIN_REPEATS), MAX_REPEATS))
            times = time_side_by_side(runs, device, repeats=repeats, warmup=0)
    finally:
        for module, training in modes.items():
            module.training = training
    return float(np.median(times["dense"])), float(np.median(times["cut"]))


def meet_latency(
    decide: Callable[[float], Plan], measure: Callable[[Plan], float], limit: float
) -> tuple[Plan, float, float]:
    """Return the plan that comes nearest to a limit, what was predicted for it, and what was measured.

    What the first plan misses, a table that adds up operators never being exact, the next one aims off by.

    Args:
        decide: Returns a plan whose predicted latency is within what it is given.
        measure: Returns the measured latency of a plan.
        limit: Milliseconds that must be met.

    Raises:
        BudgetError: If no plan comes within five percent above it.
    """
    aim, tried = limit, []
    for _ in range(MOST_TRIES):
        try:
            plan = decide(aim)
        except BudgetError:
            if not tried:
                raise
            break  # a corrected aim may be out of reach where what was tried is near enough
        if tried and plan == tried[-1][0]:
            break
        found = measure(plan)
        tried.append((plan, aim, found))
        if -CLOSE <= found / limit - 1 <= CLOSE:
            break
        aim *= limit / found
    plan, aim, found = min(tried, key=lambda one: abs(one[2] / limit - 1))
    if found > limit * (1 + CLOSE_ENOUGH):
        raise BudgetError(
            f"a latency of {limit:.3g} ms must be reached within {CLOSE_ENOUGH:.0%}, but the nearest of {len(tried)} "
            f"plans was measured to take {found:.3g} ms; allow more kinds of axes, lower `min_keep_ratio`, "
            f"raise the budget, or measure again when the machine is idle"
        )
    return plan, aim, found
