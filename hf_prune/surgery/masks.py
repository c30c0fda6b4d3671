"""Masks on any axis: units that nothing reads for now, but that can go on learning and come back.

A mask sets the readers' slices of its units to zero, as the cut would. What a unit computes is still computed, so the
gradient of its masked slices says what the loss would gain from reading it again.

Source: Humble et al., Soft Masking for Cost-Constrained Channel Pruning, ECCV 2022, arXiv 2211.02206.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_prune.allocate.plan import Plan
from hf_prune.analyse.graph import AxisGraph, Slice
from hf_prune.errors import PlanError, did_you_mean
from hf_prune.surgery.gates import OnUnits, parametrize_readers, remove_parametrizations, require_plain_readers

Mode = Literal["soft", "hard", "permanent"]


class Mask(nn.Module):
    """Which units of an axis are read, and how much they were worth of late; saved with the model.

    Attributes:
        mode: "soft": masked weights learn as if they were read; "hard": they keep their values; "permanent": they are
            set to zero, and their units never come back.
        kept: `(size,)`, 1 for units that are read and 0 for the others.
        importance: `(size,)`, moving average over steps.
        num_seen: Steps in that average.
    """

    kept: Tensor
    importance: Tensor
    num_seen: Tensor

    def __init__(self, size: int, mode: Mode = "soft") -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise PlanError(f"`mode` of masks must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        self.mode = mode
        self.register_buffer("kept", torch.ones(size))
        self.register_buffer("importance", torch.zeros(size))
        self.register_buffer("num_seen", torch.zeros(()))

    @property
    def num_kept(self) -> int:
        """Number of units that are read."""
        return int(self.kept.sum())

    @torch.no_grad()
    def keep_best(self, number: int) -> tuple[int, int]:
        """Read the units that were worth most, the first ones where they were worth the same.

        Returns:
            How many units came back, and how many went.
        """
        permanent = self.mode == "permanent"
        # Units that cannot come back stand behind all others, whatever their number says.
        worth = self.importance.where(self.kept > 0, -1.0) if permanent else self.importance
        kept = torch.zeros_like(self.kept)
        kept[worth.argsort(descending=True, stable=True)[:number]] = 1
        if permanent:
            kept *= self.kept
        change = kept - self.kept
        self.kept.copy_(kept)
        return int((change > 0).sum()), int((change < 0).sum())

    @torch.no_grad()
    def note(self, importance: Tensor, valid: Tensor, *, decay: float) -> None:
        """Take the importance `(size,)` of a step into the average; the first one after `forget` is the average.

        Args:
            importance: Not negative.
            valid: Whether to look at it at all, a single truth value.
            decay: Share of the old average.
        """
        mean = torch.where(self.num_seen > 0, decay * self.importance + (1 - decay) * importance, importance)
        self.importance.copy_(torch.where(valid, mean, self.importance))
        self.num_seen += valid

    def forget(self) -> None:
        """Begin a new average; the old one stands until there is something to put in its place."""
        self.num_seen.zero_()


class MaskedReader(OnUnits):
    """A reader's weight as the model sees it: without the slices of masked units."""

    def __init__(self, mask: Mask, slice_: Slice, ndim: int) -> None:
        super().__init__(slice_, ndim)
        # One mask for all readers of the axis.
        self.mask = mask

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight; in the mode "soft" gradients pass as if there were no mask."""
        masked = self.scaled(weight, self.mask.kept)
        return weight + (masked - weight).detach() if self.mask.mode == "soft" else masked


@dataclass(frozen=True)
class MaskedWeight:
    """A weight under masks.

    Attributes:
        module: That it belongs to.
        name: Of it in the module.
        original: What is trained.
        readers: One for every masked axis along it.
    """

    module: nn.Module
    name: str
    original: nn.Parameter
    readers: tuple[MaskedReader, ...]

    @torch.no_grad()
    def seen(self) -> Tensor:
        """Return the weight as the model sees it."""
        return getattr(self.module, self.name).detach()


def add_masks(
    model: nn.Module, graph: AxisGraph, axes: Iterable[str] | None = None, *, mode: Mode = "soft"
) -> dict[str, Mask]:
    """Put a mask on axes and return the masks by axis name; all units are read until told otherwise.

    Args:
        model: Changed in place; computes the same as before. The masks become buffers of it.
        graph: Its analysis.
        axes: Names; None takes all. Axes that are not silenced through their readers alone get no mask.
        mode: See `Mask`.

    Raises:
        PlanError: If an axis or the mode is unknown, or the model has masks or gates already.
    """
    require_plain_readers(model)
    names = list(graph.axes) if axes is None else list(axes)
    for name in names:
        if name not in graph.axes:
            raise PlanError(f"a mask needs a free axis, there is no '{name}'" + did_you_mean(name, graph.axes))
    device = next(model.parameters()).device
    masks = {name: Mask(graph.axes[name].size, mode).to(device) for name in names if graph.axes[name].can_gate}
    for name, mask in masks.items():
        parametrize_readers(model, graph, name, partial(MaskedReader, mask))
    return masks


def masked_weights(model: nn.Module) -> Iterator[MaskedWeight]:
    """Yield all weights under masks, in the order of the modules."""
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        stacks: Any = module.parametrizations
        for name, stack in stacks.items():
            readers = tuple(step for step in stack if isinstance(step, MaskedReader))
            if readers:
                yield MaskedWeight(module, name, stack.original, readers)


@torch.no_grad()
def zero_masked(model: nn.Module) -> None:
    """Set the masked slices themselves to zero."""
    for weight in masked_weights(model):
        weight.original.copy_(weight.seen())


def plan_of_masks(graph: AxisGraph, masks: Mapping[str, Mask]) -> Plan:
    """Return the plan that cuts what is masked."""
    return Plan.of(graph, {name: mask.kept.nonzero().flatten().tolist() for name, mask in masks.items()})


def remove_masks(model: nn.Module) -> None:
    """Take the masks off; weights are what was trained underneath, so cut what is masked before using the model.

    Raises:
        PlanError: If there are none.
    """
    if not remove_parametrizations(model, MaskedReader, leave_parametrized=False):
        raise PlanError("the model has no masks to remove")
