"""Matrix products, convolutions and attention."""

from typing import Any

from torch import Tensor

from hf_prune.analyse.axes import ONE, Axis, Expr, fix, product, size_of, unify
from hf_prune.analyse.rules.base import SPACE, Call, Dims, broadcast, out_dims, rule


@rule("mm", "addmm", "bmm", "baddbmm", "addbmm")
def matmul(call: Call) -> Dims:
    """Multiply matrices, one or a batch of them."""
    left, right = ("self", "mat2") if call.name in ("aten::mm", "aten::bmm") else ("mat1", "mat2")
    if call.name == "aten::baddbmm":
        left, right = "batch1", "batch2"
    first, second = call.dims(left), call.dims(right)
    batch = broadcast([first[:-2], second[:-2]], len(first) - 2)
    call.contract(
        (call[left], [first[-1]], [*first[:-2], first[-2]]),
        (call[right], [second[-2]], [*second[:-2], second[-1]]),
        macs=[*batch, first[-2], first[-1], second[-1]],
    )
    unify(first[-1], second[-2])
    out = [*batch, first[-2], second[-1]]
    if call.name in ("aten::addmm", "aten::baddbmm"):
        call.contract((call["self"], [], call.dims("self")), macs=[])
        broadcast([out, call.dims("self")], len(out))
    return out


@rule("dot", "mv")
def matvec(call: Call) -> Dims:
    """Multiply a matrix or a vector with a vector."""
    dims = list(call.dims("self"))
    unify(dims[-1], call.dims("tensor" if call.name == "aten::dot" else "vec")[0])
    call.note(dims[-1], "reduced")
    return dims[:-1]


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def convolution(call: Call) -> Dims:
    """Convolve: plain, grouped, depthwise or transposed."""
    weight, x = call.dims("weight"), call.dims("input")
    groups, transposed = call["groups"], bool(call["transposed"])
    written, read = (weight[1], weight[0]) if transposed else (weight[0], weight[1])
    space = out_dims(call.out.shape[2:], SPACE)
    for dim in weight[2:]:
        fix(dim, "it is a position in a kernel")
    for dim in x[2:]:
        fix(dim, SPACE)
    num_in, num_out = size_of(x[1]), call.out.shape[1]
    positions = x[2:] if transposed else space
    call.contract((call["weight"], [read], [written]), (call["input"], [x[1]], [x[0]]),
                  macs=[x[0], *positions, *weight])  # fmt: skip
    if call["bias"] is not None:
        call.contract((call["bias"], [], call.dims("bias")), macs=[])
    if groups == 1:
        unify(x[1], read)
        out = written
    elif groups == num_in == num_out:
        call.note(x[1], "depthwise")
        unify(x[1], weight[0])
        out = x[1]
    else:
        out = grouped(call, x[1], weight, groups, transposed)
    if call["bias"] is not None:
        unify(out, call.dims("bias")[0])
    return [x[0], out, *space]


def grouped(call: Call, channels: Expr, weight: Dims, groups: int, transposed: bool) -> Expr:
    """Unify the channels of a grouped convolution: whole groups may go, or the same unit of every group."""
    per_group_out = call.out.shape[1] // groups
    number, inner_out = Axis(groups), Axis(per_group_out) if per_group_out > 1 else ONE
    call.note(number, "groups")
    out = product([number, inner_out])
    if transposed:
        unify(channels, weight[0])
        unify(weight[1], inner_out)
        unify(channels, product([number, Axis(size_of(channels) // groups)]))
    else:
        unify(weight[0], out)
        unify(channels, product([number, weight[1]]))
    return out


@rule("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
      "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_cudnn_attention",
      "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable")  # fmt: skip
def attention(call: Call) -> list[Any]:
    """Attend, all in one operator."""
    query, key, value = (list(call.dims(name)) for name in ("query", "key", "value"))
    batch = broadcast([query[:-2], key[:-2], value[:-2]], len(query) - 2)
    unify(query[-1], key[-1])
    unify(key[-2], value[-2])
    for head in batch[1:]:
        call.note(head, "attention batch")
    call.note(query[-1], "attention width")
    call.contract(macs=[*batch, query[-2], key[-2], query[-1]])
    call.contract(macs=[*batch, query[-2], key[-2], value[-1]])
    fix(query[-2], SPACE)
    fix(key[-2], SPACE)
    rest = [out_dims(t.shape, "it is internal to attention") if isinstance(t, Tensor) else None for t in call.out[1:]]
    return [[*batch, query[-2], value[-1]], *rest]
