"""Token pruning inside a model that stays what it is: same class, same checkpoint keys, selectors beside them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_prune.errors import HfPruneError, ManifestError, UnsupportedModelError
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.decide import GumbelNoise, sample_keep, threshold_keep
from hf_prune.tokens.package import package_dropped
from hf_prune.tokens.packing import Packing, run_packed
from hf_prune.tokens.rope import rope_of_kept, rope_of_packed
from hf_prune.tokens.selector import SoftTokenSelector
from hf_prune.tokens.site import TokenSite, find_site
from hf_prune.tokens.tokenset import TokenSet, compact, fill_dropped, hide_keys

ATTRIBUTE = "token_pruning"
Runtime = Literal["auto", "masked", "gathered", "packed"]


@dataclass
class StageRecord:
    """What one selector decided in the last forward pass.

    Attributes:
        before_block: The block it sits before.
        keep: `(B, N)` patches of the grid alive after it, 0 or 1, differentiable while training.
        margin: `(B, n)` logit(keep) - logit(drop) of the candidate patches, before the decision.
        candidates: `(B, n)` which of those slots were alive before the decision.
    """

    before_block: int
    keep: Tensor
    margin: Tensor
    candidates: Tensor


@dataclass
class ForwardRun:
    """The state of one forward pass; entry i of `tokens` holds before block i.

    `packing` says whose tokens are whose while the batch travels as one sequence.
    Steps only read the entry before them and write the one after, so a block may be run again
    (gradient checkpointing) and finds what it found the first time.
    """

    tokens: dict[int, TokenSet] = field(default_factory=dict)
    packing: Packing | None = None
    records: dict[int, StageRecord] = field(default_factory=dict)

    @property
    def latest(self) -> TokenSet:
        """The state after the last block that ran."""
        return self.tokens[max(self.tokens)]


class TokenPruning(nn.Module):
    """The selectors of a model and the rules by which its blocks see fewer tokens.

    Registered on the model as `token_pruning`. In training mode dropped tokens are hidden from the others by
    attention masking and nothing is removed; in evaluation mode they are removed, each image's own number.

    Attributes:
        settings: What the selectors are and where they sit.
        selectors: One per entry of `settings.before_blocks`, under the block's index.
        runtime: `"auto"` masks in training and removes in evaluation. To force one: `"masked"`, `"gathered"` (removed,
            the batch padded to its longest image), `"packed"` (removed, no padding). All give the same logits.
        noise: Source of Gumbel noise while training; None makes even training decisions deterministic.
        last_run: Decisions of the most recent forward pass.
    """

    def __init__(self, settings: TokenPruningConfig, site: TokenSite) -> None:
        super().__init__()
        if settings.before_blocks[-1] >= site.depth:
            raise ManifestError(
                f"selectors must sit before blocks 0 to {site.depth - 1} of this model, got {settings.before_blocks}"
            )
        self.settings = settings
        self.num_prefix_tokens, self.pool_with_prefix = site.num_prefix_tokens, site.pool_with_prefix
        self.mask_argument, self.fused_attention = site.mask_argument, site.fused_attention
        self.runtime: Runtime = "auto"
        self.noise: GumbelNoise | None = GumbelNoise(seed=0)
        self.last_run: ForwardRun | None = None
        self.selectors = nn.ModuleDict()
        self._dim = site.dim
        previous = 1.0
        for block, ratio in zip(settings.before_blocks, settings.keep_ratios, strict=True):
            self._add_selector(block, ratio / previous)
            previous = ratio

    def _add_selector(self, block: int, start_keep_probability: float) -> None:
        settings = self.settings
        selector = SoftTokenSelector(
            self._dim, settings.num_heads, share_head_mlp=settings.share_head_mlp, paper_mlp1=settings.paper_mlp1
        )
        selector.start_at_keep_probability(start_keep_probability)
        self.selectors[str(block)] = selector

    def insert_first(self, block: int) -> None:
        """Put one more selector in front of those there are; it starts by keeping nearly everything.

        Raises:
            ManifestError: If it would not come first.
        """
        settings = self.settings
        self.settings = replace(
            settings, before_blocks=(block, *settings.before_blocks), keep_ratios=(1.0, *settings.keep_ratios)
        )
        device = self.selectors[str(settings.before_blocks[0])].keep_threshold.device
        self._add_selector(block, 0.95)
        self.selectors[str(block)].to(device)  # type: ignore[arg-type]

    def keep_selectors(self, before_blocks: tuple[int, ...], keep_ratios: tuple[float, ...]) -> None:
        """Take all selectors out but those before the given blocks, which shall reach these keep ratios.

        Raises:
            ManifestError: If there is no selector before one of the blocks.
        """
        missing = [block for block in before_blocks if str(block) not in self.selectors]
        if missing:
            raise ManifestError(
                f"selectors can be kept where there are some, before blocks {self.settings.before_blocks}, "
                f"got {before_blocks}"
            )
        self.settings = replace(self.settings, before_blocks=before_blocks, keep_ratios=keep_ratios)
        self.selectors = nn.ModuleDict({str(block): self.selectors[str(block)] for block in before_blocks})

    @property
    def _removes(self) -> bool:
        """Whether dropped tokens leave the sequence."""
        return self.runtime in ("gathered", "packed") or (self.runtime == "auto" and not self.training)

    def _packs(self, policy: Tensor) -> bool:
        """Whether a batch of unequal images travels as one sequence."""
        may = self.runtime == "auto" and not self.training and self.fused_attention
        return self.runtime == "packed" or (may and Packing.is_worth_it(policy, self._dim))

    def take_records(self) -> list[StageRecord]:
        """Return the decisions of the last forward pass, first selector first, and forget them.

        Raises:
            HfPruneError: If there was no forward pass, or its decisions lost their gradient.
        """
        run, self.last_run = self.last_run, None
        if run is None:
            raise HfPruneError("there are no decisions to take: run the model once before")
        records = [run.records[block] for block in sorted(run.records)]
        if self.training and torch.is_grad_enabled() and any(not r.keep.requires_grad for r in records):
            raise HfPruneError(
                "keep decisions must carry a gradient while training, but some do not; if gradient "
                "checkpointing is on, use its non-reentrant form (`use_reentrant=False`)"
            )
        return records

    def start(self) -> ForwardRun:
        """Open the record of a new forward pass."""
        self.last_run = ForwardRun()
        return self.last_run

    def enter_block(self, block: int, x: Tensor, run: ForwardRun) -> tuple[Tensor, TokenSet]:
        """Return the tokens block number `block` shall see, and their state.

        Args:
            block: Index of the block about to run.
            x: `(B, T, C)`, output of the block before.
            run: State of this forward pass.
        """
        tokens = run.tokens.get(block)
        if tokens is None:
            tokens = TokenSet.all_patches(len(x), x.shape[1] - self.num_prefix_tokens, x.device)
        if str(block) in self.selectors:
            padded = x if run.packing is None else run.packing.unpack(x)
            x, tokens, run.records[block] = self._select(block, padded, tokens)
            policy = tokens.policy(self.num_prefix_tokens)
            run.packing = Packing.of(policy) if self._packs(policy) else None
            if run.packing is None:
                tokens = replace(tokens, bias=hide_keys(policy, training=self.training, see_self=True))
            else:
                x = run.packing.pack(x)
        run.tokens[block + 1] = tokens
        return x, tokens

    def _select(self, block: int, x: Tensor, tokens: TokenSet) -> tuple[Tensor, TokenSet, StageRecord]:
        """Score, decide, package what is dropped and, where allowed, take it out of the sequence."""
        selector: SoftTokenSelector = self.selectors[str(block)]  # type: ignore[assignment]
        prefix, candidates = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        scores = selector(candidates, tokens.candidates_alive)
        num_slots = tokens.alive.shape[1]
        logits = scores.logits[:, :num_slots]
        if self.training and self.noise is not None:
            decision = sample_keep(logits, self.noise.draw(logits, stage=block))
        else:
            decision = threshold_keep(logits, selector.keep_threshold)
        kept = replace(tokens, alive=tokens.alive * decision)
        packages, packages_alive = package_dropped(
            candidates,
            tokens,
            kept.alive,
            scores.keep_probability,
            per_stage=self.settings.packages == "per_stage",
        )
        kept = replace(kept, packages_alive=packages_alive)
        record = StageRecord(block, kept.grid_mask(), logits[..., 0] - logits[..., 1], tokens.alive)
        patches = candidates[:, :num_slots]
        if self._removes:
            patches, kept = compact(patches, kept)
        return torch.cat([prefix, patches, packages.to(x.dtype)], dim=1), kept, record

    def fill_after_norm(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """Forward hook of the final norm: see `fill_dropped`."""
        tokens = self._latest_tokens()
        if tokens is None:
            return output
        return fill_dropped(output, tokens, self.num_prefix_tokens, with_prefix=self.pool_with_prefix)

    def mask_pool(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of an attention pooling: it must not read dropped tokens either."""
        tokens = self._latest_tokens()
        if tokens is None:
            return args, kwargs
        policy = tokens.policy(self.num_prefix_tokens)[:, -args[0].shape[1] :]
        bias = hide_keys(policy, training=self.training)
        return args, kwargs if bias is None else {**kwargs, "attn_mask": bias.to(args[0].dtype)}

    def _latest_tokens(self) -> TokenSet | None:
        """The state the last forward pass has reached, or None while no selector has run."""
        tokens = self.last_run.latest if self.last_run and self.last_run.tokens else None
        return tokens if tokens is not None and tokens.packages_alive.shape[1] else None


