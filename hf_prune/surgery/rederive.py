"""Find out again what a cut means for a model's code, from the shapes of some of its tensors alone.

A release of transformers may lay a model out anew, and a model without its head may have layers that the saved one had
not. Then the dense skeleton is analysed where it is built, and what must be set follows from the shapes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_prune.analyse.axes import Axis, Expr, leaves, resolve, size_after
from hf_prune.analyse.graph import Held
from hf_prune.analyse.inputs import inputs_for
from hf_prune.analyse.running import skeleton, to_meta
from hf_prune.analyse.trace import trace
from hf_prune.errors import SurgeryError
from hf_prune.surgery.apply import cut_tensors
from hf_prune.surgery.repair import repair
from hf_prune.surgery.replay import Mismatch
from hf_prune.surgery.structure import Structure, structure_from

Equations = list[tuple[Expr, int]]


def rederive(dense: nn.Module, saved: Structure, inputs: Any = None) -> Structure:
    """Return the structure of a model of which some tensors have known shapes.

    Args:
        dense: Skeleton; not changed.
        saved: What is known: shapes, and what they are made of.
        inputs: To run it on; None takes them from the model's configuration.

    Cost: two runs without numbers, and one more for each kind of module whose code holds on to sizes.

    Raises:
        SurgeryError: If the shapes contradict each other, or the model cannot be made to run with them.
        TraceError: If the dense model cannot be run.
    """
    inputs = to_meta(inputs_for(dense) if inputs is None else inputs)
    recording, empty = trace(dense, inputs)
    equations: Equations = []
    for name, shape in saved.shapes.items():
        dims = recording.dims[name]
        equations += [(dim, n) for dim, n in zip(dims, shape, strict=True) if n is not None]
        for dim, factors in zip(dims, saved.factors.get(name, ()), strict=False):
            axes = list(dict.fromkeys(leaves(dim)))
            if factors is not None and len(axes) == len(factors):
                equations += list(zip(axes, factors, strict=True))
    sizes = solve(equations)
    model = skeleton(empty)
    cut_tensors(model, recording.dims, {axis: torch.arange(n) for axis, n in sizes.items()})
    try:
        repairs = repair(model, recording, sizes, inputs, Held())
    except Mismatch as err:
        raise SurgeryError(f"the cut model must run as the dense one does, but in '{err.module}' {err}") from err
    return structure_from(model, recording, sizes, repairs)


def solve(equations: Equations) -> dict[Axis, int]:
    """Return the sizes of axes from the sizes of dimensions that are made of them.

    Raises:
        SurgeryError: If there is no solution.
    """
    sizes: dict[Axis, int] = {}
    open_ones = [(resolve(dim), n) for dim, n in equations]
    # When nothing follows any more, heads rather than their widths are taken to have changed.
    for guess in (False, True):
        found = True
        while found:
            found = False
            for dim, n in open_ones:
                unknown = [axis for axis in dict.fromkeys(leaves(dim)) if axis not in sizes]
                if unknown and (len(unknown) == 1 or guess):
                    size = _size(dim, n, unknown[0], sizes)
                    found |= size is not None
                    sizes |= {} if size is None else {unknown[0]: size}
    wrong = [(dim, n) for dim, n in open_ones if size_after(dim, sizes) != n]
    if wrong:
        raise SurgeryError(f"the shapes must be those of one cut, but {wrong[0][0]} cannot have size {wrong[0][1]}")
    return {axis: n for axis, n in sizes.items() if n != axis.size}


def _size(dim: Expr, n: int, axis: Axis, sizes: Mapping[Axis, int]) -> int | None:
    """Return the size at which a dimension has a given one; None if there is none."""
    known = {other: sizes.get(other, other.size) for other in leaves(dim)}
    right = [size for size in range(1, axis.size + 1) if size_after(dim, {**known, axis: size}) == n]
    return right[0] if right else None
