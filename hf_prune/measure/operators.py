"""The operators of a model: what runs, on tensors whose shapes are functions of the sizes of axes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_prune.analyse.axes import Axis, Expr, leaves, resolve, size_of
from hf_prune.analyse.graph import AxisGraph, build_graph
from hf_prune.analyse.inputs import batch_of
from hf_prune.analyse.running import skeleton, to_meta
from hf_prune.analyse.trace import OneCall, Recording, Tracer, record

ATTENTION = functional.scaled_dot_product_attention
# No work, though their schemas do not say that they give views; and what makes tables from nothing.
IDLE = {"aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::lift_fresh"}
# Weights are met once a run and have mostly left the nearest caches by the next one.
COLD_BYTES, MOST_COPIES = 64 << 20, 32


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that an operator is given.

    Attributes:
        dims: Its dimensions.
        order: Dimensions from the slowest to the fastest in memory.
        dtype: Its data type.
        is_weight: Whether it is a parameter, or made of parameters alone.
    """

    dims: tuple[Expr, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    is_weight: bool

    def make(self, size: Callable[[Expr], int], device: torch.device) -> Tensor:
        """Return a tensor of ones with this layout."""
        shape = [size(self.dims[d]) for d in self.order]
        back = [self.order.index(d) for d in range(len(shape))]
        return torch.ones(shape, dtype=self.dtype, device=device).permute(back)


@dataclass(frozen=True)
class Operator:
    """One operation of the run of a model.

    Attributes:
        key: What it is, in words: operators with one key take equally long.
        func: What is called.
        args: Its arguments, a `TensorSpec` in place of every tensor.
        kwargs: Keyword arguments, likewise.
        dims: Dimensions that can change, each once.
        module: Path of the innermost module it ran in.
    """

    key: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dims: tuple[Expr, ...]
    module: str = ""

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices, so that its time depends on each dimension by itself."""
        return self.func is ATTENTION or self.func._schema.name in PRODUCTS  # type: ignore[attr-defined]

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution."""
        return self.func is not ATTENTION and self.func._schema.name == "aten::convolution"  # type: ignore[attr-defined]

    def num_values(self, *sizes: Any) -> Any:
        """Return how many numbers it is given, its changing dimensions being of the given sizes (numbers or arrays)."""
        after = dict(zip(self.dims, sizes, strict=True))
        specs = [spec for spec in tree_leaves((self.args, self.kwargs)) if isinstance(spec, TensorSpec)]
        return sum(prod(after.get(dim, size_of(dim)) for dim in spec.dims) for spec in specs)

    def runner(self, sizes: Sequence[int], device: torch.device) -> Callable[[], Any]:
        """Return a call that runs it once on tensors of its own, its changing dimensions being of the given sizes."""
        after = dict(zip(self.dims, sizes, strict=True))
        specs = [spec for spec in tree_leaves((self.args, self.kwargs)) if isinstance(spec, TensorSpec)]

        def size(dim: Expr) -> int:
            return after.get(dim, size_of(dim))

        num_bytes = sum(prod(map(size, s.dims)) * s.dtype.itemsize for s in specs if s.is_weight)
        num_copies = min(-(-COLD_BYTES // num_bytes), MOST_COPIES) if num_bytes else 1
        made: dict[int, Tensor] = {}

        def tensor(spec: TensorSpec) -> Tensor:
            if spec.is_weight:
                return spec.make(size, device)
            return made.setdefault(id(spec), spec.make(size, device))

        calls = []
        for _ in range(num_copies):
            args, kwargs = tree_map_only(TensorSpec, tensor, (self.args, self.kwargs))
            calls.append((_with_sizes(self.func, list(args)), kwargs))
        following, func = cycle(calls), self.func

        def run() -> Any:
            args, kwargs = next(following)
            return func(*args, **kwargs)

        return run


PRODUCTS = {"aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::convolution"}


def _with_sizes(func: Any, args: list[Any]) -> list[Any]:
    """Set the arguments that repeat what the shapes of tensors say."""
    name = "" if func is ATTENTION else func._schema.name
    if name == "aten::native_layer_norm":
        args[1] = list(args[0].shape[-len(args[1]) :])
    elif name == "aten::convolution":
        # (input, weight, bias, stride, padding, dilation, transposed, output padding, groups)
        args[8] = args[0].shape[1] // args[1].shape[1] if not args[6] else args[8]
    elif name == "aten::native_group_norm":
        args[4] = args[0].shape[1]
    return args


def operators_of(graph: AxisGraph, batch_size: int) -> tuple[AxisGraph, list[Operator]]:
    """Run a model once more, without numbers, on a batch, and return what it does.

    Args:
        graph: The analysed model.
        batch_size: Images a batch; its inputs were of one.

    Returns:
        The axes of that run under their names, and the operators in order, fused attention as one of them; what only
        gives a tensor another shape is left out.
    """
    inputs = batch_of(graph.inputs, batch_size)
    inputs = inputs if graph.recording.by_real_run else to_meta(inputs)
    tracers: list[_OperatorTracer] = []

    def tracer_of(*parts: Any) -> Tracer:
        tracers.append(_OperatorTracer(*parts))
        return tracers[0]

    empty = skeleton(graph.skeleton)
    with _AttentionWhole(tracers):
        recording = record(empty if not graph.recording.by_real_run else graph.skeleton, inputs, tracer_of)
    batch = build_graph(graph.skeleton, recording, empty, inputs)
    free = {axis.leaf for name, axis in batch.axes.items() if name in graph.axes}
    return batch, [_operator(*call, free) for call in tracers[0].calls]


class _OperatorTracer(Tracer):
    """Also keeps what every operation was given."""

    def __init__(self, recording: Recording, *parts: Any) -> None:
        super().__init__(recording, *parts)
        self.calls: list[tuple[str, Any, tuple, dict[str, Any]]] = []
        self.in_attention = False

    def note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Keep a call."""
        specs = tree_map_only(Tensor, self._spec, (tuple(args), dict(kwargs)))
        self.calls.append((self.stack.innermost, func, *specs))

    def _spec(self, tensor: Tensor) -> TensorSpec:
        order = sorted(range(tensor.ndim), key=lambda d: (-tensor.stride(d) if tensor.shape[d] > 1 else 0, d))
        return TensorSpec(tuple(self.dims_of(tensor)), tuple(order), tensor.dtype, bool(self.origin.get(tensor)))

    def _record(self, call: OneCall) -> None:
        restrides = torch.Tag.inplace_view in call.func.tags
        works = not (call.name in IDLE or restrides or any(map(_is_view, call.func._schema.returns)))
        if works and not self.in_attention and any(t.is_floating_point() for t in call.tensors):
            arguments = call.func._schema.arguments
            args = [call.arguments[a.name] for a in arguments if not a.kwarg_only]
            self.note(call.func, args, {a.name: call.arguments[a.name] for a in arguments if a.kwarg_only})
        super()._record(call)


def _is_view(returned: Any) -> bool:
    return returned.alias_info is not None and not returned.alias_info.is_write


class _AttentionWhole(TorchFunctionMode):
    """Sees fused attention before it is taken apart."""

    def __init__(self, tracers: list[_OperatorTracer]) -> None:
        super().__init__()
        self.tracers = tracers

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not ATTENTION:
            return func(*args, **kwargs)
        (tracer,) = self.tracers
        tracer.note(func, args, kwargs)
        tracer.in_attention = True
        try:
            return func(*args, **kwargs)
        finally:
            tracer.in_attention = False


def _operator(module: str, func: Any, args: tuple, kwargs: dict[str, Any], free: set[Axis]) -> Operator:
    """Find what can change in an operation, and put it into words."""
    dims: dict[Expr, str] = {}

    def resolved(spec: TensorSpec) -> TensorSpec:
        return TensorSpec(tuple(map(resolve, spec.dims)), spec.order, spec.dtype, spec.is_weight)

    args, kwargs = tree_map_only(TensorSpec, resolved, (args, kwargs))
    words = []
    for leaf in tree_leaves((args, kwargs)):
        if not isinstance(leaf, TensorSpec):
            words.append(str(leaf))
            continue
        for dim in leaf.dims:
            if free & set(leaves(dim)):
                dims.setdefault(dim, chr(ord("a") + len(dims)))
        shape = ",".join(f"{dims.get(dim, '')}{size_of(dim)}" for dim in leaf.dims)
        order = "" if leaf.order == tuple(sorted(leaf.order)) else f"@{''.join(map(str, leaf.order))}"
        words.append(f"[{shape}]{order}{'w' if leaf.is_weight else ''}:{str(leaf.dtype).removeprefix('torch.')}")
    name = "attention" if func is ATTENTION else func._schema.name.removeprefix("aten::")
    return Operator(f"{name} {' '.join(words)}", func, args, kwargs, tuple(dims), module)
