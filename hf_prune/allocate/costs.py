"""What a model costs as a function of the sizes of its axes, by name; along one axis for many sizes at once."""

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, Protocol

import numpy as np

from hf_prune.analyse.axes import Axis, Expr, Product, leaves, resolve
from hf_prune.analyse.cost import Polynomial
from hf_prune.analyse.graph import AxisGraph

Sizes = Mapping[str, int]
# The dimensions of a part of the model, and its cost at given sizes of these: numbers, or arrays that broadcast.
Term = tuple[tuple[Expr, ...], Callable[..., Any]]


class CostModel(Protocol):
    """A cost of a whole model."""

    def __call__(self, sizes: Sizes) -> float:
        """Return the cost; axes that are not named keep their dense size."""
        ...

    def along(self, name: str, sizes: Sizes, options: np.ndarray) -> np.ndarray:
        """Return the cost `(options,)` when one axis takes each of some sizes and the others those of `sizes`."""
        ...


class SumOfTerms:
    """A cost that adds up over the parts of a model, each of which knows its dimensions.

    Cost of a call: one evaluation of every term; along an axis, of the terms on it.

    Args:
        graph: The analysed model.
        terms: Its parts.
        constant: What is added to them.
        tags: For each term what `scaled` is to know it by; none where it will not be asked.
    """

    def __init__(
        self, graph: AxisGraph, terms: Iterable[Term], constant: float = 0.0, tags: Iterable[Hashable] = ()
    ) -> None:
        self.constant, self.tags = constant, list(tags)
        # Asked for along every axis in turn.
        self.last: tuple[dict[str, int], float] | None = None
        self.axes = {name: axis.leaf for name, axis in graph.axes.items()}
        self.terms = [(tuple(map(resolve, dims)), evaluate) for dims, evaluate in terms]
        self.on: dict[Axis, list[int]] = {leaf: [] for leaf in self.axes.values()}
        for number, (dims, _) in enumerate(self.terms):
            for leaf in {leaf for dim in dims for leaf in leaves(dim)} & self.on.keys():
                self.on[leaf].append(number)

    def __call__(self, sizes: Sizes) -> float:
        """See `CostModel`."""
        if self.last is None or self.last[0] != sizes:
            self.last = dict(sizes), self.constant + float(self._add(range(len(self.terms)), self._by_axis(sizes)))
        return self.last[1]

    def along(self, name: str, sizes: Sizes, options: np.ndarray) -> np.ndarray:
        """See `CostModel`."""
        now, touched = self._by_axis(sizes), self.on[self.axes[name]]
        moved = now | {self.axes[name]: options}
        return self(sizes) - self._add(touched, now) + self._add(touched, moved) * np.ones(len(options))

    def scaled(self, factor_of: Callable[[Any], float], more: float = 0.0) -> "SumOfTerms":
        """Return the cost when every term costs a factor of what it did, by its tag, and something is added."""
        made = copy.copy(self)
        made.last, made.constant = None, self.constant + more
        made.terms = [
            (dims, _times(evaluate, factor_of(tag)))
            for (dims, evaluate), tag in zip(self.terms, self.tags, strict=True)
        ]
        return made

    def _by_axis(self, sizes: Sizes) -> dict[Axis, Any]:
        return {self.axes[name]: size for name, size in sizes.items()}

    def _add(self, numbers: Sequence[int] | range, sizes: dict[Axis, Any]) -> Any:
        return sum(evaluate(*(_size(dim, sizes) for dim in dims)) for dims, evaluate in
                   (self.terms[number] for number in numbers))  # fmt: skip


def _times(evaluate: Callable[..., Any], factor: float) -> Callable[..., Any]:
    return evaluate if factor == 1 else lambda *sizes: factor * evaluate(*sizes)


def tagged_macs(graph: AxisGraph, tag_of: Callable[[str, Sequence[Expr]], Hashable]) -> SumOfTerms:
    """Return MACs as a cost whose terms, one for each product, carry tags.

    Args:
        graph: The analysed model.
        tag_of: Returns a tag from the path of the module that a product runs in and the dimensions it multiplies.
    """
    recording = graph.recording
    tags = [tag_of(module, dims) for module, dims in zip(recording.macs_modules, recording.macs, strict=True)]
    return SumOfTerms(
        graph, [(tuple(dims), lambda *sizes: prod(sizes, start=1.0)) for dims in recording.macs], 0.0, tags
    )


def polynomial_cost(graph: AxisGraph, polynomial: Polynomial) -> SumOfTerms:
    """Return parameters or MACs as a cost."""
    # One term for each factor: floats, for products of arrays of int64 overflow without a word.
    return SumOfTerms(
        graph,
        [(dims, lambda *sizes, count=float(count): count * prod(sizes)) for dims, count in polynomial.terms.items()],
    )


def _size(expr: Expr, sizes: Mapping[Axis, Any]) -> Any:
    """Return the size of a resolved dimension; an array where an axis takes several sizes."""
    if isinstance(expr, Axis):
        return sizes.get(expr, expr.size)
    if isinstance(expr, Product):
        return prod(_size(factor, sizes) for factor in expr.factors)
    return sum(_size(part, sizes) for part in expr.parts)
