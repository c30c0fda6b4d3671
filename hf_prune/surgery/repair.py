"""Mend what a model's own code believes about sizes, by replaying the traced run on the cut model.

The first operation whose shape is not as predicted names the module and the number that is wrong (12 where 6 is
expected); the attribute of that module that holds the number is set, and the replay goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_prune.analyse.axes import Axis, Expr, leaves
from hf_prune.analyse.graph import DueNumber, Held
from hf_prune.analyse.trace import Recording
from hf_prune.surgery.attributes import (
    Attributes,
    attributes_behind,
    groups_after,
    held_value,
    set_attributes,
    set_known_layers,
)
from hf_prune.surgery.calls import Calls, install
from hf_prune.surgery.replay import Mismatch, Sizes, attention_widths, cut_axes, first_mismatch, wrong_numbers


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
        attributes: Attributes = {}
        # After the trial cut what is still unknown is rather a number at a call than one more attribute.
        calls = calls_behind(modules, recording, mismatch, sizes, held) if held.complete else {}
        # And a scale stays what it was, whatever attribute it is computed from.
        if not calls and mismatch.scale is None:
            attributes = attributes_behind(modules, recording, mismatch, sizes, held, wrong_guesses)
        if not calls and not attributes:
            calls = calls_behind(modules, recording, mismatch, sizes, held)
        if not calls and not attributes:
            raise mismatch
        guess = Guess(modules, attributes, mismatch) if attributes else None
        held.add(attributes, calls)
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
        same = str(mismatch) == str(self.mismatch) and mismatch.progress == self.mismatch.progress
        return same or mismatch.progress < self.mismatch.progress

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