class BlockStep:
    """One block as the model's own loop sees it: callable like the block, attributes are the block's."""

    def __init__(self, index: int, block: nn.Module, run: ForwardRun, pruning: TokenPruning, *, is_last: bool) -> None:
        self.index, self.block, self.run, self.pruning = index, block, run, pruning
        self.is_last = is_last

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block on the tokens still in play."""
        x, tokens = self.pruning.enter_block(self.index, x, self.run)
        if tokens.packages_alive.shape[1] == 0:
            return self.block(x, *args, **kwargs)
        name = self.pruning.mask_argument
        given = args[0] if args else kwargs.get(name)
        if given is not None or len(args) > 1:
            raise UnsupportedModelError(
                f"a token-pruned model cannot take an attention mask of its own, got one of type "
                f"{type(given).__name__} at block {self.index}; leave it out"
            )
        packing, rope = self.run.packing, kwargs.get("rope")
        if rope is not None:
            kwargs["rope"] = rope_of_kept(rope, tokens)
        if packing is None:
            kwargs[name] = None if tokens.bias is None else tokens.bias.to(x.dtype)
            return self.block(x, **kwargs)
        if rope is not None:
            kwargs["rope"] = rope_of_packed(kwargs["rope"], packing, self.pruning.num_prefix_tokens)
        x = run_packed(self.block, x, packing, **{**kwargs, name: None})
        return packing.unpack(x) if self.is_last else x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class TokenBlocks(nn.ModuleList):
    """The model's own blocks under their own names; iterating them runs the selectors in between.

    A `ModuleList` although timm uses a `Sequential`: timm's activation checkpointing walks the
    children of a `Sequential` and would pass the selectors by.
    """

    pruning: TokenPruning
    # The inherited one iterates over the list, which here starts a forward pass.
    __repr__ = nn.Module.__repr__

    def __init__(self, blocks: list[nn.Module], pruning: TokenPruning) -> None:
        super().__init__(blocks)
        # Not a child: its parameters belong to the module that owns the blocks.
        self.__dict__["pruning"] = pruning

    def __iter__(self) -> Iterator[Any]:
        run = self.pruning.start()
        for index, block in enumerate(self._modules.values()):
            yield BlockStep(index, block, run, self.pruning, is_last=index == len(self) - 1)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and index.indices(len(self))[::2] == (0, 1):
            return TokenBlocks(list(self._modules.values())[index], self.pruning)  # type: ignore[arg-type]
        return super().__getitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks, as a `Sequential` does."""
        for step in self:
            x = step(x)
        return x


