"""Where selectors go and how much each keeps, from a latency target and a cost model."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_prune.errors import BudgetError


class CostOfKept(Protocol):
    """Anything that prices kept tokens; see `measure.token_cost.TokenCost`."""

    @property
    def num_patches(self) -> int:
        """Patches of the image grid."""
        ...

    @property
    def dense(self) -> float:
        """Cost without pruning."""
        ...

    def of_kept(self, kept: Tensor, before_blocks: Sequence[int]) -> Tensor:
        """Cost of keeping `kept` patches after each selector."""
        ...


def even_stages(depth: int, num_stages: int = 3) -> tuple[int, ...]:
    """Return the blocks to put selectors before: after each of `num_stages` equal parts but the last.

    12 blocks give (3, 6, 9), 16 give (4, 8, 12) and 20 give (5, 10, 15), the places of the SPViT code.

    Raises:
        BudgetError: If there are too few blocks.
    """
    if depth <= num_stages:
        raise BudgetError(f"{num_stages} selectors need a model of at least {num_stages + 1} blocks, got {depth}")
    return tuple(depth * stage // (num_stages + 1) for stage in range(1, num_stages + 1))


def geometric(keep_ratio: float, num_stages: int) -> tuple[float, ...]:
    """Return `keep_ratio`, its square, its cube ...: every selector keeps the same share of what it sees."""
    return tuple(keep_ratio**stage for stage in range(1, num_stages + 1))


def target_ms(target_latency: float, dense_ms: float) -> float:
    """Return a latency target in milliseconds: values up to 1 are a fraction of dense, others milliseconds.

    Raises:
        BudgetError: If the target is not positive or not below dense.
    """
    milliseconds = target_latency * dense_ms if target_latency <= 1 else target_latency
    if not 0 < milliseconds < dense_ms:
        raise BudgetError(
            f"`target_latency` must be a fraction of the dense latency below 1, or milliseconds below the dense "
            f"{dense_ms:.3g} ms, got {target_latency:g}"
        )
    return milliseconds


def macs_target(target_macs: float, dense_macs: float) -> float:
    """Return a target in MACs of an image: values up to 1 are a fraction of dense, others MACs.

    Raises:
        BudgetError: If the target is not positive or not below dense.
    """
    macs = target_macs * dense_macs if target_macs <= 1 else target_macs
    if not 0 < macs < dense_macs:
        raise BudgetError(
            f"`target_macs` must be a fraction of the dense MACs below 1, or a number below the dense "
            f"{dense_macs:,.0f}, got {target_macs:g}"
        )
    return macs


def keep_ratios_for(
    cost: CostOfKept, target: float, before_blocks: Sequence[int], *, shape: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Return the keep ratios whose predicted cost meets a target, all of one shape.

    One number is searched by bisection: the exponent e of `shape ** e`. With the default shape (1/e, 1/e^2, ...)
    that is the geometric schedule of DynamicViT and of SPViT's inference code, at whatever keep ratio fits.

    Args:
        cost: Cost in the unit of `target`.
        target: What the pruned model may cost.
        before_blocks: Where the selectors sit.
        shape: Relative keep ratios, decreasing; for example those learned by block-to-stage insertion.

    Raises:
        BudgetError: If the target is below what one kept patch per stage costs (the message says how much), or above
            what keeping everything costs.
    """
    base = torch.tensor(shape or geometric(torch.e**-1, len(before_blocks)), dtype=torch.float64)
    return _solved(cost, target, before_blocks, lambda exponent: base**exponent, most=6e4)


def even_steps_for(cost: CostOfKept, target: float, before_blocks: Sequence[int]) -> tuple[float, ...]:
    """Return the keep ratios whose predicted cost meets a target, where every reduction takes away as many tokens.

    That is the constant schedule of ToMe, up to rounding to whole tokens.

    Raises:
        BudgetError: As `keep_ratios_for`.
    """
    steps = torch.arange(1, len(before_blocks) + 1, dtype=torch.float64)
    return _solved(cost, target, before_blocks, lambda step: 1 - step * steps, most=1.0)


def _solved(
    cost: CostOfKept,
    target: float,
    before_blocks: Sequence[int],
    ratios_at: Callable[[float], Tensor],
    *,
    most: float,
) -> tuple[float, ...]:
    """Return the ratios of a family, ordered from keeping everything at 0 to keeping least at `most`, at the target."""
    fewest = 1 / cost.num_patches

    def ratios(number: float) -> Tensor:
        return ratios_at(number).clamp_min(fewest)

    def price(number: float) -> float:
        return float(cost.of_kept(ratios(number) * cost.num_patches, before_blocks))

    lowest, highest = price(most), price(0.0)
    where = f"with selectors before blocks {tuple(before_blocks)}"
    if target < lowest:
        raise BudgetError(
            f"the lowest reachable cost {where} is {lowest:.4g} ({lowest / cost.dense:.1%} of dense, one patch "
            f"kept after each), got a target of {target:.4g} ({target / cost.dense:.1%}); "
            f"raise the target or put the selectors earlier"
        )
    if target > highest:
        raise BudgetError(
            f"{where} the model costs {highest:.4g} even with every token kept, below the target of {target:.4g}; "
            f"nothing would be pruned, lower the target"
        )
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if price(middle) > target else (low, middle)
    return tuple(ratios(high).tolist())
