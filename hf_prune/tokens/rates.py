"""DiffRate's rates: softmaxes over what every reduction drops and merges, and the reducers that try them out.

Letters: B images, N patches, S reductions, J candidates, C channels.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hf_prune.tokens.pruning import TokenPruning
from hf_prune.tokens.reducers.base import Reduced, Reducer, Rule, View
from hf_prune.tokens.reducers.decide import bound_tail
from hf_prune.tokens.reducers.merge import similarities

# Within these one power on all shares may go while they are learned; nobody gets there who learns slowly.
POWERS = (0.05, 20.0)


class Counts(NamedTuple):
    """Patches before every reduction, after its drops and after its merges, `(S,)` each, falling."""

    before: Tensor
    undropped: Tensor
    kept: Tensor

    def whole(self) -> "Counts":
        """Return whole numbers: at least one patch is left everywhere."""
        return Counts(*(count.detach().round().clamp_min(1) for count in self))

    @property
    def merged(self) -> Tensor:
        """How many tokens every reduction merges."""
        return self.undropped - self.kept


class Rates(nn.Module):
    """What share of the tokens it sees every reduction leaves, by dropping and by merging.

    Args:
        num_stages: S.
        num_patches: N.
        num_candidates: J; shares 1, 1 - 1/J, ... 1/J.
        start_share: What both leave at first, everywhere.

    Attributes:
        power: Of all shares: the one number by which they meet a target together.
    """

    shares: Tensor
    power: Tensor

    def __init__(self, num_stages: int, num_patches: int, num_candidates: int, *, start_share: float) -> None:
        super().__init__()
        self.num_patches = num_patches
        self.register_buffer("shares", 1 - torch.arange(num_candidates) / num_candidates)
        self.register_buffer("power", torch.ones(()))
        logits = _tilted(self.shares, start_share).expand(num_stages, -1)
        self.drop = nn.Parameter(logits.clone())
        self.merge = nn.Parameter(logits.clone())

    def counts(self, power: Tensor | None = None) -> Counts:
        """Return the mean counts, differentiable; `power` as the attribute if None."""
        power = self.power if power is None else power
        undropped, unmerged = ((logits.softmax(-1) @ self.shares) ** power for logits in (self.drop, self.merge))
        kept = self.num_patches * (undropped * unmerged).cumprod(0)
        before = torch.cat([kept.new_full((1,), self.num_patches), kept[:-1]])
        return Counts(before, before * undropped, kept)

    def meet(self, cost: Callable[[Counts], Tensor], target: float) -> None:
        """Set the power at which the counts cost a target, as a differentiable function of the softmaxes.

        By two steps of Newton's method from where it is, the second of which carries the gradient.
        """
        power = self.power
        for _ in range(2):
            power = power.detach().requires_grad_()
            found = cost(self.counts(power))
            (slope,) = torch.autograd.grad(found, power, retain_graph=True)
            power = (power.detach() - (found - target) / slope).float().clamp(*POWERS)
        self.power = power

    def masks(self, stage: int) -> tuple[Tensor, Tensor]:
        """Return who is not dropped and who is not merged by rank, `(N,)` each, best first.

        Both are 0 or 1, by the whole counts. Their gradient is that of the probability that as many are left.
        """
        counts, whole = self.counts(), self.counts().whole()
        found = []
        for logits, seen, left in (
            (self.drop, counts.before[stage], whole.undropped[stage]),
            (self.merge, counts.undropped[stage], whole.kept[stage]),
        ):
            rank = torch.arange(self.num_patches, device=logits.device)
            among = (self.shares**self.power * seen.detach()).unsqueeze(-1) - rank
            soft = logits[stage].softmax(-1) @ among.clamp(0, 1)
            found.append((soft - soft.detach()) + (rank < left).to(soft.dtype))
        return found[0], found[1]


class TryRates(Reducer):
    """Drops and merges as many tokens as the rates say, on a sequence that keeps all of its slots.

    What is dropped is hidden; what is merged is averaged into the nearest token that stays, and hidden. In evaluation
    logits are those of `reducers.diffrate.DropAndMerge` with the same counts.

    Args:
        rates: Shared by all reductions, and no parameter of any.
        stage: Which of them this is.
    """

    reads: ClassVar[Literal["tokens", "attention"]] = "attention"
    learned: ClassVar[bool] = True

    def __init__(self, rates: Rates, stage: int) -> None:
        super().__init__()
        self.__dict__["rates"] = rates
        self.rates: Rates
        self.stage = stage

    def reduce(self, view: View, rule: Rule) -> Reduced:
        """See `Reducer.reduce`."""
        tokens, alive = view.tokens, view.tokens.alive
        with torch.no_grad():
            read = view.received().masked_fill(alive == 0, -1.0)
            rank = read.argsort(dim=1, descending=True).argsort(dim=1)
        undropped, unmerged = (_bounded(by_rank[rank]) for by_rank in self.rates.masks(self.stage))
        stays = alive * undropped * unmerged
        share = alive * undropped * (1 - unmerged)
        with torch.no_grad():
            slots = torch.arange(alive.shape[1], device=alive.device).expand(len(alive), -1)
            cosines = similarities(view.patches, slots, slots)
            hosts = (stays > 0).unsqueeze(1) & ~torch.eye(alive.shape[1], dtype=torch.bool, device=alive.device)
            into = cosines.masked_fill(~hosts, -2.0).argmax(-1)
            place = torch.where(stays > 0, slots, torch.where(share > 0, into, -1))
            source = tokens.sources().long()
            source = torch.where(source >= 0, place.gather(1, source.clamp_min(0)), source)
        size = tokens.sizes()
        weight = size * share
        new_size = size + torch.zeros_like(size).scatter_add(1, into, weight)
        moved = view.patches * weight.unsqueeze(-1)
        total = view.patches * size.unsqueeze(-1)
        total = total.scatter_add(1, into.unsqueeze(-1).expand_as(moved), moved)
        patches = (total / new_size.unsqueeze(-1)).to(view.patches.dtype)
        tokens = replace(tokens, alive=stays, size=new_size, source=source, all_alive=False)
        return Reduced(patches, view.candidates[:, alive.shape[1] :], tokens, torch.zeros_like(alive))


def try_rates(pruning: TokenPruning, rates: Rates) -> None:
    """Let the reducers of a model try out rates: in evaluation to the letter, in training with gradients to them."""
    for stage, block in enumerate(pruning.settings.before_blocks):
        pruning.selectors[str(block)] = TryRates(rates, stage)
    pruning.runtime, pruning.noise = "masked", None


def _bounded(mask: Tensor) -> Tensor:
    """Return a mask whose gradient has no outliers."""
    if mask.requires_grad:
        mask.register_hook(bound_tail)
    return mask


def _tilted(shares: Tensor, mean: float) -> Tensor:
    """Return logits, linear in the shares, whose softmax has a mean; as near as the shares allow."""
    low, high = -1e4, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * shares).softmax(-1) @ shares) < mean else (low, middle)
    return high * shares
