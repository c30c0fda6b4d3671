"""Slice the tensors of a model and mend its code, or leave it as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.analyse.axes import Axis, Expr, kept_indices
from hf_prune.analyse.graph import AxisGraph
from hf_prune.analyse.running import forget_tables, named_tensors
from hf_prune.errors import SurgeryError
from hf_prune.surgery.attributes import set_attributes
from hf_prune.surgery.calls import corrections, install, reinstall
from hf_prune.surgery.repair import Repairs
from hf_prune.surgery.verify import require_shapes

Kept = Mapping[Axis, Tensor]


def kept_of_dims(dims: list[Expr], kept: Kept) -> list[Tensor]:
    """Return for every dimension of a tensor which of its indices remain."""
    return [kept_indices(dim, dict(kept)) for dim in dims]


def slice_tensor(tensor: Tensor, indices: list[Tensor]) -> Tensor:
    """Return a contiguous copy that holds only the given indices of every dimension, or the tensor itself."""
    result = tensor
    for d, index in enumerate(indices):
        if len(index) != tensor.shape[d]:
            result = result.index_select(d, index.to(tensor.device))
    return result


@torch.no_grad()
def cut_tensors(model: nn.Module, dims: Mapping[str, list[Expr]], kept: Kept) -> dict[str, Tensor]:
    """Replace every parameter and buffer by what remains of it, shared ones by one shared result.

    Args:
        model: Changed in place.
        dims: Dimensions of every parameter and buffer.
        kept: Units that remain, for the axes that lose some.

    Returns:
        The tensors as they were, by name, for `put_back`. As long as it lives, so do they.
    """
    before: dict[str, Tensor] = {}
    new: dict[int, Any] = {}
    for name, tensor in named_tensors(model).items():
        remaining = slice_tensor(tensor, kept_of_dims(dims[name], kept))
        if remaining is tensor:
            continue
        before[name] = tensor
        if isinstance(tensor, nn.Parameter):
            remaining = nn.Parameter(remaining, requires_grad=tensor.requires_grad)
        new[id(tensor)] = remaining
    exchange(model, new)
    return before


def put_back(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Undo `cut_tensors`."""
    now = named_tensors(model)
    exchange(model, {id(now[name]): tensor for name, tensor in before.items()})


def exchange(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Replace tensors by identity, wherever a module holds them."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) in new:
                    store[name] = new[id(tensor)]  # type: ignore[assignment]
        # Some modules keep a parameter a second time, in a list or under another name.
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and id(value) in new:
                vars(module)[name] = new[id(value)]


@contextmanager
def cut(model: nn.Module, graph: AxisGraph, kept: Kept, repairs: Repairs) -> Iterator[None]:
    """Cut and mend a model; if what is done next fails, put everything back.

    Raises:
        SurgeryError: If a tensor has another shape than predicted, or for any error of what is done next.
    """
    modules, calls = dict(model.named_modules()), corrections(model)
    old = {path: {name: getattr(modules[path], name) for name in values} for path, values in repairs.attributes.items()}
    before = cut_tensors(model, graph.recording.dims, kept)
    try:
        set_attributes(modules, repairs.attributes)
        install(model, repairs.calls)
        forget_tables(model)
        require_shapes(model, graph, kept)
        yield
    except Exception as err:
        put_back(model, before)
        set_attributes(modules, old)
        reinstall(model, calls)
        if isinstance(err, SurgeryError):
            raise
        raise SurgeryError(f"the cut model must run, but it does not: {type(err).__name__}: {err}") from err
