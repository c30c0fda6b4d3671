"""What pruning did to a model's skeleton, as data: kept with the model, and done again to a dense skeleton.

The same edits that a cut makes with numbers are made without, when a saved model is built: tensors become smaller,
attributes and calls are set, branches are replaced. Which units a tensor kept does not matter then; its numbers follow.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.analyse.axes import Axis, Expr, leaves, size_of
from hf_prune.analyse.graph import AxisGraph
from hf_prune.analyse.running import named_tensors
from hf_prune.analyse.trace import Recording
from hf_prune.surgery.apply import exchange
from hf_prune.surgery.attributes import FROM_WEIGHTS, Attributes, set_attributes, set_known_layers
from hf_prune.surgery.calls import Calls, corrections, install
from hf_prune.surgery.constant import Constant
from hf_prune.surgery.features import feature_channels, head_widths, set_feature_channels
from hf_prune.surgery.repair import Repairs

KEY = "_hf_prune_structure"
# The length of every dimension that was cut, None for the others: heads and image sizes may change later.
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Removed:
    """A module that was replaced.

    Attributes:
        constant: What builds the `Constant` in its place; None if nothing is there any more.
        tensor: The name of a tensor that it held, or of one near it, to find it by.
    """

    constant: Mapping[str, Any] | None
    tensor: str


@dataclass(frozen=True)
class Structure:
    """All differences between a pruned model's skeleton and the dense one's, by the names that modules have now.

    Attributes:
        shapes: Tensor -> the lengths that it has where it was cut.
        attributes: Module path -> attribute -> value, where layers of torch do not tell by their weights.
        calls: See `surgery.calls`.
        removed: Module path -> what took its place.
        factors: Tensor -> for every dimension made of several axes, heads and their widths for instance, the sizes of
            these, None for the others; to tell them apart when the cut must be found out again.
        features: Channels of the feature maps that a timm model announces; None where there is nothing to say.
    """

    shapes: dict[str, Shape] = field(default_factory=dict)
    attributes: Attributes = field(default_factory=dict)
    calls: Calls = field(default_factory=dict)
    removed: dict[str, Removed] = field(default_factory=dict)
    factors: dict[str, tuple[tuple[int, ...] | None, ...]] = field(default_factory=dict)
    features: tuple[int, ...] | None = None

    def then(self, later: "Structure") -> "Structure":
        """Return the differences after a second pruning."""
        attributes = _outside(self.attributes, later.removed)
        for path, values in later.attributes.items():
            attributes[path] = attributes.get(path, {}) | values
        return Structure(
            shapes=_outside(self.shapes, later.removed)
            | {name: _last_cut(self.shapes.get(name), shape) for name, shape in later.shapes.items()},
            attributes=attributes,
            calls=_outside(self.calls, later.removed) | later.calls,
            removed=_outside(self.removed, later.removed) | later.removed,
            factors=_outside(self.factors, later.removed) | later.factors,
            features=later.features or self.features,
        )


def structure_of(model: nn.Module) -> Structure:
    """Return how a model differs from its dense skeleton; an empty structure if hf_prune did not change it."""
    return vars(model).get(KEY, Structure())


def structure_from(model: nn.Module, recording: Recording, sizes: dict[Axis, int], repairs: Repairs) -> Structure:
    """Return the structure of a model that was cut and repaired just now."""
    modules = dict(model.named_modules())
    attributes = {path: _not_from_weights(modules[path], values) for path, values in repairs.attributes.items()}
    shapes = {name: _cut_dims(tensor, recording.dims[name]) for name, tensor in named_tensors(model).items()}
    shapes = {name: shape for name, shape in shapes.items() if any(shape)}
    factors = {name: tuple(_factors(dim, sizes) for dim in recording.dims[name]) for name in shapes}
    return Structure(
        shapes=shapes,
        factors={name: sizes for name, sizes in factors.items() if any(sizes)},
        attributes={path: values for path, values in attributes.items() if values},
        calls={path: row for path, row in corrections(model).items() if path in repairs.calls},
    )


def note_cut(model: nn.Module, graph: AxisGraph, kept: Mapping[Axis, Tensor], repairs: Repairs) -> None:
    """Note with a model how it was cut, and let it tell its widths as they are."""
    sizes = {axis: len(index) for axis, index in kept.items()}
    before, cut = structure_of(model), structure_from(model, graph.recording, sizes, repairs)
    widths = cut.attributes.get("", {}) | head_widths(model, graph, sizes)
    cut = replace(
        cut,
        shapes=_outside(cut.shapes, before.removed),
        factors=_outside(cut.factors, before.removed),
        attributes=cut.attributes | ({"": widths} if widths else {}),
        features=feature_channels(model, graph, sizes),
    )
    modules = dict(model.named_modules())
    _keep_cut_buffers(modules, cut.shapes)
    set_attributes(modules, {"": widths})
    set_feature_channels(model, cut.features)
    vars(model)[KEY] = _with_constants_of(model, before.then(cut))


def _outside(names: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Return what has names outside of all paths."""
    paths = list(paths)
    return {name: value for name, value in names.items() if not any(_is_inside(name, path) for path in paths)}


