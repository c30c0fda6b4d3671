"""The package token: what was dropped lives on as one weighted average."""

import torch
from torch import Tensor

from hf_prune.tokens.config import Packages
from hf_prune.tokens.tokenset import TokenSet

# Keep probabilities below this count as this much, so a package of tokens that are all worthless is their plain mean.
LEAST_WEIGHT = 1e-6


def package_dropped(
    candidates: Tensor, before: TokenSet, alive_after: Tensor, keep_probability: Tensor, *, packages: Packages
) -> tuple[Tensor, Tensor]:
    """Average the tokens a selector has just dropped, weighted by their keep probabilities.

    Source: SPViT (Kong et al. 2022), package token; re-absorption as described for its successor HeatViT: the one
    package there is joins the average with its own keep probability instead of staying a normal token.

    Args:
        candidates: `(B, n + p, C)`, patch slots then package slots.
        before: State before the decision.
        alive_after: `(B, n)`, patches still alive after it.
        keep_probability: `(B, n + p)`, the selector's opinion of the candidates.
        packages: `"single"`: one package re-absorbs its predecessor. `"per_stage"`: append one for this stage's tokens
            and keep the earlier ones, as the released checkpoints expect. `"none"`: what is dropped is gone.

    Returns:
        `(B, q, C)` packages and `(B, q)`, 1 where there is one: an image that never dropped anything has none.
    """
    if packages == "none":
        return candidates[:, before.alive.shape[1] :], before.packages_alive
    per_stage = packages == "per_stage"
    dropped = before.alive - alive_after
    absorbed = torch.zeros_like(before.packages_alive) if per_stage else before.packages_alive
    share = torch.cat([dropped, absorbed], dim=1)
    weight = (share * keep_probability.clamp_min(LEAST_WEIGHT)).unsqueeze(-1)
    package_alive = (share.detach() > 0.5).any(dim=1, keepdim=True).to(share.dtype)
    # Where nothing was dropped the sum is zero: dividing by one keeps both the value and its gradient small.
    total = weight.sum(dim=1, keepdim=True) + (1 - package_alive).unsqueeze(-1)
    package = (candidates.float() * weight).sum(dim=1, keepdim=True) / total
    if not per_stage:
        return package, package_alive
    earlier = candidates[:, before.alive.shape[1] :]
    return torch.cat([earlier, package], dim=1), torch.cat([before.packages_alive, package_alive], dim=1)
