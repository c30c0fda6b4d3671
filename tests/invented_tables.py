"""Latency tables that no clock has made: the time of a busy machine is no ground for a test."""

from itertools import product
from math import prod

from hf_prune.analyse.axes import size_of
from hf_prune.measure.latency_table import LatencyTable, WholeAndSum
from hf_prune.measure.latency_table import table_setting as operators_setting
from hf_prune.measure.operator_times import OperatorTimes, goes_by_dimension, grid
from hf_prune.measure.operators import operators_of
from hf_prune.measure.token_cost import BlockProbe
from hf_prune.measure.token_table import TokenTable
from hf_prune.measure.token_table import table_setting as tokens_setting


def operator_table(model, graph, *, batch_size=1):
    """Every operator takes a microsecond for a product of its sizes, or a nanosecond for a number; the whole twice."""
    _, operators = operators_of(graph, batch_size)
    entries = {}
    for op in operators:
        grids = [grid(size_of(dim), 1) for dim in op.dims]
        if goes_by_dimension(op):
            entries[op.key] = OperatorTimes(tuple(grids), tuple(1e-3 * prod(point) for point in product(*grids)))
        else:
            counts = sorted({int(op.num_values(*point)) for point in product(*grids)})
            entries[op.key] = OperatorTimes((tuple(counts),), tuple(1e-6 * count for count in counts))
    whole, quarter = WholeAndSum(2.0, 1.0), WholeAndSum(1.0, 0.5)
    setting = operators_setting(model, batch_size)
    return LatencyTable(**setting, model="ViT", entries=entries, dense=whole, quarter=quarter, step=1)


def block_table(model, pixels, tokens, *, repeats=1):
    """A block takes as long as it has tokens, a selector a tenth of that; the device was twice as fast at that time."""
    lengths = (2, 66)
    times = {"block_ms": tuple(0.01 * n for n in lengths), "selector_ms": tuple(0.001 * n for n in lengths)}
    setting = tokens_setting(BlockProbe(model, pixels, tokens))
    return TokenTable(**setting, torch_version="2", repeats=repeats, tokens=lengths, dense_ms=1.0, **times)
