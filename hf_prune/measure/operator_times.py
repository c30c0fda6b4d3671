"""How long an operator takes at a grid of sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer

from hf_prune.analyse.axes import size_of
from hf_prune.errors import LatencyTableError
from hf_prune.measure.operators import Operator

# Kernels work on so many channels at once: on AVX-512 a convolution of 136 channels is slower than one of 144.
STEPS = {"cpu": 16}
STEP_ELSEWHERE = 8
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
ROUNDS, MS_A_POINT = 3, 6.0


@dataclass(frozen=True)
class OperatorTimes:
    """Milliseconds of one operator.

    Attributes:
        sizes: For each dimension that can change, the sizes it was measured at, ascending; for operators that only
            move and change numbers, how many numbers they are given.
        ms: Median for every combination, the last dimension running fastest.
    """

    sizes: tuple[tuple[int, ...], ...]
    ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if prod(map(len, self.sizes)) != len(self.ms) or any(list(s) != sorted(set(s)) or not s for s in self.sizes):
            raise LatencyTableError("an operator must have ascending sizes and one time for every combination of them")
        require_times(self.ms)

    def at(self, *sizes: Any) -> Any:
        """Return milliseconds, interpolated between measured sizes; below the smallest one they stay what they are.

        Sizes are numbers, or arrays that broadcast.
        """
        table = np.asarray(self.ms).reshape([len(known) for known in self.sizes])
        places = [np.interp(size, known, np.arange(len(known))) for size, known in zip(sizes, self.sizes, strict=True)]
        ms: Any = 0.0
        for corner in product((0, 1), repeat=len(places)):
            weight: Any = 1.0
            index = []
            for place, length, upper in zip(places, table.shape, corner, strict=True):
                low = np.minimum(np.floor(place).astype(int), max(length - 2, 0))
                weight = weight * (place - low if upper else 1 - (place - low))
                index.append(np.minimum(low + upper, length - 1))
            ms = ms + weight * table[tuple(index)]
        return ms


def require_times(times: Any) -> None:
    """Check that all are positive, finite numbers.

    Raises:
        LatencyTableError: If one is not.
    """
    if not all(isinstance(ms, int | float) and 0 < ms < float("inf") for ms in times):
        raise LatencyTableError("every time in a latency table must be a positive number of milliseconds")


def grid(size: int, step: int) -> tuple[int, ...]:
    """Return the sizes at which a dimension is measured: shares of the dense size, at cheap steps if it is large."""
    step = step if size >= 4 * step else 1
    return tuple(sorted({min(size, max(1, round(share * size / step)) * step) for share in SHARES}))


def measure_operator(op: Operator, device: torch.device, step: int) -> OperatorTimes:
    """Time an operator at a grid of sizes, in rounds, so that a slow spell of the machine does not bend it.

    Raises:
        LatencyTableError: If it does not run at other sizes than those of the dense model.
    """
    grids = [grid(size_of(dim), step) for dim in op.dims]
    if goes_by_dimension(op):
        sizes, points = tuple(grids), list(product(*grids))
    else:
        joint = [tuple(g[max(0, len(g) - back)] for g in grids) for back in range(len(SHARES), 0, -1)]
        by_values = {int(op.num_values(*point)): point for point in joint}
        sizes, points = (tuple(sorted(by_values)),), [by_values[count] for count in sorted(by_values)]
    times: list[list[float]] = [[] for _ in points]
    for _ in range(ROUNDS):
        for point, found in zip(points, times, strict=True):
            found.append(_time_at(op, point, device))
    return OperatorTimes(sizes, tuple(float(np.median(found)) for found in times))


def _time_at(op: Operator, point: tuple[int, ...], device: torch.device) -> float:
    try:
        return time_ms(op.runner(point, device), device, MS_A_POINT / ROUNDS)
    except RuntimeError as err:
        raise LatencyTableError(
            f"every operator must run at other sizes to be timed, but '{op.key}' does not run at {point}: {err}; use a "
            f"budget of MACs for this model, and please report its name"
        ) from err


def goes_by_dimension(op: Operator) -> bool:
    """Tell whether each dimension counts by itself; what only touches every number once goes by how many there are."""
    return op.is_product or len(op.dims) < 2


def time_of(op: Operator, times: OperatorTimes, factor: float, step: int) -> Callable[..., Any]:
    """Return milliseconds, times a factor, as a function of the sizes of an operator's dimensions."""

    def by_dimension(*sizes: Any) -> Any:
        return factor * times.at(*sizes)

    def by_steps(*sizes: Any) -> Any:
        # A convolution of a few channels more than a multiple is as slow as one of the next multiple.
        return by_dimension(*(np.ceil(np.asarray(size) / step) * step for size in sizes))

    def by_values(*sizes: Any) -> Any:
        return factor * times.at(op.num_values(*sizes))

    return by_values if not goes_by_dimension(op) else by_steps if op.is_convolution else by_dimension


def time_ms(run: Callable[[], Any], device: torch.device, ms: float) -> float:
    """Return milliseconds of a call, the mean over as many calls as take about `ms`, after two that do not count."""
    if device.type == "cuda":
        return _time_by_events(run, ms)
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    once = timer.timeit(1).mean * 1e3
    return timer.timeit(min(max(round(ms / once), 1), 200)).mean * 1e3


def _time_by_events(run: Callable[[], Any], ms: float) -> float:
    def timed(number: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(number):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / number

    timed(2)
    return timed(min(max(round(ms / max(timed(1), 1e-3)), 1), 200))
