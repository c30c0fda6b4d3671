"""Two-speed feed-forward networks: the grid stays whole, and tokens of little interest take one linear layer.

For window transformers, whose attention and patch merging need every token in its place. Letters: B images, N tokens
of a stage's grid, C channels, L rows of all images that take the whole FFN.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from hf_prune.errors import HfPruneError, ManifestError, UnsupportedModelError
from hf_prune.tokens.reducers.base import StageRecord
from hf_prune.tokens.reducers.decide import GumbelNoise, sample_keep, top_keep
from hf_prune.tokens.reducers.dynamicvit import TokenPredictor
from hf_prune.tokens.two_speed_config import TwoSpeedConfig
from hf_prune.tokens.two_speed_site import WindowSite, find_window_site

ATTRIBUTE = "two_speed"


class Rows(NamedTuple):
    """Which rows of a batch `(B * N, C)` take which FFN.

    Attributes:
        whole: `(L,)`.
        cheap: `(B * N - L,)`.
    """

    whole: Tensor
    cheap: Tensor


class Decision(NamedTuple):
    """What one selector decided.

    Attributes:
        keep: `(B, N)`, 1 for tokens that take the whole FFN.
        is_mixed: Whether both FFNs run on every token and are mixed by `keep`, which has a gradient then.
        rows: Who is gathered where that is not so; None where all take the whole FFN.
    """

    keep: Tensor
    is_mixed: bool
    rows: Rows | None


@dataclass
class ForwardState:
    """State of the latest forward pass; copies of a model start without one.

    `decisions` stay when records are taken: gradient checkpointing runs blocks again.
    """

    decisions: dict[int, Decision] = field(default_factory=dict)
    records: dict[int, StageRecord] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def __reduce__(self) -> tuple:
        return type(self), ()


class TwoSpeed(nn.Module):
    """The selectors and cheap FFNs of a model, registered on it as `two_speed`.

    A cheap FFN is a linear layer on what the FFN reads, which in Swin is the block's own layer norm. In training both
    FFNs run on every token and are mixed by the hard decision, so that decisions, selectors and cheap FFNs have
    gradients. In evaluation every image sends as many tokens, those with the highest scores, through the whole FFN,
    as one `(L, C)` matrix, and the others through the cheap one; attention always sees all of them.

    With gradient checkpointing there must be one forward pass to each backward pass.

    Source: the fast path of hierarchical models in Rao et al., Dynamic Spatial Sparsification for Efficient Vision
    Transformers and Convolutional Neural Networks, T-PAMI 2023, arXiv 2207.01580. Differs from it by sharing the
    block's layer norm.

    Attributes:
        settings: Where selectors sit and what they keep.
        selectors: One predictor for every entry of `settings.before_blocks`, under the block's number.
        cheap: The cheap FFN of every two-speed block, under the block's number. They start at zero: such a token
            passes by the FFN as it is; `fit_two_speed` fits them to images.
        noise: Source of Gumbel noise while training; None takes the highest scores as evaluation does.
    """

    def __init__(self, settings: TwoSpeedConfig, site: WindowSite) -> None:
        super().__init__()
        _require_fit(settings, site)
        self.settings = settings
        self.noise: GumbelNoise | None = GumbelNoise(seed=0)
        self.state = ForwardState()
        self.selectors, self.cheap = nn.ModuleDict(), nn.ModuleDict()
        self._earlier: dict[int, int | None] = {}
        for stage, block in enumerate(self.before_blocks):
            grid = site.stage_of(block)
            others = [other for other in self.before_blocks if other in grid]
            self._earlier[block] = max((other for other in others if other < block), default=None)
            self.selectors[str(block)] = self._selector(stage, site.blocks[block].dim)
            for number in range(block, min((other for other in others if other > block), default=grid.stop)):
                self.cheap[str(number)] = _silent(site.blocks[number].dim, site.blocks[number].out_dim)

    @property
    def before_blocks(self) -> tuple[int, ...]:
        """Blocks with a selector before them."""
        return cast(tuple[int, ...], self.settings.before_blocks)

    def decided_by(self, block: int) -> int:
        """Return the block whose selector decides for a two-speed block."""
        return max(other for other in self.before_blocks if other <= block)

    def _selector(self, stage: int, dim: int) -> TokenPredictor:
        before = self._earlier[self.before_blocks[stage]]
        share = 1.0 if before is None else self.settings.keep_ratios[self.before_blocks.index(before)]
        start = self.settings.keep_ratios[stage] / share
        return TokenPredictor.build(dim, self.settings.predictors(), stage, start_keep_ratio=start)

    def take_records(self) -> list[StageRecord]:
        """Return the decisions of the last forward pass, first selector first, and forget them.

        Raises:
            HfPruneError: If there was no forward pass, or its decisions lost their gradient.
        """
        records = [self.state.records.pop(block) for block in sorted(self.state.records)]
        if not records:
            raise HfPruneError("there are no decisions to take: run the model once before")
        if self.training and torch.is_grad_enabled() and any(not record.keep.requires_grad for record in records):
            raise HfPruneError(
                "keep decisions must carry a gradient while training, but some do not; if gradient "
                "checkpointing is on, use its non-reentrant form (`use_reentrant=False`)"
            )
        return records

    def decide(self, block: int, _module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of a block with a selector: score its tokens `(B, ..., C)` and note the decision."""
        tokens, earlier = args[0].flatten(1, -2), self._earlier[block]
        if earlier is None:
            alive = torch.ones(tokens.shape[:2], device=tokens.device)
        else:
            alive = self.state.decisions[earlier].keep
        logits = self.selectors[str(block)](tokens, alive).logits
        keep, order = self._keep(block, logits, alive)
        self.state.decisions[block] = Decision(keep, self.training, None if order is None else _rows(keep, order))
        self.state.records[block] = StageRecord(block, keep, logits[..., 0] - logits[..., 1], alive)

    def _keep(self, block: int, logits: Tensor, alive: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the decision `(B, N)` for logits `(B, N, 2)` and, where rows are to be gathered, who is kept."""
        num_images, num_tokens = alive.shape
        if self.training and self.noise is not None:
            noise = self.noise.draw(num_images, num_tokens, block, alive.device)
            return alive * sample_keep(logits, noise), None
        num_keep = max(round(self.settings.keep_ratios[self.before_blocks.index(block)] * num_tokens), 1)
        keep, order = top_keep(logits[..., 0] - logits[..., 1], alive.detach(), num_keep)
        if not self.training:
            return keep, order if num_keep < num_tokens else None
        probability = logits.softmax(-1)[..., 0]
        return alive * ((probability - probability.detach()) + keep), None

    def enter(self, block: int, _module: nn.Module, args: tuple) -> tuple[Tensor] | None:
        """Forward pre-hook where an FFN begins: of `(B, N, C)`, only the rows `(L, C)` that take it whole go in."""
        decision = self.state.decisions[self.decided_by(block)]
        if decision.is_mixed or decision.rows is not None:
            self.state.inputs[block] = args[0]
        return None if decision.rows is None else (args[0].flatten(0, -2).index_select(0, decision.rows.whole),)

    def leave(self, block: int, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        """Forward hook where an FFN ends: give every token of `(B, N, C)` what its own FFN says."""
        decision = self.state.decisions[self.decided_by(block)]
        if not decision.is_mixed and decision.rows is None:
            return output
        x, cheap = self.state.inputs.pop(block), self.cheap[str(block)]
        if decision.rows is None:
            keep = decision.keep.to(output.dtype).unsqueeze(-1)
            return keep * output + (1 - keep) * cheap(x)
        rows = x.flatten(0, -2)
        together = output.new_empty(rows.shape[0], output.shape[-1])
        together.index_copy_(0, decision.rows.whole, output)
        together.index_copy_(0, decision.rows.cheap, cheap(rows.index_select(0, decision.rows.cheap)).to(output.dtype))
        return together.view(*x.shape[:-1], -1)


def add_two_speed(model: nn.Module, settings: TwoSpeedConfig) -> TwoSpeed:
    """Give the FFNs of a hierarchical window transformer a second, cheap speed, in place.

    The model keeps its class and every key of its checkpoint; what is new appears as `two_speed.*` on the module that
    runs the blocks. While all tokens are kept, its answers are those of the dense model.

    Args:
        model: See `two_speed_site.SUPPORTED`.
        settings: What to add.

    Returns:
        The new module, also reachable through `two_speed_of(model)`.

    Raises:
        UnsupportedModelError: If the model is of another kind or has two speeds already.
        ManifestError: If a selector would sit behind the last block, keep ratios grow within a stage, or there are not
            as many as selectors.
    """
    site = find_window_site(model)
    if hasattr(site.owner, ATTRIBUTE):
        raise UnsupportedModelError("the model must be dense or cut, but its FFNs have two speeds already")
    if settings.before_blocks is None:
        settings = replace(settings, before_blocks=site.firsts[1:])
    two_speed = TwoSpeed(settings, site)
    parameter = next(site.blocks[0].block.parameters())
    two_speed.to(parameter.device, parameter.dtype).train(model.training)
    site.owner.add_module(ATTRIBUTE, two_speed)
    for number, place in enumerate(site.blocks):
        if str(number) in two_speed.selectors:
            place.block.register_forward_pre_hook(partial(two_speed.decide, number))
        if str(number) in two_speed.cheap:
            place.entry.register_forward_pre_hook(partial(two_speed.enter, number))
            place.exit.register_forward_hook(partial(two_speed.leave, number))
    return two_speed


def two_speed_of(model: nn.Module) -> TwoSpeed:
    """Return the selectors and cheap FFNs of a model.

    Raises:
        UnsupportedModelError: If it has none.
    """
    found = [module for module in model.modules() if isinstance(module, TwoSpeed)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"the FFNs of the model must have two speeds, but {type(model).__name__} holds {len(found)} sets of "
            f"selectors for that; add them with `add_two_speed`"
        )
    return found[0]


def _require_fit(settings: TwoSpeedConfig, site: WindowSite) -> None:
    """Check that a model has the places that the settings name."""
    blocks = cast(tuple[int, ...], settings.before_blocks)
    if blocks[-1] >= len(site.blocks):
        raise ManifestError(f"selectors must sit before blocks 0 to {len(site.blocks) - 1} of this model, got {blocks}")
    for (one, high), (other, low) in pairwise(zip(blocks, settings.keep_ratios, strict=True)):
        if other in site.stage_of(one) and low > high:
            raise ManifestError(
                f"`keep_ratios` must not grow within a stage (a token on the cheap side stays there until patches are "
                f"merged), got {high} before block {one} and {low} before block {other}"
            )


def _silent(dim: int, out_dim: int) -> nn.Linear:
    """Return a linear layer that says zero."""
    layer = nn.Linear(dim, out_dim)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _rows(keep: Tensor, order: Tensor) -> Rows:
    """Return who goes where, for decisions `(B, N)` that keep as many in every image, `order` `(B, K)`."""
    num_images, num_tokens = keep.shape
    others = (1 - keep).topk(num_tokens - order.shape[1], dim=1, sorted=False).indices
    starts = num_tokens * torch.arange(num_images, device=keep.device).unsqueeze(1)
    return Rows((order + starts).flatten(), (others + starts).flatten())
