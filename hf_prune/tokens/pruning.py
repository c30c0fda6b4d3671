"""The reducers of a model, and what a forward pass does with them."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_prune.errors import HfPruneError, ManifestError
from hf_prune.tokens.attention import Attention
from hf_prune.tokens.config import Packages, TokenPruningConfig
from hf_prune.tokens.packing import Packing
from hf_prune.tokens.reducers.base import Reducer, Rule, StageRecord, View
from hf_prune.tokens.reducers.decide import GumbelNoise
from hf_prune.tokens.reducers.registry import reducer_class
from hf_prune.tokens.runtime import Runtime, has_fixed_counts, packs, removes, require_exportable
from hf_prune.tokens.site import TokenSite
from hf_prune.tokens.tokenset import TokenSet, fill_dropped, hide_keys, to_grid


@dataclass
class ForwardRun:
    """The state of one forward pass; entry i of `tokens`, `packages` and `attention` holds before block i.

    `packing` says whose tokens are whose while the batch travels as one sequence.
    Steps only read the entry before them and write the one after, so a block may be run again
    (gradient checkpointing) and finds what it found the first time.
    """

    tokens: dict[int, TokenSet] = field(default_factory=dict)
    packing: Packing | None = None
    packages: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Attention] = field(default_factory=dict)
    records: dict[int, StageRecord] = field(default_factory=dict)

    @property
    def latest(self) -> TokenSet:
        """The state after the last block that ran."""
        return self.tokens[max(self.tokens)]


class TokenPruning(nn.Module):
    """The reducers of a model and the rules by which its blocks see fewer tokens.

    Registered on the model as `token_pruning`. Where decisions are learned, training hides dropped tokens from the
    others by attention masking and removes nothing, unless `removes_in_training`. Otherwise they leave.

    Attributes:
        settings: What the reducers are and where they sit.
        selectors: One reducer per entry of `settings.before_blocks`, under the block's index.
        runtime: See `tokens.runtime`; `"auto"` masks while decisions are learned and removes otherwise.
        removes_in_training: Whether `"auto"` removes while decisions are learned too. What remains gets the gradients
            that masking gives it; a token that was dropped no longer feels what reading it would have been worth.
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
        self.keeps_grid = settings.keep_grid or site.needs_grid
        self.runtime: Runtime = "auto"
        self.removes_in_training = False
        self.noise: GumbelNoise | None = GumbelNoise(seed=0)
        self.last_run: ForwardRun | None = None
        # By block that runs now, where the grid is kept: its run, its tokens, and the grid it came from.
        self.off_grid: dict[int, tuple[ForwardRun, TokenSet, Tensor]] = {}
        self.selectors = nn.ModuleDict()
        self._firsts = [stack.first for stack in site.stacks]
        self._dims = {block: site.stack_of(block).dim for block in range(site.depth)}
        self._require_order()
        self._require_attention()
        for stage in range(len(settings.before_blocks)):
            self._add_reducer(stage)

    def _require_order(self) -> None:
        for first in self._firsts:
            ratios = [self.settings.keep_ratios[stage] for stage in self._stages_of_stack(first)]
            if any(low < high for low, high in pairwise(ratios)):
                raise ManifestError(f"`keep_ratios` must not grow (a dropped token never returns), got {ratios!r}")

    def _require_attention(self) -> None:
        first = [block for block in self.settings.before_blocks if block in self._firsts]
        if first and reducer_class(self.settings.method).reads == "attention":
            raise ManifestError(
                f"'{self.settings.method}' reads the attention of the block before, and there is none before block "
                f"{first[0]} on its grid of tokens; the stages of this model start at blocks {self._firsts}"
            )

    def _add_reducer(self, stage: int) -> None:
        settings, block = self.settings, self.settings.before_blocks[stage]
        earlier = [other for other in self._stages_of_stack(block) if other < stage]
        before = settings.keep_ratios[earlier[-1]] if earlier else 1.0
        kind = reducer_class(settings.method)
        self.selectors[str(block)] = kind.build(
            self._dims[block], settings, stage, start_keep_ratio=settings.keep_ratios[stage] / before
        )

    def _stages_of_stack(self, block: int) -> list[int]:
        """Return the numbers of the stages on the grid that a block runs on: every grid starts whole."""
        first = max(first for first in self._firsts if first <= block)
        following = min((other for other in self._firsts if other > block), default=len(self._dims))
        return [i for i, other in enumerate(self.settings.before_blocks) if first <= other < following]

    def insert_first(self, block: int) -> None:
        """Put one more selector in front of those there are; it starts by keeping nearly everything.

        Raises:
            ManifestError: If it would not come first.
        """
        settings = self.settings
        device = next(self.selectors[str(settings.before_blocks[0])].parameters()).device
        self.settings = replace(
            settings, before_blocks=(block, *settings.before_blocks), keep_ratios=(0.95, *settings.keep_ratios)
        )
        self._add_reducer(0)
        self.settings = replace(self.settings, keep_ratios=(1.0, *settings.keep_ratios))
        self.selectors[str(block)].to(device)

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

    def take_records(self) -> list[StageRecord]:
        """Return the decisions of the last forward pass, first reduction first, and forget them.

        Raises:
            HfPruneError: If there was no forward pass, or its decisions lost their gradient.
        """
        run, self.last_run = self.last_run, None
        if run is None:
            raise HfPruneError("there are no decisions to take: run the model once before")
        records = [run.records[block] for block in sorted(run.records)]
        learns = reducer_class(self.settings.method).learned and self.training and torch.is_grad_enabled()
        if learns and any(not record.keep.requires_grad for record in records):
            raise HfPruneError(
                "keep decisions must carry a gradient while training, but some do not; if gradient "
                "checkpointing is on, use its non-reentrant form (`use_reentrant=False`)"
            )
        return records

    def patches_on_grid(self, sequence: Tensor) -> Tensor:
        """Return `(B, N, C)`: the patches of a sequence `(B, T, C)` behind the last block, zeros where none is left.

        Call before `take_records`. Models whose final norm sees no patches give `(B, 0, C)`.
        """
        assert self.last_run is not None
        tokens, rest = self.last_run.latest, sequence[:, self.num_prefix_tokens :]
        if self.keeps_grid or tokens.source is not None:
            return rest
        shape = (rest.shape[0], tokens.num_patches, rest.shape[-1])
        return to_grid(rest[:, : tokens.alive.shape[1]], tokens, rest.new_zeros(shape))

    def start(self, first_block: int = 0) -> ForwardRun:
        """Open the record of a new forward pass, or of the next grid in the same one."""
        run = ForwardRun()
        if first_block and self.last_run is not None:
            run.records = self.last_run.records
        else:
            self.off_grid.clear()
        self.last_run = run
        return run

    def watches(self, block: int) -> bool:
        """Return whether somebody wants to know the attention of a block."""
        following = str(block + 1)
        return following in self.selectors and cast(Reducer, self.selectors[following]).reads == "attention"

    def reduce(self, block: int, x: Tensor, tokens: TokenSet, run: ForwardRun) -> tuple[Tensor, TokenSet]:
        """Return the tokens that the reducer before a block leaves, and their state; note its decisions.

        Args:
            block: Index of the block about to run, which has a reducer.
            x: `(B, T, C)`: prefix, patches, packages.
            tokens: Their state.
            run: State of this forward pass.
        """
        reducer = cast(Reducer, self.selectors[str(block)])
        prefix, candidates = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        view = View(candidates, tokens, run.attention.get(block), self.num_prefix_tokens)
        reduced = reducer.reduce(view, self._rule(block, reducer, tokens))
        tokens = reduced.tokens
        run.records[block] = StageRecord(block, tokens.grid_mask(), reduced.margin, view.tokens.alive)
        x = torch.cat([prefix, reduced.patches, reduced.packages], dim=1)
        policy = tokens.policy(self.num_prefix_tokens)
        run.packing = None
        if (
            not tokens.all_alive
            and self._removes(reducer)
            and packs(policy, self._dims[block], self.runtime, fused_attention=self.fused_attention)
        ):
            run.packing = Packing.of(policy, training=self.training)
        if run.packing is not None:
            return run.packing.pack(x), tokens
        return x, replace(tokens, bias=self._bias(policy, tokens))

    def _rule(self, block: int, reducer: Reducer, tokens: TokenSet) -> Rule:
        fixed = has_fixed_counts(reducer, self.runtime, training=self.training)
        require_exportable(reducer, self.runtime, fixed=fixed)
        noise = None
        if self.training and self.noise is not None and reducer.learned and not fixed:
            noise = self.noise.draw(tokens.alive.shape[0], tokens.num_patches, block, tokens.alive.device)
        ratio = self.settings.keep_ratios[self.settings.before_blocks.index(block)]
        return Rule(
            num_keep=max(round(ratio * tokens.num_patches), 1),
            fixed=fixed,
            removes=self._removes(reducer),
            noise=noise,
            packages=cast(Packages, self.settings.packages),
        )

    def _removes(self, reducer: Reducer) -> bool:
        return removes(reducer, self.runtime, training=self.training, while_training=self.removes_in_training)

    def _bias(self, policy: Tensor, tokens: TokenSet) -> Tensor | None:
        """Return what blocks add to their attention scores: who is hidden, who counts for several."""
        bias = None if tokens.all_alive else hide_keys(policy, training=self.training, see_self=True)
        logs = tokens.log_sizes(self.num_prefix_tokens) if self.settings.proportional else None
        if bias is None or logs is None:
            return logs if bias is None else bias
        return bias + logs

    def back_on_grid(self, block: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """Forward hook of a block, where the grid is kept: what is not in play keeps the features it had.

        A hook, and the first of the block's, so that whoever else collects outputs of blocks gets whole grids.
        """
        # While training a block may be run again, long after the forward pass.
        state = self.off_grid.get(block) if torch.is_grad_enabled() else self.off_grid.pop(block, None)
        if state is None:
            return output
        run, tokens, whole = state
        output = output if run.packing is None else run.packing.unpack(output)
        num_prefix, num_slots = self.num_prefix_tokens, tokens.alive.shape[1]
        prefix, patches, packages = output.split([num_prefix, num_slots, output.shape[1] - num_prefix - num_slots], 1)
        run.packages[block + 1] = packages
        return torch.cat([prefix, to_grid(patches, tokens, whole[:, num_prefix:])], dim=1)

    def fill_after_norm(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """Forward hook of the final norm: see `fill_dropped`."""
        tokens = self._latest_tokens()
        if tokens is None:
            return output
        return fill_dropped(output, tokens, self.num_prefix_tokens, with_prefix=self.pool_with_prefix)

    def mask_pool(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of an attention pooling: it must not read dropped tokens either."""
        tokens = self._latest_tokens()
        if tokens is None or tokens.all_alive or tokens.source is not None:
            return args, kwargs
        policy = tokens.policy(self.num_prefix_tokens)[:, -args[0].shape[1] :]
        bias = hide_keys(policy, training=self.training)
        return args, kwargs if bias is None else {**kwargs, "attn_mask": bias.to(args[0].dtype)}

    def _latest_tokens(self) -> TokenSet | None:
        """The state the last forward pass has reached, or None while the grid is whole."""
        run = self.last_run
        if run is None or not run.tokens or self.keeps_grid or run.latest.is_whole:
            return None
        return run.latest
