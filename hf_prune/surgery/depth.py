"""Take out branches and blocks: a module whose output no longer depends on its input becomes a constant.

When all units of an axis go, whatever only they fed gives the same for every input: a bias. The outermost modules of
which that is true are found by running the model on two inputs, before and after the units are silenced, and are
replaced by their bias; a residual block that only adds a bias is replaced as a whole. What then feeds nobody any more
goes, too.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.analyse.axes import Axis, leaves
from hf_prune.analyse.graph import POSITIONS, AxisGraph
from hf_prune.analyse.running import call_model, named_tensors, output_tensors, quiet_run
from hf_prune.analyse.trace import Recording
from hf_prune.errors import SurgeryError
from hf_prune.surgery.constant import Constant, first_tensor
from hf_prune.surgery.verify import in_double, outputs_of, probe_inputs, require_equal, silenced

Modules = dict[str, nn.Module]


@dataclass(frozen=True)
class Seen:
    """What went through a module in one call: its input, its output and how many it returned (0: no tuple)."""

    given: Tensor
    out: Tensor
    num_returned: int


@contextmanager
def branches_removed(model: nn.Module, graph: AxisGraph, empty: Mapping[Axis, Tensor]) -> Iterator[float]:
    """Replace what axes without units leave constant; if what is done next fails, put everything back.

    Args:
        model: Changed in place.
        graph: Its analysis.
        empty: Axes that lose all their units.

    Yields:
        The largest difference from the silenced model, relative to the outputs.

    Cost: ten runs of batch size 1 in double precision, and the activations of four of them.

    Raises:
        SurgeryError: If an axis does not lie on a branch of its own, or the model without it is not the silenced one.
    """
    original, put = dict(model.named_modules()), {}
    with in_double(model):
        try:
            difference = _remove(model, graph, empty, put)
        except SurgeryError:
            raise
        except Exception as err:
            names = ", ".join(axis.name for axis in graph.axes.values() if axis.leaf in empty)
            raise SurgeryError(
                f"the model must run without {names}, but it does not: {type(err).__name__}: {err}"
            ) from err
        finally:
            _put(model, {path: original[path] for path in put})
    dtype = next(tensor.dtype for tensor in named_tensors(model).values() if tensor.is_floating_point())
    _put(model, {path: module.to(dtype) for path, module in put.items()})
    try:
        yield difference
    except Exception:
        _put(model, {path: original[path] for path in put})
        raise


def _put(model: nn.Module, modules: Modules) -> None:
    """Put modules in their places, outer ones first."""
    for path in sorted(modules):
        model.set_submodule(path, modules[path])


def _remove(model: nn.Module, graph: AxisGraph, empty: Mapping[Axis, Tensor], put: Modules) -> float:
    """Replace modules, add them to `put`, and return how far the outputs are from those of the silenced model."""
    inputs = [probe_inputs(graph, model, seed) for seed in (0, 1)]
    dense, live = [_watched(model, each) for each in inputs], _influential(model, inputs[0])
    with silenced(model, graph, empty):
        expected = outputs_of(model, inputs[0])
        silent = [_watched(model, each) for each in inputs]
        if all(map(torch.equal, expected, outputs_of(model, inputs[1]))):
            raise SurgeryError("nothing of the input would reach the output of the model; keep one unit or more")
    holding = {path for path, module in model.named_modules() if any(True for _ in module.parameters())}
    for path in filter(holding.__contains__, silent[0]):
        before, after = ([run[path] for run in runs] for runs in (dense, silent))
        constant = None if _inside(path, put) else _constant(graph.recording, path, before, after)
        if constant is not None:
            put[path] = constant
            model.set_submodule(path, constant)
    _require_gone(graph, empty, put)
    _drop_idle(model, inputs[0], live, put)
    return require_equal(expected, outputs_of(model, inputs[0]))


def _inside(path: str, put: Modules) -> bool:
    return any(path.startswith(f"{outer}.") for outer in put)


def _require_gone(graph: AxisGraph, empty: Mapping[Axis, Tensor], put: Modules) -> None:
    """Check that what read the units is gone, for every axis.

    Raises:
        SurgeryError: If it is not.
    """
    for axis in graph.axes.values():
        if axis.leaf in empty and not any(_inside(s.name, put) for s in axis.readers):
            raise SurgeryError(
                f"all units of '{axis.name}' can only go where nothing but a constant is left of a module then, and "
                f"there is no such module; keep one unit or more"
            )


@torch.no_grad()
def _watched(model: nn.Module, inputs: Any) -> dict[str, Seen]:
    """Run a model and return what went through every module that is called once, outer ones first."""
    seen: dict[str, list[Seen | None]] = {path: [] for path, _ in model.named_modules() if path}
    handles = []
    for path, calls in seen.items():

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any, calls: list = calls) -> None:
            calls.append(_seen(args, kwargs, output))

        handles.append(model.get_submodule(path).register_forward_hook(note, with_kwargs=True))
    try:
        with quiet_run(model):
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: calls[0] for path, calls in seen.items() if len(calls) == 1 and calls[0] is not None}


def _seen(args: Any, kwargs: dict[str, Any], output: Any) -> Seen | None:
    """Return what went through a module, or None if it takes no tensor or gives more than one."""
    num_returned = len(output) if type(output) is tuple else 0
    first = output[0] if num_returned else output
    given = first_tensor(args, kwargs)
    if given is None or not isinstance(first, Tensor) or (num_returned and any(o is not None for o in output[1:])):
        return None
    return Seen(given.clone(), first.clone(), num_returned)


def _constant(recording: Recording, path: str, before: list[Seen], after: list[Seen]) -> Constant | None:
    """Return what takes a module's place; None if it still works, never did, or is not the same in all positions."""
    channels = _channel_dims(recording, path, after[0])
    for adds in (False, True):
        if channels is None or _is_constant(before, adds) or not _is_constant(after, adds):
            continue
        seen = after[0]
        value = seen.out - seen.given if adds else seen.out
        for d in set(range(value.ndim)) - channels:
            if not torch.allclose(value, value.narrow(d, 0, 1), rtol=1e-9, atol=1e-9):
                return None
            value = value.narrow(d, 0, 1)
        given = seen.given.shape if seen.given.ndim == value.ndim else [0] * value.ndim
        like = [d for d in range(value.ndim) if d not in channels and given[d] == seen.out.shape[d]]
        constant = Constant(value.shape, adds=adds, like=like, num_returned=seen.num_returned).to(value)
        constant.bias.data.copy_(value)
        return constant
    return None


