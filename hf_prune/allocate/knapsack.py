"""The most valuable model within a budget: a multiple-choice knapsack, repeated until neighbours agree.

Keeping k units of an axis is worth the sum of its k best scores and costs what the model then costs. The cost of an
axis depends on the sizes of the axes beside it, so it is linearised around the sizes at hand, the knapsack is solved
for sizes not far from these, and so on from there, until the realised cost meets the budget and nothing improves.

Source: the knapsack of Humble et al., Soft Masking for Cost-Constrained Channel Pruning, ECCV 2022 (which charges every
layer once, for its inputs, and solves once); ours counts both sides of a layer and iterates to the realised cost.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_prune.errors import BudgetError

if TYPE_CHECKING:
    from hf_prune.allocate.allocators import Problem
    from hf_prune.analyse.graph import AxisInfo

# Sizes change by at most this factor from one linearisation to the next; later ones are finer.
REACH, FINER, FINEST = 1.3, 0.7, 1.02
MAX_ROUNDS = 40
MOST_STATES = 4000


def knapsack(problem: "Problem", start: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return how many units of every axis to keep: the largest total score that was found within the budget.

    Args:
        problem: Axes, scores (comparable over axes), cost, limit, and what sizes are allowed.
        start: Sizes to linearise around first; None begins with the dense model.

    Raises:
        BudgetError: If the smallest model within the limits costs more.

    Cost: some ten knapsacks of a few milliseconds each, and as many evaluations of the cost along every axis.
    """
    choices = {axis.name: allowed_sizes(problem, axis) for axis in problem.axes}
    gains = {axis.name: _gains(problem.scores[axis.name].double().numpy()) for axis in problem.axes}
    problem.require_reachable({name: int(options[0]) for name, options in choices.items()})
    sizes = {name: _nearest(options, (start or {}).get(name, int(options[-1]))) for name, options in choices.items()}
    best, best_value, reach, idle = None, -np.inf, REACH, 0
    for _ in range(MAX_ROUNDS):
        cost = problem.cost(sizes)
        value = sum(gains[name][size] for name, size in sizes.items())
        idle = 0 if cost <= problem.limit and value > best_value * (1 + 1e-6) else idle + (best is not None)
        if cost <= problem.limit:
            best, best_value = (sizes, value) if value > best_value else (best, best_value)
            reach = 1 + (reach - 1) * FINER
        if reach < FINEST or idle > 6:
            break
        sizes = _step(problem, choices, gains, sizes, cost, reach)
    return best if best is not None else _shrunk(problem, choices, sizes)


def allowed_sizes(problem: "Problem", axis: "AxisInfo") -> np.ndarray:
    """Return the sizes an axis may have, ascending."""
    return np.array(sorted({problem.limits.apply(axis, k) for k in range(1, axis.size + 1)}))


def _gains(scores: np.ndarray) -> np.ndarray:
    """Return what keeping the best 0, 1, 2 ... units is worth."""
    return np.concatenate([[0.0], np.cumsum(np.sort(scores)[::-1])])


def _nearest(options: np.ndarray, size: int) -> int:
    return int(options[np.abs(options - size).argmin()])


def _step(
    problem: "Problem",
    choices: Mapping[str, np.ndarray],
    gains: Mapping[str, np.ndarray],
    sizes: dict[str, int],
    cost: float,
    reach: float,
) -> dict[str, int]:
    """Solve the knapsack for sizes within reach, with the cost linearised around those at hand."""
    near, values, savings = {}, [], []
    for name, options in choices.items():
        now, place = sizes[name], int(np.searchsorted(options, sizes[name]))
        beside = {options[max(place - 1, 0)], options[min(place + 1, len(options) - 1)]}
        inside = (options >= now / reach) & (options <= now * reach) | np.isin(options, [*beside])
        near[name] = options[inside]
        values.append(gains[name][near[name]])
        savings.append(problem.cost.along(name, sizes, near[name]) - cost)
    # What cannot be reached in one step is approached.
    room = max(problem.limit - cost, sum(float(saving.min()) for saving in savings) * (1 - 1e-9))
    picks = choose(values, savings, room)
    return {name: int(near[name][pick]) for name, pick in zip(near, picks, strict=True)}


def _shrunk(problem: "Problem", choices: Mapping[str, np.ndarray], sizes: dict[str, int]) -> dict[str, int]:
    """Take the next smaller size of every axis, in turns, until the budget is met."""
    while problem.cost(sizes) > problem.limit:
        for name, options in choices.items():
            sizes = sizes | {name: int(options[max(int(np.searchsorted(options, sizes[name])) - 1, 0)])}
            if problem.cost(sizes) <= problem.limit:
                break
    return sizes


