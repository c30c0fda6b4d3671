"""Prove that a cut model is what was promised."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hf_prune.analyse.axes import Axis, size_after
from hf_prune.analyse.graph import AxisGraph
from hf_prune.analyse.running import call_model, named_tensors, output_tensors, quiet_run
from hf_prune.errors import SurgeryError


class DifferenceError(SurgeryError):
    """The cut model runs, but not as it must."""


def probe_inputs(graph: AxisGraph, model: nn.Module, seed: int = 0) -> Any:
    """Return the example inputs with noise instead of blank images, on the model's device and as precise as it is."""
    first = next(tensor for tensor in named_tensors(model).values() if tensor.is_floating_point())
    device, precise = first.device, first.dtype is torch.float64
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        return torch.randn(tensor.shape, generator=generator).to(device, first.dtype if precise else tensor.dtype)

    return tree_map_only(Tensor, fill, graph.inputs)


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the floating-point tensors of a model's output."""
    with quiet_run(model):
        return [t.clone() for t in output_tensors(call_model(model, inputs)) if t.is_floating_point()]


@contextmanager
def in_double(model: nn.Module) -> Iterator[None]:
    """Compute in float64 for a while; the weights take twice their memory, and come back as they were to the bit."""
    dtypes = {name: t.dtype for name, t in named_tensors(model).items() if t.is_floating_point()}

    def change(wanted: Mapping[str, torch.dtype]) -> None:
        for name, tensor in named_tensors(model).items():
            if name in wanted:
                tensor.data = tensor.data.to(wanted[name])

    change(dict.fromkeys(dtypes, torch.float64))
    try:
        yield
    finally:
        change(dtypes)


@contextmanager
def silenced(model: nn.Module, graph: AxisGraph, kept: Mapping[Axis, Tensor]) -> Any:
    """Silence the units that will go, in the dense model: nothing writes them and nothing reads them.

    Where queries meet keys nothing reads them all, so nothing carries them either: a norm's bias would speak for them.

    One module at a time has a second copy of its weights, while it runs.
    """
    tensors, handles = named_tensors(model), []
    # By identity: a shared weight has several names.
    masks = {id(tensors[name]): rows for name, rows in _masks(graph, kept, tensors).items()}
    for module in model.modules():
        own = {name: masks[id(tensor)] for name, tensor in [*module._parameters.items(), *module._buffers.items()]
               if id(tensor) in masks}  # fmt: skip
        if own:
            swap = _Swap(own)
            handles += [
                module.register_forward_pre_hook(swap.enter),
                module.register_forward_hook(swap.leave, always_call=True),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masks(
    graph: AxisGraph, kept: Mapping[Axis, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, list[tuple[int, Tensor]]]:
    """Return for each tensor to be silenced the indices to set to zero, dimension by dimension."""
    masks: dict[str, list[tuple[int, Tensor]]] = {}
    for axis in graph.axes.values():
        if axis.leaf not in kept:
            continue
        gone = torch.ones(axis.size + 1, dtype=torch.bool)
        gone[kept[axis.leaf]] = False
        gone[-1] = False
        parameters = [s for s in axis.carriers if isinstance(tensors[s.name], nn.Parameter)]
        for s in [*axis.writers, *axis.readers, *([] if axis.can_gate else parameters)]:
            masks.setdefault(s.name, []).append((s.dim, gone[s.units].nonzero().squeeze(1)))
    return masks


class _Swap:
    """Gives a module masked weights while it runs."""

    def __init__(self, masks: dict[str, list[tuple[int, Tensor]]]) -> None:
        self.masks, self.saved = masks, []

    def enter(self, module: nn.Module, *_: Any) -> None:
        saved = {}
        for name, rows in self.masks.items():
            store = module._parameters if name in module._parameters else module._buffers
            tensor = store[name]
            if tensor is None:
                continue
            saved[name] = tensor
            masked = tensor.detach().clone()
            for dim, index in rows:
                masked.index_fill_(dim, index.to(masked.device), 0)
            if store is module._parameters:
                module._parameters[name] = nn.Parameter(masked, requires_grad=False)
            else:
                module._buffers[name] = masked
        self.saved.append(saved)

    def leave(self, module: nn.Module, *_: Any) -> None:
        if self.saved:
            for name, tensor in self.saved.pop().items():
                (module._parameters if name in module._parameters else module._buffers)[name] = tensor


def reasons_not_exact(graph: AxisGraph, kept: Mapping[Axis, Tensor]) -> list[str]:
    """Return why the cut model need not equal its silenced twin; empty if it must."""
    cut = [axis for axis in graph.axes.values() if axis.leaf in kept]
    return sorted({f"{axis.kind}: {axis.inexact}" for axis in cut if axis.inexact})


def require_equal(expected: list[Tensor], found: list[Tensor], *, tolerance: float = 1e-4) -> float:
    """Return the largest difference, relative to the size of the outputs.

    Raises:
        SurgeryError: If shapes differ.
        DifferenceError: If it is larger than the tolerance.
    """
    worst = 0.0
    for first, second in zip(expected, found, strict=True):
        if first.shape != second.shape:
            raise SurgeryError(f"outputs must keep their shape {tuple(first.shape)}, got {tuple(second.shape)}")
        scale = float(first.abs().max().clamp_min(1e-6))
        worst = max(worst, float((first.double() - second.double()).abs().max()) / scale)
    if not worst <= tolerance:
        raise DifferenceError(
            f"the pruned model must equal the dense one whose removed units are silenced, but outputs differ by "
            f"{worst:.2g} of their size (allowed {tolerance:g})"
        )
    return worst


def require_shapes(model: nn.Module, graph: AxisGraph, kept: Mapping[Axis, Tensor]) -> None:
    """Check that every tensor has the shape that the plan predicts.

    Raises:
        SurgeryError: If one has not.
    """
    sizes = {axis: len(index) for axis, index in kept.items()}
    for name, tensor in named_tensors(model).items():
        expected = tuple(size_after(dim, sizes) for dim in graph.recording.dims[name])
        if tuple(tensor.shape) != expected:
            raise SurgeryError(f"'{name}' must have shape {expected} after pruning, got {tuple(tensor.shape)}")
