"""Tokens, heads and neurons in one budget: decide which of them go, and make the model.

A schedule of tokens is one more class of options of the knapsack over widths. Its value has no unit in common with the
scores of heads and neurons, so it is measured: for every schedule the knapsack spends what is left of the budget, the
result is run on calibration images, and the schedule wins that changes what the model says the least.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hf_prune.allocate.allocators import Allocator, Limits, allocator_named
from hf_prune.allocate.budget import Budget
from hf_prune.allocate.joint_plan import Choice, JointPlan
from hf_prune.allocate.plan import Plan
from hf_prune.analyse.graph import AxisGraph
from hf_prune.analyse.inputs import batch_of
from hf_prune.analyse.running import call_model
from hf_prune.errors import BudgetError
from hf_prune.joint_search import Search, axes_in_blocks, log_probabilities, standing_in
from hf_prune.measure.closing import meet_latency, time_beside
from hf_prune.measure.joint_cost import TokenGrid, joint_latency, joint_macs
from hf_prune.measure.latency_table import LatencyTable, measure_latency_table, table_setting
from hf_prune.measure.token_cost import BlockProbe, count_macs, count_params, macs_cost
from hf_prune.measure.token_table import TokenTable, measure_token_table
from hf_prune.measure.token_table import table_setting as token_table_setting
from hf_prune.pipeline import PruneRecord, analyze, apply_plan
from hf_prune.publish.describe import note
from hf_prune.recover.compensate import How, compensated
from hf_prune.recover.norms import images_of
from hf_prune.score.base import Criterion, relative
from hf_prune.score.registry import criterion as criterion_named
from hf_prune.surgery.repair import Repairs
from hf_prune.tokens.attach import add_token_pruning
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.pruning import TokenPruning
from hf_prune.tokens.schedule import even_stages, geometric
from hf_prune.tokens.site import find_site

# Shares of what it sees that every reduction keeps; 1 keeps all tokens.
KEEPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
# Kept by every reduction while tables are measured: reducers that have nothing to do take no time.
TABLE_KEEP = 0.7


def plan_joint(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    budget: Budget,
    data: Iterable[Any],
    method: str = "spvit",
    stages: Sequence[int] | None = None,
    keeps: Sequence[float] = KEEPS,
    criterion: str | Criterion = "taylor",
    allocator: str | Allocator = "knapsack",
    kinds: Sequence[str] = ("heads", "mlp"),
    limits: Limits | None = None,
    compensation: How | None = None,
    graph: AxisGraph | None = None,
    table: LatencyTable | None = None,
    token_table: TokenTable | None = None,
    batch_size: int = 1,
    **making: Any,
) -> JointPlan:
    """Decide which tokens, heads and neurons to keep within one budget, without changing the model.

    A budget in milliseconds is met by measurement, as in `hf_prune.plan`: a copy is cut, given its reducers and timed
    beside the dense model, and the aim is corrected until the time is within five percent of the budget. The schedule
    of tokens stays what was chosen; the widths give way.

    Methods that learn which tokens go (spvit, dynamicvit) know nothing yet: while schedules are compared, EViT chooses
    for them. Costs and times are those of fixed counts (runtime "topk").

    Args:
        model: A dense vision transformer with one grid of tokens; see `tokens.site.SUPPORTED`.
        example_inputs: See `hf_prune.analyze`.
        budget: MACs of an image or milliseconds of a batch; parameters do not become fewer with tokens.
        data: Batches of a few hundred images, with labels where the criterion wants them; gone through once.
        method: What makes tokens fewer; see `tokens.reducers.registry`.
        stages: Blocks that a reduction precedes, from 1; None spreads three evenly.
        keeps: Schedules to try: every reduction keeps this share of the tokens it sees. Between the last one that needs
            a cut and the first one that needs none, what meets the budget alone is tried as well.
        criterion: How units are scored.
        allocator: How what is left is shared out among axes.
        kinds: Kinds of axes inside blocks that may be cut.
        limits: Protected axes, rounding, minimum sizes; its kinds are not looked at.
        compensation: Compare schedules after fitting kept weights to the dense outputs: closer to what comes out in
            the end where that will be done, and several times as dear.
        graph: The analysis, if it was made before.
        table: Times of the model's operators; None measures them where the budget is in milliseconds.
        token_table: Times of its blocks by tokens, measured for this method; likewise.
        batch_size: Images a batch, for a budget in milliseconds without tables.
        making: Other settings of the reducers; see `TokenPruningConfig`.

    Raises:
        BudgetError: If the budget is of parameters, or no schedule meets it.
        PlanError: If no axis inside a block may be cut.
        UnsupportedModelError: If the model is no plain vision transformer.

    Cost: one criterion, one run of the data for each schedule (13 by default) and one of the dense model, twelve
    knapsacks, and for milliseconds two tables; memory of two copies of the model.
    """
    if budget.params is not None:
        raise BudgetError(
            "a joint budget must be of `macs` or `latency_ms`: parameters do not become fewer with tokens"
        )
    graph, batches = graph or analyze(model, example_inputs), list(data)
    grid, reducers = TokenGrid.of(model, graph), reducers_for(model, method, stages, **making)
    axes = axes_in_blocks(graph, grid, replace(limits or Limits(), kinds=tuple(kinds)))
    limits = limits or Limits()
    images = list(images_of(model, batches))
    if budget.latency_ms is None:
        cost = joint_macs(model, graph, macs_cost(model, images[0][:1], reducers))
    else:
        table = table or measure_latency_table(model, graph, batch_size=batch_size)
        table.require_same_setting(table_setting(model, table.batch_size))
        token_table = _token_table(model, images[0], reducers, table.batch_size, token_table)
        cost = joint_latency(model, graph, table, token_table)
        limits = replace(limits, round_to=math.lcm(limits.round_to, table.step_for(axes)))
    rule = criterion_named(criterion)
    scores = rule.score(model, graph, axes, batches)
    if not rule.comparable:
        scores = {name: relative(values) for name, values in scores.items()}
    dense = cost(None)({})
    search = Search(model, graph, axes, scores, cost, budget.limit(dense), limits, allocator_named(allocator), reducers)
    trials = search.trials(keeps, grid)
    dense_logits = log_probabilities(copy.deepcopy(model).eval(), images)
    choices = [search.choice(trial, images, dense_logits, batches, compensation) for trial in trials]
    number = min(range(len(choices)), key=lambda n: choices[n].divergence)
    how = _how(rule, budget, allocator, choices[number])
    (tokens, plan), choice = trials[number], choices[number]
    joint = JointPlan(
        replace(plan, how=how), tokens, budget.quantity, search.limit, choice.predicted, dense, None, tuple(choices)
    )
    if budget.latency_ms is None:
        return joint
    assert table is not None
    return _in_time(search, joint, table, is_share=budget.value <= 1)


def reducers_for(
    model: nn.Module, method: str = "spvit", stages: Sequence[int] | None = None, **making: Any
) -> TokenPruningConfig:
    """Return settings of reducers for a model, as tables are measured with; see `plan_joint`.

    Raises:
        ManifestError: If they do not fit the model, or have nothing to read where they are.
    """
    site = find_site(model)
    blocks = tuple(stages or even_stages(site.depth))
    ratios = geometric(TABLE_KEEP, len(blocks))
    tokens = TokenPruningConfig(
        **{"num_heads": site.num_heads, **making}, method=method, before_blocks=blocks, keep_ratios=ratios
    )
    for settings in (tokens, standing_in(tokens)):
        TokenPruning(settings, site)  # raises where it does not fit
    return tokens


def _token_table(
    model: nn.Module, images: Tensor, tokens: TokenPruningConfig, batch_size: int, table: TokenTable | None
) -> TokenTable:
    """Measure how long blocks take by tokens, or check the table that is given."""
    pixels = torch.cat([images] * -(-batch_size // len(images)))[:batch_size]
    model = copy.deepcopy(model).eval()
    if table is None:
        return measure_token_table(model, pixels, tokens, repeats=20)
    table.require_same_setting(token_table_setting(BlockProbe(model, pixels, tokens)))
    return table


def _in_time(search: Search, joint: JointPlan, table: LatencyTable, *, is_share: bool) -> JointPlan:
    """Correct the widths until the model takes as long as it may, measured; see `measure.closing.meet_latency`."""
    tokens = joint.tokens

    def measured_ms(plan: Plan) -> float:
        dense_ms, ms = time_beside(search.model, search.realised(plan, tokens), search.graph, table.batch_size)
        return ms / dense_ms * joint.dense if is_share else ms

    plan, _, found_ms = meet_latency(partial(search.widths, tokens), measured_ms, joint.limit)
    done = replace(joint, plan=plan, measured=found_ms)
    predicted_ms = search.cost(tokens)(done.sizes)
    timing = {"predicted latency": f"{predicted_ms:.3g} ms", "measured latency": f"{found_ms:.3g} ms"}
    how = joint.plan.how | timing | {"batch": str(table.batch_size), "device": table.device_name}
    return replace(done, plan=replace(plan, how=how), predicted=predicted_ms)


def _how(rule: Criterion, budget: Budget, allocator: str | Allocator, choice: Choice) -> dict[str, str]:
    """Return what decided, in words for the record."""
    return {
        "criterion": rule.name,
        "budget": f"{budget.quantity} {budget.value:g}, for tokens and widths together",
        "allocator": allocator if isinstance(allocator, str) else "a function",
        "patches kept": ", ".join(f"{ratio:.0%}" for ratio in choice.keep_ratios) or "all",
        "divergence before training": f"{choice.divergence:.3g} nats",
    }


def apply_joint(
    model: nn.Module,
    joint: JointPlan,
    graph: AxisGraph,
    *,
    compensation: How | None = None,
    data: Iterable[Any] | None = None,
    verify: bool = True,
) -> PruneRecord:
    """Cut a dense model and give it its reducers, in place.

    The cut is verified as in `hf_prune.apply_plan`, before any token goes. Afterwards the model knows both, so that one
    manifest holds them wherever it is saved. Reducers that learn are fresh: seed torch, and train them.

    Args:
        model: Of `graph`.
        joint: Made for it by `plan_joint`.
        graph: Its analysis.
        compensation: Fit kept weights to the dense outputs; see `hf_prune.recover.compensate`.
        data: Batches for that.
        verify: Whether to compare the cut model with its silenced twin.

    Returns:
        What was done; its MACs are those with fixed counts of tokens.

    Raises:
        PlanError: If the plan is of another model.
        SurgeryError: If the cut model is not as predicted.
    """
    site = find_site(model)
    if joint.tokens is not None:
        TokenPruning(joint.tokens, site)  # raises before anything is changed
    device = next(model.parameters()).device
    image = tree_map_only(Tensor, lambda t: t.to(device), batch_of(graph.inputs, 1))
    params, macs = count_params(model), count_macs(lambda: call_model(model, image))
    record = PruneRecord(joint.plan, Repairs(), (params, params), (macs, macs), None, [])
    if joint.plan.kept:
        fits = compensation is not None
        with compensated(model, graph, joint.plan, data, how=compensation) if fits else nullcontext():
            record = apply_plan(model, joint.plan, graph, verify=verify)
    if joint.tokens is None:
        return record
    pruning = add_token_pruning(model, joint.tokens)
    left = count_params(model), _macs_of_fixed_counts(model, pruning, image)
    step = replace(
        record,
        plan=Plan({}, {}, {} if joint.plan.kept else dict(joint.plan.how)),
        params=(record.params[1], left[0]),
        macs=(record.macs[1], left[1]),
        difference=None,
        not_exact=["tokens leave"],
    )
    note(model, step, joint.tokens.to_dict())
    return replace(record, params=(params, left[0]), macs=(macs, left[1]))


def _macs_of_fixed_counts(model: nn.Module, pruning: TokenPruning, image: Any) -> int:
    training = model.training
    pruning.runtime = "topk"
    try:
        return count_macs(lambda: call_model(model.eval(), image))
    finally:
        model.train(training)
        pruning.runtime = "auto"
