"""Slice the tensors of a model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.analyse.axes import Axis, Expr, kept_indices
from hf_prune.analyse.running import named_tensors

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
    _exchange(model, new)
    return before


def put_back(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Undo `cut_tensors`."""
    now = named_tensors(model)
    _exchange(model, {id(now[name]): tensor for name, tensor in before.items()})


def _exchange(model: nn.Module, new: Mapping[int, Tensor]) -> None:
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
