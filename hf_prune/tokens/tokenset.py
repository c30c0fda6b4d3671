"""Which tokens of a batch are in play: the record that travels from block to block.

Letters: B images, N patches of the image grid, n patch slots in the sequence, p package slots, C channels,
T all tokens of the sequence (prefix, then n patch slots, then p package slots).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# What a dropped token's attention weight is multiplied with while training: small, so that nobody reads it, but
# not zero, so that a decision to drop still feels what reading the token would have been worth.
HIDDEN_WEIGHT = 1e-6


@dataclass(frozen=True)
class TokenSet:
    """The tokens in play after some block, for a whole batch.

    Attributes:
        num_patches: N, the patches of the full grid.
        alive: `(B, n)`, 1 where the slot holds a kept patch; differentiable while training.
        packages_alive: `(B, p)`, 1 where the package slot holds something.
        index: `(B, n)`, grid position of each slot, or None while slots and grid are the same; a slot that holds
            several patches has the position of the one they were merged into.
        size: `(B, n)`, how many patches each slot stands for, or None where each is one.
        source: `(B, N)`, the slot that stands for each patch of the grid, -1 where none does; None where `index` tells.
        all_alive: Whether every slot is known to be in play, without looking at numbers.
        bias: What the blocks add to their attention scores; None where every token is read alike.
    """

    num_patches: int
    alive: Tensor
    packages_alive: Tensor
    index: Tensor | None = None
    size: Tensor | None = None
    source: Tensor | None = None
    all_alive: bool = False
    bias: Tensor | None = None

    @classmethod
    def all_patches(cls, num_images: int, num_patches: int, device: torch.device) -> "TokenSet":
        """Return the state before any reduction: every patch alive, no package."""
        alive = torch.ones(num_images, num_patches, device=device)
        return cls(num_patches, alive, alive.new_zeros(num_images, 0), all_alive=True)

    @property
    def is_whole(self) -> bool:
        """Whether the sequence is still the dense one."""
        return self.index is None and self.all_alive and not self.packages_alive.shape[1]

    @property
    def candidates_alive(self) -> Tensor:
        """`(B, n + p)`: patch slots, then package slots."""
        return torch.cat([self.alive, self.packages_alive], dim=1)

    def grid_index(self) -> Tensor:
        """Return `(B, n)`: the grid position of each slot."""
        if self.index is not None:
            return self.index
        return torch.arange(self.num_patches, device=self.alive.device).expand(self.alive.shape[0], -1)

    def grid_mask(self) -> Tensor:
        """Return `(B, N)`: which patches of the image are in play themselves."""
        if self.index is None:
            return self.alive
        mask = self.alive.new_zeros(self.alive.shape[0], self.num_patches)
        return mask.scatter_add(1, self.index, self.alive)

    def sources(self) -> Tensor:
        """Return `(B, N)`: the slot that stands for each patch of the grid, -1 where none does."""
        if self.source is not None:
            return self.source
        slots = torch.arange(self.alive.shape[1], device=self.alive.device).expand(self.alive.shape[0], -1)
        slots = torch.where(self.alive > 0, slots, -1)
        if self.index is None:
            return slots
        return slots.new_full((slots.shape[0], self.num_patches), -1).scatter(1, self.index, slots)

    def sizes(self) -> Tensor:
        """Return `(B, n)`: how many patches each slot stands for."""
        return torch.ones_like(self.alive) if self.size is None else self.size

    def policy(self, num_prefix_tokens: int) -> Tensor:
        """Return `(B, T)`: 1 for every token that may be read, prefix tokens always."""
        return torch.nn.functional.pad(self.candidates_alive, (num_prefix_tokens, 0), value=1.0)

    def log_sizes(self, num_prefix_tokens: int) -> Tensor | None:
        """Return what proportional attention adds to scores, `(B, 1, 1, T)`: log of the size of what is read.

        Source: ToMe (Bolya et al., ICLR 2023), equation 1. Prefix and package tokens count once.
        """
        if self.size is None:
            return None
        logs = torch.nn.functional.pad(self.size.log(), (num_prefix_tokens, self.packages_alive.shape[1]))
        return logs[:, None, None, :]


def hide_keys(policy: Tensor, *, training: bool, see_self: bool = False) -> Tensor | None:
    """Return what to add to attention scores so that dropped tokens are not read, or None if all may be.

    Training: log(G + eps) with G the policy, so that the attention weights are those of DynamicViT's and SPViT's
    exp-multiply form and gradients reach the decisions, in a form that every fused attention accepts.
    Inference: hidden keys get no weight at all.

    Args:
        policy: `(B, T)`, 1 or 0 for each key.
        training: Which of the two forms.
        see_self: While training, let every token read itself (G has ones on its diagonal), as the papers do.

    Returns:
        `(B, 1, T, T)` with `see_self` while training, else `(B, 1, 1, T)`.
    """
    keys = policy[:, None, None, :]
    if training:
        if see_self:
            keys = keys + (1 - keys) * torch.eye(policy.shape[1], device=policy.device)
        return (keys + HIDDEN_WEIGHT).log()
    hidden = keys == 0
    # A compiler must not be asked about numbers.
    if not torch.compiler.is_compiling() and not hidden.any():
        return None
    return torch.zeros_like(keys).masked_fill(hidden, torch.finfo(keys.dtype).min)


def compact(patches: Tensor, tokens: TokenSet) -> tuple[Tensor, TokenSet]:
    """Move the kept patches of every image to the front, in order, and cut to the fullest image.

    Args:
        patches: `(B, n, C)`.
        tokens: Their state; decisions must be hard.

    Returns:
        `(B, m, C)` with m the largest number of kept patches in the batch, and its state.
    """
    if bool(tokens.alive.all()):
        return patches, tokens
    width = int(tokens.alive.sum(dim=1).max())
    order = tokens.alive.detach().argsort(dim=1, descending=True, stable=True)[:, :width]
    return taken(patches, tokens, order)


def taken(patches: Tensor, tokens: TokenSet, order: Tensor) -> tuple[Tensor, TokenSet]:
    """Return the slots `order` `(B, m)` of every image, `(B, m, C)`, and their state."""
    index = order if tokens.index is None else tokens.index.gather(1, order)
    size = None if tokens.size is None else tokens.size.gather(1, order)
    patches = patches.gather(1, order.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    return patches, replace(tokens, alive=tokens.alive.gather(1, order), index=index, size=size)


def fill_dropped(sequence: Tensor, tokens: TokenSet, num_prefix_tokens: int, *, with_prefix: bool) -> Tensor:
    """Replace the output of dropped tokens by the mean of the kept ones, and repeat merged ones.

    Any later mean or maximum over the sequence then equals that over kept tokens alone, whatever
    code the model pools with; class tokens are untouched. A merged token counts as often as it has patches.

    Args:
        sequence: `(B, T, C)`, output of the final norm.
        tokens: The state after the last block.
        num_prefix_tokens: Tokens in front of the patches.
        with_prefix: Whether the model's pooling averages the prefix tokens too.

    Returns:
        `(B, T, C)`, or `(B, prefix + N, C)` where tokens were merged.
    """
    prefix, rest = sequence[:, :num_prefix_tokens], sequence[:, num_prefix_tokens:]
    counts = torch.cat([tokens.alive * tokens.sizes(), tokens.packages_alive], dim=1)
    weight = counts.to(sequence.dtype).unsqueeze(-1)
    total, count = (rest * weight).sum(1, keepdim=True), weight.sum(1, keepdim=True)
    if with_prefix:
        total, count = total + prefix.sum(1, keepdim=True), count + num_prefix_tokens
    mean = total / count.clamp_min(1e-6)
    if tokens.source is not None:
        return torch.cat([prefix, to_grid(rest, tokens, mean.expand(-1, tokens.num_patches, -1))], dim=1)
    return torch.cat([prefix, rest * weight + (1 - weight) * mean], dim=1)


def to_grid(patches: Tensor, tokens: TokenSet, others: Tensor) -> Tensor:
    """Return `(B, N, C)`: every patch of the grid with the token that stands for it now.

    Args:
        patches: `(B, n, C)`, the slots.
        tokens: Their state.
        others: `(B, N, C)`, what the patches have that nothing stands for: their last features, or zeros.
    """
    if patches.shape[1] == 0:
        return others
    source = tokens.sources().unsqueeze(-1)
    here = patches.gather(1, source.clamp_min(0).expand(-1, -1, patches.shape[-1]))
    return torch.where(source >= 0, here, others)
