"""Fisher: units whose removal changes the loss least, to second order, go first."""

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

FORMS = ("gate", "elements")


@dataclass(frozen=True, kw_only=True)
class Fisher(Criterion):
    """Half the mean over images of the squared weight times gradient of a unit.

    The Hessian of OBD is replaced by the empirical Fisher information, the mean over *images* of squared gradients;
    squares of the gradient of a batch would be something else, which vanishes where training ends. So every image
    gets a backward run of its own: exact for every architecture, and as slow as batches of one image.

    - "gate": (sum w g)^2 over the readers: the Fisher information of a gate on the unit. Equal to the activation
      Fisher, where the sum is over positions of activation times its gradient.
    - "elements": sum w^2 g^2 over all coupled layers: OBD's diagonal, as if weights did not act together.

    Source: LeCun et al., Optimal Brain Damage, 1989; Theis et al., Faster Gaze Prediction with Dense Networks and
    Fisher Pruning, 2018, for the form "gate". The loss is cross-entropy, the model evaluates.

    Attributes:
        form: See above.

    Raises:
        CriterionError: If there is no such form.
    """

    name = "fisher"
    needs = "backward"
    comparable = True

    form: Literal["gate", "elements"] = "gate"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise CriterionError(f"`form` of Fisher must be one of {', '.join(FORMS)}, got {self.form!r}")

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return half the mean square; see `Criterion.score`. One backward run an image."""
        gate = self.form == "gate"
        members = {axis.name: (axis.size, gate_slices(axis) if gate else axis.slices) for axis in axes}
        totals, num_images = {axis.name: torch.zeros(axis.size) for axis in axes}, 0
        with unit_products(model, members, torch.clone if gate else torch.square) as sums_of:
            for images, labels in labelled_batches(self, model, data):
                for image, label in zip(images.split(1), labels.split(1), strict=True):
                    for name, sums in sums_of(loss_of(model, image, label)).items():
                        totals[name] = totals[name].to(sums.device) + (sums.square() if gate else sums)
                num_images += len(images)
        return finished(self, {name: total / (2 * num_images) for name, total in totals.items()})
