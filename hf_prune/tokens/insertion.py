"""Block-to-stage training: find where selectors belong by inserting them from the last block to the first."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_prune.errors import BudgetError
from hf_prune.tokens.schedule import CostOfKept, keep_ratios_for


@dataclass(frozen=True)
class Trial:
    """How a model does after one more selector was inserted and trained for a while.

    Attributes:
        top1: Validation accuracy, 0 to 1.
        keep_ratios: Mean share of patches alive after each selector, first block first.
    """

    top1: float
    keep_ratios: tuple[float, ...]


@dataclass(frozen=True)
class Stages:
    """Where selectors sit and what share of the patches is alive after each."""

    before_blocks: tuple[int, ...]
    keep_ratios: tuple[float, ...]


def insert_from_the_back(
    try_block: Callable[[tuple[int, ...]], Trial],
    cost: CostOfKept,
    target: float,
    *,
    depth: int,
    dense_top1: float,
    max_drop: float = 0.005,
    first_block: int = 1,
) -> Stages:
    """Insert selectors before one block after the other, last block first, until the target is met.

    Source: SPViT's block-to-stage training, step 1, as summarised by others; that insertion also stops once accuracy
    has dropped by half a point is from memory and could not be checked against the paper.

    Args:
        try_block: Adds a selector before the first of the given blocks, trains, and judges on validation data.
        cost: Prices kept patches.
        target: Cost to get to, in its unit.
        depth: Number of blocks.
        dense_top1: Validation accuracy without selectors.
        max_drop: Stop, and take the last selector out again, when accuracy fell by more than this.
        first_block: No selector goes before an earlier block.

    Raises:
        BudgetError: If the very first selector already costs too much accuracy.
    """
    stages: Stages | None = None
    for block in range(depth - 1, first_block - 1, -1):
        blocks = tuple(range(block, depth))
        trial = try_block(blocks)
        if dense_top1 - trial.top1 > max_drop:
            break
        keep = tuple(torch.tensor(trial.keep_ratios).cummin(0).values.clamp_min(1e-3).tolist())
        stages = Stages(blocks, keep)
        if price(cost, stages) <= target:
            break
    if stages is None:
        raise BudgetError(
            f"one selector before the last block already costs more than `max_drop` = {max_drop:.2%} of accuracy; "
            f"train longer per insertion, or use fixed stages"
        )
    return stages


def merge_similar(stages: Stages, *, tolerance: float = 0.085) -> Stages:
    """Merge neighbouring blocks that prune alike into one stage; its first selector stays.

    Source: SPViT's block-to-stage training, step 2; the tolerance is from memory and unchecked.

    Args:
        stages: One selector a block.
        tolerance: Blocks whose keep ratio is within this of the stage's first belong to the stage.

    Returns:
        One selector a stage, with the mean keep ratio of its blocks.
    """
    groups: list[list[int]] = []
    for index, ratio in enumerate(stages.keep_ratios):
        if groups and abs(stages.keep_ratios[groups[-1][0]] - ratio) < tolerance:
            groups[-1].append(index)
        else:
            groups.append([index])
    return Stages(
        tuple(stages.before_blocks[group[0]] for group in groups),
        tuple(sum(stages.keep_ratios[index] for index in group) / len(group) for group in groups),
    )


def spend_room(stages: Stages, cost: CostOfKept, target: float) -> Stages:
    """Let the stages cost exactly the target.

    Where there is room, the first selector keeps more (SPViT's step 3); if the target is exceeded, or the
    first selector alone cannot use the room up, all keep ratios move together.

    Raises:
        BudgetError: If the target cannot be reached with selectors at these places.
    """

    def with_first(ratio: float) -> Stages:
        return Stages(stages.before_blocks, (ratio, *stages.keep_ratios[1:]))

    if not price(cost, stages) <= target <= price(cost, with_first(1.0)):
        shape = [min(ratio, 0.999) for ratio in stages.keep_ratios]
        return Stages(stages.before_blocks, keep_ratios_for(cost, target, stages.before_blocks, shape=shape))
    low, high = stages.keep_ratios[0], 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if price(cost, with_first(middle)) > target else (middle, high)
    return with_first(low)


def price(cost: CostOfKept, stages: Stages) -> float:
    """Return what stages cost."""
    kept = torch.tensor([stages.keep_ratios]) * cost.num_patches
    return float(cost.of_kept(kept, stages.before_blocks))
