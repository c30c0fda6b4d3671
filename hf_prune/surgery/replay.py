"""Run a cut model beside the trace of the dense one: where does it leave the predicted path, and what is to blame?"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_prune.analyse.axes import Axis, Expr, leaves, size_after
from hf_prune.analyse.kernels import compute, operands
from hf_prune.analyse.running import ModuleStack, call_model, is_mixed, quiet_run, to_meta
from hf_prune.analyse.trace import Recording, Step
from hf_prune.analyse.watch import Given, Watch

Sizes = dict[Axis, int]

# Whether a tensor must be copied before it is viewed differently depends on sizes: these come and go.
SOFT = {f"aten::{name}" for name in (
    "clone", "contiguous", "alias", "detach", "_to_copy", "expand", "view", "_unsafe_view", "_reshape_alias", "t",
    "transpose", "permute", "unsqueeze", "squeeze", "copy_", "lift_fresh", "empty", "empty_like", "empty_strided",
    "slice",
)}  # fmt: skip


class Mismatch(Exception):  # noqa: N818 (a signal, not an error of the user's)
    """The replay left the traced path.

    Attributes:
        steps: The recorded steps that were due.
        module: Path of the innermost module that was running.
        given: Numbers that the module's watched calls were given so far.
        scale: (number used, numbers recorded) if a factor changed rather than a shape.
        progress: How far the replay came: operations compared, watched calls seen.
    """

    def __init__(self, what: str, scale: tuple[float, tuple[float, ...]] | None = None) -> None:
        super().__init__(what)
        self.steps: list[Step] = []
        self.module, self.scale = "", scale
        self.given: list[Given] = []
        self.progress: tuple[int, int] = (0, 0)


class Replay(TorchDispatchMode):
    """Compares every operation that computes something with the trace."""

    def __init__(self, recording: Recording, sizes: Sizes) -> None:
        super().__init__()
        self.steps, self.sizes, self.position = recording.steps, sizes, 0

    def due(self) -> list[Step]:
        """Return the recorded steps from where the replay stands to the next one that computes something."""
        stop = self.position
        while stop < len(self.steps) and self.steps[stop].name in SOFT:
            stop += 1
        return self.steps[self.position : stop + 1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if is_mixed(operands(args, kwargs, Tensor)):
            args, kwargs = to_meta((args, kwargs))
        if name in SOFT:
            return compute(func, args, cast(dict[str, Any], kwargs))
        due = self.due()
        if not due or due[-1].name != name:
            raise Mismatch(f"{name} runs where {due[-1].name if due else 'the end'} did")
        out = compute(func, args, cast(dict[str, Any], kwargs))
        self._compare(due[-1], out, args, kwargs)
        self.position += len(due)
        return out

    def _compare(self, step: Step, out: Any, args: Any, kwargs: Any) -> None:
        outputs = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        for tensor, dims in zip(outputs, step.outputs, strict=True):
            expected = [size_after(dim, self.sizes) for dim in dims]
            if list(tensor.shape) != expected:
                raise Mismatch(f"{step.name} gives {list(tensor.shape)}, expected {expected}")
        numbers = filter(math.isfinite, operands(args, kwargs, float))
        for number in numbers:
            if not any(math.isclose(number, recorded, rel_tol=1e-6) for recorded in step.scalars):
                raise Mismatch(
                    f"{step.name} uses {number:.4g} where {sorted(step.scalars)} was used", (number, step.scalars)
                )


def wrong_numbers(given: Given, recorded: Sequence[Expr | float], sizes: Sizes) -> dict[int, int | float]:
    """Return position -> what it should be, for the numbers of a watched call that are not as recorded."""
    if given is None or len(given) != len(recorded):
        return {}
    right = [size_after(n, sizes) if isinstance(n, Expr) else n for n in recorded]
    return {
        position: due
        for position, (n, due) in enumerate(zip(given, right, strict=True))
        if n != -1 and not math.isclose(n, due, rel_tol=1e-6)
    }


def first_mismatch(model: nn.Module, recording: Recording, sizes: Sizes, inputs: Any) -> Mismatch | None:
    """Run a cut model and return where it leaves the trace, or None if it does not."""
    mode, stack = Replay(recording, sizes), ModuleStack(model)
    given: dict[str, list[Given]] = defaultdict(list)

    def note(numbers: Given) -> None:
        for path in dict.fromkeys(stack.paths):
            given[path].append(numbers)
        # Nothing may be computed between two views, so a wrong one can cancel out in shape and still mix units.
        calls, number = recording.calls.get(stack.innermost, []), len(given[stack.innermost]) - 1
        if number < len(calls) and (wrong := wrong_numbers(numbers, calls[number], sizes)):
            due = list(wrong.values())
            scale = (numbers[0], (due[0],)) if numbers and isinstance(due[0], float) else None
            raise Mismatch(f"a call is given {numbers}, expected {due} at position {list(wrong)}", scale)

    try:
        with quiet_run(model), Watch(note, lambda *_: None), mode:
            call_model(model, inputs)
        return None
    except Exception as err:
        # Torch's own checks speak up outside of any operator too; what was due then is to blame.
        mismatch = err if isinstance(err, Mismatch) else Mismatch(f"{type(err).__name__}: {err}")
        mismatch.module = _running_module(model, err)
        due = mode.due() or recording.steps[-1:]
        mismatch.steps = [step for step in due if step.module == mismatch.module] or due
        mismatch.given, mismatch.progress = given[mismatch.module], (mode.position, len(given[""]))
        return mismatch
    finally:
        stack.remove()


def _running_module(model: nn.Module, err: BaseException) -> str:
    """Return the path of the innermost module in whose forward an error arose."""
    paths = {id(module): path for path, module in model.named_modules()}
    found, frame = "", err.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        found = paths.get(id(owner), found) if isinstance(owner, nn.Module) else found
        frame = frame.tb_next
    return found


def blamed(mismatch: Mismatch, recording: Recording, sizes: Sizes) -> set[Axis]:
    """Return the cut axes that a mismatch is about: those of its steps, or else of the module around them."""
    cut, path = _cut_axes(mismatch.steps, sizes), mismatch.module
    while not cut and path:
        steps = [step for step in recording.steps if step.module == path or step.module.startswith(path + ".")]
        # A method that is no forward runs in the name of its caller, but looks at tensors of its own module.
        tensors = [dims for name, dims in recording.dims.items() if name.startswith(path + ".")]
        cut = _cut_axes(steps, sizes) or _cut_in(tensors, sizes)
        path = path.rpartition(".")[0]
    if mismatch.scale is None:
        return cut
    number, recorded = mismatch.scale
    ratios = [number / other for other in recorded if other]
    explained = {
        axis for axis in cut for power in (-1, -0.5, -0.25, 0.25, 0.5, 1)
        if any(math.isclose(ratio, (sizes[axis] / axis.size) ** power, rel_tol=1e-4) for ratio in ratios)
    }  # fmt: skip
    # Scales come from the width at which queries meet keys; other axes can shrink by the same factor by accident.
    return explained & attention_widths(recording) or explained or cut


def attention_widths(recording: Recording) -> set[Axis]:
    """Return the axes along which queries meet keys."""
    return {leaf for expr, use in recording.uses if use == "attention width" for leaf in leaves(expr)}


def cut_axes(sizes: Sizes) -> set[Axis]:
    """Return the axes that lose units."""
    return {axis for axis, size in sizes.items() if size != axis.size}


def _cut_axes(steps: list[Step], sizes: Sizes) -> set[Axis]:
    return _cut_in([dims for step in steps for dims in [*step.outputs, *step.inputs]], sizes)


def _cut_in(tensors: list[list[Expr]], sizes: Sizes) -> set[Axis]:
    return {leaf for dims in tensors for dim in dims for leaf in leaves(dim)} & cut_axes(sizes)
