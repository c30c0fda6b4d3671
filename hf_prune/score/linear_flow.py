"""Run a model as if it were linear, so that what flows in at one end flows out at the other.

Gradients then are flows: the sum of weight times gradient over any cut through the network is the sum of its outputs,
as long as weights and inputs are not negative and nothing but the input feeds it. ReLU, pooling, sums and convolutions
are that way already. What is not keeps its value but passes gradients on as the multiplication that it amounted to:

- activations (GELU, SiLU, sigmoid and others), softmax and normalisation to length one: by output over input;
- LayerNorm, GroupNorm and BatchNorm: divide by the root of the mean square, a BatchNorm by its running deviation, and
  multiply with their scale; they neither centre nor shift;
- products of two activations (queries and keys, attention and values, gates): half of the flow comes from each;
- divisors: as constants.

What models compute in place or inside `torch.nn.MultiheadAttention` stays as it is.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PROPORTIONAL = {
    "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "mish", "normalize", "relu6", "rms_norm", "selu",
    "sigmoid", "silu", "softmax", "softplus", "tanh",
}  # fmt: skip
PRODUCTS = {"__matmul__", "__mul__", "__rmul__", "bmm", "matmul", "mul", "multiply"}
QUOTIENTS = {"__truediv__", "div", "divide", "true_divide"}
CONSTANT = {"reciprocal", "rsqrt"}


class LinearFlow(TorchFunctionMode):
    """While it is on, torch's functions act as said above."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Return the output of the function, or of what stands for it."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in STAND_INS:
            return STAND_INS[name](*args, **kwargs)
        if name in PROPORTIONAL and args:
            return _Proportional.apply(args[0], func(args[0].detach().clone(), *args[1:], **kwargs))
        if name in PRODUCTS and len(args) > 1 and all(_carries_flow(x) for x in args[:2]):
            return func(_half(args[0]), _half(args[1]), *args[2:], **kwargs)
        if name in QUOTIENTS and len(args) > 1 and isinstance(args[1], Tensor):
            return func(args[0], args[1].detach(), *args[2:], **kwargs)
        output = func(*args, **kwargs)
        return output.detach() if name in CONSTANT else output


class _Proportional(torch.autograd.Function):
    """The value given, with the gradient of a multiplication by what the input was multiplied by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(torch.where(x.isfinite() & (x != 0), value / x, 0.0))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (ratio,) = ctx.saved_tensors
        return gradients[0] * ratio, None


def _carries_flow(x: Any) -> bool:
    """Return whether something is an activation; weights are leaves."""
    return isinstance(x, Tensor) and x.requires_grad and not x.is_leaf


def _half(x: Tensor) -> Tensor:
    return (x + x.detach()) / 2


def _by_root_mean_square(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    return x * torch.rsqrt(x.detach().square().mean(dims, keepdim=True) + eps)


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    y = _by_root_mean_square(x, tuple(range(-len(shape), 0)), eps)
    return y if weight is None else y * weight


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    groups = x.unflatten(1, (num_groups, -1))
    y = _by_root_mean_square(groups, tuple(range(2, groups.ndim)), eps).flatten(1, 2)
    return y if weight is None else y * _along_channels(weight, y)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_var is None:
        y = _by_root_mean_square(x, tuple(d for d in range(x.ndim) if d != 1), eps)
    else:
        y = x * _along_channels(torch.rsqrt(running_var + eps), x)
    return y if weight is None else y * _along_channels(weight, y)


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    with LinearFlow():
        scores = query @ key.transpose(-2, -1) * scale
        if is_causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return scores.softmax(-1) @ value


STAND_INS: dict[str, Callable[..., Tensor]] = {
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
}
