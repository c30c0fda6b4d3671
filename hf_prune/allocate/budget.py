"""How small a model must become."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hf_prune.analyse.axes import Axis
from hf_prune.analyse.cost import Cost
from hf_prune.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """One limit: values up to 1 are a fraction of dense, larger ones absolute.

    Attributes:
        macs: Multiply-accumulates of one image.
        params: Parameters.

    Raises:
        BudgetError: If not exactly one limit is given, or it is not positive.
    """

    macs: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise BudgetError(f"a budget must set one of macs and params, got {sorted(given) or 'none'}")
        ((name, value),) = given.items()
        if not value > 0:
            raise BudgetError(f"`{name}` of a budget must be positive, got {value!r}")

    def measure(self, cost: Cost) -> "tuple[Callable[[Mapping[Axis, int]], float], float]":
        """Return the cost as a function of axis sizes, and its limit.

        Raises:
            BudgetError: If the limit is not below what the dense model costs.
        """
        name, polynomial = ("macs", cost.macs) if self.macs is not None else ("params", cost.params)
        value, dense = float(self.macs or self.params or 0), polynomial({})
        limit = value * dense if value <= 1 else value
        if limit >= dense:
            raise BudgetError(
                f"`{name}` must be below those of the dense model, {dense:,}, got {limit:,.0f}; nothing would be pruned"
            )
        return polynomial, limit
