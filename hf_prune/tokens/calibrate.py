"""Set the keep thresholds so that the deterministic decisions keep what was asked for, on average."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.tokens.attach import token_pruning_of
from hf_prune.tokens.pruning import TokenPruning


@torch.no_grad()
def calibrate_thresholds(
    model: nn.Module,
    batches: Callable[[], Iterable[Tensor]],
    keep_ratios: Sequence[float],
    *,
    gather: Callable[[Tensor], Tensor] = lambda margins: margins,
) -> list[float]:
    """Move each selector's threshold to where its decisions keep the target share of patches, image by image.

    Training samples its decisions; inference takes the more probable one. Where probabilities are not yet near 0 or 1
    the two keep different numbers of tokens. One threshold per selector, common to all images, closes that gap and
    leaves the counts image-adaptive. First selector first, because the second sees what the first leaves.

    Args:
        model: Token-pruned model; put into evaluation mode meanwhile.
        batches: Gives a fresh iterator over batches of pixels `(B, 3, H, W)` on the model's device; a few hundred
            training images do.
        keep_ratios: Target share of all patches alive after each selector.
        gather: Collects a 1-d tensor over processes.

    Returns:
        The mean keep ratios reached on those images.

    Cost: one forward pass over the batches per selector and one more; 4 bytes per image and patch of memory.
    """
    pruning, was_training = token_pruning_of(model), model.training
    model.eval()
    blocks = [str(block) for block in pruning.settings.before_blocks]
    for stage, (block, keep_ratio) in enumerate(zip(blocks, keep_ratios, strict=True)):
        margins, num_patches = _margins(model, pruning, stage, batches(), gather)
        threshold: Tensor = pruning.selectors[block].keep_threshold  # type: ignore[assignment]
        threshold.fill_(split_point(margins, round(keep_ratio * num_patches)))
    reached = []
    for pixels in batches():
        model(pixels)
        reached.append(torch.stack([record.keep.mean(1) for record in pruning.take_records()], dim=1))
    model.train(was_training)
    return [gather(column.contiguous()).mean().item() for column in torch.cat(reached).unbind(1)]


def split_point(margins: Tensor, num_keep: int) -> float:
    """Return a threshold that `num_keep` of the margins reach, half way between two of them.

    Half way, because a threshold that equals a margin is decided by rounding.
    """
    ranked = margins.sort(descending=True).values
    num_keep = min(max(num_keep, 0), len(ranked))
    if num_keep == 0 or num_keep == len(ranked):
        return float(ranked[0] + 1) if num_keep == 0 else float(ranked[-1] - 1)
    return float((ranked[num_keep - 1] + ranked[num_keep]) / 2)


def _margins(
    model: nn.Module, pruning: TokenPruning, stage: int, batches: Iterable[Tensor], gather: Any
) -> tuple[Tensor, int]:
    """Return the margins of the patches that reach a selector, and how many patches all images have together."""
    margins, num_patches, device = [], 0, next(pruning.parameters()).device
    for pixels in batches:
        model(pixels)
        record = pruning.take_records()[stage]
        margins.append(record.margin[record.candidates > 0].float().cpu())
        num_patches += record.keep.numel()
    total = gather(torch.tensor([num_patches], device=device)).sum().item()
    return gather(torch.cat(margins).to(device)).cpu(), int(total)
