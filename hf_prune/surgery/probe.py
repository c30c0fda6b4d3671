"""Find out, before any real weight is cut, which axes a model's code does not let go."""

import copy

import torch
from torch import Tensor

from hf_prune.analyse.axes import Axis
from hf_prune.analyse.graph import AxisGraph, Held
from hf_prune.analyse.running import skeleton, to_meta
from hf_prune.errors import SurgeryError
from hf_prune.surgery.apply import cut_tensors
from hf_prune.surgery.repair import Repairs, repair
from hf_prune.surgery.replay import Mismatch, blamed, may_remember


def freeze_what_cannot_be_repaired(graph: AxisGraph) -> bool:
    """Cut a copy without weights along every free axis and freeze the axes at which the repair fails.

    What the code holds on to is noted in `graph.held`, so that later cuts need not search for it.

    Returns whether there are any: then the graph is to be built again.

    Cost: one or two runs without numbers, and one or two more for each kind of module that resists.

    Raises:
        Mismatch: If the model should be traced again first, for it may remember something from its first run.
        SurgeryError: If the repair fails and no axis is to blame.
    """
    free = {axis.leaf for axis in graph.axes.values()}
    num_free = len(free)
    while free:
        kept = {axis: torch.arange(size) for axis in free if (size := probe_size(axis)) != axis.size}
        try:
            rehearse(graph, kept, graph.held)
            break
        except Mismatch as mismatch:
            if may_remember(mismatch, graph.recording):
                raise
            guilty = blamed(mismatch, graph.recording, {axis: len(index) for axis, index in kept.items()})
            if not guilty:
                raise SurgeryError(
                    f"the cut model must run as the dense one does, but in '{mismatch.module}' {mismatch} and no cut "
                    f"axis is involved; please report this with the name of the model"
                ) from mismatch
            for axis in guilty | alike(graph, guilty, free):
                axis.reason = axis.reason or f"the code of '{mismatch.module}' insists on its size ({mismatch})"
            free = {axis for axis in free if axis.reason is None}
    return len(free) < num_free


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


def probe_size(axis: Axis) -> int:
    """Return about half the size, a little different for each axis, so that numbers cannot agree by accident."""
    return max(1, min(axis.size - 1, round(axis.size * (0.4 + 0.017 * (axis.serial % 13)))))


def alike(graph: AxisGraph, guilty: set[Axis], free: set[Axis]) -> set[Axis]:
    """Return the axes that play the same part as guilty ones in other blocks of the model."""
    by_axis = {info.leaf: info.part for info in graph.axes.values()}
    parts = {by_axis[axis] for axis in guilty if axis in by_axis}
    return {axis for axis in free if by_axis.get(axis) in parts}
