"""Keep or drop: a Gumbel sample while training, the more probable choice afterwards."""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_MEDIANS = 10.0


@dataclass
class GumbelNoise:
    """Gumbel noise that depends on (seed, step, stage) and the image's place in the global batch alone.

    Not on the process, the order of calls or the history: so runs on one and on several processes draw the same
    noise for the same global batch, a resumed run draws what the interrupted one would have, and a block that
    is recomputed for gradient checkpointing sees its own noise again.

    Cost: every process draws the noise of the whole global batch, 2 numbers a token.
    """

    seed: int
    rank: int = 0
    world_size: int = 1
    step: int = 0

    def draw(self, num_images: int, num_patches: int, stage: int, device: torch.device) -> Tensor:
        """Return standard Gumbel noise for two choices on every patch of the grid, `(B, N, 2)`."""
        generator = torch.Generator(device=device)
        generator.manual_seed((self.seed * 1_000_003 + self.step) * 1_009 + stage)
        shape = (self.world_size * num_images, num_patches, 2)
        uniform = torch.empty(shape, device=device, dtype=torch.float32).exponential_(generator=generator)
        return -uniform[self.rank * num_images : (self.rank + 1) * num_images].clamp_min(1e-30).log()


def sample_keep(logits: Tensor, noise: Tensor) -> Tensor:
    """Return a hard 0/1 keep decision `(B, N)` whose gradient is that of its probability.

    Source: straight-through Gumbel-Softmax at temperature 1, as in the released SPViT code. Differs from it by
    `bound_tail` on the gradient.
    """
    probability = (logits + noise).softmax(dim=-1)[..., 0]
    # In this order the sum is exactly 0 or 1.
    decision = (probability - probability.detach()) + (probability >= 0.5).to(probability.dtype)
    if decision.requires_grad:
        decision.register_hook(bound_tail)
    return decision


def bound_tail(gradient: Tensor) -> Tensor:
    """Clip the gradient of keep decisions at a multiple of its median magnitude (zeros aside).

    For a dropped token the gradient is a first-order guess of what reading it would be worth, in proportion to
    exp(its score) over the sum of those still read. Where attention is sharp that guess is off by many orders of
    magnitude (a token cannot get more than the whole attention), and a handful of such tokens would outweigh
    everything else, the keep constraint included.
    """
    size = gradient.abs()
    limit = MAX_MEDIANS * torch.where(size > 0, size, torch.nan).nanmedian().nan_to_num()
    return gradient.clamp(-limit, limit)


def threshold_keep(logits: Tensor, threshold: Tensor) -> Tensor:
    """Return the deterministic keep decision `(B, N)`, 0 or 1; at threshold 0 the more probable choice.

    Differs from the released SPViT code, which also samples at inference.
    """
    return (logits[..., 0] - logits[..., 1] >= threshold).to(logits.dtype)


def top_keep(margin: Tensor, alive: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """Return the decision `(B, N)` that keeps the `num_keep` best of those alive, and which they are, `(B, num_keep)`.

    Shapes depend on `num_keep` alone, so a compiler and an exporter can follow.
    """
    # What is not alive comes last, whatever its margin.
    ranked = torch.where(alive > 0, margin.detach(), torch.finfo(margin.dtype).min)
    order = ranked.topk(num_keep, dim=1, sorted=False).indices
    return torch.zeros_like(alive).scatter(1, order, 1.0), order
