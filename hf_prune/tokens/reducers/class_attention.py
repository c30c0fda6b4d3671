"""Keep what the class token reads most."""

from typing import ClassVar, Literal

import torch

from hf_prune.tokens.reducers.base import Selector, TokenScores, View


class ClassAttention(Selector):
    """Drops the tokens that got least attention from the class token in the block before, mean over heads.

    In models without a class token: least attention from all tokens. No parameters, every image keeps as many.

    The baseline of the field; EViT is this with a package token.
    """

    reads: ClassVar[Literal["tokens", "attention"]] = "attention"

    def judge(self, view: View) -> TokenScores:
        """See `Selector.judge`."""
        received = view.received()
        margin = received.float().clamp_min(1e-12).log()
        return TokenScores(torch.stack([margin, torch.zeros_like(margin)], dim=-1), received)
