"""Numbers that a model's forward computes for itself, `x.reshape(B, N, C)` or `q / sqrt(d)`, put right from outside.

Where no attribute holds a wrong number there is nothing to set. The narrowest thing left is to correct the number on
its way into torch: which watched call in the module's forward, which of its numbers, which value. That is plain data,
so it can be stored with the model and installed again.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from hf_prune.analyse.watch import call_with, is_watched, numbers_given

# module path -> number of the watched call -> position of the number -> its value: a size, or a scale
Calls = dict[str, dict[int, dict[int, int | float]]]

KEY = "_corrected_calls"


class _Correct(TorchFunctionMode):
    """Replaces numbers in the calls of one forward pass."""

    def __init__(self, numbers: Mapping[int, Mapping[int, int | float]]) -> None:
        super().__init__()
        self.numbers, self.call = numbers, -1

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not is_watched(func, args, kwargs):
            return func(*args, **kwargs)
        self.call += 1
        given = numbers_given(func, args, kwargs)
        if given is None or self.call not in self.numbers:
            return func(*args, **kwargs)
        right = self.numbers[self.call]
        return call_with(func, args, kwargs, [n if n == -1 else right.get(p, n) for p, n in enumerate(given)])


class Correction:
    """The hooks that correct one module's calls."""

    def __init__(self, numbers: Mapping[int, Mapping[int, int | float]]) -> None:
        self.numbers = {int(call): {int(p): value for p, value in row.items()} for call, row in numbers.items()}
        self.open: list[_Correct] = []

    def enter(self, *_: Any) -> None:
        """Forward pre-hook."""
        mode = _Correct(self.numbers)
        mode.__enter__()
        self.open.append(mode)

    def leave(self, *_: Any) -> None:
        """Forward hook, called after errors too."""
        if self.open:
            self.open.pop().__exit__(None, None, None)


def install(model: nn.Module, calls: Calls) -> None:
    """Correct calls from now on, besides those that are corrected already."""
    now = corrections(model)
    merged = {path: {call: dict(row) for call, row in now.get(path, {}).items()} for path in calls}
    for path, numbers in calls.items():
        for call, row in numbers.items():
            merged[path].setdefault(call, {}).update(row)
    reinstall(model, now | merged)


def corrections(model: nn.Module) -> Calls:
    """Return what is corrected in a model."""
    return {path: module.__dict__[KEY][0].numbers for path, module in model.named_modules() if KEY in module.__dict__}


def reinstall(model: nn.Module, calls: Calls) -> None:
    """Correct these calls and no others."""
    for path, module in model.named_modules():
        if KEY in module.__dict__:
            for handle in module.__dict__.pop(KEY)[1]:
                handle.remove()
        if path in calls:
            correction = Correction(calls[path])
            module.__dict__[KEY] = (correction, (
                module.register_forward_pre_hook(correction.enter),
                module.register_forward_hook(correction.leave, always_call=True),
            ))  # fmt: skip
