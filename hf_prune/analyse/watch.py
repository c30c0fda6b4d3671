"""Watch the calls by which a model's forward gives tensors new shapes or scales them, and the numbers it gives them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

SHAPING = {Tensor.view, Tensor.reshape, Tensor.expand, torch.reshape}
SPLITTING = {Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes}
SCALING = {Tensor.mul, Tensor.div, Tensor.mul_, Tensor.div_, torch.mul, torch.div}
ATTENTION = functional.scaled_dot_product_attention

# What a call was given: sizes, or one scale; None if something else (a dtype, one size for all parts).
Given = list[int] | list[float] | None


def is_watched(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call gives a new shape, or scales by a number."""
    if func in SCALING:
        return type(_operand(args, kwargs)) is float
    return func in SHAPING or func in SPLITTING or func is ATTENTION


def numbers_given(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Given:
    """Return the numbers that a watched call was given."""
    if func in SCALING:
        return [_operand(args, kwargs)]
    if func is ATTENTION:
        query = args[0] if args else kwargs["query"]
        return [query.shape[-1] ** -0.5 if kwargs.get("scale") is None else float(kwargs["scale"])]
    if func in SPLITTING:
        sizes = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_sizes"))
        sizes = tuple(sizes) if isinstance(sizes, tuple | list) else ()
    else:
        sizes = args[1:] if len(args) > 1 else tuple(kwargs.get("shape", kwargs.get("size", ())))
        if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
            sizes = tuple(sizes[0])
    return list(sizes) if sizes and all(isinstance(size, int) for size in sizes) else None


def call_with(func: Any, args: Sequence[Any], kwargs: dict[str, Any], numbers: Sequence[Any]) -> Any:
    """Call a function with other numbers than it was given."""
    if func is ATTENTION:
        return func(*args, **(kwargs | {"scale": numbers[0]}))
    if func in SCALING:
        return func(args[0], numbers[0])
    if func in SPLITTING:
        return func(args[0], list(numbers), dim=split_dim(func, args, kwargs))
    return func(args[0], tuple(numbers))


def split_dim(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return along which dimension a call splits; 0 for calls that do not."""
    return int(args[2] if len(args) > 2 else kwargs.get("dim", 0)) if func in SPLITTING else 0


def _operand(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("other")


class Watch(TorchFunctionMode):
    """Calls back before and after every watched call: with the numbers given, and with these and the result.

    Also gives linear layers contiguous inputs: for others torch runs different operations, and whether an input
    is contiguous can depend on sizes.
    """

    def __init__(self, before: Callable[[Given], None], after: Callable[[Given, Any, int], None]) -> None:
        super().__init__()
        self.before, self.after = before, after

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and args:
            args = (args[0].contiguous(), *args[1:])
        if not is_watched(func, args, kwargs):
            return func(*args, **kwargs)
        given = numbers_given(func, args, kwargs)
        self.before(given)
        out = func(*args, **kwargs)
        self.after(given, out, split_dim(func, args, kwargs))
        return out
