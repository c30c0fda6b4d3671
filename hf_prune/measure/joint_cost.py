"""What a model costs when tokens leave between its blocks and its widths are cut: one cost for both.

Whatever runs inside a block costs a factor of what it did, by how many tokens reach the block. In MACs the factor is
exact (linear layers go with the number of tokens, attention with its square); in milliseconds it is what one dense
block was measured to take on so many tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from hf_prune.allocate.costs import SumOfTerms, tagged_macs
from hf_prune.analyse.axes import Expr, leaves, resolve, size_of
from hf_prune.analyse.graph import AxisGraph
from hf_prune.analyse.rules.base import SPACE
from hf_prune.measure.latency_table import LatencyTable
from hf_prune.measure.token_cost import TokenCost
from hf_prune.measure.token_table import TokenTable
from hf_prune.tokens.attach import add_token_pruning
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.reducers.base import Merger
from hf_prune.tokens.reducers.registry import reducer_class
from hf_prune.tokens.site import find_site

# The cost by the sizes of axes under token settings; None keeps all tokens.
JointCost = Callable[[TokenPruningConfig | None], SumOfTerms]


@dataclass(frozen=True)
class TokenGrid:
    """How many tokens there are, and where.

    Attributes:
        block_paths: Path of every block.
        reader_path: Path of what reads all tokens behind the last block; None where nothing does.
        num_prefix_tokens: Tokens in front of the patches.
        num_patches: Patches of the image.
    """

    block_paths: tuple[str, ...]
    reader_path: str | None
    num_prefix_tokens: int
    num_patches: int

    @classmethod
    def of(cls, model: nn.Module, graph: AxisGraph) -> "TokenGrid":
        """Find the tokens of an analysed model.

        Raises:
            UnsupportedModelError: If token pruning does not know the model, or it has several grids.
        """
        site, paths = find_site(model), {id(module): path for path, module in model.named_modules()}
        blocks = tuple(paths[id(block)] for block in site.blocks.children())
        reader = None if site.token_reader is None else paths[id(site.token_reader)]
        recording = graph.recording
        length = next(
            size_of(dim)
            for module, dims in zip(recording.macs_modules, recording.macs, strict=True)
            for dim in dims
            if is_inside(module, blocks[0]) and counts_tokens(dim)
        )
        return cls(blocks, reader, site.num_prefix_tokens, length - site.num_prefix_tokens)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.block_paths)

    @property
    def length(self) -> int:
        """Tokens of the dense sequence."""
        return self.num_prefix_tokens + self.num_patches

    def place_of(self, module: str) -> int | None:
        """Return the number of the block that a module lies in, the number of blocks for the reader, None elsewhere."""
        if self.reader_path is not None and is_inside(module, self.reader_path):
            return self.depth
        return next((number for number, path in enumerate(self.block_paths) if is_inside(module, path)), None)

    def num_kept(self, tokens: TokenPruningConfig) -> list[int]:
        """Return the patches alive after each reduction, where counts are fixed."""
        return [max(round(ratio * self.num_patches), 1) for ratio in tokens.keep_ratios]

    def lengths(self, tokens: TokenPruningConfig) -> list[int]:
        """Return the sequence length at every block, and behind the last, where counts are fixed."""
        after = dict(zip(tokens.before_blocks, enumerate(self.num_kept(tokens), start=1), strict=True))
        found, length = [], self.length
        for block in range(self.depth):
            if block in after:
                stage, num_keep = after[block]
                num_packages = {"single": 1, "per_stage": stage, "none": 0}[str(tokens.packages)]
                length = self.num_prefix_tokens + num_keep + num_packages
            found.append(length)
        # Merged tokens are repeated behind the final norm, so that whatever pools them counts them right.
        return [*found, self.length if issubclass(reducer_class(tokens.method), Merger) else length]

    def reducing(self, tokens: TokenPruningConfig, parts: TokenCost) -> float:
        """Return what all reductions cost, by what each of them sees."""
        lengths = [self.length, *self.lengths(tokens)]
        return sum(_at(parts.selector, lengths[block]) for block in tokens.before_blocks)


def is_inside(module: str, path: str) -> bool:
    """Return whether a module is another one or lies in it."""
    return module == path or module.startswith(f"{path}.")


def counts_tokens(dim: Expr) -> bool:
    """Return whether a dimension runs along the positions of the image."""
    return any(leaf.reason == SPACE for leaf in leaves(resolve(dim)))


def with_tokens(model: nn.Module, tokens: TokenPruningConfig | None) -> nn.Module:
    """Give a model fresh reducers that keep as many tokens in every image, in place, for inference; return it.

    Learned ones know nothing yet: so many tokens are left, but not the right ones.
    """
    if tokens is not None:
        add_token_pruning(model, tokens).runtime = "topk"
    return model.eval()


def joint_macs(model: nn.Module, graph: AxisGraph, parts: TokenCost) -> JointCost:
    """Return MACs of an image by tokens and sizes.

    Args:
        model: Dense.
        graph: Its analysis.
        parts: See `measure.token_cost.macs_cost`, of which what reducers cost is taken: exact where they read tokens
            alone; what they read of the attention of heads is counted as if none had gone.
    """
    grid = TokenGrid.of(model, graph)

    def tag_of(module: str, dims: Sequence[Expr]) -> tuple[int | None, int]:
        return grid.place_of(module), sum(map(counts_tokens, dims))

    whole = tagged_macs(graph, tag_of)

    @cache
    def cost(tokens: TokenPruningConfig | None) -> SumOfTerms:
        if tokens is None:
            return whole
        lengths = grid.lengths(tokens)

        def factor_of(tag: tuple[int | None, int]) -> float:
            place, degree = tag
            return 1.0 if place is None else (lengths[place] / grid.length) ** degree

        return whole.scaled(factor_of, grid.reducing(tokens, parts))

    return cost


def joint_latency(model: nn.Module, graph: AxisGraph, table: LatencyTable, token_table: TokenTable) -> JointCost:
    """Return milliseconds of a batch by tokens and sizes, from both tables of one model.

    Args:
        model: Dense.
        graph: Its analysis.
        table: Of its operators.
        token_table: Of its blocks and reducers, on the same device; what drifted since is divided out.
    """
    grid, parts = TokenGrid.of(model, graph), token_table.cost()
    whole, drift = table.cost(graph, grid.place_of), table.dense.whole_ms / token_table.dense_ms

    @cache
    def cost(tokens: TokenPruningConfig | None) -> SumOfTerms:
        if tokens is None:
            return whole
        lengths = grid.lengths(tokens)[: grid.depth]
        factors = [_at(parts.block, length) / _at(parts.block, grid.length) for length in lengths]

        def factor_of(place: int | None) -> float:
            return 1.0 if place is None or place == grid.depth else factors[place]

        return whole.scaled(factor_of, drift * grid.reducing(tokens, parts))

    return cost


def _at(curve: Tensor, length: int) -> float:
    """Return a cost at a sequence length; several packages may make one longer than any that was measured."""
    return float(curve[min(length, len(curve) - 1)])


@dataclass(frozen=True)
class CostOfTokens:
    """The cost of a model whose widths are settled, by its tokens alone; a `tokens.schedule.CostOfKept`.

    Attributes:
        cost: By tokens and sizes.
        tokens: Settings whose keep ratios are left open.
        sizes: Of the axes that were cut.
        num_patches: Patches of the image.
    """

    cost: JointCost
    tokens: TokenPruningConfig
    sizes: dict[str, int]
    num_patches: int

    @property
    def dense(self) -> float:
        """Cost with all tokens and all widths."""
        return self.cost(None)({})

    def of_kept(self, kept: Tensor, before_blocks: Sequence[int]) -> Tensor:
        """Return the cost `(...)` of images that keep `kept` `(..., stages)` patches after each selector."""
        rows = (kept.reshape(-1, kept.shape[-1]) / self.num_patches).clamp(1e-9, 1.0).tolist()
        settings = [replace(self.tokens, before_blocks=tuple(before_blocks), keep_ratios=tuple(row)) for row in rows]
        costs = [self.cost(tokens)(self.sizes) for tokens in settings]
        return torch.tensor(costs, dtype=torch.float64).reshape(kept.shape[:-1])
