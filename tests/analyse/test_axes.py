"""Unification is type inference: what comes out must not depend on the order in which things meet."""

import itertools
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_prune.analyse.axes import (
    ONE,
    Axis,
    Product,
    Sum,
    concat,
    cut,
    fix,
    fixed,
    kept_indices,
    leaves,
    product,
    resolve,
    size_after,
    size_of,
    split_factor,
    unify,
    unit_of,
)


def shape(expr) -> object:
    """The structure of an expression as nested sizes."""
    expr = resolve(expr)
    if isinstance(expr, Axis):
        return expr.size
    kind = "*" if isinstance(expr, Product) else "+"
    return (kind, *(shape(part) for part in (expr.factors if kind == "*" else expr.parts)))


def test_a_dimension_learns_its_structure_from_what_it_meets():
    whole, heads, width = Axis(12), Axis(3), Axis(4)
    unify(whole, product([heads, width]))
    assert shape(whole) == ("*", 3, 4)
    assert set(leaves(whole)) == {heads, width}


def test_products_are_refined_to_their_common_factors():
    first, second = product([Axis(4), Axis(6)]), product([Axis(2), Axis(12)])
    unify(first, second)
    assert shape(first) == shape(second) == ("*", 2, 2, 6)
    assert resolve(first) == resolve(second)


def test_products_without_common_factors_are_fixed_there_and_only_there():
    free = Axis(5)
    first, second = product([Axis(4), Axis(3), free]), product([Axis(6), Axis(2), Axis(5)])
    unify(first, second)
    *mixed, last = leaves(first)
    assert all("mixes" in axis.reason for axis in mixed)
    assert last.reason is None
    assert last in set(leaves(second))


def test_concatenations_are_cut_where_either_side_ends():
    first, second = concat([Axis(5), Axis(3)]), concat([Axis(2), Axis(6)])
    unify(first, second)
    assert shape(first) == shape(second) == ("+", 2, 3, 3)


def test_a_stack_of_equal_parts_meets_a_product_part_by_part():
    query, key, value = Axis(8), Axis(8), Axis(8)
    stacked = product([Axis(3), Axis(2), Axis(4)])
    unify(concat([query, key, value]), stacked)
    assert shape(query) == ("*", 2, 4)
    assert resolve(query) == resolve(key) == resolve(value)
    assert resolve(stacked).factors[0].reason is not None


def test_what_is_fixed_fixes_what_it_meets():
    free = Axis(6)
    unify(free, fixed(6, "it is the output"))
    assert next(leaves(free)).reason == "it is the output"
    outer = Axis(6)
    fix(outer, "no")
    unify(outer, product([Axis(2), Axis(3)]))
    assert all(axis.reason == "no" for axis in leaves(outer))


def test_different_sizes_fix_both():
    first, second = Axis(4), Axis(5)
    unify(first, second)
    assert first.reason
    assert second.reason


def test_ones_carry_nothing():
    assert resolve(Axis(1)) == ONE
    axis = Axis(7)
    assert product([ONE, axis, Axis(1)]) is axis


def test_cutting_through_a_product_needs_whole_rows():
    expr = product([Axis(4), Axis(3)])
    head, tail = cut(expr, 6)
    assert (shape(head), shape(tail)) == (("*", 2, 3), ("*", 2, 3))
    assert cut(product([Axis(2), Axis(3)]), 2) is None


def test_units_of_sums_and_products():
    heads, width, other = Axis(2), Axis(3), Axis(2)
    expr = concat([product([heads, width]), other])
    assert unit_of(expr, heads).tolist() == [0, 0, 0, 1, 1, 1, -1, -1]
    assert unit_of(expr, width).tolist() == [0, 1, 2, 0, 1, 2, -1, -1]
    assert unit_of(expr, other).tolist() == [-1] * 6 + [0, 1]
    kept = {heads: torch.tensor([1]), width: torch.tensor([0, 2]), other: torch.tensor([0])}
    assert kept_indices(expr, kept).tolist() == [3, 5, 6]


factor_lists = st.lists(st.sampled_from([2, 3, 4, 5, 6]), min_size=1, max_size=3)


@st.composite
def equal_products(draw):
    """Several ways to write the same number as a product."""
    primes = draw(st.lists(st.sampled_from([2, 2, 3, 5]), min_size=2, max_size=4))
    ways = []
    for _ in range(draw(st.integers(2, 4))):
        cuts = sorted(draw(st.sets(st.integers(1, len(primes) - 1), max_size=3)))
        ways.append([prod(primes[a:b]) for a, b in itertools.pairwise([0, *cuts, len(primes)])])
    return ways


@given(equal_products(), st.randoms(use_true_random=False))
def test_unification_does_not_depend_on_the_order(ways, random):
    pairs = [(i, j) for i in range(len(ways)) for j in range(i)]
    results = []
    for _ in range(3):
        exprs = [product([Axis(n) for n in way]) for way in ways]
        shuffled = [pair if random.random() < 0.5 else pair[::-1] for pair in random.sample(pairs, len(pairs))]
        for i, j in shuffled:
            unify(exprs[i], exprs[j])
        assert all(resolve(expr) == resolve(exprs[0]) for expr in exprs)
        assert not any(axis.reason for axis in leaves(exprs[0]))
        results.append(shape(exprs[0]))
    assert results[0] == results[1] == results[2]


@st.composite
def expressions(draw, depth=2):
    """A random expression of fresh axes."""
    kind = draw(st.sampled_from(["axis", "product", "sum"])) if depth else "axis"
    if kind == "axis":
        return Axis(draw(st.integers(2, 4)))
    parts = [draw(expressions(depth=depth - 1)) for _ in range(draw(st.integers(2, 3)))]
    return product(parts) if kind == "product" else concat(parts)


@given(expressions(), st.randoms(use_true_random=False))
def test_kept_indices_are_those_whose_every_unit_is_kept(expr, random):
    axes = list(dict.fromkeys(leaves(expr)))
    kept = {axis: torch.tensor(sorted(random.sample(range(axis.size), random.randint(1, axis.size)))) for axis in axes}
    index = kept_indices(expr, kept)
    expected = torch.ones(size_of(expr), dtype=torch.bool)
    for axis in axes:
        units = unit_of(expr, axis)
        expected &= (units < 0) | torch.isin(units, kept[axis])
    assert index.tolist() == expected.nonzero().squeeze(1).tolist()
    assert len(index) == size_after(expr, {axis: len(units) for axis, units in kept.items()})


def has_sum(expr) -> bool:
    expr = resolve(expr)
    return isinstance(expr, Sum) or any(map(has_sum, getattr(expr, "factors", ())))


@given(expressions(), st.data())
def test_splitting_keeps_the_number_of_indices(expr, data):
    size = size_of(expr)
    leading = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    halves = split_factor(expr, leading)
    if halves is not None:
        assert (size_of(halves[0]), size_of(halves[1])) == (leading, size // leading)
        if not has_sum(expr):
            assert resolve(expr) == product(halves)


@pytest.mark.parametrize("length", [0, 3, 8])
def test_cutting_at_the_ends_and_between_parts(length):
    first, second = Axis(3), Axis(5)
    head, tail = cut(concat([first, second]), length)
    assert (size_of(head), size_of(tail)) == (length, 8 - length)
