"""Operations that look at the same numbers in another shape."""

from math import prod

from hf_prune.analyse.axes import ONE, Axis, Expr, Product, Sum, fix, fixed, product, resolve, size_of, split_factor
from hf_prune.analyse.rules.base import Call, Dims, give_up, rule


@rule("clone", "alias", "detach", "_to_copy", "lift_fresh", "contiguous", "empty_like", "zeros_like", "ones_like",
      "full_like", "rand_like", "randn_like", "native_dropout", "bernoulli", "cumsum_")  # fmt: skip
def same(call: Call) -> Dims:
    """Keep all dimensions."""
    return list(call.dims("self"))


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided_", "as_strided", "view_copy", "resize_")
def view(call: Call) -> Dims:
    """Read the dimensions as one row-major product and divide it anew."""
    dims, shape = call.dims("self"), list(call.out.shape)
    if call.name.startswith("aten::as_strided") or prod(shape) != prod(map(size_of, dims)):
        if [size_of(dim) for dim in dims] == shape:
            return list(dims)
        return give_up(call, f"{call.name} reads memory in its own order")
    left, out = [factor for dim in dims for factor in factors(dim)], []
    for size in shape:
        taken, rest = take(left, size)
        if taken is None:
            for factor in left:
                fix(factor, "it is regrouped in a way that mixes its units")
            return out + [fixed(n, "it mixes units of regrouped dimensions") for n in shape[len(out) :]]
        out.append(taken)
        left = rest
    return out


def factors(expr: Expr) -> list[Expr]:
    """Return the factors of a dimension, one for anything but a product."""
    expr = resolve(expr)
    return list(expr.factors) if isinstance(expr, Product) else [expr]


def take(left: list[Expr], size: int) -> tuple[Expr | None, list[Expr]]:
    """Take factors from the front whose product is `size`, splitting the last one if needed."""
    left, taken = list(left), []
    while size > 1:
        if not left:
            return None, left
        factor = left.pop(0)
        here = size_of(factor)
        if size % here == 0:
            taken.append(factor)
            size //= here
            continue
        halves = split_factor(factor, size) if here % size == 0 else None
        if halves is None:
            return None, [*taken, factor, *left]
        taken.append(halves[0])
        left.insert(0, halves[1])
        size = 1
    return product(taken), left


@rule("t", "numpy_T")
def t(call: Call) -> Dims:
    """Swap two dimensions."""
    return list(reversed(call.dims("self")))


@rule("transpose")
def transpose(call: Call) -> Dims:
    """Swap two dimensions."""
    dims = list(call.dims("self"))
    first, second = call["dim0"] % len(dims), call["dim1"] % len(dims)
    dims[first], dims[second] = dims[second], dims[first]
    return dims


@rule("permute")
def permute(call: Call) -> Dims:
    """Reorder."""
    dims = call.dims("self")
    return [dims[d % len(dims)] for d in call["dims"]]


@rule("unsqueeze")
def unsqueeze(call: Call) -> Dims:
    """Insert a one."""
    dims = list(call.dims("self"))
    dims.insert(call["dim"] % (len(dims) + 1), ONE)
    return dims


@rule("squeeze")
def squeeze(call: Call) -> Dims:
    """Drop ones."""
    dims = call.dims("self")
    chosen = call["dim"]
    where = range(len(dims)) if chosen is None else [chosen] if isinstance(chosen, int) else chosen
    gone = {d % len(dims) for d in where} if dims else set()
    return [dim for d, dim in enumerate(dims) if d not in gone or size_of(dim) != 1]


@rule("expand")
def expand(call: Call) -> Dims:
    """Repeat ones; how often is up to whatever they meet later."""
    dims, shape = call.dims("self"), call.out.shape
    dims = [ONE] * (len(shape) - len(dims)) + list(dims)
    return [dim if size_of(dim) == n else Axis(n) if n else Sum(()) for dim, n in zip(dims, shape, strict=True)]


@rule("repeat")
def repeat(call: Call) -> Dims:
    """Put copies one behind the other."""
    dims, times = call.dims("self"), call["repeats"]
    dims = [ONE] * (len(times) - len(dims)) + list(dims)
    return [product([fixed(n, "it counts copies"), dim]) for n, dim in zip(times, dims, strict=True)]
