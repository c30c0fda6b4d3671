"""Put tokens together by averaging, and keep count of who stands for whom.

Letters: B images, n tokens, m tokens that are left, r tokens that go, C channels.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prune.tokens.tokenset import TokenSet


def similarities(metric: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the cosines `(B, i, j)` of the tokens `rows` `(B, i)` and `columns` `(B, j)` of a metric `(B, n, D)`."""
    unit = F.normalize(metric.float(), dim=-1)
    first, second = (unit.gather(1, index.unsqueeze(-1).expand(-1, -1, unit.shape[-1])) for index in (rows, columns))
    return first @ second.transpose(1, 2)


def merged(patches: Tensor, tokens: TokenSet, stay: Tensor, goes: Tensor, into: Tensor) -> tuple[Tensor, TokenSet]:
    """Average tokens that go into tokens that stay, each weighted by the patches it stands for.

    Args:
        patches: `(B, n, C)`.
        tokens: Their state.
        stay: `(B, m)`, slots that are left, in their new order.
        goes: `(B, r)`, slots that are merged; what is in neither is dropped.
        into: `(B, r)`, the place in `stay` that each goes into.

    Returns:
        `(B, m, C)` and its state.
    """
    size = tokens.sizes()
    weighted = patches * size.unsqueeze(-1).to(patches.dtype)
    width = (-1, -1, patches.shape[-1])
    total = weighted.gather(1, stay.unsqueeze(-1).expand(width))
    total = total.scatter_add(1, into.unsqueeze(-1).expand(width), weighted.gather(1, goes.unsqueeze(-1).expand(width)))
    new_size = size.gather(1, stay).scatter_add(1, into, size.gather(1, goes))
    place = torch.full_like(tokens.grid_index(), -1)
    place = place.scatter(1, stay, torch.arange(stay.shape[1], device=stay.device).expand_as(stay))
    place = place.scatter(1, goes, into)
    source = tokens.sources()
    source = torch.where(source >= 0, place.gather(1, source.clamp_min(0)), source)
    kept = replace(
        tokens,
        alive=tokens.alive.gather(1, stay),
        index=tokens.grid_index().gather(1, stay),
        size=new_size,
        source=source,
    )
    return total / new_size.unsqueeze(-1).to(patches.dtype), kept
