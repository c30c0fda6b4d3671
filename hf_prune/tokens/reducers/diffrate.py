"""DiffRate: drop the least read tokens and merge the next, by numbers that were learned."""

from typing import ClassVar

import torch
from torch import Tensor

from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.reducers.base import Merger, View
from hf_prune.tokens.reducers.merge import merged, similarities
from hf_prune.tokens.tokenset import TokenSet


class DropAndMerge(Merger):
    """Drops tokens with least class attention and merges the next into their nearest, as many as the schedule says.

    Source: Chen et al., DiffRate: Differentiable Compression Rate for Efficient Vision Transformers, ICCV 2023, arXiv
    2305.17997. `tokens.rate_search` learns the schedule. Differs from it in this: tokens go between two blocks.

    Args:
        merge_ratio: Of the image's patches, the fraction to merge here; the rest of what goes is dropped.
    """

    most: ClassVar[float] = 1.0

    def __init__(self, merge_ratio: float) -> None:
        super().__init__()
        self.merge_ratio = merge_ratio

    @classmethod
    def build(cls, dim: int, settings: TokenPruningConfig, stage: int, *, start_keep_ratio: float) -> "DropAndMerge":
        """See `Reducer.build`."""
        return cls(settings.merge_ratios[stage])

    def merge(self, view: View, num_keep: int) -> tuple[Tensor, TokenSet]:
        """See `Merger.merge`."""
        patches, num_slots = view.patches, view.patches.shape[1]
        num_gone = num_slots - num_keep
        num_merged = min(round(self.merge_ratio * view.tokens.num_patches), num_gone)
        with torch.no_grad():
            order = view.received()[:, :num_slots].argsort(dim=1, descending=True)
            stay, goes, _ = order.split([num_keep, num_merged, num_gone - num_merged], dim=1)
            into = similarities(patches, goes, stay).argmax(-1)
        return merged(patches, view.tokens, stay, goes, into)
