"""PiToMe: merge where there is much of the same."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prune.tokens.reducers.base import Merger, View
from hf_prune.tokens.reducers.merge import merged, similarities
from hf_prune.tokens.tokenset import TokenSet

MARGIN = 0.45


class EnergyMerge(Merger):
    """Merges among the tokens of highest energy, those with many like them, and leaves the others in peace.

    The energy of a token is the mean over the other tokens of ELU(cosine - margin), the cosine that of keys of the
    block before, mean over heads. Of the 2r tokens of highest energy every second goes into its nearest among the rest.

    Source: Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging (PiToMe), NeurIPS 2024, arXiv
    2405.16148. Differs from it in this: one margin for all blocks, and tokens merge between two blocks.
    """

    most: ClassVar[float] = 0.5

    def merge(self, view: View, num_keep: int) -> tuple[Tensor, TokenSet]:
        """See `Merger.merge`."""
        patches, num_slots = view.patches, view.patches.shape[1]
        num_gone = num_slots - num_keep
        keys = view.keys()[:, :num_slots]
        slots = torch.arange(num_slots, device=patches.device).expand(patches.shape[0], -1)
        with torch.no_grad():
            cosines = similarities(keys, slots, slots)
            # A token's own cosine adds the same to all.
            order = F.elu(cosines - MARGIN).mean(-1).argsort(dim=1, descending=True)
            crowd, rest = order.split([2 * num_gone, num_slots - 2 * num_gone], dim=1)
            goes, hosts = crowd[:, ::2], crowd[:, 1::2]
            nearest = similarities(keys, goes, hosts).argmax(-1)
        return merged(patches, view.tokens, torch.cat([rest, hosts], dim=1), goes, rest.shape[1] + nearest)
