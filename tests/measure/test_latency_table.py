import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import timm
import torch
from hub_server import HubServer

import hf_prune
from hf_prune import Budget
from hf_prune.analyse.axes import size_after, size_of
from hf_prune.errors import BudgetError, LatencyTableError
from hf_prune.measure.closing import meet_latency
from hf_prune.measure.latency_table import LatencyTable, WholeAndSum, measure_latency_table, table_setting
from hf_prune.measure.operator_times import OperatorTimes, goes_by_dimension, grid
from hf_prune.measure.operators import operators_of

IMAGE = torch.zeros(1, 3, 64, 64)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = timm.create_model("resnet18").eval()
    return model, hf_prune.analyze(model, IMAGE)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=10).eval()


def invented(model, graph, batch_size=2):
    """A table in which every operator takes a microsecond for a million multiples of its sizes, exactly."""
    _, operators = operators_of(graph, batch_size)
    entries = {}
    for op in operators:
        grids = [grid(size_of(dim), 1) for dim in op.dims]
        if goes_by_dimension(op):
            times = tuple(1e-3 * float(np.prod(point)) + 1e-2 for point in product(*grids))
            entries[op.key] = OperatorTimes(tuple(grids), times)
        else:
            counts = sorted({int(op.num_values(*point)) for point in zip(*grids, strict=True)})
            entries[op.key] = OperatorTimes((tuple(counts),), tuple(1e-6 * count for count in counts))
    whole = WholeAndSum(2.0, 1.0)  # twice the sum, and nothing besides
    return LatencyTable(**table_setting(model, batch_size), model="ResNet", entries=entries, dense=whole,
                        quarter=WholeAndSum(1.0, 0.5), step=1)  # fmt: skip


def test_a_cut_model_takes_the_sum_of_its_operators(network):
    model, graph = network
    table = invented(model, graph)
    batch, operators = operators_of(graph, table.batch_size)
    cost = table.cost(graph)
    for share in (1.0, 0.7, 0.3):
        sizes = {name: max(1, round(share * axis.size)) for name, axis in graph.axes.items()}
        after = {batch.axes[name].leaf: size for name, size in sizes.items()}
        expected = 0.0
        for op in operators:
            now = [size_after(dim, after) for dim in op.dims]
            expected += 1e-3 * np.prod(now) + 1e-2 if goes_by_dimension(op) else 1e-6 * op.num_values(*now)
        assert cost(sizes) == pytest.approx(2 * expected, rel=1e-6)


