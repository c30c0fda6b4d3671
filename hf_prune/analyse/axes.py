"""Axis expressions and their unification: type inference for shapes.

Every dimension of every tensor is an expression: an `Axis`, a product of expressions (768 seen as 12 heads of 64) or
a sum of them (the parts of a concatenation). Two dimensions that meet in an operation must be the same; `unify`
makes them so, splitting axes where one side knows more structure than the other. What cannot be aligned is fixed, with
the reason: it will not be pruned, rather than pruned wrongly.

Dimensions of size 1 carry nothing to prune; they are the empty product `ONE`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod

import torch
from torch import Tensor

_serial = count()


class Axis:
    """A set of units that come and go together.

    Attributes:
        size: Number of units.
        reason: Why it must not be pruned; None while nothing speaks against it.
        bound: What it turned out to be; None while it is a leaf.
    """

    __slots__ = ("bound", "reason", "serial", "size")

    def __init__(self, size: int, reason: str | None = None) -> None:
        self.size, self.reason = size, reason
        self.bound: Expr | None = None
        self.serial = next(_serial)

    def __repr__(self) -> str:
        return f"a{self.serial}:{self.size}" + ("!" if self.reason else "")


@dataclass(frozen=True)
class Product:
    """Factors in row-major order: the last one runs fastest."""

    factors: "tuple[Expr, ...]"


@dataclass(frozen=True)
class Sum:
    """Parts one behind the other."""

    parts: "tuple[Expr, ...]"


Expr = Axis | Product | Sum
ONE = Product(())


def product(factors: Sequence[Expr]) -> Expr:
    """Return the product, flattened and without ones."""
    flat: list[Expr] = []
    for factor in factors:
        factor = resolve(factor)
        flat.extend(factor.factors if isinstance(factor, Product) else (factor,))
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def concat(parts: Sequence[Expr]) -> Expr:
    """Return the sum, flattened and without empty parts."""
    flat: list[Expr] = []
    for part in parts:
        part = resolve(part)
        flat.extend(part.parts if isinstance(part, Sum) else (part,))
    flat = [part for part in flat if size_of(part)]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def resolve(expr: Expr) -> Expr:
    """Replace axes by what they are bound to."""
    if isinstance(expr, Axis):
        if expr.bound is None:
            return expr if expr.size != 1 else ONE
        expr.bound = resolve(expr.bound)
        return expr.bound
    if isinstance(expr, Product):
        return product(expr.factors) if expr.factors else ONE
    return concat(expr.parts)


def size_of(expr: Expr) -> int:
    """Return the number of indices."""
    if isinstance(expr, Axis):
        return expr.size
    if isinstance(expr, Product):
        return prod(map(size_of, expr.factors))
    return sum(map(size_of, expr.parts))


def leaves(expr: Expr) -> Iterator[Axis]:
    """Yield every axis of an expression, with repetition."""
    expr = resolve(expr)
    if isinstance(expr, Axis):
        yield expr
    else:
        for child in expr.factors if isinstance(expr, Product) else expr.parts:
            yield from leaves(child)


def fix(expr: Expr, reason: str) -> None:
    """Forbid to prune any axis of an expression; the first reason given is kept."""
    for axis in leaves(expr):
        axis.reason = axis.reason or reason


def fixed(size: int, reason: str) -> Expr:
    """Return a new axis that must not be pruned."""
    return ONE if size == 1 else Axis(size, reason)


def unify(first: Expr, second: Expr) -> None:
    """Make two dimensions the same.

    Where they cannot be aligned, the axes concerned are fixed, so that the result is always sound.
    """
    first, second = resolve(first), resolve(second)
    if first is second or first == second:
        return
    if size_of(first) != size_of(second):
        _give_up(first, second, "two dimensions of different size meet")
    elif isinstance(first, Axis) and isinstance(second, Axis):
        _bind(*((second, first) if first.serial < second.serial else (first, second)))
    elif isinstance(first, Axis):
        _bind(first, second)
    elif isinstance(second, Axis):
        _bind(second, first)
    elif isinstance(first, Product) and isinstance(second, Product):
        _align_factors(list(first.factors), list(second.factors))
    elif isinstance(first, Sum) and isinstance(second, Sum):
        _align_parts(first, second)
    else:
        whole, parts = (first, second) if isinstance(second, Sum) else (second, first)
        _align_product_with_sum(whole, parts)  # type: ignore[arg-type]


def _bind(axis: Axis, expr: Expr) -> None:
    if axis.reason:
        fix(expr, axis.reason)
    axis.bound = expr


def _give_up(first: Expr, second: Expr, reason: str) -> None:
    fix(first, reason)
    fix(second, reason)


def _align_factors(first: list[Expr], second: list[Expr]) -> None:
    """Unify two row-major factor lists of equal size, leftmost first."""
    while first and second:
        left, right = resolve(first.pop(0)), resolve(second.pop(0))
        if size_of(left) > size_of(right):
            first, second, left, right = second, first, right, left
        if size_of(left) == size_of(right):
            unify(left, right)
            continue
        halves = split_factor(right, size_of(left))
        if halves is not None:
            unify(left, halves[0])
            second.insert(0, halves[1])
            continue
        # No common refinement here: take both sides up to where they meet again.
        ours, theirs = [left], [right]
        while prod(map(size_of, ours)) != prod(map(size_of, theirs)):
            behind, rest = (ours, first) if prod(map(size_of, ours)) < prod(map(size_of, theirs)) else (theirs, second)
            behind.append(rest.pop(0))
        _give_up(Product(tuple(ours)), Product(tuple(theirs)), "it is regrouped in a way that mixes its units")


def split_factor(expr: Expr, leading: int) -> tuple[Expr, Expr] | None:
    """Return an expression as (leading factor of a given size, the rest), or None if it cannot be seen so."""
    expr, size = resolve(expr), size_of(expr)
    if leading == 1:
        return ONE, expr
    if leading == size:
        return expr, ONE
    if size % leading:
        return None
    if isinstance(expr, Axis):
        outer, inner = Axis(leading, expr.reason), Axis(size // leading, expr.reason)
        expr.bound = product([outer, inner])
        return resolve(outer), resolve(inner)
    if isinstance(expr, Sum):
        if len(expr.parts) % leading or len({size_of(part) for part in expr.parts}) > 1:
            return None
        step = len(expr.parts) // leading
        rows = [concat(expr.parts[start : start + step]) for start in range(0, len(expr.parts), step)]
        for row in rows[1:]:
            unify(rows[0], row)
        return fixed(leading, "it counts equal parts"), resolve(rows[0])
    taken: list[Expr] = []
    rest = list(expr.factors)
    while rest and leading > 1:
        factor = rest.pop(0)
        here = size_of(factor)
        if leading % here == 0:
            taken.append(factor)
            leading //= here
        else:
            halves = split_factor(factor, leading) if here % leading == 0 else None
            if halves is None:
                return None
            taken.append(halves[0])
            rest.insert(0, halves[1])
            leading = 1
    return product(taken), product(rest)


def cut(expr: Expr, length: int) -> tuple[Expr, Expr] | None:
    """Return an expression as (first `length` indices, the others), or None if it cannot be seen so."""
    expr, size = resolve(expr), size_of(expr)
    if length in (0, size):
        return (expr, Sum(())) if length else (Sum(()), expr)
    if isinstance(expr, Axis):
        head, tail = resolve(Axis(length, expr.reason)), resolve(Axis(size - length, expr.reason))
        expr.bound = Sum((head, tail))
        return head, tail
    if isinstance(expr, Product):
        if not expr.factors:
            return None
        inner = product(expr.factors[1:])
        if length % size_of(inner):
            return None
        halves = cut(expr.factors[0], length // size_of(inner))
        return None if halves is None else (product([halves[0], inner]), product([halves[1], inner]))
    head_parts: list[Expr] = []
    rest = list(expr.parts)
    while size_of(Sum(tuple(head_parts))) < length:
        part = rest.pop(0)
        missing = length - size_of(Sum(tuple(head_parts)))
        if size_of(part) > missing:
            halves = cut(part, missing)
            if halves is None:
                return None
            rest.insert(0, halves[1])
            part = halves[0]
        head_parts.append(part)
    return concat(head_parts), concat(rest)


def _align_parts(first: Sum, second: Sum) -> None:
    """Unify two concatenations part by part, cutting the longer part where they differ."""
    ours, theirs = list(first.parts), list(second.parts)
    while ours and theirs:
        left, right = ours.pop(0), theirs.pop(0)
        if size_of(left) > size_of(right):
            ours, theirs, left, right = theirs, ours, right, left
        if size_of(left) < size_of(right):
            halves = cut(right, size_of(left))
            if halves is None:
                _give_up(first, second, "its parts do not line up with those it meets")
                return
            right = halves[0]
            theirs.insert(0, halves[1])
        unify(left, right)


def _align_product_with_sum(whole: Product, parts: Sum) -> None:
    """Unify a product with a concatenation: cut the product where the parts end."""
    rows = split_factor(parts, size_of(whole.factors[0])) if whole.factors else None
    if rows is not None:
        fix(whole.factors[0], "it counts equal parts")
        unify(product(whole.factors[1:]), rows[1])
        return
    rest: Expr = whole
    for part in parts.parts:
        halves = cut(rest, size_of(part))
        if halves is None:
            _give_up(whole, parts, "it is regrouped in a way that mixes its units")
            return
        unify(halves[0], part)
        rest = halves[1]


def unit_of(expr: Expr, axis: Axis) -> Tensor:
    """Return for every index of a dimension the unit of `axis` it belongs to, or -1, as `(size,)` integers."""
    expr = resolve(expr)
    if expr is axis:
        return torch.arange(axis.size)
    if isinstance(expr, Axis):
        return torch.full((expr.size,), -1)
    if isinstance(expr, Sum):
        return torch.cat([unit_of(part, axis) for part in expr.parts])
    units = torch.tensor([-1])
    for factor in expr.factors:
        inner = unit_of(factor, axis)
        units = torch.maximum(units[:, None], inner[None, :]).flatten()
    return units


def kept_indices(expr: Expr, kept: "dict[Axis, Tensor]") -> Tensor:
    """Return which indices of a dimension remain when axes keep the given units, as sorted integers."""
    expr = resolve(expr)
    if isinstance(expr, Axis):
        return kept.get(expr, torch.arange(expr.size))
    if isinstance(expr, Sum):
        start, chosen = 0, [torch.arange(0)]
        for part in expr.parts:
            chosen.append(kept_indices(part, kept) + start)
            start += size_of(part)
        return torch.cat(chosen)
    index = torch.zeros(1, dtype=torch.long)
    for factor in expr.factors:
        index = (index[:, None] * size_of(factor) + kept_indices(factor, kept)[None, :]).flatten()
    return index


def size_after(expr: Expr, sizes: "dict[Axis, int]") -> int:
    """Return the size of a dimension when axes have the given sizes."""
    expr = resolve(expr)
    if isinstance(expr, Axis):
        return sizes.get(expr, expr.size)
    if isinstance(expr, Product):
        return prod(size_after(factor, sizes) for factor in expr.factors)
    return sum(size_after(part, sizes) for part in expr.parts)
