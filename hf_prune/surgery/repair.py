"""Mend what a model's own code believes about sizes, by replaying the traced run on the cut model.

The first operation whose shape is not as predicted names the module and the number that is wrong (12 where 6 is
expected); the attribute of that module that holds the number is set, and the replay goes on.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_prune.analyse.axes import Axis, Expr, leaves, resolve, size_after, size_of
from hf_prune.analyse.graph import DueNumber, Held, OneOf
from hf_prune.analyse.trace import Recording, Step
from hf_prune.surgery.calls import Calls, install
from hf_prune.surgery.replay import (
    Mismatch,
    Sizes,
    attention_widths,
    cut_axes,
    first_mismatch,
    wrong_numbers,
)

Attributes = dict[str, dict[str, Any]]


@dataclass
class Repairs:
    """What was mended, as data.

    Attributes:
        attributes: Module path -> attribute -> value.
        calls: Numbers corrected on their way into torch; see `surgery.calls`.
    """

    attributes: Attributes = field(default_factory=dict)
    calls: Calls = field(default_factory=dict)


def repair(model: nn.Module, recording: Recording, sizes: Sizes, inputs: Any, held: Held) -> Repairs:
    """Mend a cut model until the replay agrees with the trace to the end.

    Args:
        model: With cut tensors; changed in place.
        recording: Trace of the dense model.
        sizes: Units left on each axis that was cut.
        inputs: What the trace ran on, on the model's device.
        held: What is known of the code already; what is found is added.

    Returns:
        What was mended.

    Raises:
        Mismatch: If a step disagrees and neither an attribute nor a call explains it.
    """
    modules = dict(model.named_modules())
    done = Repairs(attributes=set_known_layers(model, groups_after(recording, sizes)))
    apply_held(model, recording, held, sizes, done)
    guess, wrong_guesses = None, set()
    while (mismatch := first_mismatch(model, recording, sizes, inputs)) is not None:
        if guess and guess.brought_nothing(mismatch):
            guess.take_back(modules, held, done)
            wrong_guesses |= guess.names
            mismatch = guess.mismatch
        # A scale stays what it was, whatever attribute it is computed from.
        searched = mismatch.scale is None
        attributes = attributes_behind(modules, recording, mismatch, sizes, held, wrong_guesses) if searched else {}
        guess = Guess(modules, attributes, mismatch) if attributes else None
        if attributes:
            for path, values in attributes.items():
                held.attributes.setdefault(path, {}).update(values)
        elif found := calls_behind(modules, recording, mismatch, sizes, held):
            for path, calls in found.items():
                for call, row in calls.items():
                    held.calls.setdefault(path, {}).setdefault(call, {}).update(row)
        else:
            raise mismatch
        apply_held(model, recording, held, sizes, done)
    return done


class Guess:
    """Attributes that hold a number which should have changed; that may be so by accident."""

    def __init__(self, modules: Mapping[str, nn.Module], attributes: Attributes, mismatch: Mismatch) -> None:
        self.names = {(path, name) for path, values in attributes.items() for name in values}
        self.before = {(path, name): getattr(modules[path], name) for path, name in self.names}
        self.mismatch = mismatch

    def brought_nothing(self, mismatch: Mismatch) -> bool:
        """Tell whether the replay fails as before, or earlier."""
        before = self.mismatch
        return mismatch.progress < before.progress or (mismatch.progress, str(mismatch)) == (
            before.progress,
            str(before),
        )

    def take_back(self, modules: Mapping[str, nn.Module], held: Held, done: Repairs) -> None:
        """Give attributes the values they had."""
        for (path, name), value in self.before.items():
            setattr(modules[path], name, value)
            held.attributes[path].pop(name, None)
            done.attributes.get(path, {}).pop(name, None)


def apply_held(model: nn.Module, recording: Recording, held: Held, sizes: Sizes, done: Repairs) -> None:
    """Set every size that the code holds on to and that changes, and add it to what was done."""
    modules = dict(model.named_modules())
    for path, values in held.attributes.items():
        numbers = {name: held_value(value, sizes) for name, value in values.items()}
        changed = {
            name: number for name, number in numbers.items() if number not in (None, getattr(modules[path], name))
        }
        if changed:
            set_attributes(modules, {path: changed})
            done.attributes.setdefault(path, {}).update(changed)
    for path, calls in held.calls.items():
        right = {call: numbers_after(row, sizes) for call, row in calls.items()}
        if any(right.values()):
            done.calls[path] = {call: row for call, row in right.items() if row}
    install(model, done.calls)


def numbers_after(row: Mapping[int, DueNumber], sizes: Sizes) -> dict[int, int | float]:
    """Return what is to be corrected at a call; nothing if the cut does not touch it."""
    cut = cut_axes(sizes)
    return {p: due.after(sizes) for p, due in row.items() if any(cut & {*leaves(width)} for width in due.widths)}


def held_value(value: Any, sizes: Sizes) -> Any:
    """Return what an attribute must hold, or None if what is known of it does not tell."""
    if isinstance(value, OneOf):
        return value.after(sizes)
    if isinstance(value, int):
        return value
    parts = [held_value(part, sizes) for part in value]
    return None if None in parts else type(value)(parts)


def calls_behind(
    modules: dict[str, nn.Module], recording: Recording, mismatch: Mismatch, sizes: Sizes, held: Held
) -> dict[str, dict[int, dict[int, DueNumber]]]:
    """Find the first call in the failing module that was given a wrong number, and the same call elsewhere.

    Empty if there is none, or it was corrected already.
    """
    path = mismatch.module
    ours = recording.calls.get(path, [])
    for call, (given, recorded) in enumerate(zip(mismatch.given, ours, strict=False)):
        wrong, known = wrong_numbers(given, recorded, sizes), held.calls.get(path, {}).get(call, {})
        if not wrong or wrong.keys() <= numbers_after(known, sizes).keys():
            continue
        # What is known and was not corrected goes wrong by other axes than was thought.
        more = cut_axes(sizes) if wrong.keys() & known.keys() else set()
        found: dict[str, dict[int, dict[int, DueNumber]]] = {}
        for other, module in modules.items():
            theirs = recording.calls.get(other, [])
            same_code = type(module) is type(modules[path]) and len(theirs) == len(ours)
            if same_code and len(theirs[call]) == len(recorded):
                widths = _widths_behind(recording, other, isinstance(recorded[0], float)) | more
                found[other] = {call: {p: DueNumber(theirs[call][p], frozenset(widths)) for p in wrong}}
        return found
    return {}


def _widths_behind(recording: Recording, path: str, scale: bool) -> set[Axis]:
    """Return the axes from which a module may compute a size, or a scale: where there are, those of attention."""
    if not scale:
        sizes = [number for numbers in recording.calls[path] for number in numbers if isinstance(number, Expr)]
        return {leaf for dim in sizes for leaf in leaves(dim)}
    steps = [step for step in recording.steps if step.module == path]
    here = {leaf for step in steps for dims in [*step.inputs, *step.outputs] for dim in dims for leaf in leaves(dim)}
    return here & attention_widths(recording) or here


def attributes_behind(
    modules: dict[str, nn.Module],
    recording: Recording,
    mismatch: Mismatch,
    sizes: Sizes,
    held: Held,
    wrong_guesses: Collection[tuple[str, str]],
) -> Attributes:
    """Find the attributes that hold a number which should have changed, in the failing module and those of its kind.

    Attributes that are explained already are left out: the search ends at the latest when all are. Once all is known
    that the code holds on to, only those are looked at which hold one of several widths.
    """
    explained: dict[str, set[str]] = defaultdict(set)
    for other, values in held.attributes.items():
        explained[other] = {name for name, value in values.items() if held_value(value, sizes) is not None}
    for other, name in wrong_guesses:
        explained[other].add(name)
    if held.complete:
        for other, module in modules.items():
            explained[other] |= vars(module).keys() - held.attributes.get(other, {}).keys()
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
NOT_A_WIDTH = re.compile(r"image|img|patch|kernel|stride|window|shift|grid|padding|dilation|resolution")


def _matching(module: nn.Module, numbers: dict[int, OneOf], explained: set[str]) -> dict[str, Any]:
    """Return the attributes that hold one of the numbers, with what they mean."""
    values: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training" or name in explained or NOT_A_WIDTH.search(name):
            continue
        if type(value) is int and value in numbers:
            values[name] = numbers[value]
        elif isinstance(value, tuple | list) and all(type(part) is int for part in value) and numbers.keys() & {*value}:
            values[name] = type(value)([numbers.get(part, part) for part in value])
    return values


def groups_after(recording: Recording, sizes: Sizes) -> dict[str, int]:
    """Return how many groups every plain convolution has after the cut, by the path of its module."""
    return {
        step.module: size_after(step.inputs[0][1], sizes) // size_after(step.inputs[1][1], sizes)
        for step in recording.steps
        if step.name == "aten::convolution"
    }


def set_known_layers(model: nn.Module, groups: dict[str, int]) -> Attributes:
    """Set the sizes that torch's own layers keep, from the tensors they hold now."""
    done: Attributes = {}
    for path, module in model.named_modules():
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
    set_attributes(dict(model.named_modules()), done)
    return done


def set_attributes(modules: Mapping[str, nn.Module], attributes: Attributes) -> None:
    """Set attributes of modules given by their paths."""
    for path, values in attributes.items():
        for name, value in values.items():
            setattr(modules[path], name, value)
