"""Where a window transformer keeps its blocks and their feed-forward networks: read from the model."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_prune.errors import UnsupportedModelError
from hf_prune.tokens.site import tokens_owner

MODEL_TYPES = ("swin", "swinv2")
TIMM_CLASSES = {"SwinTransformer", "SwinTransformerV2"}
SUPPORTED = "Swin and Swin V2 of transformers (classifiers, backbones) and of timm"


@dataclass(frozen=True)
class WindowBlock:
    """One block and its feed-forward network (FFN).

    Attributes:
        block: Takes tokens `(B, N, C)` or `(B, H, W, C)` first.
        entry: Where the FFN begins; takes `(B, N, C)`, or rows `(L, C)` as well.
        exit: Where it ends: the same module, or the last of two.
        dim: Token width at the entry.
        out_dim: Token width at the exit.
    """

    block: nn.Module
    entry: nn.Module
    exit: nn.Module
    dim: int
    out_dim: int


@dataclass(frozen=True)
class WindowSite:
    """What two-speed FFNs need to know of a model.

    Attributes:
        owner: Module that the selectors are registered on.
        stages: Blocks of every grid of tokens; between two stages patches are merged.
    """

    owner: nn.Module
    stages: tuple[tuple[WindowBlock, ...], ...]

    @property
    def firsts(self) -> tuple[int, ...]:
        """Number of every stage's first block, counted over all stages."""
        return tuple(sum(len(stage) for stage in self.stages[:number]) for number in range(len(self.stages)))

    @property
    def blocks(self) -> tuple[WindowBlock, ...]:
        """All blocks in order."""
        return tuple(block for stage in self.stages for block in stage)

    def stage_of(self, block: int) -> range:
        """Return the numbers of the blocks on the grid that a block runs on."""
        first, stage = next(
            pair for pair in reversed([*zip(self.firsts, self.stages, strict=True)]) if pair[0] <= block
        )
        return range(first, first + len(stage))


def find_window_site(model: nn.Module) -> WindowSite:
    """Find the FFNs of a hierarchical window transformer.

    Raises:
        UnsupportedModelError: If the model is of another kind.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    owner: Any = model
    if kind in MODEL_TYPES:
        owner = tokens_owner(model)
        stages = owner.encoder.layers
    elif TIMM_CLASSES & {base.__name__ for base in type(model).__mro__}:
        stages = owner.layers
    else:
        raise UnsupportedModelError(
            f"two-speed FFNs need a hierarchical window transformer ({SUPPORTED}), got "
            f"'{kind or type(model).__name__}' ({type(model).__name__}); plain vision transformers can do without "
            f"tokens altogether: use `add_token_pruning`"
        )
    return WindowSite(owner, tuple(tuple(_window_block(block) for block in stage.blocks) for stage in stages))


def _window_block(block: Any) -> WindowBlock:
    # Older releases of transformers, and its Swin V2, hold the two halves of the FFN apart.
    entry, last = (block.mlp, block.mlp) if hasattr(block, "mlp") else (block.intermediate, block.output)
    linears = [module for part in (entry, last) for module in part.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise UnsupportedModelError(
            f"the FFN of every block must have linear layers that take tokens one by one, but that of "
            f"{type(block).__name__} ({type(entry).__name__}) has none"
        )
    return WindowBlock(block, entry, last, linears[0].in_features, linears[-1].out_features)
