"""GraSP: what the flow of gradients would lose, before any training, goes last."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.errors import CriterionError
from hf_prune.score.base import finished
from hf_prune.score.batches import labelled_batches
from hf_prune.score.parts import Parts, Units, Values, prunable_weights
from hf_prune.score.saliency import (
    Probe,
    Saliency,
    gradients_at,
    mean_gradients,
    rounds,
    undisturbed,
    warn_of_silence,
)

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Grasp(Saliency):
    """How much faster the loss can fall, to first order, because a part is there.

    `S = -w (H g)`, summed with its sign over the weights that read a unit, is half the first-order change of `g g` when
    the unit goes, the squared norm of the gradient with respect to the weights of linear layers and convolutions. Parts
    of the smallest `S` are kept.

    `S` has both signs; a score must not. With `x = -2 S N / (g g)`, the share of `g g` that a part is good for times
    the number `N` of parts in the model, the score is `x + sqrt(x^2 + 1)`: about `2 x` for parts that gradients need, 1
    for those without influence, and towards 0 the more a part is in the way. It falls as `S` grows, everywhere, so that
    the order is GraSP's. A dead unit is therefore not the first to go: one that stands in the way is.

    Source: Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, ICLR 2020. The classifier
    is scored with the weights it has, not with others drawn for the purpose, and batch norms without statistics use the
    batch's: then images that are together in a micro-batch matter.

    Attributes:
        temperature: Divisor of the logits, so that softmax is nearly linear.
        micro_batch_size: Images that are differentiated twice at a time, whatever the batches are.

    Raises:
        CriterionError: If a number is not positive.
    """

    name = "grasp"
    needs = "backward"
    comparable = True

    temperature: float = 200.0
    micro_batch_size: int = 16

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.micro_batch_size < 1:
            raise CriterionError(
                f"`temperature` and `micro_batch_size` of GraSP must be positive, got {self.temperature} and "
                f"{self.micro_batch_size}"
            )

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return what gradients owe to units; see `Criterion.score`.

        The data are gone through twice: first for `g`, held fixed from then on, then micro-batch by micro-batch for
        `H g`, the gradient of the sum of `g` times the micro-batch's gradient. An iterator is kept in memory. Cost: one
        backward run and one double backward run an image; in memory three sets of gradients, and the graph of one
        micro-batch.

        Raises:
            CriterionError: If data are missing or the gradient is zero.
        """
        return finished(self, self.rate(model, Units(graph, axes), data))

    def rate(self, model: nn.Module, parts: Parts, data: Iterable[Any] | None) -> Values:
        """See `Saliency.rate`."""
        again = rounds(data)
        with undisturbed(model) as probe:
            gradients = mean_gradients(
                probe,
                list(prunable_weights(model)),
                self._split(labelled_batches(self, model, next(again))),
                temperature=self.temperature,
            )
            flow = sum(float(gradient.square().sum()) for gradient in gradients.values())
            if not flow:
                raise CriterionError(
                    "the gradient must not vanish for 'grasp'; check that the logits hang on the weights"
                )
            second = self._split(labelled_batches(self, model, next(again)))
            curved = hessian_times(probe, gradients, parts.names(), second, temperature=self.temperature)
            products = {name: -probe.weights[name] * values for name, values in curved.items()}
        found = parts.sums(products)
        warn_of_silence(self, found)
        # exp(asinh(x)) is x + sqrt(x^2 + 1), exact for large negative numbers, too.
        return {name: torch.exp(torch.asinh(sums * (-2 * parts.total() / flow))) for name, sums in found.items()}

    def _split(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in batches:
            number = -(-len(images) // self.micro_batch_size)
            yield from zip(images.tensor_split(number), labels.tensor_split(number), strict=True)


def hessian_times(
    probe: Probe, vector: Values, names: Sequence[str], batches: Batches, *, temperature: float = 1.0
) -> Values:
    """Return the product of the Hessian of the mean cross-entropy and a vector, by parameter name.

    Args:
        probe: Of the model.
        vector: Parameter name -> its part of the vector.
        names: Parameters whose rows of the product are wanted.
        batches: Images and labels; the graph of one batch is in memory at a time.
        temperature: Divisor of the logits.
    """
    leaves, num_images = probe.leaves(list(dict.fromkeys([*vector, *names]))), 0
    wanted = {name: leaves[name] for name in names if name in leaves}
    totals = {name: torch.zeros_like(leaf) for name, leaf in wanted.items()}

    # A function of its own, so that nothing holds on to the graph of one batch while the next one runs.
    def of_batch(images: Tensor, labels: Tensor) -> Values:
        loss = probe.loss(leaves, images, labels, temperature)
        first = gradients_at(loss, {name: leaves[name] for name in vector}, again=True)
        along = sum((vector[name] * gradient).sum() for name, gradient in first.items())
        return gradients_at(torch.as_tensor(along), wanted)

    for images, labels in batches:
        for name, gradient in of_batch(images, labels).items():
            totals[name] += gradient
        num_images += len(images)
    return {name: total / max(num_images, 1) for name, total in totals.items()}
