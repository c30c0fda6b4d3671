"""Taylor: units whose removal changes the loss least, to first order, go first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.errors import CriterionError
from hf_prune.score.base import Criterion, finished
from hf_prune.score.batches import labelled_batches, loss_of
from hf_prune.score.gradients import gate_slices, unit_products

FORMS = ("gate", "group", "elements")


@dataclass(frozen=True, kw_only=True)
class Taylor(Criterion):
    """Absolute weight times gradient of the loss, summed over the weights of a unit, averaged over batches.

    Forms of the sum, `w` and `g` being weights and gradients:

    - "gate": |sum w g| over the readers. The derivative with respect to a gate on the unit: the first-order change of
      the loss when nothing of the unit passes on. Every axis counts once, so axes are comparable.
    - "group": |sum w g| over all coupled layers. Each layer in a row measures the same gate again.
    - "elements": sum |w g| over all coupled layers; what cancels in the others does not here.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, from which we differ by
    absolute values in place of squares; "elements" as in the group Taylor of Torch-Pruning. The loss is cross-entropy,
    the model evaluates. Batches count by their number of images.

    Attributes:
        form: See above.
        abs_per_batch: Take absolute values of every batch and average them; else average first, which near a trained
            optimum leaves little but noise, for there the mean gradient vanishes.

    Raises:
        CriterionError: If there is no such form, or it cannot be averaged first.
    """

    name = "taylor"
    needs = "backward"
    comparable = True

    form: Literal["gate", "group", "elements"] = "gate"
    abs_per_batch: bool = True

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise CriterionError(f"`form` of Taylor must be one of {', '.join(FORMS)}, got {self.form!r}")
        if self.form == "elements" and not self.abs_per_batch:
            raise CriterionError(
                "`abs_per_batch` must be True for the form 'elements': averaging every element first would need a "
                "second copy of the weights; use the form 'group'"
            )

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return the mean absolute change of the loss; see `Criterion.score`. One backward run a batch."""
        members = {axis.name: (axis.size, gate_slices(axis) if self.form == "gate" else axis.slices) for axis in axes}
        entry = torch.abs if self.form == "elements" else torch.clone
        totals, num_images = {axis.name: torch.zeros(axis.size) for axis in axes}, 0
        with unit_products(model, members, entry) as sums_of:
            for images, labels in labelled_batches(self, model, data):
                for name, sums in sums_of(loss_of(model, images, labels)).items():
                    change = sums.abs() if self.abs_per_batch else sums
                    totals[name] = totals[name].to(change.device) + change * len(images)
                num_images += len(images)
        return finished(self, {name: total.abs() / num_images for name, total in totals.items()})
