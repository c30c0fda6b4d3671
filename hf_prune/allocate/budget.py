"""How small or how fast a model must become."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_prune.allocate.costs import CostModel, polynomial_cost
from hf_prune.analyse.cost import Cost
from hf_prune.analyse.graph import AxisGraph
from hf_prune.errors import BudgetError

if TYPE_CHECKING:
    from hf_prune.measure.latency_table import LatencyTable


@dataclass(frozen=True)
class Budget:
    """One limit: values up to 1 are a fraction of dense, larger ones absolute.

    Attributes:
        macs: Multiply-accumulates of one image.
        params: Parameters.
        latency_ms: Milliseconds a batch, on the device that the model is on.

    Raises:
        BudgetError: If not exactly one limit is given, or it is not positive.
    """

    macs: float | None = None
    params: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise BudgetError(f"a budget must set one of macs, params and latency_ms, got {sorted(given) or 'none'}")
        if not self.value > 0:
            raise BudgetError(f"`{self.quantity}` of a budget must be positive, got {self.value!r}")

    @property
    def quantity(self) -> str:
        """What is limited."""
        return next(name for name, value in vars(self).items() if value is not None)

    @property
    def value(self) -> float:
        """The limit, as it was given."""
        return float(vars(self)[self.quantity])

    def limit(self, dense: float) -> float:
        """Return the limit in absolute numbers.

        Raises:
            BudgetError: If it is not below what the dense model costs.
        """
        limit = self.value * dense if self.value <= 1 else self.value
        if limit >= dense:
            raise BudgetError(
                f"`{self.quantity}` must be below what the dense model costs, {dense:,.6g}, got {limit:,.6g}; nothing "
                f"would be pruned"
            )
        return limit


def cost_of(graph: AxisGraph, budget: Budget, table: "LatencyTable | None" = None) -> tuple[CostModel, float]:
    """Return the cost that a budget limits as a function of the sizes of axes, and the limit.

    Args:
        graph: The analysed model.
        budget: The limit.
        table: Measured latencies of this model; needed where milliseconds are limited.

    Raises:
        BudgetError: If the limit is not below what the dense model costs, or a table is missing.
    """
    if budget.quantity == "latency_ms":
        if table is None:
            raise BudgetError(
                "a budget of `latency_ms` needs a latency table: pass `table=measure_latency_table(model)`"
            )
        cost: CostModel = table.cost(graph)
    else:
        costs = Cost.of(graph)
        cost = polynomial_cost(graph, costs.macs if budget.quantity == "macs" else costs.params)
    return cost, budget.limit(cost({}))
