"""The axes of a model under names that a person understands."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

from torch import Tensor, nn

from hf_prune.analyse.axes import Axis, Expr, Product, leaves, resolve, size_after, unit_of
from hf_prune.analyse.running import named_tensors
from hf_prune.analyse.trace import Recording

Kind = Literal["heads", "head_dim", "mlp", "channels", "embed", "groups", "other"]
KINDS: tuple[Kind, ...] = ("heads", "head_dim", "mlp", "channels", "embed", "groups", "other")
LAST_WORD = {"heads": "heads", "head_dim": "head_dim", "mlp": "hidden", "embed": "embed", "groups": "groups",
             "channels": "channels", "other": "units"}  # fmt: skip
OF_REASON = {
    "it is part of the model's input": "input",
    "it is part of the model's output": "output",
    "single positions of it are picked by number": "stack",
    "it counts equal parts": "parts",
    "it counts stacked tensors": "stack",
}
POSITIONS = ("it is a position in a kernel", "it is a position in the image, not a channel", "it is a table of numbers")


@dataclass(frozen=True)
class Slice:
    """A dimension of a parameter or buffer that an axis runs along.

    Attributes:
        name: Of the parameter or buffer.
        dim: Which dimension of it.
        units: `(size,)`, for every index the unit of the axis it belongs to, or -1.
    """

    name: str
    dim: int
    units: Tensor


@dataclass(frozen=True)
class AxisInfo:
    """One axis that can be pruned.

    Attributes:
        name: For example `blocks.3.attn.heads`.
        kind: See `KINDS`.
        size: Number of units.
        leaf: The axis in the expressions of the trace.
        writers: Slices that produce the units (output dimensions of layers, their biases).
        readers: Slices that are multiplied with the units and summed (input dimensions of layers).
        carriers: Slices that go along (norms, depthwise convolutions, layer scales, tables).
        inexact: Why a pruned model differs from one whose units are silenced; None if it does not.
        num_params: Parameters that lie on the axis.
        can_gate: Whether closing its readers silences a unit; not so for widths at which queries meet keys.
    """

    name: str
    kind: Kind
    size: int
    leaf: Axis
    writers: tuple[Slice, ...]
    readers: tuple[Slice, ...]
    carriers: tuple[Slice, ...]
    inexact: str | None
    num_params: int
    can_gate: bool

    @property
    def part(self) -> tuple[str, str]:
        """The part the axis plays: axes that differ in the numbers of their names only play the same."""
        return self.kind, re.sub(r"[0-9]+", "#", self.name)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """All slices."""
        return self.writers + self.readers + self.carriers


@dataclass(frozen=True)
class OneOf:
    """A size that the cut in which it was met explains by any of several dimensions, mostly by one alone."""

    dims: tuple[Expr, ...]

    def after(self, sizes: dict[Axis, int]) -> int | None:
        """Return the size when axes have the given sizes; None where the dimensions disagree."""
        found = {size_after(dim, sizes) for dim in self.dims}
        return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class DueNumber:
    """What a call of the code must be given.

    Attributes:
        value: The expression of a size, or a scale of the dense model.
        widths: Axes whose cut makes the code compute something else.
    """

    value: Expr | float
    widths: frozenset[Axis]

    def after(self, sizes: dict[Axis, int]) -> int | float:
        """Return the number when axes have the given sizes."""
        return size_after(self.value, sizes) if isinstance(self.value, Expr) else self.value


@dataclass
class Held:
    """Sizes that the model's code holds on to; found by cutting copies without weights.

    Attributes:
        attributes: Module path -> attribute -> what it holds: a `OneOf`, or a tuple or list of numbers and `OneOf`.
        calls: Module path -> number of the watched call in its forward -> position of the number -> what it must be.
        complete: Whether a trial cut along all axes was mended to the end.
    """

    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: dict[str, dict[int, dict[int, DueNumber]]] = field(default_factory=dict)
    complete: bool = False

    def add(self, attributes: dict[str, dict[str, Any]], calls: dict[str, dict[int, dict[int, DueNumber]]]) -> None:
        """Note more of the same."""
        for path, values in attributes.items():
            self.attributes.setdefault(path, {}).update(values)
        for path, rows in calls.items():
            for call, row in rows.items():
                self.calls.setdefault(path, {}).setdefault(call, {}).update(row)

    def copy(self) -> "Held":
        """Return a copy that shares the expressions."""
        return Held(
            {path: dict(values) for path, values in self.attributes.items()},
            {path: {call: dict(row) for call, row in calls.items()} for path, calls in self.calls.items()},
            self.complete,
        )


@dataclass
class AxisGraph:
    """What a model can lose.

    Attributes:
        axes: Free axes by name, in the order of the run.
        frozen: Axes that must not be pruned, with the reason.
        recording: The trace behind it.
        skeleton: The model without weights (a copy with weights where `recording.by_real_run`).
        inputs: What it was traced with.
        shapes: Of every parameter and buffer.
        names: Of axes, frozen ones too.
        held: What else must change with the axes.
    """

    axes: dict[str, AxisInfo]
    frozen: dict[str, str]
    recording: Recording
    skeleton: nn.Module
    inputs: Any
    shapes: dict[str, tuple[int, ...]]
    names: dict[Axis, str] = field(default_factory=dict)
    held: Held = field(default_factory=Held)

    def explain(self, parameter: str) -> list[str]:
        """Return for every dimension of a parameter or buffer which axes it is made of.

        Raises:
            KeyError: If there is no such parameter.
        """
        return [self.describe(dim) for dim in self.recording.dims[parameter]]

    def describe(self, expr: Expr) -> str:
        """Return an expression in words: `blocks.3.attn.heads * blocks.3.attn.head_dim`."""
        expr = resolve(expr)
        if isinstance(expr, Axis):
            return self.names.get(expr, f"fixed {expr.size}")
        if isinstance(expr, Product):
            return " * ".join(map(self.describe, expr.factors)) or "1"
        return " + ".join(map(self.describe, expr.parts))

    def table(self) -> str:
        """Return all axes as a table."""
        width = max([len(name) for name in [*self.axes, *self.frozen]] + [4])
        rows = [f"{'axis':{width}}  {'kind':9}{'size':>6}{'parameters':>12}  note"]
        for axis in self.axes.values():
            note = f"prunes, but changes others: {axis.inexact}" if axis.inexact else ""
            rows.append(f"{axis.name:{width}}  {axis.kind:9}{axis.size:6}{axis.num_params:12,}  {note}".rstrip())
        rows += [f"{name:{width}}  frozen: {reason}" for name, reason in self.frozen.items()]
        return "\n".join(rows)

    __str__ = table


def build_graph(model: nn.Module, recording: Recording, empty: nn.Module, inputs: Any) -> AxisGraph:
    """Collect, name and sort the axes of a trace."""
    tensors = named_tensors(model)
    found: dict[Axis, list[Slice]] = {}
    for name in [*recording.order, *(name for name in tensors if name not in recording.order)]:
        for d, dim in enumerate(recording.dims[name]):
            for leaf in dict.fromkeys(leaves(dim)):
                found.setdefault(leaf, []).append(Slice(name, d, unit_of(dim, leaf)))
    uses: dict[Axis, set[str]] = defaultdict(set)
    for expr, use in recording.uses:
        for leaf in leaves(expr):
            uses[leaf].add(use)
    params = dict(model.named_parameters())
    graph = AxisGraph({}, {}, recording, empty, inputs, {name: tuple(t.shape) for name, t in tensors.items()})
    partners, passing = _partners(recording), _unsaved_buffers(model)
    for leaf, slices in found.items():
        roles = {(s.name, s.dim): recording.roles.get((s.name, s.dim), set()) for s in slices}
        writers = tuple(s for s in slices if "writer" in roles[s.name, s.dim])
        readers = tuple(s for s in slices if "reader" in roles[s.name, s.dim] and s not in writers)
        carriers = tuple(s for s in slices if s not in writers and s not in readers)
        kind = _kind(uses[leaf], partners[leaf], uses, writers, readers, carriers, tensors)
        if leaf.reason is None and not (writers or readers):
            leaf.reason = "no layer writes or reads it"
        if leaf.reason is None and not any(s.name in params for s in writers) and passing & {s.name for s in slices}:
            leaf.reason = "it comes from a table that the model computes for itself"
        last = OF_REASON.get(leaf.reason or "", LAST_WORD[kind])
        name = _unused(_name(kind, last, slices if leaf.reason else writers or readers or carriers), graph)
        graph.names[leaf] = name
        if leaf.reason is not None:
            if leaf.reason not in POSITIONS:
                graph.frozen[name] = leaf.reason
            continue
        count = sum(params[n].numel() for n in {s.name for s in slices} if n in params)
        graph.axes[name] = AxisInfo(
            name,
            kind,
            leaf.size,
            leaf,
            writers,
            readers,
            carriers,
            _inexact(uses[leaf]),
            count,
            bool(readers) and "attention width" not in uses[leaf],
        )
    return graph


def _unsaved_buffers(model: nn.Module) -> set[str]:
    """Return the names of buffers that are not part of a checkpoint."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _partners(recording: Recording) -> dict[Axis, set[Axis]]:
    """Return for every axis those it is multiplied with in some dimension of a parameter."""
    partners: dict[Axis, set[Axis]] = defaultdict(set)
    for dims in recording.dims.values():
        for dim in dims:
            together = set(leaves(dim)) if getattr(resolve(dim), "factors", None) else set()
            for leaf in together:
                partners[leaf] |= together - {leaf}
    return partners


