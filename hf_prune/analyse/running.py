"""Run models for their shapes: without weights, without side effects, with an eye on where they are."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_prune.analyse.caches import forget

CONTAINERS = {dict, OrderedDict, set, list}
ATOMS = {int, float, bool, str, type(None)}


class ModuleStack:
    """Knows in which module the model is."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = [""]
        self.handles = []
        for path, module in model.named_modules():
            enter, leave = self._hooks(path)
            self.handles.append(module.register_forward_pre_hook(enter))
            self.handles.append(module.register_forward_hook(leave, always_call=True))

    def _hooks(self, path: str) -> tuple[Any, Any]:
        def enter(*_: Any) -> None:
            self.paths.append(path)

        def leave(*_: Any) -> None:
            self.paths.pop()

        return enter, leave

    @property
    def innermost(self) -> str:
        """Path of the module whose forward is running."""
        return self.paths[-1]

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a model without its weights: every parameter and buffer on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        stand_in = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(stand_in, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else stand_in
        )
    # What `copy.deepcopy` does, but without a look at every number and word, of which modules mostly consist.
    alike = [module for module in model.modules() if not hasattr(module, "__deepcopy__") and id(module) not in memo]
    for module in alike:
        memo[id(module)] = type(module).__new__(type(module))
    for module in alike:
        vars(memo[id(module)]).update((name, _copied(value, memo)) for name, value in vars(module).items())
    return copy.deepcopy(model, memo)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Return a deep copy; the many tables of hooks with nothing in them get one of their own at once."""
    if type(value) in ATOMS:
        return value
    if type(value) in CONTAINERS and not value:
        return memo.setdefault(id(value), type(value)())
    return copy.deepcopy(value, memo)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested arguments, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def to_meta(tree: Any) -> Any:
    """Return nested arguments with stand-ins on the meta device for their tensors."""
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), tree)


def is_mixed(tensors: list[Tensor]) -> bool:
    """Return whether some tensors are on the meta device and others are not: constants that a model keeps elsewhere."""
    return any(tensor.is_meta for tensor in tensors) and not all(tensor.is_meta for tensor in tensors)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, by the first of its names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def forget_tables(model: nn.Module) -> None:
    """Change the mode for a moment, at which models throw away what they computed from their weights."""
    modes = {module: module.training for module in model.modules()}
    model.train().eval()
    _set_modes(modes)


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    # Past `nn.Module.__setattr__`, which looks for tensors first.
    for module, training in modes.items():
        vars(module)["training"] = training


@contextmanager
def quiet_run(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no memories, no fused encoder layers that would hide what happens inside.

    Afterwards modules have the attributes they had, and in lists and dictionaries what was in them: a mode, a table
    made for the size of these inputs.
    """
    modes = {module: module.training for module in model.modules()}
    forget_tables(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    forget(model)
    stores = [
        store for module in modes for store in (vars(module), *vars(module).values()) if type(store) in CONTAINERS
    ]
    before = [(store, type(store)(store) if store else ()) for store in stores]
    try:
        # Which attention kernel torch takes depends on sizes; this one is made of operations that have rules.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for store, content in before:
            store.clear()
            (store.extend if isinstance(store, list) else store.update)(content)
        _set_modes(modes)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple or a dictionary of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def output_tensors(output: Any) -> list[Tensor]:
    """Return every tensor in whatever a model returns."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in output_tensors(part)]
    if hasattr(output, "__dict__"):
        return output_tensors(vars(output))
    return []
