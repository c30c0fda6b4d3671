"""A model's own blocks, between which tokens become fewer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.errors import UnsupportedModelError
from hf_prune.tokens.attention import WatchAttention
from hf_prune.tokens.packing import run_packed
from hf_prune.tokens.pruning import ForwardRun, TokenPruning
from hf_prune.tokens.rope import rope_of_kept, rope_of_packed
from hf_prune.tokens.tokenset import TokenSet


class BlockStep:
    """One block as the model's own loop sees it: callable like the block, attributes are the block's.

    Args:
        index: Number of the block over all stacks of the model.
        block: The model's own.
        run: State of this forward pass.
        pruning: What makes tokens fewer.
        is_last: Whether no block of the stack follows.
    """

    def __init__(self, index: int, block: nn.Module, run: ForwardRun, pruning: TokenPruning, *, is_last: bool) -> None:
        self.index, self.block, self.run, self.pruning = index, block, run, pruning
        self.is_last = is_last

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block on the tokens still in play."""
        pruning, run, whole = self.pruning, self.run, x
        tokens = run.tokens.get(self.index)
        if tokens is None:
            num_patches = x.shape[1] - pruning.num_prefix_tokens
            tokens = TokenSet.all_patches(x.shape[0], num_patches, x.device)
        elif pruning.keeps_grid:
            x = self._off_grid(x, tokens)
        if str(self.index) in pruning.selectors:
            x = x if run.packing is None else run.packing.unpack(x)
            x, tokens = pruning.reduce(self.index, x, tokens, run)
        run.tokens[self.index + 1] = tokens
        if tokens.is_whole:
            return self._watched(tokens, lambda: self.block(x, *args, **kwargs))
        if pruning.keeps_grid:
            pruning.off_grid[self.index] = (run, tokens, whole)
        return self._run(x, tokens, args, kwargs)

    def _run(self, x: Tensor, tokens: TokenSet, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the block on a sequence that is not the dense one."""
        name = self.pruning.mask_argument
        given = args[0] if args else kwargs.get(name)
        if torch.compiler.is_compiling():
            given = None  # transformers writes out a mask that hides nothing when it is traced
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
            return self._watched(tokens, lambda: self.block(x, **kwargs))
        if rope is not None:
            kwargs["rope"] = rope_of_packed(kwargs["rope"], packing, self.pruning.num_prefix_tokens)
        x = run_packed(self.block, x, packing, **{**kwargs, name: None})
        return packing.unpack(x) if self.is_last and not self.pruning.keeps_grid else x

    def _watched(self, tokens: TokenSet, call: Callable[[], Any]) -> Any:
        """Run the block, and note its attention where the next reducer reads it."""
        if not self.pruning.watches(self.index):
            return call()
        num_prefix = self.pruning.num_prefix_tokens
        watch = WatchAttention(has_class_token=num_prefix > 0)  # not `with ... as`, which torch.compile gets wrong
        with watch:
            output = call()
        self.run.attention[self.index + 1] = watch.seen(
            self.block, None if tokens.all_alive else tokens.policy(num_prefix)
        )
        return output

    def _off_grid(self, whole: Tensor, tokens: TokenSet) -> Tensor:
        """Take the tokens in play, `(B, T, C)`, off a full grid `(B, prefix + N, C)`."""
        packages = self.run.packages.get(self.index)
        num_prefix = self.pruning.num_prefix_tokens
        prefix, patches = whole[:, :num_prefix], whole[:, num_prefix:]
        if tokens.index is not None:
            patches = patches.gather(1, tokens.index.unsqueeze(-1).expand(-1, -1, whole.shape[-1]))
        x = torch.cat([prefix, patches] if packages is None else [prefix, patches, packages], dim=1)
        return x if self.run.packing is None else self.run.packing.pack(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class TokenBlocks(nn.ModuleList):
    """The model's own blocks under their own names; iterating them runs the reducers in between.

    A `ModuleList` although timm uses a `Sequential`: timm's activation checkpointing walks the
    children of a `Sequential` and would pass the reducers by.
    """

    pruning: TokenPruning
    # The inherited one iterates over the list, which here starts a forward pass.
    __repr__ = nn.Module.__repr__

    def __init__(self, blocks: list[nn.Module], pruning: TokenPruning, first: int = 0) -> None:
        super().__init__(blocks)
        # Not a child: its parameters belong to the module that owns the blocks.
        self.__dict__["pruning"] = pruning
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        run = self.pruning.start(self.first)
        for index, block in enumerate(self._modules.values()):
            assert block is not None
            yield BlockStep(self.first + index, block, run, self.pruning, is_last=index == len(self) - 1)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and index.indices(len(self))[::2] == (0, 1):
            return TokenBlocks(list(self._modules.values())[index], self.pruning, self.first)  # type: ignore[arg-type]
        return super().__getitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks, as a `Sequential` does."""
        for step in self:
            x = step(x)
        return x
