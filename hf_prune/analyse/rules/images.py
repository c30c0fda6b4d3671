"""Operations on image grids: pooling, resizing, windows, frequencies."""

from math import prod
from typing import Any

from hf_prune.analyse.axes import fix, fixed, product, size_of, split_factor
from hf_prune.analyse.rules.base import SPACE, Call, Dims, give_up, out_dims, rule
from hf_prune.analyse.rules.shapes import factors, take


@rule("avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_bilinear2d",
      "upsample_bicubic2d", "upsample_nearest2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
      "upsample_nearest1d", "upsample_linear1d", "avg_pool3d", "max_pool3d_with_indices", "_adaptive_avg_pool3d",
      "adaptive_avg_pool1d", "upsample_trilinear3d", "_adaptive_avg_pool2d_backward", "grid_sampler_2d",
      "_upsample_nearest_exact2d", "adaptive_avg_pool2d", "max_pool1d", "avg_pool1d")  # fmt: skip
def resample(call: Call) -> Any:
    """Pool or resize: channels by themselves, positions anew."""
    name = "input" if call.name == "aten::grid_sampler_2d" else "self"
    dims = call.dims(name)
    several = isinstance(call.out, tuple | list)
    shape = call.out[0].shape if several else call.out.shape
    num_channels_end = 2 if len(shape) > 3 or "1d" in call.name else 1
    num_channels_end = min(num_channels_end, len(shape) - 1)
    out = [*dims[:num_channels_end], *out_dims(shape[num_channels_end:], SPACE)]
    for dim in dims[num_channels_end:]:
        fix(dim, SPACE)
    return [out] * len(call.out) if several else out


@rule("im2col")
def im2col(call: Call) -> Dims:
    """Turn windows into columns: channels, then positions in the window."""
    dims = call.dims("self")
    window = prod(call["kernel_size"])
    return [dims[0], product([dims[1], fixed(window, SPACE)]), fixed(call.out.shape[2], SPACE)]


@rule("col2im", "pixel_shuffle")
def spread(call: Call) -> Dims:
    """Turn the last factors of the channels into positions."""
    dims = call.dims("self")
    taken, rest = take(factors(dims[1]), call.out.shape[1])
    if taken is None:
        return give_up(call, "a part of it becomes positions across its structure")
    for factor in rest:
        fix(factor, SPACE)
    return [dims[0], taken, *out_dims(call.out.shape[2:], SPACE)]


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Dims:
    """Turn positions into channels."""
    dims = call.dims("self")
    folded = fixed(call.out.shape[1] // size_of(dims[1]), SPACE)
    return [dims[0], product([dims[1], folded]), *out_dims(call.out.shape[2:], SPACE)]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Dims:
    """Interleave groups of channels."""
    dims = list(call.dims("self"))
    halves = split_factor(dims[1], call["groups"])
    if halves is None:
        return give_up(call, "channels of it are interleaved across its structure")
    fix(halves[0], "it counts interleaved groups")
    dims[1] = product([halves[1], halves[0]])
    return dims


@rule("glu")
def glu(call: Call) -> Dims:
    """Multiply one half by the other."""
    dims = list(call.dims("self"))
    where = call["dim"] % len(dims)
    halves = split_factor(dims[where], 2)
    if halves is None:
        return give_up(call, "its halves are multiplied across its structure")
    fix(halves[0], "it counts equal parts")
    dims[where] = halves[1]
    return dims


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fft(call: Call) -> Dims:
    """Transform positions; other dimensions stay."""
    dims = list(call.dims("self"))
    for d in call["dim"]:
        fix(dims[d], "it is transformed to frequencies")
        dims[d] = fixed(call.out.shape[d], "it is transformed to frequencies")
    return dims


@rule("view_as_real", "view_as_complex")
def as_complex(call: Call) -> Dims:
    """Read pairs as complex numbers or the other way round."""
    dims = list(call.dims("self"))
    if call.name == "aten::view_as_real":
        return [*dims, fixed(2, "it is real and imaginary part")]
    fix(dims[-1], "it is real and imaginary part")
    return dims[:-1]