def _kind(
    uses: set[str],
    partners: set[Axis],
    all_uses: dict[Axis, set[str]],
    writers: tuple[Slice, ...],
    readers: tuple[Slice, ...],
    carriers: tuple[Slice, ...],
    tensors: dict[str, Tensor],
) -> Kind:
    if "groups" in uses:
        return "groups"
    if "attention batch" in uses and (partners or not writers):
        return "heads"
    if any("attention batch" in all_uses[partner] for partner in partners):
        return "head_dim"
    by_conv = any(tensors[s.name].ndim > 2 for s in writers or carriers)
    modules = {_module(s.name) for s in writers}
    parents = {_module(module) for module in modules}
    if not by_conv and len(parents) == 1 and {_module(_module(s.name)) for s in readers} <= parents:
        return "mlp" if "normalised" not in uses or len(modules) == 1 else "embed"
    if by_conv and "normalised" not in uses:
        return "channels"
    return "mlp" if len(modules) == 1 and not by_conv else "embed" if modules else "other"


def _inexact(uses: set[str]) -> str | None:
    if "normalised" in uses:
        return "a norm sees all of its units together"
    if "reduced" in uses:
        return "the model averages or sums over its units"
    return None


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _name(kind: Kind, last: str, slices: Iterable[Slice]) -> str:
    """Return the place all slices have in common, and what the axis is there."""
    modules = sorted({_module(s.name) for s in slices})
    if len(modules) == 1:
        place = modules[0] if kind == "channels" or last in OF_REASON.values() else _module(modules[0])
    else:
        shared = takewhile(lambda words: len(set(words)) == 1, zip(*(m.split(".") for m in modules), strict=False))
        place = ".".join(words[0] for words in shared)
    return f"{place}.{last}" if place else last


def _unused(name: str, graph: AxisGraph) -> str:
    taken, number, candidate = set(graph.names.values()), 2, name
    while candidate in taken:
        candidate, number = f"{re.sub(r'_[0-9]+$', '', name)}_{number}", number + 1
    return candidate
