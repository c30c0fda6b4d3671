"""Keep random tokens: what every other method must beat."""

import torch
from torch import Tensor

from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.reducers.base import Selector, TokenScores, View


class Random(Selector):
    """Drops tokens by chance: anew for every image while training, one fixed order of places in evaluation.

    The fixed order makes logits repeatable and the same for an image alone and in a batch.

    Args:
        stage: Number of the stage; every stage has an order of its own.
    """

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.stage = stage

    @classmethod
    def build(cls, dim: int, settings: TokenPruningConfig, stage: int, *, start_keep_ratio: float) -> "Random":
        """See `Reducer.build`."""
        return cls(stage)

    def judge(self, view: View) -> TokenScores:
        """See `Selector.judge`."""
        tokens = view.tokens
        if self.training:
            margin = torch.rand(view.candidates.shape[:2], device=view.candidates.device)
        else:
            margin = shuffled(tokens.num_patches, self.stage, tokens.alive.device)[tokens.grid_index()]
        return TokenScores(torch.stack([margin, torch.zeros_like(margin)], dim=-1), torch.ones_like(margin))


def shuffled(num_patches: int, stage: int, device: torch.device) -> Tensor:
    """Return one number in [0, 1) for each place of the grid, without a random generator, which no exporter takes."""
    number = torch.arange(num_patches, device=device) + 1 + 7919 * stage
    for factor, shift in ((0x2C1B3C6D, 12), (0x297A2D39, 15), (0x1B56C4E9, 16)):
        number = (number * factor) % 2**32
        number = number ^ (number >> shift)
    return number.float() / 2**32
