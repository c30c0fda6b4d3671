"""What a reducer is: a module between two blocks that makes tokens fewer.

Letters: B images, N patches of the grid, n patch slots, p package slots, C channels.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hf_prune.errors import UnsupportedModelError
from hf_prune.tokens.attention import Attention
from hf_prune.tokens.config import Packages, TokenPruningConfig
from hf_prune.tokens.reducers.decide import sample_keep, threshold_keep, top_keep
from hf_prune.tokens.reducers.package import package_dropped
from hf_prune.tokens.tokenset import TokenSet, compact, taken


@dataclass(frozen=True)
class View:
    """What a reducer sees.

    Attributes:
        candidates: `(B, n + p, C)`, patch slots then package slots.
        tokens: Their state.
        attention: Of the block before, over prefix tokens too; None where the reducer did not ask for it.
        num_prefix_tokens: Tokens in front of the patches.
    """

    candidates: Tensor
    tokens: TokenSet
    attention: Attention | None
    num_prefix_tokens: int

    @property
    def patches(self) -> Tensor:
        """`(B, n, C)`."""
        return self.candidates[:, : self.tokens.alive.shape[1]]

    def received(self) -> Tensor:
        """Return `(B, n + p)`: the attention each candidate got in the block before."""
        assert self.attention is not None
        return self.attention.received[:, self.num_prefix_tokens :]

    def keys(self) -> Tensor:
        """Return `(B, n + p, D)`: each candidate's key in the block before, mean over heads."""
        assert self.attention is not None
        return self.attention.key_metric()[:, self.num_prefix_tokens :]


@dataclass(frozen=True)
class Rule:
    """How a reduction is carried out.

    Attributes:
        num_keep: Patches to keep of the grid.
        fixed: Whether every image keeps just as many.
        removes: Whether what is dropped leaves the sequence.
        noise: `(B, N, 2)` for sampled decisions; None decides for what is more probable.
        packages: What becomes of dropped tokens.
    """

    num_keep: int
    fixed: bool
    removes: bool
    noise: Tensor | None
    packages: Packages


class StageRecord(NamedTuple):
    """What one reducer decided in the last forward pass.

    Attributes:
        before_block: The block it sits before.
        keep: `(B, N)` patches of the grid that are in play after it themselves, 0 or 1, differentiable while training.
        margin: `(B, n)` logit(keep) - logit(drop) of the candidate patches, before the decision; zeros for mergers.
        candidates: `(B, n)` which of those slots were alive before the decision.
    """

    before_block: int
    keep: Tensor
    margin: Tensor
    candidates: Tensor


class Reduced(NamedTuple):
    """What is left: `patches` `(B, m, C)`, `packages` `(B, q, C)`, their state, and the margins of `StageRecord`."""

    patches: Tensor
    packages: Tensor
    tokens: TokenSet
    margin: Tensor


class TokenScores(NamedTuple):
    """A selector's opinion of B x (n + p) tokens.

    Attributes:
        logits: `(B, n + p, 2)`, unnormalised log-probabilities of keep (0) and drop (1).
        keep_probability: `(B, n + p)`, positive, the weight a dropped token gets in the package.
    """

    logits: Tensor
    keep_probability: Tensor


class Reducer(nn.Module):
    """Makes tokens fewer.

    Attributes:
        reads: What it looks at besides the tokens: the attention of the block before, or nothing.
        learned: Whether it has parameters, which are trained by sampled decisions.
        adaptive: Whether images keep different numbers of tokens by its own decisions.
        packages: What becomes of dropped tokens where the settings do not say.
    """

    reads: ClassVar[Literal["tokens", "attention"]] = "tokens"
    learned: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    packages: ClassVar[Packages] = "none"

    @classmethod
    def build(cls, dim: int, settings: TokenPruningConfig, stage: int, *, start_keep_ratio: float) -> "Reducer":
        """Return a reducer.

        Args:
            dim: Token width.
            settings: Of the model.
            stage: Number of its stage.
            start_keep_ratio: Fraction of the tokens it sees that it shall keep.
        """
        return cls()

    @abstractmethod
    def reduce(self, view: View, rule: Rule) -> Reduced:
        """Return the tokens that are left."""


class Selector(Reducer):
    """Keeps some tokens as they are and drops the others, by a score of each.

    Attributes:
        keep_threshold: Margin from which on a token is kept where counts are not fixed; a buffer of adaptive methods.
    """

    keep_threshold: Tensor

    @abstractmethod
    def judge(self, view: View) -> TokenScores:
        """Score all candidates."""

    def reduce(self, view: View, rule: Rule) -> Reduced:
        """Score, decide, package what is dropped and, where allowed, take it out of the sequence."""
        tokens, num_slots = view.tokens, view.tokens.alive.shape[1]
        scores = self.judge(view)
        logits = scores.logits[:, :num_slots]
        margin = logits[..., 0] - logits[..., 1]
        order = None
        if rule.noise is not None:
            # Drawn for the grid, so that decisions do not depend on whether dropped tokens have left.
            noise = rule.noise.gather(1, tokens.grid_index().unsqueeze(-1).expand(-1, -1, 2))
            decision = sample_keep(logits, noise)
        elif rule.fixed:
            decision, order = top_keep(margin, tokens.alive, min(rule.num_keep, num_slots))
        else:
            decision = threshold_keep(logits, self.keep_threshold)
        kept = replace(tokens, alive=tokens.alive * decision, all_alive=False)
        packages, alive = package_dropped(
            view.candidates, tokens, kept.alive, scores.keep_probability, packages=rule.packages
        )
        kept = replace(kept, packages_alive=alive)
        patches = view.patches
        if rule.removes and order is not None:
            patches, kept = taken(patches, kept, order)
            kept = replace(kept, all_alive=tokens.all_alive and (rule.num_keep < num_slots or not alive.shape[1]))
        elif rule.removes:
            patches, kept = compact(patches, kept)
        return Reduced(patches, packages.to(patches.dtype), kept, margin)


class Merger(Reducer):
    """Puts tokens together until a given number is left, the same for every image.

    Attributes:
        most: The largest share of the tokens it sees that one merge can take away.
    """

    reads: ClassVar[Literal["tokens", "attention"]] = "attention"
    most: ClassVar[float] = 0.5

    @abstractmethod
    def merge(self, view: View, num_keep: int) -> tuple[Tensor, TokenSet]:
        """Return `(B, num_keep, C)` and its state, with sizes and sources."""

    def reduce(self, view: View, rule: Rule) -> Reduced:
        """Merge, unless there are few enough already."""
        tokens, num_slots = view.tokens, view.tokens.alive.shape[1]
        if not rule.removes:
            raise UnsupportedModelError(
                "merged tokens cannot be masked: leave `runtime` at 'auto' for a model whose tokens are merged"
            )
        if num_slots - rule.num_keep > self.most * num_slots:
            raise UnsupportedModelError(
                f"one merge takes away {self.most:.0%} of the tokens at most, but {rule.num_keep} of {num_slots} are "
                f"to be left; give more stages (`before_blocks`) with `keep_ratios` that fall more slowly"
            )
        margin = torch.zeros_like(tokens.alive)
        if num_slots <= rule.num_keep:
            return Reduced(view.patches, view.candidates[:, num_slots:], tokens, margin)
        patches, tokens = self.merge(view, rule.num_keep)
        return Reduced(patches, view.candidates[:, num_slots:], tokens, margin)
