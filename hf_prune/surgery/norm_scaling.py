"""Quieter batch norms behind layers that read fewer units: their scales shrink with what is still read.

With fewer inputs the deviation in front of the norm falls, and gradients behind it grow as its inverse; a scale that
shrinks in step holds them back.

Source: Humble et al., Soft Masking for Cost-Constrained Channel Pruning, ECCV 2022, arXiv 2211.02206.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_prune.analyse.graph import AxisGraph, Slice
from hf_prune.analyse.trace import VIEWS
from hf_prune.surgery.gates import remove_parametrizations
from hf_prune.surgery.masks import Mask

PRODUCTS = ("aten::convolution", "aten::mm", "aten::addmm")
# A batch norm makes room for a result before it runs.
PASSED_OVER = VIEWS | {"aten::clone", "aten::empty"}


class _Scaled(torch.autograd.Function):
    """A weight times a number, whose gradient is divided by it: a step moves the product as it would without."""

    @staticmethod
    def forward(weight: Tensor, scale: Tensor) -> Tensor:
        return weight * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return torch.where(scale > 0, gradients[0] / scale, 0.0), None


class NormScale(nn.Module):
    """The weight of a batch norm as the model sees it: times the share that the layer before it still reads.

    Attributes:
        scale: That share, 0 to 1; saved with the model.
        inputs: Masks along the layer's input dimension, with the unit of every index of it, or -1.
    """

    scale: Tensor

    def __init__(self, inputs: list[tuple[Mask, Tensor]]) -> None:
        super().__init__()
        # In a list, for the masks are modules of the readers already.
        self.inputs = inputs
        self.register_buffer("scale", torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the scaled weight."""
        return _Scaled.apply(weight, self.scale)  # type: ignore[return-value]

    @torch.no_grad()
    def follow(self, *, by_importance: bool = False) -> None:
        """Set the scale to the share of inputs that is read, or to their share of the importance of all."""
        read, worth = torch.ones_like(self.scale), torch.zeros_like(self.scale)
        for mask, units in self.inputs:
            # Indices that are not on the axis read the one at the end: always there, worth nothing known.
            index = units.to(mask.kept.device)
            read = read * torch.cat([mask.kept, mask.kept.new_ones(1)])[index]
            worth = worth + torch.cat([mask.importance, mask.kept.new_zeros(1)])[index]
        share = read.mean()
        if by_importance and bool(worth.sum() > 0):
            share = (read * worth).sum() / worth.sum()
        self.scale.copy_(share)


def add_norm_scales(model: nn.Module, graph: AxisGraph, masks: Mapping[str, Mask]) -> dict[str, NormScale]:
    """Scale every batch norm that directly follows a layer under masks; by module path, all scales one at first.

    Norms that follow several layers, or have no weight, are left alone.
    """
    inputs: dict[str, list[tuple[Mask, Slice]]] = {}
    for name, mask in masks.items():
        for s in graph.axes[name].readers:
            inputs.setdefault(s.name.rpartition(".")[0], []).append((mask, s))
    scales = {}
    for norm, layers in _layers_before_norms(graph).items():
        module = model.get_submodule(norm)
        masked = inputs.get(next(iter(layers)), []) if len(layers) == 1 else []
        one_dim = len({(s.name, s.dim) for _, s in masked}) == 1
        if one_dim and isinstance(module.weight, nn.Parameter):
            scale = NormScale([(mask, s.units) for mask, s in masked]).to(module.weight.device)
            parametrize.register_parametrization(module, "weight", scale, unsafe=True)
            scales[norm] = scale
    return scales


def fold_norm_scales(model: nn.Module) -> None:
    """Multiply the scales into the weights of the norms; the model computes what it did with them."""
    remove_parametrizations(model, NormScale, leave_parametrized=True)


def _layers_before_norms(graph: AxisGraph) -> dict[str, set[str]]:
    """Return for every batch norm the layers whose output goes straight into it; "" stands for anything else."""
    found: dict[str, set[str]] = {}
    before = ""
    for step in graph.recording.steps:
        if step.name in PASSED_OVER:
            continue
        if "batch_norm" in step.name:
            found.setdefault(step.module, set()).add(before)
        before = step.module if step.name in PRODUCTS else ""
    return found