def add_token_pruning(model: nn.Module, settings: TokenPruningConfig) -> TokenPruning:
    """Put fresh selectors into a plain vision transformer, in place.

    The model keeps its class and every key of its checkpoint; the selectors appear as `token_pruning.*` on
    the module that owns the blocks.

    Args:
        model: See `site.SUPPORTED`.
        settings: What to add.

    Returns:
        The new module, also reachable through `token_pruning_of(model)`.

    Raises:
        UnsupportedModelError: If the model is of another kind or already token-pruned.
        ManifestError: If a selector would sit behind the last block, or the heads do not divide the width.
    """
    site = find_site(model)
    if hasattr(site.owner, ATTRIBUTE):
        raise UnsupportedModelError("the model must not be token-pruned yet, but it already holds selectors")
    parameter = next(site.blocks.parameters())
    pruning = TokenPruning(settings, site).to(parameter.device)
    pruning.train(model.training)
    site.owner.add_module(ATTRIBUTE, pruning)
    setattr(site.parent, site.blocks_name, TokenBlocks(list(site.blocks.children()), pruning))
    site.norm.register_forward_hook(pruning.fill_after_norm)
    if site.pool is not None:
        site.pool.register_forward_pre_hook(pruning.mask_pool, with_kwargs=True)
    return pruning


def token_pruning_of(model: nn.Module) -> TokenPruning:
    """Return the selectors of a token-pruned model.

    Raises:
        UnsupportedModelError: If it has none.
    """
    found = [module for module in model.modules() if isinstance(module, TokenPruning)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"the model must be token-pruned (hold one set of selectors), but {type(model).__name__} holds "
            f"{len(found)}; add them with `add_token_pruning`"
        )
    return found[0]
