"""Operations that join, cut, pick, pad or make tensors."""

from collections.abc import Sequence
from typing import Any

from hf_prune.analyse.axes import ONE, Axis, Expr, concat, cut, fix, fixed, size_of, split_factor, unify
from hf_prune.analyse.rules.base import Call, Dims, broadcast, new_dims, out_dims, rule


@rule("cat")
def cat(call: Call) -> Dims:
    """Put parts one behind the other."""
    tensors = [tensor for tensor in call["tensors"] if tensor.ndim > 1 or tensor.numel()]
    parts = [call.dims_of(tensor) for tensor in tensors]
    where = call["dim"] % tensors[0].ndim
    out = broadcast([[dim if d != where else ONE for d, dim in enumerate(dims)] for dims in parts], tensors[0].ndim)
    out[where] = concat([dims[where] for dims in parts])
    return out


@rule("stack")
def stack(call: Call) -> Dims:
    """Put tensors beside each other along a new dimension."""
    tensors = call["tensors"]
    out = broadcast([call.dims_of(tensor) for tensor in tensors], tensors[0].ndim)
    out.insert(call["dim"] % (len(out) + 1), fixed(len(tensors), "it counts stacked tensors"))
    return out


@rule("unbind", "select")
def select(call: Call) -> Any:
    """Pick by a constant number: along that dimension nothing can move."""
    dims = list(call.dims("self"))
    picked = dims.pop(call["dim"] % len(dims))
    fix(picked, "single positions of it are picked by number")
    return [dims] * len(call.out) if isinstance(call.out, tuple | list) else dims


@rule("slice", "narrow")
def slice_(call: Call) -> Dims:
    """Take a range."""
    dims = list(call.dims("self"))
    where = call["dim"] % len(dims)
    size = size_of(dims[where])
    start, stop, step = (call["start"] or 0), call["end"], call["step"]
    start = max(start + size, 0) if start < 0 else min(start, size)
    stop = size if stop is None else min(max(stop + size, 0) if stop < 0 else stop, size)
    if (start, step) == (0, 1) and stop >= size:
        return dims
    if step == 1:
        dims[where] = pieces(dims[where], [start, max(stop - start, 0), size - max(stop, start)])[1]
    else:
        fix(dims[where], "every second or further unit of it is picked")
        dims[where] = fixed(call.out.shape[where], "it is picked from a strided range")
    return dims


def pieces(expr: Expr, sizes: Sequence[int]) -> list[Expr]:
    """Cut a dimension into ranges; fixes it where the ranges do not fit its structure."""
    out, rest = [], expr
    for size in sizes:
        halves = cut(rest, size)
        if halves is None:
            fix(expr, "a range of it is taken that cuts through its structure")
            return [fixed(n, "it is a range that cuts through a structure") for n in sizes]
        out.append(halves[0])
        rest = halves[1]
    return out


@rule("split", "split_with_sizes", "unsafe_split", "chunk")
def split(call: Call) -> list[Dims]:
    """Cut into parts. Equal parts are taken to stay equal, so they lose the same units."""
    dims = call.dims("self")
    where = call["dim"] % len(dims)
    sizes = [part.shape[where] for part in call.out]
    equal = len(set(sizes)) == 1 and len(sizes) > 1
    stacked = split_factor(dims[where], len(sizes)) if equal else None
    if stacked is not None:
        fix(stacked[0], "it counts equal parts")
        parts = [stacked[1]] * len(sizes)
    else:
        parts = pieces(dims[where], sizes)
        for part in parts[1:] if equal else []:
            unify(parts[0], part)
    return [[*dims[:where], part, *dims[where + 1 :]] for part in parts]


@rule("constant_pad_nd", "reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d")
def pad(call: Call) -> Dims:
    """Add constant units around."""
    dims, amounts = list(call.dims("self")), call["pad"] if call.name.endswith("_nd") else call["padding"]
    for d in range(len(amounts) // 2):
        before, after = amounts[2 * d], amounts[2 * d + 1]
        where = len(dims) - 1 - d
        if before < 0 or after < 0:
            fix(dims[where], "it is cropped")
            dims[where] = fixed(call.out.shape[where], "it is cropped")
        else:
            added = [Axis(n, "it is padding") if n > 1 else ONE if n else None for n in (before, after)]
            parts = [added[0], dims[where], added[1]]
            dims[where] = concat([part for part in parts if part is not None])
    return dims


@rule("roll", "flip")
def reorder(call: Call) -> Dims:
    """Shift or turn around: positions matter."""
    dims = list(call.dims("self"))
    for d in call["dims"] or range(len(dims)):
        fix(dims[d], "its units are shifted or turned around")
    return dims


@rule("index", "_unsafe_index")
def index(call: Call) -> Dims:
    """Pick by a table of numbers."""
    dims, chosen = list(call.dims("self")), list(call["indices"])
    chosen += [None] * (len(dims) - len(chosen))
    used = [d for d, table in enumerate(chosen) if table is not None]
    for d in used:
        fix(dims[d], "units of it are picked by a table of numbers")
    kept = [dim for d, dim in enumerate(dims) if d not in used]
    num_new = call.out.ndim - len(kept)
    first = used[0] if used[-1] - used[0] + 1 == len(used) else 0
    new = out_dims(call.out.shape[first : first + num_new], "it comes from a table of numbers")
    return [*kept[:first], *new, *kept[first:]]


@rule("gather", "scatter", "index_add", "scatter_add")
def gather(call: Call) -> Dims:
    """Pick along one dimension by numbers; a plain broadcast along the others."""
    dims, where = list(call.dims("self")), call["dim"]
    where %= len(dims)
    fix(dims[where], "units of it are picked by a table of numbers")
    indices = call.dims("index")
    for d, (dim, other) in enumerate(zip(dims, indices, strict=False)):
        if d != where and size_of(dim) == size_of(other):
            unify(dim, other)
    if call.name == "aten::gather":
        dims[where] = fixed(call.out.shape[where], "it comes from a table of numbers")
    return dims


@rule("index_select")
def index_select(call: Call) -> Dims:
    """Pick along one dimension by numbers."""
    dims, where = list(call.dims("self")), call["dim"]
    fix(dims[where], "units of it are picked by a table of numbers")
    dims[where] = fixed(call.out.shape[where], "it comes from a table of numbers")
    return dims


@rule("embedding")
def embedding(call: Call) -> Dims:
    """Look rows up."""
    rows, width = call.dims("weight")
    fix(rows, "rows of it are looked up by number")
    call.contract((call["weight"], [], [width]), macs=[])
    return [*call.dims("indices"), width]


@rule("copy_")
def copy_(call: Call) -> Dims:
    """Write one tensor into another."""
    dims = call.dims("self")
    broadcast([dims, call.dims("src")], len(dims))
    return dims


@rule("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "empty_strided",
      "new_empty_strided", "randn", "rand")  # fmt: skip
def create(call: Call) -> Dims:
    """Make a tensor that is the same everywhere: its sizes are up to whatever they meet."""
    return new_dims(call.out.shape)
