"""What hf_prune does with one model: analyse it, halve every free axis, and use what is left."""

import re
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_prune.allocate.allocators import Limits
from hf_prune.analyse.graph import KINDS, AxisGraph
from hf_prune.pipeline import analyze

KEEP = 0.5
WORTHWHILE = 0.3


def float_tensors(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in what a model returned."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the outputs of a model for a tensor or a dictionary of keyword arguments."""
    return float_tensors(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def learning_parameters(model: nn.Module, inputs: Any) -> set[str]:
    """Return the parameters that get a finite gradient from the outputs."""
    model.zero_grad(set_to_none=True)
    loss = torch.stack(
        [out.float().nan_to_num().square().mean() for out in run(model, inputs) if out.requires_grad]
    ).sum()
    loss.backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.isfinite().all())}
    model.zero_grad(set_to_none=True)
    return names


class Dense:
    """What must stay as it is: shapes of the outputs, and which parameters learn."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        with torch.no_grad():
            self.shapes = [tuple(out.shape) for out in run(model, inputs)]
        self.learning = learning_parameters(model, inputs)
        self.num_params = sum(p.numel() for p in model.parameters())

    def judge(self, model: nn.Module, inputs: Any, record: dict[str, Any]) -> None:
        """Fill in how the pruned model compares."""
        record["gone"] = round(1 - sum(p.numel() for p in model.parameters()) / self.num_params, 4)
        with torch.no_grad():
            shapes = [tuple(out.shape) for out in run(model, inputs)]
        record["forward"], record["same_shapes"] = True, shapes == self.shapes
        lost = self.learning - learning_parameters(model, inputs)
        record["backward"] = not lost
        if lost:
            record["error"] = f"no gradient for {len(lost)} parameters, such as {min(lost)}"
        if not record["same_shapes"]:
            record["error"] = f"outputs must have shapes {self.shapes}, got {shapes}"[:300]
        if not record.get("error") and record["gone"] < WORTHWHILE:
            record["error"] = f"only {record['gone']:.0%} of the parameters are gone"


def counts(record: dict[str, Any]) -> bool:
    """Tell whether a model counts as covered."""
    return all(record.get(key) for key in ("traced", "pruned", "verified", "forward", "same_shapes", "backward")) and (
        record["gone"] >= WORTHWHILE
    )


def trace_model(model: nn.Module, inputs: Any, record: dict[str, Any]) -> AxisGraph:
    """Analyse a model and fill in what was found."""
    started = time.perf_counter()
    graph = analyze(model, inputs)
    record["analyse_s"] = round(time.perf_counter() - started, 2)
    record["free"] = dict(Counter(axis.kind for axis in graph.axes.values()))
    record["frozen"] = dict(Counter(map(general, graph.frozen.values())).most_common())
    record["share_free"] = round(share_on_free_axes(model, graph), 4)
    record["traced"] = True
    return graph


def general(reason: str) -> str:
    """Return a reason without the numbers of layers, so that equal ones can be counted."""
    return re.sub(r"\.\d+(?=[.'])", ".N", reason)[:200]


def share_on_free_axes(model: nn.Module, graph: AxisGraph) -> float:
    """Return the share of the parameters that would go or stay with some free axis."""
    kept: dict[str, float] = {}
    covered: dict[tuple[str, int], Tensor] = {}
    for axis in graph.axes.values():
        for part in axis.slices:
            key = (part.name, part.dim)
            covered[key] = covered.get(key, torch.zeros_like(part.units, dtype=torch.bool)) | (part.units >= 0)
    for (name, _), mask in covered.items():
        kept[name] = kept.get(name, 1.0) * (1 - float(mask.float().mean()))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(n * (1 - kept.get(name, 1.0)) for name, n in sizes.items()) / sum(sizes.values())


def prune_model(model: nn.Module, inputs: Any, graph: AxisGraph, record: dict[str, Any]) -> None:
    """Halve every free axis, verified by the library, and fill in what happened."""
    from hf_prune.pipeline import apply_plan, plan

    dense = Dense(model, inputs)
    started = time.perf_counter()
    decided = plan(model, keep_ratio=KEEP, graph=graph, limits=Limits(kinds=KINDS))
    done = apply_plan(model, decided, graph)
    record["prune_s"] = round(time.perf_counter() - started, 2)
    record["pruned"] = record["verified"] = True
    record["difference"], record["not_exact"] = done.difference, done.not_exact
    dense.judge(model, inputs, record)


def measure(model: nn.Module, inputs: Any, *, trace_only: bool, record: dict[str, Any]) -> None:
    """Take one model through all stages, filling in a record as far as it comes."""
    graph = trace_model(model, inputs, record)
    if not trace_only:
        prune_model(model, inputs, graph, record)
        record["counts"] = counts(record)
