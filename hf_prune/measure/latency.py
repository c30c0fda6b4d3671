"""How long a callable takes on this device, measured side by side so that ratios survive a noisy machine."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from hf_prune.errors import LatencyTableError
from hf_prune.measure.report import LatencyStats


def time_side_by_side(
    runs: Mapping[str, Callable[[int], object]], device: torch.device, *, repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Return milliseconds per call of every run, `repeats` each, taken in turns.

    A slow spell of the machine then falls on all of them alike, and the ratio of two medians stays meaningful.

    Args:
        runs: Name to callable; it is given the number of the repeat, so that it may take another input each time.
        device: Where the work happens; on accelerators each call is waited for.
        repeats: Timed calls of each.
        warmup: Untimed calls of each before.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-warmup, repeats):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run(max(repeat, 0))
            _wait(device)
            if repeat >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def summarize(times_ms: list[float]) -> LatencyStats:
    """Return the median and the 10th and 90th percentile of some times."""
    median, p10, p90 = np.percentile(times_ms, [50, 10, 90])
    return LatencyStats(float(median), float(p10), float(p90))


def device_name(device: torch.device) -> str:
    """Return what the device calls itself, for tables and cards."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return torch.backends.cpu.get_cpu_capability() + " CPU" if (name := _cpu_model()) is None else name


def require_same_setting(table: object, wanted: Mapping[str, Any]) -> None:
    """Check that a latency table was measured in the setting it is to serve.

    Args:
        table: Has an attribute for every setting.
        wanted: The settings here.

    Raises:
        LatencyTableError: With every value that differs.
    """
    differing = [
        f"{key} is {getattr(table, key)!r} in the table and {value!r} here"
        for key, value in wanted.items()
        if getattr(table, key) != value
    ]
    if differing:
        raise LatencyTableError("a latency table only serves the setting it was measured in: " + "; ".join(differing))


def _cpu_model() -> str | None:
    """The processor's name where the operating system tells it in the usual file."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:  # noqa: PTH123 (a kernel file, not a path of ours)
            names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    except OSError:
        return None
    return names[0] if names else None


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