def note_removed(model: nn.Module, dense: nn.Module) -> None:
    """Note with a model which modules of the dense one are not there any more."""
    found: dict[str, Removed] = {}
    for path, module in dense.named_modules():
        if any(_is_inside(path, outer) for outer in found) or not path:
            continue
        now = model.get_submodule(path)
        if isinstance(now, Constant | nn.Identity) and type(now) is not type(module):
            earlier = structure_of(model).removed.get(path)
            found[path] = earlier or Removed(None, _tensor_near(path, named_tensors(dense)))
    vars(model)[KEY] = _with_constants_of(model, structure_of(model).then(Structure(removed=found)))


def _tensor_near(path: str, names: Iterable[str]) -> str:
    """Return the first of the names inside a module, or inside the nearest module around it."""
    while not (inside := [name for name in names if _is_inside(name, path) or not path]):
        path = path.rpartition(".")[0]
    return inside[0]


def _with_constants_of(model: nn.Module, structure: Structure) -> Structure:
    """Return a structure with the constants as they are now: they may have been cut, or replaced."""
    now = {path: model.get_submodule(path) for path in structure.removed}
    constants = {path: module.to_json() if isinstance(module, Constant) else None for path, module in now.items()}
    return replace(structure, removed={
        path: replace(removed, constant=constants[path]) for path, removed in structure.removed.items()
    })  # fmt: skip


def _keep_cut_buffers(modules: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """Let buffers that constructors compute be saved from now on: they would compute the dense ones."""
    for name in names:
        path, _, own = name.rpartition(".")
        modules[path]._non_persistent_buffers_set.discard(own)


def _cut_dims(tensor: Tensor, dims: Iterable[Expr]) -> Shape:
    return tuple(n if n != size_of(dim) else None for n, dim in zip(tensor.shape, dims, strict=True))


def _factors(dim: Expr, sizes: dict[Axis, int]) -> tuple[int, ...] | None:
    axes = list(dict.fromkeys(leaves(dim)))
    return tuple(sizes.get(axis, axis.size) for axis in axes) if len(axes) > 1 else None


def _last_cut(earlier: Shape | None, later: Shape) -> Shape:
    if earlier is None:
        return later
    return tuple(before if n is None else n for before, n in zip(earlier, later, strict=True))


def _is_inside(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _not_from_weights(module: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    known = isinstance(module, FROM_WEIGHTS)
    return {name: value for name, value in values.items() if not known or name == "groups"}


@torch.no_grad()
def rebuild(model: nn.Module, structure: Structure) -> None:
    """Give a dense skeleton a structure; of tensors with numbers the leading parts stay. May be done again.

    Args:
        model: Changed in place; on any device, `meta` among them.
        structure: Must fit; what strangers wrote is checked before, in `publish.skeleton`.
    """
    for path, removed in structure.removed.items():
        if not isinstance(model.get_submodule(path), Constant | nn.Identity):
            model.set_submodule(path, _replacement(model.get_submodule(path), removed))
    tensors, new = named_tensors(model), {}
    for name, shape in structure.shapes.items():
        if name in tensors and any(n not in (None, m) for n, m in zip(shape, tensors[name].shape, strict=True)):
            new[id(tensors[name])] = _narrowed(tensors[name], shape)
    modules = dict(model.named_modules())
    _keep_cut_buffers(modules, structure.shapes)
    set_attributes(modules, structure.attributes)
    if new:
        exchange(model, new)
        set_known_layers(model, {})  # by weights and groups
    if structure.calls:
        install(model, structure.calls)
    set_feature_channels(model, structure.features)
    vars(model)[KEY] = structure


def _replacement(module: nn.Module, removed: Removed) -> nn.Module:
    if removed.constant is None:
        return nn.Identity()
    like = next(tensor for tensor in module.parameters() if tensor.is_floating_point())
    with torch.device(like.device):
        return Constant(**removed.constant).to(like.dtype)


def _narrowed(tensor: Tensor, shape: Shape) -> Tensor:
    if tensor.is_meta:
        lengths = [m if n is None else n for n, m in zip(shape, tensor.shape, strict=True)]
        part = torch.empty(lengths, dtype=tensor.dtype, device="meta")
    else:
        part = tensor[tuple(slice(n) for n in shape)].clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
