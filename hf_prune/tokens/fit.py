"""Close the loop between predicted and measured latency after training."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

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
    max_rounds: int = 4,
) -> float:
    """Set thresholds, measure, and shift the keep ratios until the measured cost is the target.

    The cost model prices the mean number of tokens; a real batch also pays for padding and for what
    the table cannot see. The difference is taken off the target and the thresholds are set again.

    Args:
        pruning: Selectors of the trained model; their settings end with the ratios that were fitted.
        cost: The cost model the ratios came from.
        target: Cost to arrive at, in the unit of `cost`.
        calibrate: Sets the thresholds for given keep ratios.
        measure: Measures the model in the unit of `cost`.
        max_rounds: Measurements at most.

    Returns:
        The last measured cost.
    """
    settings, aim = pruning.settings, target
    per_stage = settings.packages == "per_stage"
    measured = float("nan")
    for attempt in range(max_rounds):
        calibrate(pruning.settings.keep_ratios)
        measured = measure()
        if abs(measured / target - 1) <= TOLERANCE or attempt == max_rounds - 1:
            break
        aim *= target / measured
        try:
            ratios = keep_ratios_for(
                cost, aim, settings.before_blocks, shape=settings.keep_ratios, per_stage_packages=per_stage
            )
        except BudgetError as err:
            # The model is trained by now: what it reached is worth more than an error.
            warnings.warn(f"the latency target was missed by {measured / target - 1:.1%}: {err}", HfPruneWarning, 2)
            break
        pruning.settings = replace(settings, keep_ratios=ratios)
    return measured