def choose(values: Sequence[np.ndarray], costs: Sequence[np.ndarray], limit: float) -> list[int]:
    """Return the option to take in every group: the largest sum of values whose costs sum up to at most the limit.

    A price on cost (the Lagrangian relaxation) gives a first choice and a bound on the best one. Dynamic programming
    then goes through the groups and keeps the partial choices that could still lead to something better, none of which
    is both dearer and worth less than another. Exact, unless more than `MOST_STATES` of these are left at some point.

    Args:
        values: What each option of each group is worth.
        costs: What it costs, of any sign; it need not grow with the value.
        limit: What all may cost.

    Raises:
        BudgetError: If even the cheapest options cost more.
    """
    slack = 1e-9 * max(1.0, abs(limit))
    cheapest = sum(float(cost.min()) for cost in costs)
    if cheapest > limit + slack:
        raise BudgetError(f"the cheapest options must fit the limit, but cost {cheapest:g} of {limit:g}")
    price, picks = _priced(values, costs, limit + slack)
    picks = _filled(values, costs, picks, limit + slack)
    reduced = [value - price * cost for value, cost in zip(values, costs, strict=True)]
    losses = [part.max() - part for part in reduced]
    gap = sum(float(part.max()) for part in reduced) + price * (limit + slack) - _total(values, picks)
    found = _by_states(losses, costs, price, limit + slack, gap * (1 + 1e-9) + 1e-12)
    return picks if found is None or _total(values, found) < _total(values, picks) else found


def _total(parts: Sequence[np.ndarray], picks: Sequence[int]) -> float:
    return sum(float(part[pick]) for part, pick in zip(parts, picks, strict=True))


def _priced(values: Sequence[np.ndarray], costs: Sequence[np.ndarray], limit: float) -> tuple[float, list[int]]:
    """Return the lowest price of cost at which the best options fit the limit, and these options."""

    def at(price: float) -> list[int]:
        # Of equally good options the cheapest, so that a high price leads to what fits.
        return [int(np.lexsort((cost, price * cost - value))[0]) for value, cost in zip(values, costs, strict=True)]

    low, high = 0.0, 1.0
    if _total(costs, picks := at(0.0)) <= limit:
        return 0.0, picks
    while _total(costs, at(high)) > limit and high < 1e30:
        low, high = high, high * 4
    if high >= 1e30:
        return 0.0, [int(cost.argmin()) for cost in costs]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(costs, at(middle)) > limit else (low, middle)
    return high, at(high)


def _filled(values: Sequence[np.ndarray], costs: Sequence[np.ndarray], picks: list[int], limit: float) -> list[int]:
    """Spend what a price leaves over: take the exchange worth most that still fits, again and again."""
    picks, room = list(picks), limit - sum(float(cost[pick]) for cost, pick in zip(costs, picks, strict=True))
    while True:
        gains = [
            np.where(cost - cost[pick] <= room, value - value[pick], 0.0)
            for value, cost, pick in zip(values, costs, picks, strict=True)
        ]
        group = int(np.argmax([gain.max() for gain in gains]))
        option = int(gains[group].argmax())
        if gains[group][option] <= 0:
            return picks
        room -= float(costs[group][option] - costs[group][picks[group]])
        picks[group] = option


def _by_states(
    losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], price: float, limit: float, gap: float
) -> list[int] | None:
    """Return the choice with the least loss that fits, among those that lose at most `gap`; None if there is none.

    Args:
        losses: By how much each option of each group falls behind the best one of the group at this price.
        costs: What it costs.
        price: Of cost; the value of a choice is a constant + price * cost - loss.
        limit: What all may cost.
        gap: What the choice may lose.
    """
    rests = np.append(np.cumsum([float(cost.min()) for cost in costs][::-1])[::-1][1:], 0.0)
    spent, lost, steps = np.zeros(1), np.zeros(1), []
    for loss, cost, rest in zip(losses, costs, rests, strict=True):
        options = np.flatnonzero(loss <= gap)
        both, behind = (spent[:, None] + cost[options]).ravel(), (lost[:, None] + loss[options]).ravel()
        alive = np.flatnonzero((behind <= gap) & (both + rest <= limit))
        worth = price * both[alive] - behind[alive]
        order = np.lexsort((-worth, both[alive]))
        leads = np.append(True, worth[order][1:] > np.maximum.accumulate(worth[order])[:-1])
        alive = alive[order[leads[: len(order)]]]
        if len(alive) > MOST_STATES:
            alive = alive[np.linspace(0, len(alive) - 1, MOST_STATES).astype(int)]
        if not len(alive):
            return None
        steps.append((alive // len(options), options[alive % len(options)]))
        spent, lost = both[alive], behind[alive]
    state, picks = int((price * spent - lost).argmax()), []
    for parents, options in reversed(steps):
        picks.append(int(options[state]))
        state = int(parents[state])
    return picks[::-1]
