"""What a criterion is, and how the weights of a unit are read off a model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_prune.analyse.graph import AxisGraph, AxisInfo, Slice
from hf_prune.errors import CriterionError

Needs = Literal["none", "forward", "backward"]


class Criterion(ABC):
    """A rule that says how much every unit of an axis is worth.

    Attributes:
        name: Name of its file and in the registry.
        needs: What it does with data: nothing, run the model on images, or differentiate its loss as well.
        comparable: Whether scores of different axes may be ranked together as they are.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    comparable: ClassVar[bool]

    @abstractmethod
    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Score all units of some axes.

        Args:
            model: The analysed model. Left as it was: weights, gradients, modes, hooks.
            graph: Its analysis.
            axes: Those of its axes to score.
            data: Batches; see `hf_prune.score.batches`. Not looked at where `needs` is "none".

        Returns:
            Axis name -> `(size,)` float32 on the CPU, finite, not negative; larger is more worth keeping.

        Raises:
            CriterionError: If data are missing or an axis cannot be scored.
        """


def finished(criterion: Criterion, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores as a criterion must: float32 on the CPU.

    Raises:
        CriterionError: If one is not finite.
    """
    done = {name: values.detach().to("cpu", torch.float32) for name, values in scores.items()}
    for name, values in done.items():
        if not values.isfinite().all():
            raise CriterionError(
                f"scores must be finite, but '{criterion.name}' gave {values[~values.isfinite()][0].item()} for a unit "
                f"of '{name}'; look for infinite weights or inputs, or score the model in float32"
            )
    return done


def unit_rows(tensor: Tensor, slice_: Slice, size: int) -> Tensor:
    """Return the entries of a parameter by the unit they belong to, as `(size, entries of one unit)` in float32.

    Indices that belong to no unit (another part of a concatenation) are left out; every unit has equally many.

    Raises:
        CriterionError: If the tensor has another shape than the one that was analysed.
    """
    units = slice_.units
    if slice_.dim >= tensor.ndim or tensor.shape[slice_.dim] != len(units):
        raise CriterionError(
            f"the analysis must be of this model, but dimension {slice_.dim} of '{slice_.name}' should have "
            f"{len(units)} entries and its shape is {tuple(tensor.shape)}; analyze the model again after a change"
        )
    order = units.argsort(stable=True)[int((units < 0).sum()) :]
    rows = tensor.detach().movedim(slice_.dim, 0)
    if not torch.equal(order, torch.arange(len(units))):
        rows = rows[order.to(rows.device)]
    return rows.reshape(size, -1).float()


def layer_rows(model: nn.Module, slices: Sequence[Slice], size: int) -> Iterator[Tensor]:
    """Yield what each layer holds of every unit, as `(size, entries)`: its weight and bias side by side.

    A bias goes with its weight because by itself, one small number a unit, it would have as much say as a whole layer.
    Buffers are left out. One layer is in memory at a time.
    """
    parameters: dict[str, nn.Parameter] = {}
    layers: dict[str, list[Slice]] = {}
    for slice_ in slices:
        path, _, name = slice_.name.rpartition(".")
        parameter = model.get_submodule(path)._parameters.get(name)
        if parameter is not None:
            parameters[slice_.name] = parameter
            layers.setdefault(path, []).append(slice_)
    for members in layers.values():
        rows = [unit_rows(parameters[member.name], member, size) for member in members]
        yield rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def relative(values: Tensor) -> Tensor:
    """Return values `(size,)` divided by their mean, so that layers of any scale count the same; zeros stay zeros."""
    return values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)
