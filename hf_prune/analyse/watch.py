"""Watch the calls by which a model's forward gives tensors new shapes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SHAPING = {Tensor.view, Tensor.reshape, Tensor.expand, torch.reshape}
SPLITTING = {Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes}
WATCHED = SHAPING | SPLITTING


def sizes_given(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[int] | None:
    """Return the sizes a call was given, or None if it was given something else (a dtype, one size for all parts)."""
    if func in SPLITTING:
        sizes = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_sizes"))
        sizes = tuple(sizes) if isinstance(sizes, tuple | list) else ()
    else:
        sizes = args[1:] if len(args) > 1 else tuple(kwargs.get("shape", kwargs.get("size", ())))
        if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
            sizes = tuple(sizes[0])
    return list(sizes) if sizes and all(isinstance(size, int) for size in sizes) else None


def split_dim(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Return along which dimension a call splits; 0 for calls that do not."""
    return int(args[2] if len(args) > 2 else kwargs.get("dim", 0)) if func in SPLITTING else 0


class Watch(TorchFunctionMode):
    """Calls back before and after every call that gives a new shape.

    Also gives linear layers contiguous inputs: for others torch runs different operations, and whether an input
    is contiguous can depend on sizes.
    """

    def __init__(self, before: Callable[[list[int] | None], None], after: Callable[[Any, int], None]) -> None:
        super().__init__()
        self.before, self.after = before, after

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and args:
            args = (args[0].contiguous(), *args[1:])
        if func not in WATCHED:
            return func(*args, **kwargs)
        self.before(sizes_given(func, args, kwargs))
        out = func(*args, **kwargs)
        self.after(out, split_dim(func, args, kwargs))
        return out
