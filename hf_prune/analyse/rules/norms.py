"""Operations that sum, compare or normalise along dimensions."""

from typing import Any

from hf_prune.analyse.axes import ONE, Sum, fix, fixed, size_of, split_factor, unify
from hf_prune.analyse.rules.base import Call, Dims, broadcast, rule


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "linalg_vector_norm", "norm", "logsumexp", "prod",
      "argmax", "argmin", "var_mean", "any", "all", "std_mean")  # fmt: skip
def reduce(call: Call) -> Any:
    """Sum over dimensions."""
    dims = call.dims("self")
    chosen = call["dim"]
    where = range(len(dims)) if chosen is None else [chosen] if isinstance(chosen, int) else list(chosen)
    gone = {d % len(dims) for d in (where or range(len(dims)))} if dims else set()
    for d in gone:
        call.note(dims[d], "reduced")
        if call.name in ("aten::argmax", "aten::argmin"):
            fix(dims[d], "the number of its largest unit is used")
    keep = call["keepdim"]
    out = [ONE if d in gone else dim for d, dim in enumerate(dims) if keep or d not in gone]
    return [out] * len(call.out) if isinstance(call.out, tuple | list) else out


@rule("_softmax", "_safe_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "sort", "topk", "argsort",
      "cumprod")  # fmt: skip
def along(call: Call) -> Any:
    """Compare or rank along a dimension: every unit matters to every other."""
    dims = list(call.dims("self"))
    where = call["dim"] % len(dims) if dims else 0
    fix(dims[where], f"{call.name.removeprefix('aten::').strip('_')} compares its units")
    first = call.out[0] if isinstance(call.out, tuple | list) else call.out
    if first.shape[where] != size_of(dims[where]):
        dims[where] = fixed(first.shape[where], "it is a ranking")
    return [dims] * len(call.out) if isinstance(call.out, tuple | list) else dims


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(call: Call) -> Any:
    """Normalise over the last dimensions."""
    dims = list(call.dims("input"))
    count = len(call["normalized_shape"])
    for name in ("weight", "bias"):
        if call[name] is not None:
            broadcast([dims[-count:], call.dims(name)], count)
    for dim in dims[-count:]:
        call.note(dim, "normalised")
    rest = [*dims[:-count], *[ONE] * count]
    return [dims, rest, rest] if isinstance(call.out, tuple | list) else dims


@rule("native_group_norm")
def group_norm(call: Call) -> list[Dims]:
    """Normalise over groups of channels; the number of groups stays."""
    dims = list(call.dims("input"))
    groups = call["group"]
    for name in ("weight", "bias"):
        if call[name] is not None:
            unify(dims[1], call.dims(name)[0])
    halves = split_factor(dims[1], groups)
    if halves is None:
        fix(dims[1], "its groups are normalised together and cut through its structure")
    else:
        fix(halves[0], "it counts groups that are normalised together")
    call.note(dims[1], "normalised")
    rest = [dims[0], fixed(groups, "it counts groups that are normalised together")]
    return [dims, rest, rest]


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "_native_batch_norm_legit_functional", "batch_norm_with_update", "_batch_norm_no_update")  # fmt: skip
def batch_norm(call: Call) -> list[Any]:
    """Normalise every channel by itself, over the batch where no running statistics are used (standardised weights)."""
    dims = call.dims("input")
    if call["training"] or call["running_mean"] is None:
        for dim in [dims[0], *dims[2:]]:
            call.note(dim, "normalised")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call[name] is not None:
            unify(dims[1], call.dims(name)[0])
    return [list(dims), *([dims[1]] if tensor.numel() else [Sum(())] for tensor in call.out[1:])]
