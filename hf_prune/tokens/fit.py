"""Close the loop between what was predicted and what is measured."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from hf_prune.errors import BudgetError, HfPruneWarning
from hf_prune.tokens.pruning import TokenPruning
from hf_prune.tokens.schedule import CostOfKept, keep_ratios_for

TOLERANCE = 0.02


def fit_to_target(
    pruning: TokenPruning,
    cost: CostOfKept,
    target: float,
    *,
    calibrate: Callable[[Sequence[float]], object],
    measure: Callable[[], float],
    solve: Callable[[float], Sequence[float]] | None = None,
    max_rounds: int = 6,
) -> float:
    """Set thresholds, measure, and shift the keep ratios until the measured cost is the target.

    The cost model prices the mean number of tokens; a real batch also pays for padding and for what
    the table cannot see. The difference is taken off the target and the thresholds are set again. Reducers whose counts
    are fixed have no thresholds: for them the keep ratios say it all.

    Args:
        pruning: Selectors of the trained model; their settings end with the ratios that were fitted.
        cost: The cost model the ratios came from.
        target: Cost to arrive at, in the unit of `cost`.
        calibrate: Sets the thresholds for given keep ratios.
        measure: Measures the model in the unit of `cost`.
        solve: Returns keep ratios for a cost; None stretches those of the settings.
        max_rounds: Measurements at most.

    Returns:
        The last measured cost.
    """
    settings, aim = pruning.settings, target
    if solve is None:
        solve = partial(keep_ratios_for, cost, before_blocks=settings.before_blocks, shape=settings.keep_ratios)
    measured = float("nan")
    for attempt in range(max_rounds):
        calibrate(pruning.settings.keep_ratios)
        measured = measure()
        if abs(measured / target - 1) <= TOLERANCE or attempt == max_rounds - 1:
            break
        try:
            aim, ratios = _towards(aim * target / measured, aim, solve)
        except BudgetError as err:
            # The model may be trained by now: what it reached is worth more than an error.
            warnings.warn(f"the target was missed by {measured / target - 1:.1%}: {err}", HfPruneWarning, 2)
            break
        pruning.settings = replace(settings, keep_ratios=tuple(ratios))
    return measured


def _towards(
    aim: float, reached: float, solve: Callable[[float], Sequence[float]], num_halvings: int = 4
) -> tuple[float, Sequence[float]]:
    """Return an aim and its ratios; where no ratios cost so little, one on the way there from what was reached.

    A single measurement may be far off, and what a model costs beyond its table does not shrink with the aim.

    Raises:
        BudgetError: If nothing on the way can be met either.
    """
    try:
        return aim, solve(aim)
    except BudgetError:
        if not num_halvings:
            raise
    return _towards((aim + reached) / 2, reached, solve, num_halvings - 1)
