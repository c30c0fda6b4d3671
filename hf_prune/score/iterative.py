"""Remove little by little, and rate what is left anew each time."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_prune.errors import CriterionError
from hf_prune.score.parts import Parts, Values


def in_steps(
    rate: Callable[[Mapping[str, Tensor]], Values], parts: Parts, steps: int, *, returning: bool = False
) -> Values:
    """Return how long every part stays, from 0 for the first that goes up to 1 for the most salient that remain.

    After step t of T the share `keep_ratio ** (t / T)` of all parts is left. A part counts by the last step that it
    outlived and, among those of one step, by its saliency when it went. So the parts that remain at the end are those
    of the largest values, and every larger share of the order is what the schedule left on its way.

    Args:
        rate: From masks of parameters to the saliencies of all parts, not negative.
        parts: What goes, and the share that remains.
        steps: How often saliencies are computed.
        returning: Whether parts come back when their saliency, which `rate` must then tell, is large enough.
    """
    values = rate({})
    kept = {name: torch.ones_like(v, dtype=torch.bool) for name, v in values.items()}
    places = {name: torch.zeros_like(v) for name, v in values.items()}
    for step in range(1, steps + 1):
        if step > 1:
            values = rate(parts.masks(kept))
        if not returning:
            values = {name: v.where(kept[name], -1.0) for name, v in values.items()}
        number = round(sum(v.numel() for v in values.values()) * parts.keep_ratio ** (step / steps))
        now = parts.best(values, number)
        gone = {name: kept[name] & ~now[name] for name in kept}
        _place(places, values, gone, step - 1)
        kept = now
    _place(places, values, kept, steps)
    return {name: place / (steps + 1) for name, place in places.items()}


def require_schedule(name: str, steps: int, keep_ratio: float) -> None:
    """Check settings.

    Raises:
        CriterionError: If there is no step or nothing to keep.
    """
    if steps < 1 or not 0 < keep_ratio <= 1:
        raise CriterionError(
            f"`steps` of '{name}' must be 1 or more, `keep_ratio` above 0 and at most 1, got {steps} and {keep_ratio}"
        )


def _place(places: Values, values: Values, chosen: Values, step: int) -> None:
    """Note that parts outlived a number of steps; within that they count by their value."""
    # Below one, or the best of a step would be level with the worst of the next.
    largest = max((float(values[name][of].max()) for name, of in chosen.items() if of.any()), default=0.0) * 1.001
    for name, of in chosen.items():
        within = values[name] / largest if largest > 0 else torch.zeros_like(values[name])
        places[name] = torch.where(of, step + within, places[name])
