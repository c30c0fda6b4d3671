"""FORCE and iterative SNIP: sensitivities of what is left, while it becomes less."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.score.base import finished
from hf_prune.score.iterative import in_steps, require_schedule
from hf_prune.score.parts import Parts, Units, Values
from hf_prune.score.saliency import Saliency, endless, mean_gradients, undisturbed, warn_of_silence


@dataclass(frozen=True, kw_only=True)
class Force(Saliency):
    """SNIP in steps: a batch is run through what is left, and the least sensitive parts go, by an exponential schedule.

    The sensitivity of a part is |sum w g|, `w` being weights of the dense model and `g` the gradient while parts that
    went are zero; see `Snip` for the sums, and `in_steps` for how the score of a unit comes out of the steps. Scores
    suit every budget that leaves more than `keep_ratio` of the units.

    Source: de Jorge et al., Progressive Skeletonization: Trimming more fat from a network at initialization, ICLR 2021
    (FORCE; with `returning=False` its Iterative SNIP).

    Attributes:
        steps: Number of steps. Each takes the next batch, and the first one again when there are no more.
        keep_ratio: Share of the units that is left at the end.
        returning: Whether parts that went can come back: their gates still have derivatives.

    Raises:
        CriterionError: If there is no step, or nothing to keep.
    """

    name = "force"
    needs = "backward"
    comparable = True

    steps: int = 60
    keep_ratio: float = 0.05
    returning: bool = True

    def __post_init__(self) -> None:
        require_schedule(self.name, self.steps, self.keep_ratio)

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return how long units stay, from 0 to 1; see `Criterion.score`. One backward run a step.

        What the scores of an axis are hangs on the axes that it is scored with, for units of all of them go.
        """
        return finished(self, self.rate(model, Units(graph, axes, self.keep_ratio), data))

    def rate(self, model: nn.Module, parts: Parts, data: Iterable[Any] | None) -> Values:
        """See `Saliency.rate`."""
        batches = endless(self, model, data)
        with undisturbed(model) as probe:

            def sensitivities(masks: Mapping[str, Tensor]) -> Values:
                gradients = mean_gradients(probe, parts.names(), [next(batches)], masks=masks)
                products = {name: probe.weights[name] * gradient for name, gradient in gradients.items()}
                found = {name: sums.abs() for name, sums in parts.sums(products).items()}
                if not masks:
                    warn_of_silence(self, found)
                return found

            return in_steps(sensitivities, parts, self.steps, returning=self.returning)
