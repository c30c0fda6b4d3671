"""What a model costs as a polynomial in the sizes of its axes: exact for every plan, before anything is cut."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from hf_prune.analyse.axes import Axis, Expr, resolve, size_after, size_of
from hf_prune.analyse.graph import AxisGraph

Term = tuple[Expr, ...]


@dataclass(frozen=True)
class Polynomial:
    """A sum of products of dimensions, equal products counted once.

    Attributes:
        terms: Product of dimensions -> how often it occurs.
    """

    terms: dict[Term, int]

    def __call__(self, sizes: Mapping[Axis, int]) -> int:
        """Return the value for given sizes; axes that are not named keep theirs."""
        after = dict(sizes)
        return sum(count * prod(size_after(dim, after) for dim in term) for term, count in self.terms.items())


@dataclass(frozen=True)
class Cost:
    """Costs of one forward pass at the traced input.

    Attributes:
        params: Parameters, shared ones once.
        macs: Multiply-accumulates of matrix products, convolutions and attention; element-wise work is not counted.
        activation_values: Numbers computed on the way (times the bytes of a number: memory traffic, not peak memory).
    """

    params: Polynomial
    macs: Polynomial
    activation_values: Polynomial

    @classmethod
    def of(cls, graph: AxisGraph) -> "Cost":
        """Collect the costs of a traced model."""
        recording = graph.recording
        return cls(
            _polynomial([recording.dims[name] for name, _ in graph.skeleton.named_parameters()]),
            _polynomial(recording.macs),
            _polynomial(recording.activations),
        )


def _polynomial(terms: list[list[Expr]]) -> Polynomial:
    """Merge equal terms; dimensions that cannot change become part of the count."""
    counts: Counter[Term] = Counter()
    for term in terms:
        constant, variable = 1, []
        for dim in map(resolve, term):
            if isinstance(dim, Axis) and dim.reason is not None:
                constant *= dim.size
            elif size_of(dim) != 1:
                variable.append(dim)
        counts[tuple(sorted(variable, key=repr))] += constant
    return Polynomial(dict(counts))
