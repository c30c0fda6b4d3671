"""Rotary position embeddings of tokens that have left their places on the grid (timm's EVA family).

Letters: B images, H heads (or 1), N patches of the grid, n patch and p package slots, D channels of a head.
"""

import torch
from torch import Tensor

from hf_prune.errors import UnsupportedModelError
from hf_prune.tokens.packing import Packing
from hf_prune.tokens.tokenset import TokenSet


def rope_of_kept(rope: Tensor, tokens: TokenSet) -> Tensor:
    """Return the embedding `(B, H, n + p, 2D)` of the tokens in play; packages are not rotated.

    Args:
        rope: timm's `[sin | cos]` table over the grid, `(N, 2D)` or `(H, N, 2D)`.
        tokens: Which patches are in the sequence.

    Raises:
        UnsupportedModelError: If every image already has a table of its own.
    """
    if rope.ndim == 4:
        raise UnsupportedModelError(
            "token pruning needs one rotary embedding for all images, got one per image; "
            "build the model with `patch_drop_rate=0`"
        )
    num_images, num_packages = tokens.packages_alive.shape
    table = rope if rope.ndim == 3 else rope.unsqueeze(0)
    if tokens.index is None:
        rows = table.unsqueeze(0).expand(num_images, -1, -1, -1)
    else:
        rows = table[:, tokens.index].transpose(0, 1)
    return torch.cat([rows, _unrotated(rows, num_packages)], dim=2)


def rope_of_packed(rows: Tensor, packing: Packing, num_prefix_tokens: int) -> Tensor:
    """Return the embedding `(1, H, L - prefix, 2D)` of a packed sequence.

    timm leaves the first prefix tokens of a sequence unrotated; in a packed one those are the first image's, and the
    prefix tokens of the others get rows that do not rotate.

    Args:
        rows: `(B, H, n + p, 2D)`, see `rope_of_kept`.
        packing: Where tokens belong.
        num_prefix_tokens: Prefix tokens of an image.
    """
    full = torch.cat([_unrotated(rows, num_prefix_tokens), rows], dim=2)
    return packing.pack(full.transpose(1, 2)).transpose(1, 2)[:, :, num_prefix_tokens:]


def _unrotated(like: Tensor, length: int) -> Tensor:
    """Return `(B, H, length, 2D)` of sine 0 and cosine 1."""
    sine = like.new_zeros(*like.shape[:2], length, like.shape[-1] // 2)
    return torch.cat([sine, sine + 1], dim=-1)
