"""The decision over tokens and widths together, as data."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hf_prune.allocate.plan import Plan, read_json
from hf_prune.errors import ManifestError, PlanError
from hf_prune.files import write_whole
from hf_prune.tokens.config import TokenPruningConfig


@dataclass(frozen=True)
class Choice:
    """A schedule of tokens that was tried, with the widths that the budget then leaves.

    Attributes:
        keep_ratios: Patches alive after each reduction; none where all tokens stay.
        kept_widths: Share of the units that may be cut that stay.
        predicted: Cost, in the unit of the budget.
        divergence: Mean KL(dense || pruned) of the class probabilities over the calibration images, in nats, before any
            training.
    """

    keep_ratios: tuple[float, ...]
    kept_widths: float
    predicted: float
    divergence: float


@dataclass(frozen=True)
class JointPlan:
    """Which units stay, and how tokens become fewer.

    Attributes:
        plan: Kept units; of no axis where tokens alone meet the budget.
        tokens: What makes tokens fewer; None where widths alone do better.
        quantity: What the budget limits: "macs" of an image, or "latency_ms" of a batch.
        limit: What the model may cost.
        predicted: What it will cost, by the table or by count.
        dense: What the dense model costs.
        measured: What a model made by this plan was measured to cost; None where cost is counted.
        choices: All schedules that were tried, from all tokens to few.
    """

    plan: Plan
    tokens: TokenPruningConfig | None
    quantity: str
    limit: float
    predicted: float
    dense: float
    measured: float | None = None
    choices: tuple[Choice, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> units that stay, of the axes that lose some."""
        return {name: len(units) for name, units in self.plan.kept.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        tokens = None if self.tokens is None else self.tokens.to_dict()
        choices = [asdict(choice) for choice in self.choices]
        return {**data, "plan": self.plan.to_json(), "tokens": tokens, "choices": choices}

    @classmethod
    def from_json(cls, data: Any) -> "JointPlan":
        """Rebuild a plan.

        Raises:
            PlanError: If it is malformed.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
            raise PlanError(f"a joint plan must be an object with exactly {sorted(names)}")
        try:
            tokens = None if data["tokens"] is None else TokenPruningConfig.from_dict(data["tokens"])
            choices = tuple(
                Choice(**{**choice, "keep_ratios": tuple(choice["keep_ratios"])}) for choice in data["choices"]
            )
        except (TypeError, KeyError, ManifestError) as err:
            raise PlanError(f"`tokens` or `choices` of a joint plan are malformed: {err}") from err
        return cls(**{**data, "plan": Plan.from_json(data["plan"]), "tokens": tokens, "choices": choices})

    def write(self, path: str | Path) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        write_whole(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "JointPlan":
        """Read a plan.

        Raises:
            PlanError: If there is none, or it is malformed.
        """
        return cls.from_json(read_json(path, "joint plan"))
