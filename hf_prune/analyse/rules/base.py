"""What a rule is, and what rules share."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from hf_prune.analyse.axes import ONE, Axis, Expr, Sum, fix, fixed, size_of, unify

Dims = list[Expr]
SPACE = "it is a position in the image, not a channel"


class Call(Protocol):
    """One operation of a traced run."""

    name: str
    out: Any

    def __getitem__(self, argument: str) -> Any:
        """Return an argument by its name in the operator's schema."""
        ...

    def dims(self, argument: str) -> Dims:
        """Return the dimensions of a tensor argument."""
        ...

    def dims_of(self, tensor: Tensor) -> Dims:
        """Return the dimensions of a tensor."""
        ...

    def contract(self, *operands: tuple[Any, Sequence[Expr], Sequence[Expr]], macs: Sequence[Expr]) -> None:
        """Note a product: for each operand what is summed over and what survives, and the multiply-accumulates."""
        ...

    def note(self, expr: Expr, use: str) -> None:
        """Note what happens along a dimension."""
        ...


Rule = Callable[[Any], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the names of operators."""

    def add(function: Rule) -> Rule:
        RULES.update({f"aten::{name}": function for name in names})
        return function

    return add


def out_dims(size: Sequence[int], reason: str) -> Dims:
    """Return dimensions of which nothing is known but that they must not be pruned."""
    return [fixed(n, reason) if n else Sum(()) for n in size]


def new_dims(size: Sequence[int]) -> Dims:
    """Return dimensions of which nothing is known yet."""
    return [Axis(n) if n > 1 else ONE if n else Sum(()) for n in size]


def broadcast(operands: Sequence[Dims], ndim: int) -> Dims:
    """Unify dimensions that meet element by element; a size of 1 meets anything."""
    out: Dims = [ONE] * ndim
    for dims in operands:
        for position, dim in enumerate(dims, start=ndim - len(dims)):
            if size_of(dim) == 1:
                continue
            if size_of(out[position]) == 1:
                out[position] = dim
            else:
                unify(out[position], dim)
    return out


def elementwise(call: Call, tensors: Sequence[Tensor]) -> Dims:
    """Combine all tensor arguments element by element."""
    ndim = max((tensor.ndim for tensor in tensors), default=0)
    return broadcast([call.dims_of(tensor) for tensor in tensors], ndim)


def give_up(call: Any, reason: str) -> Any:
    """Fix everything an operation touches; return the dimensions of its output, or of each of them."""
    for tensor in call.tensors:
        for dim in call.dims_of(tensor):
            fix(dim, reason)
    if isinstance(call.out, tuple | list):
        return [out_dims(t.shape, reason) if isinstance(t, Tensor) else None for t in call.out]
    return out_dims(call.out.shape, reason) if isinstance(call.out, Tensor) else None
