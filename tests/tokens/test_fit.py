import pytest
import torch
from tiny_models import COST, build_dense

import hf_prune.tokens.fit as fit
from hf_prune.errors import HfPruneWarning
from hf_prune.tokens.attach import add_token_pruning
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.schedule import keep_ratios_for


def run_fit(overhead: float, target: float):
    """A machine on which the table's cost is off by a constant factor."""
    ratios = keep_ratios_for(COST, target, (1, 3, 5))
    pruning = add_token_pruning(
        build_dense("vit"), TokenPruningConfig(before_blocks=(1, 3, 5), keep_ratios=ratios, num_heads=4)
    )
    set_to = []

    def measure() -> float:
        return overhead * COST.of_kept(torch.tensor(set_to[-1]) * 64, (1, 3, 5)).item()

    reached = fit.fit_to_target(pruning, COST, target, calibrate=set_to.append, measure=measure)
    return reached, pruning, set_to


def test_a_table_that_is_too_optimistic_is_corrected():
    target = 0.6 * COST.dense
    reached, pruning, set_to = run_fit(1.15, target)
    assert reached == pytest.approx(target, rel=fit.TOLERANCE)
    assert len(set_to) > 1
    assert pruning.settings.keep_ratios == pytest.approx(set_to[-1])
    assert set_to[-1][0] < set_to[0][0]


def test_a_table_that_is_right_is_left_alone():
    _, _, set_to = run_fit(1.0, 0.6 * COST.dense)
    assert len(set_to) == 1


def test_a_target_that_turns_out_unreachable_warns_and_keeps_the_model():
    target = 0.45 * COST.dense
    with pytest.warns(HfPruneWarning, match="missed by"):
        reached, _, _ = run_fit(6.0, target)
    assert reached > target


def test_a_measurement_out_of_all_proportion_does_not_end_the_search():
    """As when another program took the processor while the first one was made."""
    target = 0.7 * COST.dense
    ratios = keep_ratios_for(COST, target, (1, 3, 5))
    pruning = add_token_pruning(
        build_dense("vit"), TokenPruningConfig(before_blocks=(1, 3, 5), keep_ratios=ratios, num_heads=4)
    )
    set_to, factors = [], iter([3.0, *[1.1] * 9])

    def measure() -> float:
        return next(factors) * COST.of_kept(torch.tensor(set_to[-1]) * 64, (1, 3, 5)).item()

    reached = fit.fit_to_target(pruning, COST, target, calibrate=set_to.append, measure=measure)
    assert reached == pytest.approx(target, rel=fit.TOLERANCE)
