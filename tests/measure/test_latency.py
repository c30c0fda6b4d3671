import time

import pytest
import torch

from hf_prune.measure.latency import device_name, summarize, time_side_by_side


def test_runs_take_turns_and_are_timed_in_milliseconds():
    order = []

    def run(name, seconds):
        def call(repeat):
            order.append((name, repeat))
            time.sleep(seconds)

        return call

    times = time_side_by_side(
        {"slow": run("slow", 0.02), "fast": run("fast", 0.001)}, torch.device("cpu"), repeats=3, warmup=1
    )
    assert order[2:] == [(name, repeat) for repeat in range(3) for name in ("slow", "fast")]
    assert len(times["slow"]) == 3
    assert min(times["slow"]) > 19
    assert summarize(times["slow"]).median_ms > 5 * summarize(times["fast"]).median_ms


def test_a_summary_is_the_median_and_two_percentiles():
    stats = summarize([float(value) for value in range(1, 102)])
    assert (stats.median_ms, stats.p10_ms, stats.p90_ms) == pytest.approx((51, 11, 91))


def test_the_cpu_has_a_name():
    assert device_name(torch.device("cpu"))
