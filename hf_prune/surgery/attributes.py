"""Find what attributes of modules hold of a model's sizes, and set them: `num_heads` is 12 where 6 are left."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from hf_prune.analyse.axes import Expr, resolve, size_after, size_of
from hf_prune.analyse.graph import Held, OneOf
from hf_prune.analyse.trace import Recording, Step
from hf_prune.surgery.replay import Mismatch, Sizes

# Module path -> attribute -> value
Attributes = dict[str, dict[str, Any]]


def held_value(value: Any, sizes: Sizes) -> Any:
    """Return what an attribute must hold, or None if what is known of it does not tell."""
    if isinstance(value, OneOf):
        return value.after(sizes)
    if isinstance(value, int):
        return value
    parts = [held_value(part, sizes) for part in value]
    return None if None in parts else type(value)(parts)


def attributes_behind(
    modules: dict[str, nn.Module],
    recording: Recording,
    mismatch: Mismatch,
    sizes: Sizes,
    held: Held,
    wrong_guesses: Collection[tuple[str, str]],
) -> Attributes:
    """Find the attributes that hold a number which should have changed, in the failing module and those of its kind.

    Attributes that are explained already are left out: the search ends at the latest when all are.
    """
    explained: dict[str, set[str]] = defaultdict(set)
    for other, values in held.attributes.items():
        explained[other] = {name for name, value in values.items() if held_value(value, sizes) is not None}
    for other, name in wrong_guesses:
        explained[other].add(name)
    wrong, path = changed_numbers(mismatch.steps, sizes), mismatch.module
    while not (values := _matching(modules[path], wrong, explained.get(path, set()))):
        if not path:
            return {}
        path = path.rpartition(".")[0]
    found: dict[str, dict[str, Any]] = {path: values}
    for other, module in modules.items():
        if other != path and type(module) is type(modules[path]):
            steps = same_steps(recording, mismatch, mismatch.module.removeprefix(path), other)
            there = _matching(module, changed_numbers(steps, sizes), explained.get(other, set()))
            same = {name: value for name, value in there.items() if name in values}
            if same:
                found[other] = same
    return found


def same_steps(recording: Recording, mismatch: Mismatch, inner: str, other: str) -> list[Step]:
    """Return what another module of a kind does where this one failed; nothing if its code took another way."""
    ours = [step for step in recording.steps if step.module == mismatch.module]
    theirs = [step for step in recording.steps if step.module == other + inner]
    if [step.name for step in ours] != [step.name for step in theirs]:
        return []
    return [step for step, failed in zip(theirs, ours, strict=True) if any(failed is due for due in mismatch.steps)]


def changed_numbers(steps: list[Step], sizes: Sizes) -> dict[int, OneOf]:
    """Return size before -> dimension for those that change at steps; a number that changes in two ways is left out."""
    found: dict[int, dict[int, list[Expr]]] = defaultdict(lambda: defaultdict(list))
    for part in (p for step in steps for dims in [*step.outputs, *step.inputs] for dim in dims for p in parts_of(dim)):
        before, after = size_of(part), size_after(part, sizes)
        if before != after and part not in found[before][after]:
            found[before][after].append(part)
    return {before: OneOf(tuple(*by_after.values())) for before, by_after in found.items() if len(by_after) == 1}


def parts_of(expr: Expr) -> list[Expr]:
    """Return a dimension and everything it is made of."""
    expr = resolve(expr)
    children = getattr(expr, "factors", None) or getattr(expr, "parts", None) or ()
    return [expr, *(part for child in children for part in parts_of(child))]


# Numbers that describe images and windows are equal to a width by accident only.
NOT_A_WIDTH = re.compile(
    r"image|img|patch|kernel|stride|window|shift|grid|padding|dilation|resolution|points|indices|idx"
)


def _matching(module: nn.Module, numbers: dict[int, OneOf], explained: set[str]) -> dict[str, Any]:
    """Return the attributes that hold one of the numbers, with what they mean."""
    values: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training" or name in explained or NOT_A_WIDTH.search(name):
            continue
        if type(value) is int and value in numbers:
            values[name] = numbers[value]
        elif isinstance(value, tuple | list) and _are_sizes(value) and numbers.keys() & {*value}:
            values[name] = type(value)([numbers.get(part, part) for part in value])
    return values


def _are_sizes(value: Collection[Any]) -> bool:
    """Tell whether an attribute is a shape or the like; longer lists of numbers are tables."""
    return len(value) <= 8 and all(type(part) is int for part in value)


def groups_after(recording: Recording, sizes: Sizes) -> dict[str, int]:
    """Return how many groups every plain convolution has after the cut, by the path of its module."""
    return {
        step.module: size_after(step.inputs[0][1], sizes) // size_after(step.inputs[1][1], sizes)
        for step in recording.steps
        if step.name == "aten::convolution"
    }


# Layers of torch whose sizes can be told from their weights, but for the groups of a convolution.
FROM_WEIGHTS = (
    nn.Linear,
    nn.LayerNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.modules.conv._ConvNd,
)


def set_known_layers(model: nn.Module, groups: dict[str, int]) -> Attributes:
    """Set the sizes that torch's own layers keep, from the tensors they hold now."""
    done: Attributes = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        wanted: dict[str, Any] = {}
        if isinstance(module, nn.Linear):
            wanted = {"out_features": weight.shape[0], "in_features": weight.shape[1]}
        elif isinstance(module, nn.LayerNorm):
            wanted = {"normalized_shape": tuple(weight.shape)}
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            wanted = {"num_features": weight.shape[0]}
        elif isinstance(module, nn.GroupNorm):
            wanted = {"num_channels": weight.shape[0]}
        elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
            number = groups.get(path, module.groups)
            wanted = {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * number, "groups": number}
        elif isinstance(module, nn.modules.conv._ConvNd):
            wanted = {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * module.groups}
        changed = {name: value for name, value in wanted.items() if getattr(module, name) != value}
        if changed:
            done[path] = changed
    set_attributes(modules, done)
    return done


def set_attributes(modules: Mapping[str, nn.Module], attributes: Attributes) -> None:
    """Set attributes of modules given by their paths."""
    for path, values in attributes.items():
        for name, value in values.items():
            setattr(modules[path], name, value)
