"""The decision: which units of which axes remain."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.errors import PlanError, did_you_mean
from hf_prune.files import write_whole

if TYPE_CHECKING:
    from hf_prune.analyse.axes import Axis
    from hf_prune.analyse.graph import AxisGraph


@dataclass(frozen=True)
class Plan:
    """Kept units of every axis that loses some.

    Attributes:
        kept: Axis name -> kept units, ascending; none removes the branch that the axis lies on.
        sizes: Axis name -> its size before, so that a plan of another model is recognised.
        how: What decided, for the record: the criterion, the budget.
    """

    kept: dict[str, tuple[int, ...]]
    sizes: dict[str, int]
    how: dict[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if set(self.kept) != set(self.sizes):
            raise PlanError("`kept` and `sizes` of a plan must name the same axes")
        for name, kept in self.kept.items():
            size = self.sizes[name]
            if any(type(unit) is not int or not 0 <= unit < size for unit in kept):
                raise PlanError(f"units of axis '{name}' must be integers from 0 to {size - 1}, got {kept}")
            if any(low >= high for low, high in pairwise(kept)):
                raise PlanError(f"units of axis '{name}' must be ascending and different, got {kept}")

    @classmethod
    def of(cls, graph: "AxisGraph", kept: Mapping[str, Iterable[int]]) -> "Plan":
        """Make a plan for a model from kept units; axes that keep everything are left out.

        Raises:
            PlanError: If there is no such free axis, or units are out of range.
        """
        for name in kept:
            if name not in graph.axes:
                raise PlanError(unknown_axis(name, graph))
        chosen = {name: tuple(sorted({int(unit) for unit in units})) for name, units in kept.items()}
        changed = {name: units for name, units in chosen.items() if len(units) != graph.axes[name].size}
        return cls(changed, {name: graph.axes[name].size for name in changed})

    @classmethod
    def removing(cls, graph: "AxisGraph", *modules: str) -> "Plan":
        """Make a plan that removes whole modules: `blocks.3` (a block), `blocks.5.mlp` (a branch), `blocks.*.mlp`.

        All axes of heads, neurons and channels that lie inside them lose all their units.

        Raises:
            PlanError: If no such axis lies in one of the modules.
        """
        gone: dict[str, tuple[int, ...]] = {}
        for module in modules:
            inside = [name for name, axis in graph.axes.items()
                      if axis.kind in ("heads", "mlp", "channels") and fnmatchcase(name, f"{module}.*")]  # fmt: skip
            if not inside:
                raise PlanError(f"there is nothing to remove in '{module}': no free axis lies inside" + did_you_mean(
                    module, {name.rpartition(".")[0] for name in graph.axes}, most=3))  # fmt: skip
            gone |= dict.fromkeys(inside, ())
        return cls.of(graph, gone)

    def check(self, graph: "AxisGraph") -> None:
        """Check that the plan fits a model.

        Raises:
            PlanError: If it does not.
        """
        for name, size in self.sizes.items():
            if name not in graph.axes:
                raise PlanError(unknown_axis(name, graph))
            if graph.axes[name].size != size:
                raise PlanError(
                    f"the plan must be of this model, but its axis '{name}' has {size} units and the model's has "
                    f"{graph.axes[name].size}"
                )

    def on(self, graph: "AxisGraph") -> "dict[Axis, Tensor]":
        """Return the kept units by axis of a trace."""
        self.check(graph)
        return {graph.axes[name].leaf: torch.tensor(units, dtype=torch.long) for name, units in self.kept.items()}

    def then(self, second: "Plan") -> "Plan":
        """Return the plan that does at once what this one and then `second`, of the pruned model, do.

        Raises:
            PlanError: If `second` does not fit what this plan leaves.
        """
        kept, sizes = dict(self.kept), {**second.sizes, **self.sizes}
        for name, units in second.kept.items():
            left = self.kept.get(name, tuple(range(second.sizes[name])))
            if len(left) != second.sizes[name]:
                raise PlanError(
                    f"the second plan must be of the pruned model: '{name}' has {len(left)} units left, and the second "
                    f"plan is of {second.sizes[name]}"
                )
            kept[name] = tuple(left[unit] for unit in units)
        return Plan(kept, {name: sizes[name] for name in kept})

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        kept = {name: list(units) for name, units in self.kept.items()}
        return {"kept": kept, "sizes": dict(self.sizes), "how": dict(self.how)}

    @classmethod
    def from_json(cls, data: Any) -> "Plan":
        """Rebuild a plan from data that may come from a stranger.

        Raises:
            PlanError: If it is malformed.
        """
        if not isinstance(data, Mapping) or not {"kept", "sizes"} <= set(data) <= {"kept", "sizes", "how"}:
            raise PlanError("a plan must be an object with exactly 'kept' and 'sizes', and perhaps 'how'")
        kept, sizes, how = data["kept"], data["sizes"], data.get("how", {})
        if not isinstance(how, Mapping) or any(not isinstance(part, str) for pair in how.items() for part in pair):
            raise PlanError("'how' of a plan must map words to words")
        if not isinstance(kept, Mapping) or not isinstance(sizes, Mapping):
            raise PlanError("'kept' and 'sizes' of a plan must be objects")
        if any(not isinstance(units, list) for units in kept.values()):
            raise PlanError("'kept' must hold a list of units for every axis")
        if any(type(size) is not int or size < 1 for size in sizes.values()):
            raise PlanError("'sizes' must hold a positive integer for every axis")
        return cls({str(name): tuple(units) for name, units in kept.items()}, dict(sizes), dict(how))

    def write(self, path: str | Path) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        write_whole(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "Plan":
        """Read a plan.

        Raises:
            PlanError: If there is none, or it is malformed.
        """
        return cls.from_json(read_json(path, "plan"))


def read_json(path: str | Path, what: str) -> Any:
    """Return the content of a file that holds a plan of some kind.

    Raises:
        PlanError: If there is none, or it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise PlanError(f"no {what} could be read from '{path}': {err}") from err


def unknown_axis(name: str, graph: "AxisGraph") -> str:
    """Return what to say about a name that is no free axis."""
    if name in graph.frozen:
        return f"axis '{name}' must not be pruned: {graph.frozen[name]}"
    return f"the model has no axis '{name}'" + did_you_mean(name, graph.axes, most=3)
