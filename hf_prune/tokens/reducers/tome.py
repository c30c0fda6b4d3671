"""ToMe: merge the most similar pairs."""

from typing import ClassVar

import torch
from torch import Tensor

from hf_prune.tokens.reducers.base import Merger, View
from hf_prune.tokens.reducers.merge import merged, similarities
from hf_prune.tokens.tokenset import TokenSet


class BipartiteMerge(Merger):
    """Merges the most similar pairs of tokens: every second token looks for its nearest among the others.

    Similarity is the cosine of keys of the block before, mean over heads. Prefix tokens take no part.

    Source: Bolya et al., Token Merging: Your ViT but Faster (ToMe), ICLR 2023, arXiv 2210.09461, section 3 and
    equation 1. Differs from it in this: tokens merge between two blocks, where the paper merges between attention and
    MLP of one (the keys are the same; one MLP more runs on all of them).
    """

    most: ClassVar[float] = 0.5

    def merge(self, view: View, num_keep: int) -> tuple[Tensor, TokenSet]:
        """See `Merger.merge`."""
        patches, num_images, num_slots = view.patches, view.patches.shape[0], view.patches.shape[1]
        slots = torch.arange(num_slots, device=patches.device).expand(num_images, -1)
        seekers, others = slots[:, ::2], slots[:, 1::2]
        with torch.no_grad():
            best, nearest = similarities(view.keys()[:, :num_slots], seekers, others).max(-1)
            order = best.argsort(dim=1, descending=True)
        gone, left = order.split([num_slots - num_keep, seekers.shape[1] - (num_slots - num_keep)], dim=1)
        stay = torch.cat([seekers.gather(1, left), others], dim=1)
        into = left.shape[1] + nearest.gather(1, gone)
        return merged(patches, view.tokens, stay, seekers.gather(1, gone), into)
