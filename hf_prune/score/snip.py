"""SNIP: what the loss would lose to first order, before any training, goes last."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.errors import CriterionError
from hf_prune.score.base import finished
from hf_prune.score.batches import labelled_batches
from hf_prune.score.parts import Parts, Units, Values
from hf_prune.score.saliency import Saliency, mean_gradients, undisturbed, warn_of_silence

FORMS = ("gate", "abs_sum")


@dataclass(frozen=True, kw_only=True)
class Snip(Saliency):
    """Absolute derivative of the mean loss with respect to a gate on each part.

    - "gate": |sum w g| over the weights that read a unit, `g` the gradient of the mean loss of all images: the
      absolute value comes last, behind sums over images, weights and coupled layers.
    - "abs_sum": sum |w g| over the same weights, an upper bound. It does not see what cancels, and grows with the
      number of weights.

    Of a single weight both are |w g|. In a model that was trained the mean gradient is close to zero and what is left
    of it mostly noise: pass many images, or take `Taylor`, which averages absolute values of batches.

    Source: Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, ICLR 2019; for units as in
    Verdenius et al., Pruning via Iterative Ranking of Sensitivity Statistics (SNAP-it), 2020. Their division by the sum
    of all saliencies, which does not change the order, is left out, and batch norms without statistics use the batch's.

    Attributes:
        form: See above.

    Raises:
        CriterionError: If there is no such form.
    """

    name = "snip"
    needs = "backward"
    comparable = True

    form: Literal["gate", "abs_sum"] = "gate"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise CriterionError(f"`form` of SNIP must be one of {', '.join(FORMS)}, got {self.form!r}")

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return the first-order changes of the loss; see `Criterion.score`.

        One backward run a batch; in memory a copy of the weights that read units, and one batch's activations.
        """
        return finished(self, self.rate(model, Units(graph, axes), data))

    def rate(self, model: nn.Module, parts: Parts, data: Iterable[Any] | None) -> Values:
        """See `Saliency.rate`."""
        with undisturbed(model) as probe:
            gradients = mean_gradients(probe, parts.names(), labelled_batches(self, model, data))
            products = {name: probe.weights[name] * gradient for name, gradient in gradients.items()}
        if self.form == "abs_sum":
            products = {name: product.abs() for name, product in products.items()}
        found = {name: sums.abs() for name, sums in parts.sums(products).items()}
        warn_of_silence(self, found)
        return found
