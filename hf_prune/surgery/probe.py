"""Find out, before any real weight is cut, which axes a model's code does not let go."""

import copy
import re
from itertools import combinations

import torch
from torch import Tensor

from hf_prune.analyse.axes import Axis, Expr, Product, leaves, product, resolve, size_of, unify
from hf_prune.analyse.graph import AxisGraph, Held
from hf_prune.analyse.running import skeleton, to_meta
from hf_prune.analyse.trace import Step
from hf_prune.errors import SurgeryError
from hf_prune.surgery.apply import cut_tensors
from hf_prune.surgery.repair import Repairs, repair
from hf_prune.surgery.replay import Mismatch, Sizes, blamed


def freeze_what_cannot_be_repaired(graph: AxisGraph) -> bool:
    """Cut a copy without weights along every free axis and tie or freeze the axes at which the repair fails.

    What the code holds on to is noted in `graph.held`, so that later cuts need not search for it.

    Returns whether there were any: then the graph is to be built again.

    Cost: one or two runs without numbers, and one or two more for each kind of module that resists.

    Raises:
        SurgeryError: If the repair fails and no axis is to blame.
    """
    free = [axis.leaf for axis in graph.axes.values()]
    changed = False
    while free:
        sizes = probe_sizes(free)
        try:
            rehearse(graph, {axis: torch.arange(size) for axis, size in sizes.items()}, graph.held)
            graph.held.complete = True
            break
        except Mismatch as mismatch:
            guilty = blamed(mismatch, graph.recording, sizes)
            if not guilty:
                raise SurgeryError(
                    f"the cut model must run as the dense one does, but in '{mismatch.module}' {mismatch} and no cut "
                    f"axis is involved; please report this with the name of the model"
                ) from mismatch
            if not tie(graph, mismatch, guilty, sizes):
                for axis in guilty | alike(graph, guilty, free):
                    axis.reason = axis.reason or f"the code of '{mismatch.module}' insists on its size ({mismatch})"
            free = [leaf for axis in free for leaf in leaves(axis) if leaf.reason is None]
            free, changed = list(dict.fromkeys(free)), True
    return changed


def rehearse(graph: AxisGraph, kept: dict[Axis, Tensor], held: Held) -> Repairs:
    """Cut a copy without weights and repair it; return what had to be mended. What is found is added to `held`.

    Raises:
        Mismatch: If the repair fails.
    """
    real = graph.recording.by_real_run
    model = copy.deepcopy(graph.skeleton) if real else skeleton(graph.skeleton)
    inputs = graph.inputs if real else to_meta(graph.inputs)
    cut_tensors(model, graph.recording.dims, kept)
    return repair(model, graph.recording, {axis: len(index) for axis, index in kept.items()}, inputs, held)


def probe_sizes(axes: list[Axis]) -> dict[Axis, int]:
    """Return about half the size of each axis, neighbours a little different, so that numbers tell them apart.

    Axes that cannot be any smaller are left out.
    """
    halves = {axis: round(axis.size * (0.4 + 0.017 * (number % 13))) for number, axis in enumerate(axes)}
    sizes = {axis: max(1, min(axis.size - 1, half)) for axis, half in halves.items()}
    return {axis: size for axis, size in sizes.items() if size != axis.size}


def alike(graph: AxisGraph, guilty: set[Axis], free: list[Axis]) -> set[Axis]:
    """Return the axes that play the same part as guilty ones in other blocks of the model."""
    by_axis = {info.leaf: info.part for info in graph.axes.values()}
    parts = {by_axis[axis] for axis in guilty if axis in by_axis}
    return {axis for axis in free if by_axis.get(axis) in parts}


def tie(graph: AxisGraph, mismatch: Mismatch, guilty: set[Axis], sizes: Sizes) -> bool:
    """Make one of two widths that a module's code takes for one: what it is given, and heads times their width.

    Only factors that would be frozen otherwise are tied, and only to a width that would be, too, or whose size after
    the cut the mismatch shows. Modules of the same class that do the same are treated alike.

    Returns whether there was anything to tie.
    """
    modules, where = dict(graph.skeleton.named_modules()), mismatch.module
    shown = {int(number) for number in re.findall(r"\d+", str(mismatch))}
    code, ours = _code(graph, where)
    pairs = [
        (i, j)
        for i, axis in enumerate(ours)
        if isinstance(axis, Axis) and (axis in guilty or sizes.get(axis) in shown)
        for j, factors in enumerate(ours)
        if isinstance(factors, Product) and size_of(axis) == size_of(factors)
        if guilty.issuperset(leaves(factors)) and axis not in set(leaves(factors))
    ]
    for path in [path for path, module in modules.items() if pairs and type(module) is type(modules[where])]:
        same, theirs = _code(graph, path)
        if same == code and len(theirs) == len(ours):
            for i, j in pairs:
                unify(theirs[i], theirs[j])
    return bool(pairs)


def _code(graph: AxisGraph, path: str) -> tuple[list[str], list[Expr]]:
    """Return the names of what a module does itself, and its widths."""
    steps = [step for step in graph.recording.steps if step.module == path]
    return [step.name for step in steps], _widths(steps)


def _widths(steps: list[Step]) -> list[Expr]:
    """Return all dimensions of steps and, of products, the runs of neighbouring factors."""
    found: list[Expr] = []
    for dim in (resolve(dim) for step in steps for dims in [*step.inputs, *step.outputs] for dim in dims):
        found.append(dim)
        if isinstance(dim, Product):
            n = len(dim.factors)
            found += [product(dim.factors[i:j]) for i, j in combinations(range(n + 1), 2) if 1 < j - i < n]
    return found
