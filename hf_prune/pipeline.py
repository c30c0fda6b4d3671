"""Analyse, score, allocate, cut, verify: the whole road on one screen."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_prune.allocate.allocators import Allocator, Limits, Problem, allocator_named, best
from hf_prune.allocate.budget import Budget, cost_of
from hf_prune.allocate.plan import Plan
from hf_prune.analyse.cost import Cost
from hf_prune.analyse.graph import AxisGraph, build_graph
from hf_prune.analyse.inputs import inputs_for, require_plain_tensors
from hf_prune.analyse.running import named_tensors
from hf_prune.analyse.trace import trace
from hf_prune.errors import BudgetError, PlanError, SurgeryError
from hf_prune.measure.closing import meet_latency, time_cut
from hf_prune.measure.latency_table import LatencyTable, measure_latency_table, table_setting
from hf_prune.publish.describe import note
from hf_prune.recover.compensate import How, compensated
from hf_prune.score.base import Criterion, relative
from hf_prune.score.registry import criterion as criterion_named
from hf_prune.surgery.apply import Kept, cut
from hf_prune.surgery.depth import branches_removed
from hf_prune.surgery.probe import freeze_what_cannot_be_repaired, rehearse
from hf_prune.surgery.repair import Repairs
from hf_prune.surgery.replay import Mismatch
from hf_prune.surgery.structure import note_cut, note_removed
from hf_prune.surgery.verify import (
    DifferenceError,
    in_double,
    outputs_of,
    probe_inputs,
    reasons_not_exact,
    require_equal,
    silenced,
)


@dataclass(frozen=True)
class PruneRecord:
    """What was done to a model.

    Attributes:
        plan: The decision.
        repairs: Attributes and calls that had to be mended.
        params: Parameters before and after.
        macs: Multiply-accumulates before and after.
        difference: Largest difference from the silenced dense model, relative to the outputs; None if not compared.
        not_exact: Why it was not compared.
    """

    plan: Plan
    repairs: Repairs
    params: tuple[int, int]
    macs: tuple[int, int]
    difference: float | None
    not_exact: list[str]


def analyze(model: nn.Module, example_inputs: Any = None) -> AxisGraph:
    """Find the axes of a model: what can be pruned, what is tied to it, and what must stay, with the reason.

    Args:
        model: Any `nn.Module`. Not changed.
        example_inputs: A tensor, a tuple, or a dictionary of keyword arguments, of batch size 1; None reads the input
            size from the model's own configuration (transformers, timm).

    Returns:
        Axes with names, kinds, sizes, and the slices of parameters on them.

    Cost: a few runs on the meta device, a fraction of a second to a few seconds; no copy of the weights.

    Raises:
        TraceError: If the model cannot run on the inputs, or its tensors are quantised or without data.
    """
    require_plain_tensors(model)
    inputs = inputs_for(model) if example_inputs is None else example_inputs
    recording, empty = trace(model, inputs)
    graph = build_graph(model, recording, empty, inputs)
    if freeze_what_cannot_be_repaired(graph):
        graph = replace(build_graph(model, recording, empty, inputs), held=graph.held)
    return graph


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    budget: Budget | None = None,
    keep_ratio: float | None = None,
    criterion: str | Criterion = "magnitude",
    allocator: str | Allocator = "isomorphic",
    kinds: Sequence[str] | None = None,
    limits: Limits | None = None,
    data: Iterable[Any] | None = None,
    graph: AxisGraph | None = None,
    table: LatencyTable | None = None,
    batch_size: int = 1,
) -> Plan:
    """Decide what to keep, without changing the model.

    A budget in milliseconds is met by measurement: plans are made by a latency table, a copy of the model is cut and
    timed beside the dense one, and the aim is corrected until the time is within five percent of the budget.

    Args:
        model: Any `nn.Module`.
        example_inputs: See `analyze`.
        budget: What the pruned model may cost. Either this or `keep_ratio`.
        keep_ratio: Share of every axis to keep, instead of a budget and an allocator.
        criterion: How units are scored, by name or instance; see `hf_prune.score.registry`.
        allocator: How the budget is shared out: uniform, global_rank, isomorphic, knapsack, or a function.
        kinds: Kinds of axes that may be pruned, instead of those of `limits`.
        limits: Kinds, protected axes, rounding, minimum sizes.
        data: Batches, for criteria that look at data.
        graph: The analysis, if it was made before.
        table: Latencies of this model on its device; None measures them where the budget is in milliseconds.
        batch_size: Images a batch, for a budget in milliseconds without a table.

    Raises:
        BudgetError: If the budget cannot be met.
        LatencyTableError: If the table is of another model, device, or setting.
        PlanError: If nothing would be pruned.
        CriterionError: If the criterion is unknown or lacks data.
    """
    graph, limits = graph or analyze(model, example_inputs), limits or Limits()
    limits = limits if kinds is None else replace(limits, kinds=tuple(kinds))
    axes: Sequence = limits.choose(list(graph.axes.values()))
    if not axes:
        raise PlanError(f"there is nothing to prune: none of the {len(graph.axes)} free axes is allowed by the limits")
    if (budget is None) == (keep_ratio is None):
        raise BudgetError("give either `budget` or `keep_ratio`, for example budget=Budget(macs=0.5)")
    rule = criterion_named(criterion)
    scores = rule.score(model, graph, axes, data)
    if not rule.comparable:
        # As Torch-Pruning does by default (Fang et al., DepGraph, CVPR 2023): every axis has mean 1.
        scores = {name: relative(values) for name, values in scores.items()}
    how = _how(rule, keep_ratio, budget, allocator)
    if keep_ratio is not None:
        wanted = {axis.name: limits.apply(axis, round(axis.size * keep_ratio)) for axis in axes}
        return replace(Plan.of(graph, best(scores, wanted)), how=how)
    assert budget is not None
    if budget.latency_ms is not None:
        table = table or measure_latency_table(model, graph, batch_size=batch_size)
        table.require_same_setting(table_setting(model, table.batch_size))
        limits = replace(limits, round_to=math.lcm(limits.round_to, table.step_for(axes)))
    problem, share_out = Problem(axes, scores, *cost_of(graph, budget, table), limits), allocator_named(allocator)

    def decide(limit: float) -> Plan:
        kept = best(scores, share_out(replace(problem, limit=limit)))
        return replace(Plan.of(graph, kept), how=how)

    if budget.latency_ms is None:
        return decide(problem.limit)
    assert table is not None
    return _plan_in_time(model, graph, decide, problem, table, is_share=budget.value <= 1)


def _plan_in_time(
    model: nn.Module,
    graph: AxisGraph,
    decide: Callable[[float], Plan],
    problem: Problem,
    table: LatencyTable,
    *,
    is_share: bool,
) -> Plan:
    """Make plans until one takes as long as it may, measured; a share is one of the dense model timed beside it."""

    def measured_ms(plan: Plan) -> float:
        dense_ms, cut_ms = time_cut(model, graph, plan.on(graph), table.batch_size)
        return cut_ms / dense_ms * problem.cost({}) if is_share else cut_ms

    plan, predicted_ms, found_ms = meet_latency(decide, measured_ms, problem.limit)
    timing = {"predicted latency": f"{predicted_ms:.3g} ms", "measured latency": f"{found_ms:.3g} ms"}
    return replace(plan, how=plan.how | timing | {"batch": str(table.batch_size), "device": table.device_name})


def _how(
    rule: Criterion, keep_ratio: float | None, budget: Budget | None, allocator: str | Allocator
) -> dict[str, str]:
    """Return what decided, in words for the record."""
    how = {"criterion": rule.name}
    if budget is None:
        return how | {"keep ratio of every width": f"{keep_ratio:g}"}
    return how | {
        "budget": f"{budget.quantity} {budget.value:g}",
        "allocator": allocator if isinstance(allocator, str) else "a function",
    }


def apply_plan(model: nn.Module, decided: Plan, graph: AxisGraph, *, verify: bool = True) -> PruneRecord:
    """Cut a model in place, verified; on any failure it is left as it was.

    Afterwards the model knows what was done to it, so that it can be saved: by its own `save_pretrained`, or by
    `hf_prune.save`.

    Raises:
        PlanError: If the plan is of another model or removes nothing.
        SurgeryError: If the cut model is not as predicted.
    """
    record = _apply(model, decided, graph, verify=verify)
    note(model, record)
    return record


def _apply(model: nn.Module, decided: Plan, graph: AxisGraph, *, verify: bool) -> PruneRecord:
    kept = decided.on(graph)
    if not kept:
        raise PlanError("the plan removes nothing: every axis keeps all its units")
    empty = {axis: index for axis, index in kept.items() if not len(index)}
    if empty:
        return _cut_depth_first(model, decided, graph, empty, verify=verify)
    try:
        repairs = rehearse(graph, kept, graph.held.copy())
    except Mismatch as err:
        raise SurgeryError(f"the cut model must run as the dense one does, but in '{err.module}' {err}") from err
    not_exact = reasons_not_exact(graph, kept)
    if verify:
        difference = _cut_verified(model, graph, kept, repairs, exact=not not_exact)
    else:
        with cut(model, graph, kept, repairs):
            difference = None
    note_cut(model, graph, kept, repairs)
    cost, sizes = Cost.of(graph), {a: len(i) for a, i in kept.items()}
    return PruneRecord(
        decided,
        repairs,
        (cost.params({}), cost.params(sizes)),
        (cost.macs({}), cost.macs(sizes)),
        difference,
        not_exact,
    )


def _cut_depth_first(model: nn.Module, decided: Plan, graph: AxisGraph, empty: Kept, *, verify: bool) -> PruneRecord:
    """Remove branches; what is left is a model like any other, and the rest of the plan cuts that."""
    with branches_removed(model, graph, empty) as difference:
        smaller, left = analyze(model, graph.inputs), set(named_tensors(model))
        # With a branch its other axes went, too.
        there = [name for name, axis in graph.axes.items() if left & {s.name for s in axis.slices}]
        kept = {name: units for name, units in decided.kept.items() if units and name in there}
        rest = Plan(kept, {name: decided.sizes[name] for name in kept})
        cost = Cost.of(smaller)
        done = PruneRecord(decided, Repairs(), (0, cost.params({})), (0, cost.macs({})), difference, [])
        if kept:
            done = _apply(model, rest, smaller, verify=verify)
    note_removed(model, graph.skeleton)
    dense, differences = Cost.of(graph), (difference, done.difference)
    return replace(
        done,
        plan=decided,
        params=(dense.params({}), done.params[1]),
        macs=(dense.macs({}), done.macs[1]),
        difference=None if None in differences else max(difference, done.difference or 0.0),
    )


def _cut_verified(model: nn.Module, graph: AxisGraph, kept: Kept, repairs: Repairs, *, exact: bool) -> float | None:
    """Cut a model, compare it with its silenced twin if it must be exact, and return the difference."""

    def attempt() -> float | None:
        inputs, expected = probe_inputs(graph, model), None
        if exact:
            with silenced(model, graph, kept):
                expected = outputs_of(model, inputs)
        with cut(model, graph, kept, repairs):
            found = outputs_of(model, inputs)
            return None if expected is None else require_equal(expected, found)

    try:
        return attempt()
    except DifferenceError:
        # Half precision is not precise enough, and a softmax may tell apart what float32 does not.
        with in_double(model):
            return attempt()


def prune(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    compensation: How | None = None,
    data: Iterable[Any] | None = None,
    **settings: Any,
) -> nn.Module:
    """Prune a model in place and return it: analysed, scored, cut, repaired and verified.

    Args:
        model: Any `nn.Module`; of the same class afterwards.
        example_inputs: A tensor, a tuple or a dictionary of keyword arguments; None takes them from the model's own
            configuration.
        compensation: Let the weights that stay take over from those that go, without training: "least_squares" or
            "mean"; see `hf_prune.recover.compensate`.
        data: Batches, for compensation and for criteria that look at data; gone through more than once, so a list or
            a loader rather than a generator.
        settings: See `plan`.

    Raises:
        HfPruneError: One of its kinds, and the model is as it was.
    """
    graph = analyze(model, example_inputs)
    decided = plan(model, graph=graph, data=data, **settings)
    with nullcontext() if compensation is None else compensated(model, graph, decided, data, how=compensation):
        apply_plan(model, decided, graph)
    return model
