"""Run a model once and write down what every operation does to every dimension.

The run happens on torch's `meta` device: shapes are computed, numbers are not, and no weight is copied. A
model that looks at numbers while it runs is traced by a real run instead.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hf_prune.analyse.axes import Expr, fix, leaves, size_of
from hf_prune.analyse.kernels import compute, operands
from hf_prune.analyse.rules import RULES, Dims, elementwise, give_up, new_dims, out_dims
from hf_prune.analyse.running import (
    ModuleStack,
    call_model,
    is_mixed,
    named_tensors,
    output_tensors,
    quiet_run,
    skeleton,
    tensors_in,
    to_meta,
)
from hf_prune.analyse.watch import Given, Watch
from hf_prune.errors import TraceError

CONSTANT = "it meets a constant made while the model runs"


@dataclass(frozen=True)
class Step:
    """One operation of the run, for the replay of a pruned model.

    Attributes:
        name: Operator, `aten::view`.
        module: Path of the innermost module it ran in.
        inputs: Dimensions of each tensor argument.
        outputs: Dimensions of each tensor it gave.
        scalars: Its floating-point arguments: a scale computed from a size shows here.
    """

    name: str
    module: str
    inputs: list[Dims]
    outputs: list[Dims]
    scalars: tuple[float, ...]


@dataclass
class Recording:
    """What a run showed.

    Attributes:
        dims: Dimensions of every parameter and buffer, by name; tied ones share them.
        steps: All operations in order.
        macs: For each product the dimensions to multiply.
        macs_modules: For each product the path of the innermost module it ran in.
        activations: Dimensions of every tensor that was computed.
        roles: (parameter, dimension) -> subset of {"writer", "reader"}.
        uses: What happens along some dimensions ("normalised", "attention batch", ...).
        order: Parameters in the order of first use.
        calls: Module path -> for every watched call in its forward, in order, the sizes of the result (or of parts),
            or the scale that it was given; see `analyse.watch`.
        by_real_run: Whether the meta device did not do.
    """

    dims: dict[str, Dims]
    steps: list[Step] = field(default_factory=list)
    macs: list[list[Expr]] = field(default_factory=list)
    macs_modules: list[str] = field(default_factory=list)
    activations: list[Dims] = field(default_factory=list)
    roles: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    uses: list[tuple[Expr, str]] = field(default_factory=list)
    order: dict[str, None] = field(default_factory=dict)
    calls: dict[str, list[Dims | list[float]]] = field(default_factory=dict)
    by_real_run: bool = False


class ByTensor(dict):
    """Facts about tensors. Keeps them alive, for a tensor that dies would pass its identity on to the next."""

    def __setitem__(self, tensor: Tensor, fact: Any) -> None:
        super().__setitem__(id(tensor), (tensor, fact))

    def __getitem__(self, tensor: Tensor) -> Any:
        return super().__getitem__(id(tensor))[1]

    def __contains__(self, tensor: object) -> bool:
        return super().__contains__(id(tensor))

    def get(self, tensor: Tensor, default: Any = None) -> Any:
        """Return the fact, or a default."""
        return super().get(id(tensor), (tensor, default))[1]


class OneCall:
    """One operation as rules see it."""

    def __init__(self, tracer: "Tracer", func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        self.tracer, self.func, self.name, self.out = tracer, func, func._schema.name, out
        self.arguments = {argument.name: argument.default_value for argument in func._schema.arguments}
        names = [argument.name for argument in func._schema.arguments]
        self.arguments.update(zip(names, args, strict=False))
        self.arguments.update(kwargs)
        self.tensors = operands(args, kwargs, Tensor)

    def __getitem__(self, argument: str) -> Any:
        return self.arguments.get(argument)

    def dims(self, argument: str) -> Dims:
        """Return the dimensions of a tensor argument."""
        return self.tracer.dims_of(self.arguments[argument])

    def dims_of(self, tensor: Tensor) -> Dims:
        """Return the dimensions of a tensor."""
        return self.tracer.dims_of(tensor)

    def note(self, expr: Expr, use: str) -> None:
        """Note what happens along a dimension."""
        self.tracer.recording.uses.append((expr, use))

    def contract(self, *operands: tuple[Any, Sequence[Expr], Sequence[Expr]], macs: Sequence[Expr]) -> None:
        """Note a product; parameters learn whether a dimension of theirs is read from or written to."""
        if macs:
            self.tracer.recording.macs.append(list(macs))
            self.tracer.recording.macs_modules.append(self.tracer.stack.innermost)
        origins = [self.tracer.origin.get(tensor) or () for tensor, _, _ in operands]
        for (tensor, summed, surviving), origin in zip(operands, origins, strict=True):
            if origin:
                self.tracer.note_roles(tensor, summed, surviving)
        # A learned query is made of parameters alone, too, but of several.
        if len(operands) == 2 and not any(len(origin) == 1 for origin in origins) and operands[0][1]:
            (_, summed, (*batch, _)), _ = operands
            for expr in batch:
                self.note(expr, "attention batch")
            for expr in summed:
                self.note(expr, "attention width")


class Tracer(TorchDispatchMode):
    """Annotates every tensor of a run with the expressions of its dimensions."""

    def __init__(self, recording: Recording, named: dict[str, Tensor], stack: "ModuleStack") -> None:
        super().__init__()
        self.recording, self.stack = recording, stack
        self.known, self.origin = ByTensor(), ByTensor()
        self.multiplied: set[str] = set()
        for name, tensor in named.items():
            self.known[tensor] = recording.dims[name]
            self.origin[tensor] = (name,)

    def dims_of(self, tensor: Tensor) -> Dims:
        """Return the dimensions of a tensor; those of a stranger are fixed."""
        if tensor not in self.known:
            self.known[tensor] = out_dims(tensor.shape, CONSTANT)
        return self.known[tensor]

    def note_call(self, given: Given, result: Any, dim: int) -> None:
        """Note a call in the forward of the running module and of all around it."""
        if given and isinstance(given[0], float):
            numbers: Any = given
        elif isinstance(result, Tensor):
            numbers = self.dims_of(result)
        else:
            numbers = [self.dims_of(part)[dim] for part in result]
        for path in dict.fromkeys(self.stack.paths):
            self.recording.calls.setdefault(path, []).append(numbers)

    def note_roles(self, weight: Tensor, summed: Sequence[Expr], surviving: Sequence[Expr]) -> None:
        """Find out which dimensions of the parameters behind a weight are summed over and which survive."""
        for name in self.origin[weight]:
            self.recording.order.setdefault(name)
            # At the second use of a shared layer its input and output may be one axis, which would tell nothing.
            if summed and name in self.multiplied:
                continue
            self.multiplied |= {name} if summed else set()
            for role, exprs in (("reader", summed), ("writer", surviving)):
                touched = {axis for expr in exprs for axis in leaves(expr)}
                for d, dim in enumerate(self.recording.dims[name]):
                    if touched & set(leaves(dim)):
                        self.recording.roles.setdefault((name, d), set()).add(role)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if is_mixed(operands(args, kwargs, Tensor)):
            args, kwargs = cast(Any, tree_map_only(Tensor, self._to_meta, (args, kwargs)))
        out = compute(func, args, cast(dict[str, Any], kwargs))
        self._record(OneCall(self, func, args, cast(dict[str, Any], kwargs), out))
        return out

    def _to_meta(self, tensor: Tensor) -> Tensor:
        """A constant that the model keeps outside its buffers; where it is, only its shape is needed."""
        if tensor.is_meta:
            return tensor
        stand_in = torch.empty_like(tensor, device="meta")
        self.known[stand_in] = self.dims_of(tensor)
        return stand_in

    def _record(self, call: OneCall) -> None:
        outputs = call.out if isinstance(call.out, tuple | list) else [call.out]
        given = [[*self.dims_of(tensor)] for tensor in call.tensors]
        origin = self._origin(call)
        for name in origin:
            self.recording.order.setdefault(name)
        results = self._results(call)
        found = []
        for tensor, dims in zip(outputs, results, strict=True):
            if isinstance(tensor, Tensor):
                if dims is None or [size_of(dim) for dim in dims] != list(tensor.shape):
                    raise TraceError(
                        f"the rule of {call.name} must explain an output of shape {tuple(tensor.shape)}, but gave "
                        f"{dims}; please report this with the name of the model"
                    )
                self.known[tensor], found = dims, [*found, dims]
                if origin:
                    self.origin[tensor] = origin
        numbers = [value for value in call.arguments.values() if isinstance(value, float)]
        self.recording.steps.append(Step(call.name, self.stack.innermost, given, found, tuple(numbers)))
        if not call.name.endswith("_") and call.name not in VIEWS:
            self.recording.activations.extend(found)

    def _origin(self, call: OneCall) -> tuple[str, ...]:
        """Return the parameters a result is computed from, if it is computed from nothing else."""
        origins = [self.origin.get(tensor) for tensor in call.tensors]
        if not origins or not all(origins):
            return ()
        return tuple(dict.fromkeys(name for names in origins for name in names))

    def _results(self, call: OneCall) -> list[Any]:
        several = isinstance(call.out, tuple | list)
        if call.name in RULES:
            result = RULES[call.name](call)
            return result if several else [result]
        if isinstance(call.out, Tensor) and call.name in POINTWISE:
            return [elementwise(call, call.tensors)]
        result = give_up(call, f"{call.name.removeprefix('aten::')} has no rule")
        return result if several else [result]


VIEWS = {f"aten::{name}" for name in (
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "split",
    "split_with_sizes", "unbind", "alias", "detach", "as_strided", "_reshape_alias",
)}  # fmt: skip


def _pointwise_names() -> set[str]:
    """Return the names of all operators that torch says work element by element."""
    names = set()
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in getattr(packet, "overloads", list)():
            if torch.Tag.pointwise in getattr(packet, overload).tags:
                names.add(f"aten::{name}")
    # Element by element too, though torch does not mark them so.
    return names | {f"aten::{name}" for name in (
        "masked_fill", "masked_fill_", "where", "fill_", "zero_", "hardswish", "hardswish_", "hardtanh", "hardtanh_",
        "hardsigmoid", "hardsigmoid_", "_prelu_kernel", "leaky_relu", "leaky_relu_", "log_sigmoid_forward", "dropout",
        "bernoulli_", "normal_", "uniform_", "nan_to_num", "clamp", "clamp_", "erfinv", "mish_", "mish", "threshold",
    )}  # fmt: skip


POINTWISE = _pointwise_names()


def record(model: nn.Module, inputs: Any, tracer_of: "Callable[..., Tracer]" = Tracer) -> Recording:
    """Trace a model whose tensors and inputs are on one device (meta or a real one).

    Args:
        model: Its modules are run.
        inputs: What it is called with.
        tracer_of: Makes the tracer from a recording, named tensors and a module stack; one of another kind may look
            at more than what is recorded.

    Raises:
        TraceError: If the model cannot run on these inputs.
    """
    named = named_tensors(model)
    dims: dict[str, Dims] = {name: new_dims(tensor.shape) for name, tensor in named.items()}
    for name, tensor in named.items():
        if not tensor.is_floating_point() and not tensor.is_complex():
            for dim in dims[name]:
                fix(dim, "it is a table of numbers")
    recording = Recording(dims)
    stack = ModuleStack(model)
    tracer = tracer_of(recording, named, stack)
    for tensor in tensors_in(inputs):
        tracer.known[tensor] = out_dims(tensor.shape, "it is part of the model's input")
    try:
        with quiet_run(model), Watch(lambda _: None, tracer.note_call), tracer:
            output = call_model(model, inputs)
    finally:
        stack.remove()
    for tensor in output_tensors(output):
        for dim in tracer.dims_of(tensor):
            fix(dim, "it is part of the model's output")
    return recording


def trace(model: nn.Module, inputs: Any) -> tuple[Recording, nn.Module]:
    """Trace a model and return what was found and the skeleton that it was found on.

    Raises:
        TraceError: If the model cannot run on these inputs.
    """
    # Models may remember things from their first run, so what is traced is not what is kept.
    empty = skeleton(model)
    try:
        recording = record(skeleton(model), to_meta(inputs))
        return recording, empty
    except TraceError:
        raise
    except Exception as on_meta:
        # Whatever a model does that needs numbers; a real run decides whether the inputs are to blame.
        real = copy.deepcopy(model)
        try:
            recording = record(copy.deepcopy(model), inputs)
        except TraceError:
            raise
        except Exception as err:
            raise TraceError(
                f"{type(model).__name__} must run on `example_inputs`, but it does not: "
                f"{type(err).__name__}: {err}; give inputs as the model takes them (a tensor, a tuple, or a dict of "
                f"keyword arguments). Without numbers it failed with: {type(on_meta).__name__}: {on_meta}"
            ) from err
        recording.by_real_run = True
        return recording, real
