"""Learn how many tokens each block drops and merges, with the model's weights as they are.

Letters: B images, N patches, S reductions.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_prune.errors import BudgetError, DataError
from hf_prune.measure.token_cost import TokenCost, macs_cost
from hf_prune.tokens.attach import add_token_pruning
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.rates import Counts, Rates, try_rates
from hf_prune.tokens.schedule import keep_ratios_for, macs_target
from hf_prune.tokens.site import find_site, logits_of

TOLERANCE = 0.01


@dataclass(frozen=True)
class ScheduleCost:
    """MACs of an image by what every reduction drops and merges.

    Attributes:
        parts: Cost of blocks, and of reading attention.
        before_blocks: Where reductions are.
        dim: Token width.
    """

    parts: TokenCost
    before_blocks: tuple[int, ...]
    dim: int

    @classmethod
    def of(cls, model: nn.Module, image: Tensor, before_blocks: Sequence[int]) -> "ScheduleCost":
        """Count the parts of a dense model on an image `(1, 3, H, W)`."""
        settings = TokenPruningConfig(
            method="diffrate", before_blocks=tuple(before_blocks), keep_ratios=(1.0,) * len(before_blocks)
        )
        return cls(macs_cost(model, image, settings), settings.before_blocks, find_site(model).stacks[0].dim)

    def of_counts(self, counts: Counts) -> Tensor:
        """Return the MACs, differentiable: blocks and attention by `macs_cost`, and what merged tokens compare."""
        compared = (counts.merged * counts.kept).sum() * self.dim
        return self.parts.of_kept(counts.kept, self.before_blocks) + compared

    def of_settings(self, settings: TokenPruningConfig) -> float:
        """Return the MACs of a finished schedule."""
        parts = ScheduleCost(self.parts, settings.before_blocks, self.dim)
        kept = torch.tensor(settings.keep_ratios, dtype=torch.float64) * self.parts.num_patches
        merged = torch.tensor(settings.merge_ratios, dtype=torch.float64) * self.parts.num_patches
        return float(parts.of_counts(Counts(kept, kept + merged, kept)))


def search_rates(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target_macs: float,
    before_blocks: Sequence[int] | None = None,
    num_steps: int = 300,
    learning_rate: float = 0.1,
    num_candidates: int = 32,
) -> TokenPruningConfig:
    """Learn a schedule for the method 'diffrate' that costs a target: what every reduction drops and merges.

    Before each of the blocks there are two softmaxes over the share of its tokens that is left, one for dropping and
    one for merging. Their means are the counts. A forward pass carries them out hard, on tokens ranked by the class
    attention that they get; gradients reach the softmaxes through soft masks. The loss is cross-entropy, without labels
    the divergence from the dense logits. The target is met in every step: by one power on all shares, whose gradient
    takes from one block what another one gets. It starts with the same shares everywhere.

    Args:
        model: Dense; see `tokens.site.SUPPORTED`. Neither it nor its weights are changed.
        batches: Images `(B, 3, H, W)`, pairs of images and labels, or dicts with `pixel_values` and maybe `labels`;
            gone through again and again. Some hundreds of images do.
        target_macs: At most 1: fraction of the dense MACs. Above: MACs of an image.
        before_blocks: Where tokens may leave; None is before every block but the first.
        num_steps: Batches to learn from.
        learning_rate: Of Adam on the logits of the softmaxes; falls to zero as a cosine.
        num_candidates: Shares to choose from, evenly spread; a mean may lie between.

    Returns:
        Settings for `add_token_pruning`, within 1 % of the target; reductions that take nothing away are left out.

    Raises:
        BudgetError: If the target is not below dense, or too low for whole tokens at these places.
        DataError: If there are no images, or batches of another form.
        UnsupportedModelError: If the model is no plain vision transformer, or its attention cannot be seen.

    Cost: two copies of the model, and `num_steps` forward passes over all tokens, each with a backward pass that stops
    at the activations (no gradients of weights) and keeps those of one batch.

    Source: Chen et al., DiffRate: Differentiable Compression Rate for Efficient Vision Transformers, ICCV 2023, arXiv
    2305.17997. Differs from it in this: tokens go between two blocks; candidates are shares of what a reduction sees,
    not counts of the image, so that no choice makes a later one idle; a hidden token keeps a weight of 1e-6 in
    attention while learning, so that a drop feels what reading the token would be worth; and the power on all shares
    instead of a squared penalty on MACs, whose weight would have to fit the size of the loss.
    """
    dense = copy.deepcopy(model).eval().requires_grad_(False)
    blocks = tuple(range(1, find_site(dense).depth) if before_blocks is None else before_blocks)
    stream = _endless(batches, next(dense.parameters()).device)
    images, labels = next(stream)
    cost = ScheduleCost.of(dense, images[:1], blocks)
    target = macs_target(target_macs, cost.parts.dense)
    share = keep_ratios_for(cost.parts, target, blocks)[0] ** 0.5
    rates = Rates(len(blocks), cost.parts.num_patches, num_candidates, start_share=share).to(images.device)
    student = copy.deepcopy(dense)
    making = TokenPruningConfig(method="diffrate", before_blocks=blocks, keep_ratios=(1.0,) * len(blocks))
    pruning = add_token_pruning(student, making)
    try_rates(pruning, rates)
    pruning.train()  # the blocks themselves stay in evaluation mode
    optimizer = torch.optim.Adam(rates.parameters(), lr=learning_rate, betas=(0.9, 0.99), eps=1e-12)
    with torch.enable_grad():
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * step / num_steps)) / 2
            rates.meet(cost.of_counts, target)
            loss = _loss(student, dense, images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            images, labels = next(stream)
    return _settle(rates.counts(), cost, target)


def _loss(student: nn.Module, dense: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    logits = logits_of(student(images)).float()
    if labels is not None:
        return F.cross_entropy(logits, labels)
    with torch.no_grad():
        taught = logits_of(dense(images)).float().log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), taught, log_target=True, reduction="batchmean")


def _settle(counts: Counts, cost: ScheduleCost, target: float) -> TokenPruningConfig:
    """Return whole counts at the target: all shares to one power, found by bisection."""
    counts = Counts(*(count.detach().double().cpu() for count in counts))
    undropped, unmerged = counts.undropped / counts.before, counts.kept / counts.undropped
    low, high, found = 0.0, 64.0, []
    for _ in range(60):
        power = (low + high) / 2
        kept = cost.parts.num_patches * ((undropped * unmerged) ** power).cumprod(0)
        before = torch.cat([kept.new_full((1,), cost.parts.num_patches), kept[:-1]])
        settings = settings_of(Counts(before, before * undropped**power, kept), cost)
        macs = cost.parts.dense if settings is None else cost.of_settings(settings)
        if settings is not None:
            found.append((abs(macs / target - 1), settings))
        low, high = (power, high) if macs > target else (low, power)
    missed, settings = min(found, key=lambda one: one[0])
    if missed > TOLERANCE:
        raise BudgetError(
            f"the MACs must be met within {TOLERANCE:.0%}, but the nearest schedule of whole tokens misses "
            f"{target:,.0f} by {missed:.1%}; give more blocks, or a target that {cost.parts.num_patches} patches allow"
        )
    return settings


def settings_of(counts: Counts, cost: ScheduleCost) -> TokenPruningConfig | None:
    """Return the settings of counts, without reductions that take nothing away; None if none does."""
    whole, num_patches = counts.whole(), cost.parts.num_patches
    left = [num_patches, *whole.kept.int().tolist()]
    rows = [
        (block, after / num_patches, min(merged, before - after) / num_patches)
        for block, (before, after), merged in zip(
            cost.before_blocks, pairwise(left), whole.merged.int().tolist(), strict=True
        )
        if after < before
    ]
    if not rows:
        return None
    blocks, keep_ratios, merge_ratios = zip(*rows, strict=True)
    return TokenPruningConfig(
        method="diffrate", before_blocks=blocks, keep_ratios=keep_ratios, merge_ratios=merge_ratios
    )


def _endless(batches: Iterable[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield images and labels, if there are any, again and again."""
    while True:
        num_images = 0
        for batch in batches:
            parts = batch
            if not isinstance(batch, Mapping):
                values = batch if isinstance(batch, list | tuple) else (batch,)
                parts = dict(zip(("pixel_values", "labels"), values, strict=False))
            images, labels = parts.get("pixel_values"), parts.get("labels")
            if not isinstance(images, Tensor) or not (labels is None or isinstance(labels, Tensor)):
                raise DataError(
                    f"batches must be images (B, 3, H, W), pairs of images and labels, or dicts with `pixel_values` "
                    f"and maybe `labels`, got {type(batch).__name__}"
                )
            if labels is not None:
                images, labels = images[labels >= 0], labels[labels >= 0].to(device)  # negative: could not be read
            if len(images):
                num_images += len(images)
                yield images.to(device), labels
        if not num_images:
            raise DataError("rates are learned from images, but `batches` gave none (again); give a list or a loader")
