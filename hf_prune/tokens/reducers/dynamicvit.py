"""DynamicViT's token predictor."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.reducers.base import Selector, TokenScores, View


class TokenPredictor(Selector):
    """Scores tokens by a small MLP on a local and a global feature, each half of the width.

    Trained by sampled decisions and masks; in evaluation every image keeps as many tokens, those with the highest
    scores. Nothing becomes of what is dropped.

    Source: Rao et al., DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification, NeurIPS 2021, arXiv
    2106.02034, equations 3 to 6. Differs from it by a denominator that cannot be zero.

    Args:
        dim: Token width, a multiple of 4.
    """

    learned: ClassVar[bool] = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )

    @classmethod
    def build(cls, dim: int, settings: TokenPruningConfig, stage: int, *, start_keep_ratio: float) -> "TokenPredictor":
        """See `Reducer.build`; it starts by keeping about its share of the tokens that it sees."""
        predictor = cls(dim)
        odds = torch.logit(torch.tensor(start_keep_ratio), eps=0.01)
        with torch.no_grad():
            predictor.score[-1].bias.copy_(torch.stack([odds / 2, -odds / 2]))  # type: ignore[union-attr]
        return predictor

    def forward(self, tokens: Tensor, alive: Tensor) -> TokenScores:
        """Score every token `(B, N, dim)`, looking at the mean of those alive `(B, N)`."""
        local, shared = self.embed(tokens).chunk(2, dim=-1)
        weight = (alive / alive.sum(1, keepdim=True).clamp_min(1e-6)).to(shared.dtype)
        context = (weight.unsqueeze(1) @ shared).expand(-1, tokens.shape[1], -1)
        logits = self.score(torch.cat([local, context], dim=-1)).float().log_softmax(-1)
        return TokenScores(logits, logits[..., 0].exp())

    def judge(self, view: View) -> TokenScores:
        """See `Selector.judge`."""
        return self(view.candidates, view.tokens.candidates_alive)
