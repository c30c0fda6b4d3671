"""Sizes that a model's forward computes for itself, `x.reshape(B, N, C)`, put right from outside.

Where no attribute holds a wrong number there is nothing to set. The narrowest thing left is to correct the number on
its way into torch: which call of `view`, `reshape`, `expand` or `split` in the module's forward, which argument, which
size. That is plain data, so it can be stored with the model and installed again.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from hf_prune.analyse.watch import SPLITTING, WATCHED, sizes_given, split_dim

# module path -> number of the call -> position of the size -> size
Reshapes = dict[str, dict[int, dict[int, int]]]


class _Correct(TorchFunctionMode):
    """Replaces sizes in the calls of one forward pass."""

    def __init__(self, sizes: Mapping[int, Mapping[int, int]]) -> None:
        super().__init__()
        self.sizes, self.number = sizes, -1

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in WATCHED:
            return func(*args, **kwargs)
        self.number += 1
        given = sizes_given(func, args, kwargs)
        if given is None or self.number not in self.sizes:
            return func(*args, **kwargs)
        for position, size in self.sizes[self.number].items():
            if given[position] != -1:
                given[position] = size
        if func in SPLITTING:
            return func(args[0], given, dim=split_dim(func, args, kwargs))
        return func(args[0], tuple(given))


class FixedSizes:
    """The hooks that correct one module's calls."""

    def __init__(self, sizes: Mapping[int, Mapping[int, int]]) -> None:
        self.sizes = {int(call): {int(p): int(size) for p, size in row.items()} for call, row in sizes.items()}
        self.open: list[_Correct] = []

    def enter(self, *_: Any) -> None:
        """Forward pre-hook."""
        mode = _Correct(self.sizes)
        mode.__enter__()
        self.open.append(mode)

    def leave(self, *_: Any) -> None:
        """Forward hook, called after errors too."""
        if self.open:
            self.open.pop().__exit__(None, None, None)


def install(model: nn.Module, reshapes: Reshapes) -> None:
    """Correct calls from now on; corrections for the same module are replaced."""
    modules = dict(model.named_modules())
    for path, sizes in reshapes.items():
        module = modules[path]
        remove(module)
        fixed = FixedSizes(sizes)
        handles = (
            module.register_forward_pre_hook(fixed.enter),
            module.register_forward_hook(fixed.leave, always_call=True),
        )
        module.__dict__["_fixed_sizes"] = (fixed, handles)


def remove(module: nn.Module) -> None:
    """Take the correction of a module off, if it has one."""
    if "_fixed_sizes" in module.__dict__:
        for handle in module.__dict__.pop("_fixed_sizes")[1]:
            handle.remove()