def test_times_between_measured_sizes_are_interpolated_and_below_them_stay():
    times = OperatorTimes(((2, 4, 8), (10, 20)), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    assert float(times.at(4, 20)) == 4.0
    assert float(times.at(3, 10)) == 2.0
    assert float(times.at(6, 15)) == 4.5
    assert float(times.at(1, 1)) == 1.0
    assert times.at(np.array([2, 3, 8]), 10).tolist() == [1.0, 2.0, 5.0]
    assert float(OperatorTimes((), (7.0,)).at()) == 7.0


def test_a_convolution_costs_what_the_next_step_costs(network):
    model, graph = network
    table = replace(invented(model, graph), step=16)
    cost = table.cost(graph)
    name = "layer3.0.conv1.channels"
    costs = cost.along(name, {}, np.arange(1, 257))
    assert (np.diff(costs) >= -1e-9).all()
    convolutions_only = costs[129:143] - costs[128:142]  # from 130 on: only what is no convolution grows
    assert convolutions_only.max() < (costs[144] - costs[143]) / 2


def test_the_line_through_two_whole_models():
    whole = {"dense": WholeAndSum(11.0, 8.0), "quarter": WholeAndSum(5.0, 2.0)}
    table = LatencyTable(device="cpu", device_name="x", dtype="float32", batch_size=1, threads=1, model="m",
                         torch_version="2", entries={}, step=1, **whole)  # fmt: skip
    assert table.calibration() == pytest.approx((1.0, 3.0))
    assert table.dense.additivity_error == pytest.approx(8 / 11 - 1)
    # Nothing negative is added: where the line says so, the dense model alone decides.
    assert replace(table, quarter=WholeAndSum(1.0, 2.0)).calibration() == pytest.approx((11 / 8, 0.0))
    assert replace(table, quarter=WholeAndSum(12.0, 2.0)).calibration() == pytest.approx((11 / 8, 0.0))


def test_sizes_follow_the_cheap_steps_as_far_as_axes_are_large(network):
    model, graph = network
    table = replace(invented(model, graph), step=16)
    axes = list(graph.axes.values())
    assert table.step_for(axes) == 16
    assert table.step_for([replace(axes[0], size=24)]) == 4
    assert table.step_for([replace(axes[0], size=3)]) == 1
    assert table.step_for([replace(axes[0], size=3, kind="heads"), axes[1]]) == 16


def test_what_was_not_measured_is_an_error_and_never_free(network):
    model, graph = network
    table = invented(model, graph)
    key = next(iter(table.entries))
    with pytest.raises(LatencyTableError, match="must hold every operator of the model, but 1 of"):
        replace(table, entries={k: v for k, v in table.entries.items() if k != key}).cost(graph)
    other = timm.create_model("resnet26").eval()
    with pytest.raises(LatencyTableError, match="must hold every operator"):
        table.cost(hf_prune.analyze(other, IMAGE))


def test_tables_of_two_settings_do_not_mix(network):
    model, graph = network
    table = invented(model, graph)
    with pytest.raises(LatencyTableError, match="batch_size is 2 in the table and 3 here"):
        table.require_same_setting(table_setting(model, 3))
    for change in ({"threads": 99}, {"dtype": "float16"}, {"device_name": "another"}, {"torch_version": "1.0"}):
        with pytest.raises(LatencyTableError, match=f"{next(iter(change))} is"):
            hf_prune.plan(model, graph=graph, budget=Budget(latency_ms=0.5), table=replace(table, **change))


def test_tables_travel_as_json(network, tmp_path):
    table = invented(*network)
    path = tmp_path / "latency_table.json"
    table.write(path)
    assert LatencyTable.read(path) == table
    assert [file.name for file in tmp_path.iterdir()] == ["latency_table.json"]
    for text in ("", "[]", "{}", json.dumps({**json.loads(path.read_text()), "step": 0}),
                 path.read_text().replace('"ms": [', '"ms": [-1,', 1)):  # fmt: skip
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(LatencyTableError, match="no latency table could be read"):
            LatencyTable.read(tmp_path / "bad.json")
    with pytest.raises(LatencyTableError, match="no latency table could be read"):
        LatencyTable.read(tmp_path / "absent.json")


def test_a_measured_table_explains_the_models_it_was_measured_with(small):
    graph = hf_prune.analyze(small, IMAGE)
    table = measure_latency_table(small, graph, batch_size=1)
    cost = table.cost(graph)
    assert cost({}) == pytest.approx(table.dense.whole_ms, rel=1e-6)
    quarter = {name: max(1, axis.size // 4) for name, axis in graph.axes.items() if axis.kind != "head_dim"}
    assert cost(quarter) < 0.9 * cost({})
    assert -0.7 < table.dense.additivity_error < 3  # of the right order, whatever else the machine does


class Clock:
    """Stands for the device: a model takes as long as a table says, but for a factor that the table does not know."""

    def __init__(self, table, graph, factor):
        self.cost, self.factor, self.runs = table.cost(graph), factor, 0
        self.by_leaf = {axis.leaf: name for name, axis in graph.axes.items()}

    def __call__(self, model, graph, kept, batch_size):
        self.runs += 1
        share = self.cost({self.by_leaf[leaf]: len(units) for leaf, units in kept.items()}) / self.cost({})
        return 50.0, 50.0 * (share + self.factor * (1 - share))


@pytest.mark.parametrize("factor", [0.0, 0.15, -0.1])
@pytest.mark.parametrize("allocator", ["isomorphic", "knapsack"])
def test_a_budget_in_milliseconds_is_met_by_measuring(network, monkeypatch, factor, allocator):
    model, graph = network
    table = invented(model, graph)
    clock = Clock(table, graph, factor)
    monkeypatch.setattr("hf_prune.pipeline.time_cut", clock)
    plan = hf_prune.plan(model, graph=graph, budget=Budget(latency_ms=0.6), table=table, allocator=allocator)
    _, found = clock(model, graph, plan.on(graph), 2)
    assert found / 50 == pytest.approx(0.6, rel=0.05)
    assert clock.runs - 1 <= 5
    assert plan.how["batch"] == "2"
    assert {"predicted latency", "measured latency", "device"} <= set(plan.how)


def test_a_budget_that_no_plan_meets_is_refused(network, monkeypatch):
    model, graph = network
    table = invented(model, graph)
    monkeypatch.setattr("hf_prune.pipeline.time_cut", lambda *_: (50.0, 49.0))
    with pytest.raises(BudgetError, match=r"the nearest of|the smallest model within the limits"):
        hf_prune.plan(model, graph=graph, budget=Budget(latency_ms=0.6), table=table)


def test_a_corrected_aim_out_of_reach_does_not_lose_what_was_near_enough():
    def decide(limit):
        if limit < 9.8:
            raise BudgetError("too small")
        return hf_prune.Plan({}, {})

    assert meet_latency(decide, lambda _: 10.4, 10.0)[2] == 10.4
    with pytest.raises(BudgetError, match="the nearest of 1 plans was measured to take 11 ms"):
        meet_latency(decide, lambda _: 11.0, 10.0)
    with pytest.raises(BudgetError, match="too small"):
        meet_latency(decide, lambda _: 9.0, 9.0)


def test_prune_to_milliseconds_in_one_call(small, monkeypatch):
    before = sum(p.numel() for p in small.parameters())
    monkeypatch.setattr("hf_prune.pipeline.time_cut", lambda *_: (10.0, 8.0))
    assert hf_prune.prune(small, IMAGE, budget=Budget(latency_ms=0.8)) is small
    assert sum(p.numel() for p in small.parameters()) < 0.95 * before
    assert small(IMAGE).shape == (1, 10)
    assert hf_prune.manifest(small)["history"][0]["plan"]["how"]["budget"] == "latency_ms 0.8"


def test_a_table_is_pulled_from_the_hub(network, tmp_path):
    table = invented(*network)
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home")
        table.write(tmp_path / "latency_table.json")
        code = (
            "import sys; from huggingface_hub import HfApi; api = HfApi(); api.create_repo('me/tables');"
            f"api.upload_file(path_or_fileobj=r'{tmp_path / 'latency_table.json'}', path_in_repo='latency_table.json',"
            " repo_id='me/tables');"
            "from hf_prune.measure.latency_table import LatencyTable as T;"
            f"assert T.from_hub('me/tables') == T.read(r'{tmp_path / 'latency_table.json'}'); print('same')"
        )
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.stdout.strip() == "same", done.stderr[-2000:]
