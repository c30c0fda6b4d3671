"""Shapes of results for the commonest operations, without torch's own way to them.

On the meta device torch computes the shape of a norm or of `gelu` in Python, through decompositions that take
milliseconds; a deep model has hundreds of these. What can be said at a glance is said here, and everything else, wrong
shapes and their error messages among it, is left to torch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Each returns NotImplemented where it takes more than a glance.
Kernel = Callable[..., Any]
KERNELS: dict[str, Kernel] = {}


def compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return what an operator gives, on the meta device by the shortest way."""
    kernel = KERNELS.get(func._schema.name)
    if kernel is not None:
        tensors = operands(args, kwargs, Tensor)
        if all(t.is_meta and t.dtype is tensors[0].dtype and t.is_floating_point() for t in tensors):
            out = kernel(*args, **kwargs)
            if out is not NotImplemented:
                return out
    return func(*args, **kwargs)


def operands(args: Sequence[Any], kwargs: dict[str, Any], kind: type) -> list[Any]:
    """Return the arguments of an operator that are of a kind, those in lists too; nothing nests deeper there."""
    found = []
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, kind):
            found.append(argument)
        elif isinstance(argument, tuple | list):
            found.extend(part for part in argument if isinstance(part, kind))
    return found


def kernel(*names: str) -> Callable[[Kernel], Kernel]:
    """Register a kernel under the names of operators."""

    def add(function: Kernel) -> Kernel:
        KERNELS.update({f"aten::{name}": function for name in names})
        return function

    return add


@kernel("addmm")
def addmm(bias: Tensor, first: Tensor, second: Tensor, **scales: Any) -> Any:
    """Multiply matrices and add a row."""
    if first.shape[1] != second.shape[0] or bias.shape != second.shape[1:]:
        return NotImplemented
    return _empty(first, (first.shape[0], second.shape[1]))


@kernel("native_layer_norm")
def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """Normalise over the last dimensions; also the mean and the inverse deviation."""
    normalised = x.shape[x.ndim - len(shape) :]
    if any(list(t) != list(shape) for t in (normalised, *(p.shape for p in (weight, bias) if p is not None))):
        return NotImplemented
    moments = (*x.shape[: x.ndim - len(shape)], *[1] * len(shape))
    return _empty(x, x.shape), _empty(x, moments), _empty(x, moments)


@kernel("native_batch_norm")
def batch_norm(x: Tensor, *parameters: Any) -> Any:
    """Normalise by running statistics."""
    *tensors, training, _, _ = parameters
    if training or x.ndim < 2 or any(t is not None and t.shape != x.shape[1:2] for t in tensors):
        return NotImplemented
    return _like(x), _empty(x, (0,)), _empty(x, (0,))


@kernel("gelu", "silu", "relu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "neg", "exp", "sin", "cos", "_softmax",
        "_safe_softmax")  # fmt: skip
def unary(x: Tensor, *settings: Any, **more: Any) -> Any:
    """Change every number by itself, or along one dimension."""
    return _like(x)


@kernel("hardswish_", "hardsigmoid_", "silu_", "relu_", "sigmoid_", "tanh_")
def in_place(x: Tensor) -> Any:
    """Change every number where it is."""
    return x


@kernel("add", "sub", "mul", "div")
def binary(x: Any, other: Any, **scales: Any) -> Any:
    """Combine two tensors of one shape, or a tensor with a row that is repeated or with a number."""
    if not isinstance(x, Tensor) or (isinstance(other, Tensor) and not _fits(other.shape, x.shape)):
        return NotImplemented
    return NotImplemented if scales.get("rounding_mode") or isinstance(other, complex) else _like(x)


def _fits(shape: torch.Size, other: torch.Size) -> bool:
    """Tell whether a tensor can be repeated to another shape."""
    rest = other[len(other) - len(shape) :]
    return len(shape) <= len(other) and all(n in (1, m) for n, m in zip(shape, rest, strict=True))


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _like(x: Tensor) -> Tensor:
    # Ten times as fast as what else is possible.
    return _empty(x, x.shape) if x.is_contiguous() else torch.empty_like(x)
