import pytest
from tiny_models import COST

from hf_prune.errors import BudgetError
from hf_prune.tokens.insertion import Stages, Trial, insert_from_the_back, merge_similar, price, spend_room


def test_blocks_are_tried_from_the_last_until_the_target_is_met():
    tried = []

    def try_block(blocks):
        tried.append(blocks)
        return Trial(0.9, tuple(0.9 - 0.08 * i for i in range(len(blocks))))

    stages = insert_from_the_back(try_block, COST, 0.8 * COST.dense, depth=12, dense_top1=0.9)
    assert tried[0] == (11,)
    assert tried[1] == (10, 11)
    assert stages.before_blocks == tried[-1]
    assert price(COST, stages) <= 0.8 * COST.dense
    assert price(COST, Stages(tried[-2], stages.keep_ratios[: len(tried[-2])])) > 0.8 * COST.dense


def test_a_selector_that_costs_too_much_accuracy_is_taken_out_again():
    drops = iter([0.0, 0.002, 0.02])
    stages = insert_from_the_back(
        lambda blocks: Trial(0.9 - next(drops), (0.5,) * len(blocks)), COST, 1.0, depth=12, dense_top1=0.9
    )
    assert stages.before_blocks == (10, 11)
    with pytest.raises(BudgetError, match="fixed stages"):
        insert_from_the_back(lambda blocks: Trial(0.5, (0.5,)), COST, 1.0, depth=12, dense_top1=0.9)


def test_neighbours_that_prune_alike_become_one_stage_with_the_first_selector():
    stages = Stages((4, 5, 6, 9, 10), (0.80, 0.76, 0.73, 0.40, 0.35))
    merged = merge_similar(stages)
    assert merged.before_blocks == (4, 9)
    assert merged.keep_ratios == pytest.approx((0.7633, 0.375), abs=1e-3)


def test_room_is_spent_on_the_first_selector_alone():
    stages = Stages((4, 8), (0.5, 0.2))
    target = price(COST, stages) * 1.05
    spent = spend_room(stages, COST, target)
    assert price(COST, spent) == pytest.approx(target, rel=1e-3)
    assert spent.keep_ratios[0] > 0.5
    assert spent.keep_ratios[1] == 0.2


def test_too_slow_stages_all_keep_less():
    stages = Stages((4, 8), (0.9, 0.8))
    target = price(COST, stages) * 0.8
    spent = spend_room(stages, COST, target)
    assert price(COST, spent) == pytest.approx(target, rel=1e-3)
    assert all(after < before for after, before in zip(spent.keep_ratios, stages.keep_ratios, strict=True))