def _is_constant(seen: list[Seen], adds: bool) -> bool:
    """Tell whether two calls gave the same, or the same on top of their inputs."""
    if any(adds and each.given.shape != each.out.shape for each in seen):
        return False
    first, second = (each.out - each.given if adds else each.out for each in seen)
    size = max(float(each.out.abs().max()) for each in seen)
    return first.shape == second.shape and float((first - second).abs().max()) <= 1e-10 * size


def _channel_dims(recording: Recording, path: str, seen: Seen) -> set[int] | None:
    """Return along which dimensions of a module's output layers write; None if that is not known."""
    steps = [step for step in recording.steps if step.module == path or step.module.startswith(f"{path}.")]
    dims = steps[-1].outputs[0] if steps and steps[-1].outputs else []
    if len(dims) != seen.out.ndim:
        return None
    written = {leaf for name, d in recording.roles for leaf in leaves(recording.dims[name][d])}
    channels = {leaf for leaf in written if leaf.reason not in POSITIONS}
    return {d for d, dim in enumerate(dims) if channels & set(leaves(dim))}


def _drop_idle(model: nn.Module, inputs: Any, live: set[str], put: Modules) -> None:
    """Replace modules by nothing if what they give has no influence on the output any more."""
    still = _influential(model, inputs)
    for path in [path for path, _ in model.named_modules()]:
        if path in live - still and (path in put or not _inside(path, put)):
            put[path] = nn.Identity()
            model.set_submodule(path, put[path])


def _influential(model: nn.Module, inputs: Any) -> set[str]:
    """Return the paths of the modules from whose outputs the model's output is computed."""
    made: dict[str, Any] = {}
    handles = []
    for path, module in model.named_modules():

        def note(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
            made[path] = next((tensor.grad_fn for tensor in output_tensors(output)), None)

        handles.append(module.register_forward_hook(note))
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in asked:
            parameter.requires_grad_(True)
        with quiet_run(model), torch.enable_grad():
            ahead = [tensor.grad_fn for tensor in output_tensors(call_model(model, inputs))]
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)
        for handle in handles:
            handle.remove()
    met = set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in met:
            met.add(node)
            ahead += [following for following, _ in node.next_functions]
    return {path for path, node in made.items() if node in met}
