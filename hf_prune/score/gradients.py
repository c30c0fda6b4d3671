"""Weight times gradient, summed for every unit, while gradients come and go."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from hf_prune.analyse.graph import AxisInfo, Slice
from hf_prune.analyse.running import quiet_run
from hf_prune.errors import CriterionError
from hf_prune.score.base import unit_rows

SumsOf = Callable[[Tensor], dict[str, Tensor]]


def gate_slices(axis: AxisInfo) -> tuple[Slice, ...]:
    """Return slices whose weight times gradient sums to the derivative with respect to a gate on each unit.

    To scale what a unit passes on is to scale its slices of the readers. Where no layer reads all that a unit does (the
    width at which queries meet keys), its writers are gated; there both partners count, which doubles the derivative.
    """
    return axis.readers if axis.can_gate else axis.writers or axis.readers


@contextmanager
def unit_products(
    model: nn.Module,
    members: Mapping[str, tuple[int, Sequence[Slice]]],
    entry: Callable[[Tensor], Tensor] = torch.clone,
) -> Iterator[SumsOf]:
    """Give a function from a loss to axis name -> `(size,)`: sums of `entry(weight * gradient)` over slices of units.

    The model evaluates meanwhile (no dropout, BatchNorm with its running statistics), and is left with the modes,
    gradients and `requires_grad` it came with. Each gradient is dropped as soon as it is summed up, so that there is
    never a second set of weights.

    Args:
        model: Any module.
        members: Axis name -> its size, and the slices to sum over; buffers among them are left out.
        entry: What to do to every single product before it is summed.
    """
    parameters = dict(model.named_parameters())
    uses: dict[str, list[tuple[str, int, Slice]]] = defaultdict(list)
    for axis, (size, slices) in members.items():
        for slice_ in slices:
            if slice_.name in parameters:
                uses[slice_.name].append((axis, size, slice_))
    # Backward runs a thread a device: a list can be appended to by all of them.
    found: list[tuple[str, Tensor]] = []

    def collect(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        products = entry(parameter.detach().float() * gradient.float())
        found.extend((axis, unit_sums(products, slice_, size)) for axis, size, slice_ in uses[name])

    def sums_of(loss: Tensor) -> dict[str, Tensor]:
        if not loss.isfinite():
            raise CriterionError(f"the loss must be finite, got {loss.item()}; check images, labels and weights")
        found.clear()
        if loss.requires_grad:
            loss.backward()
        sums = {axis: torch.zeros(size) for axis, (size, _) in members.items()}
        for axis, values in found:
            sums[axis] = sums[axis].to(values.device) + values
        return sums

    with gradients_of(parameters, uses, collect), quiet_run(model), torch.enable_grad():
        yield sums_of


@contextmanager
def gradients_of(
    parameters: Mapping[str, nn.Parameter], wanted: Collection[str], collect: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Have backward runs make the gradients of wanted parameters only and hand each over when it is complete."""
    before = {name: (parameter.requires_grad, parameter.grad) for name, parameter in parameters.items()}
    hooks = []
    try:
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(name in wanted)
            if name in wanted:
                hooks.append(parameter.register_post_accumulate_grad_hook(partial(collect, name)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in parameters.items():
            requires_grad, parameter.grad = before[name]
            parameter.requires_grad_(requires_grad)


def unit_sums(entries: Tensor, slice_: Slice, size: int) -> Tensor:
    """Return the sum over the entries of each unit, `(size,)`."""
    others = [d for d in range(entries.ndim) if d != slice_.dim]
    line = entries.sum(others) if others else entries
    return unit_rows(line, replace(slice_, dim=0), size).sum(1)
