from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import COST

from hf_prune.errors import BudgetError
from hf_prune.tokens.schedule import even_stages, even_steps_for, geometric, keep_ratios_for, target_ms


def test_even_stages_are_the_published_places():
    assert even_stages(12) == (3, 6, 9)
    assert even_stages(16) == (4, 8, 12)
    assert even_stages(20) == (5, 10, 15)
    with pytest.raises(BudgetError, match="at least 4 blocks"):
        even_stages(3)


@given(st.floats(0.45, 0.95))
def test_solved_ratios_cost_the_target_and_are_geometric(fraction):
    ratios = keep_ratios_for(COST, fraction * COST.dense, (3, 6, 9))
    price = COST.of_kept(torch.tensor(ratios) * 64, (3, 6, 9)).item()
    assert price == pytest.approx(fraction * COST.dense, rel=1e-3)
    assert ratios == pytest.approx(geometric(ratios[0], 3), rel=1e-6)


def test_a_smaller_target_never_keeps_more():
    ratios = [keep_ratios_for(COST, fraction * COST.dense, (3, 6, 9)) for fraction in (0.9, 0.7, 0.5, 0.4)]
    for more, fewer in pairwise(ratios):
        assert all(a >= b for a, b in zip(more, fewer, strict=True))


def test_the_lowest_reachable_target_is_named():
    floor = COST.of_kept(torch.ones(3), (3, 6, 9)).item()
    with pytest.raises(BudgetError, match=f"lowest reachable cost .* is {floor:.4g}"):
        keep_ratios_for(COST, 0.9 * floor, (3, 6, 9))


def test_a_target_that_needs_no_pruning_is_refused():
    with pytest.raises(BudgetError, match="nothing would be pruned"):
        keep_ratios_for(COST, 2 * COST.dense, (3, 6, 9))


def test_targets_are_fractions_up_to_one_and_milliseconds_above():
    assert target_ms(0.6, 50.0) == pytest.approx(30.0)
    assert target_ms(12.5, 50.0) == 12.5
    for wrong in (-1.0, 0.0, 1.0, 60.0):
        with pytest.raises(BudgetError, match="`target_latency`"):
            target_ms(wrong, 50.0)


@settings(max_examples=12)
@given(st.floats(0.45, 0.95))
def test_even_steps_cost_the_target_and_take_away_as_many_each_time(fraction):
    ratios = even_steps_for(COST, fraction * COST.dense, (1, 2, 3, 4, 5, 6, 7, 8))
    price = COST.of_kept(torch.tensor(ratios) * 64, (1, 2, 3, 4, 5, 6, 7, 8)).item()
    assert price == pytest.approx(fraction * COST.dense, rel=1e-3)
    steps = [a - b for a, b in pairwise((1.0, *ratios)) if b > 1.5 / 64]
    assert steps == pytest.approx([steps[0]] * len(steps))
