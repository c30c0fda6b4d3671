"""Budgets in milliseconds: what a latency table predicts, what is measured, and what a MACs budget is worth in time.

Run     python benchmarks/latency.py            (everything; a quarter of an hour on two idle cores)
        python benchmarks/latency.py budgets    (predicted beside measured)
        python benchmarks/latency.py speedup    (half the MACs, beside Torch-Pruning; needs the extra `bench`)
Writes  benchmarks/results/latency_budgets.json, latency_speedup.json and prints tables.

Weights are random: they change nothing about time. All times of a row are medians of runs in turns.
"""

import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from coverage_rival import attentions, correct_integers
from torch import nn

import hf_prune
from hf_prune.allocate.allocators import Limits, Problem, best
from hf_prune.allocate.budget import cost_of
from hf_prune.allocate.knapsack import knapsack
from hf_prune.errors import BudgetError
from hf_prune.measure.closing import meet_latency, time_cut
from hf_prune.measure.latency import device_name, time_side_by_side
from hf_prune.measure.latency_table import measure_latency_table
from hf_prune.measure.token_cost import count_macs
from hf_prune.score.base import relative
from hf_prune.score.magnitude import Magnitude

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "resnet50": (1,),
    "convnext_tiny": (1,),
    "vit_small_patch16_224": (1,),
    "deit_tiny_patch16_224": (1,),
    "swin_tiny_patch4_window7_224": (1,),
}
SHARES = (0.75, 0.5, 0.25)
IMAGE = torch.zeros(1, 3, 224, 224)


def machine() -> dict[str, Any]:
    """Return what the numbers are of."""
    return {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads(), "torch": torch.__version__}


def budgets() -> None:
    """Predicted and measured milliseconds at shares of the dense latency, before and after correcting the aim."""
    rows = []
    for name, batch_sizes in MODELS.items():
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        graph = hf_prune.analyze(model)
        axes = Limits().choose(list(graph.axes.values()))
        scores = {axis: relative(values) for axis, values in Magnitude().score(model, graph, axes).items()}
        for batch_size in batch_sizes:
            started = time.perf_counter()
            table = measure_latency_table(model, graph, batch_size=batch_size)
            table_s = time.perf_counter() - started
            for share in (1.0, *SHARES):
                row = {"model": name, "batch_size": batch_size, "share": share, "table_s": table_s,
                       "additivity_dense": table.dense.additivity_error,
                       "additivity_quarter": table.quarter.additivity_error}  # fmt: skip
                rows.append(row | one_budget(model, graph, axes, scores, table, share))
                print(json.dumps(rows[-1]), flush=True)
    errors = [abs(row["first_error"]) for row in rows if "first_error" in row]
    result = machine() | {"rows": rows, "median_abs_error": statistics.median(errors)}
    (RESULTS / "latency_budgets.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(budgets_table(result))


def one_budget(model: nn.Module, graph: Any, axes: Any, scores: Any, table: Any, share: float) -> dict[str, Any]:
    """Plan for one budget; the dense model itself where the share is one."""
    cost = table.cost(graph)
    dense_ms, found, allocate_s = cost({}), [], []

    def measured(plan: hf_prune.Plan) -> float:
        dense, cut = time_cut(model, graph, plan.on(graph), table.batch_size)
        found.append((dense, cut))
        return cut / dense * dense_ms

    if share == 1.0:
        _, again = time_cut(model, graph, {}, table.batch_size)
        return {"predicted_ms": dense_ms, "measured_ms": again, "first_error": dense_ms / again - 1}
    limits = Limits(round_to=table.step)
    predicted: dict[float, float] = {}

    def decide(limit: float) -> hf_prune.Plan:
        started = time.perf_counter()
        sizes = knapsack(Problem(axes, scores, cost, limit, limits))
        allocate_s.append(time.perf_counter() - started)
        predicted[limit] = cost(sizes)
        return hf_prune.Plan.of(graph, best(scores, sizes))

    limit = share * dense_ms
    try:
        plan, _, closing = meet_latency(decide, measured, limit)
    except BudgetError as err:
        return {"out_of_reach": str(err)}
    first = found[0][1] / found[0][0]
    sizes = {name: len(units) for name, units in plan.kept.items()}
    macs = cost_of(graph, hf_prune.Budget(macs=0.99))[0]
    return {
        "predicted_ms": predicted[limit],
        "measured_ms": first * dense_ms,
        "first_error": predicted[limit] / (first * dense_ms) - 1,
        "closing_share": closing / dense_ms,
        "closing_error": closing / limit - 1,
        "macs_share": macs(sizes) / macs({}),
        "tries": len(found),
        "allocate_s": max(allocate_s),
    }


def budgets_table(result: dict[str, Any]) -> str:
    """Return predicted against measured as markdown."""
    lines = [
        "| model, batch | table, s | operators added up: dense, quarter | 100% | 75% | 50% | 25% |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for key in dict.fromkeys((row["model"], row["batch_size"]) for row in result["rows"]):
        rows = {row["share"]: row for row in result["rows"] if (row["model"], row["batch_size"]) == key}
        cells = [f"{100 * rows[1.0]['first_error']:+.0f}%"]
        cells += [
            "out of reach"
            if "out_of_reach" in rows[s]
            else f"{100 * rows[s]['first_error']:+.0f}% → {rows[s]['closing_share']:.3f}"
            for s in SHARES
        ]
        first = rows[1.0]
        added = f"{100 * first['additivity_dense']:+.0f}%, {100 * first['additivity_quarter']:+.0f}%"
        lines.append(f"| {key[0]}, {key[1]} | {first['table_s']:.0f} | {added} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\nmedian of the absolute errors: {result['median_abs_error']:.1%}"


def speedup() -> None:
    """Milliseconds at half the MACs: ours and Torch-Pruning's, the same criterion, in turns."""
    rows = []
    for name in ("resnet50", "vit_small_patch16_224"):
        torch.manual_seed(0)
        dense = timm.create_model(name).eval()
        graph = hf_prune.analyze(dense)
        models = {"dense": dense, **ours(dense, graph), **theirs(dense)}
        macs = {key: count_macs(lambda model=model: model(IMAGE)) for key, model in models.items()}
        for batch_size in (1, 16):
            medians = medians_of(models, batch_size)
            for key, ms in medians.items():
                share, gain = macs[key] / macs["dense"], medians["dense"] / ms
                rows.append({"model": name, "batch_size": batch_size, "who": key, "macs_share": share,
                             "ms": ms, "speedup": gain, "of_promised": gain * share})  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    result = machine() | {"rows": rows}
    (RESULTS / "latency_speedup.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(speedup_table(result))


def medians_of(models: dict[str, nn.Module], batch_size: int) -> dict[str, float]:
    """Return milliseconds a batch of several models, run in turns."""
    images = torch.randn(batch_size, 3, 224, 224)
    runs = {key: (lambda _, model=model: model(images)) for key, model in models.items()}
    with torch.inference_mode():
        times = time_side_by_side(runs, torch.device("cpu"), repeats=30 if batch_size == 1 else 9)
    return {key: float(np.median(values)) for key, values in times.items()}


def ours(dense: nn.Module, graph: Any) -> dict[str, nn.Module]:
    """Return models of half the MACs, sizes at the cheap steps."""
    made = {}
    for title, allocator in (("isomorphic", "isomorphic"), ("knapsack", "knapsack")):
        made[title] = copy.deepcopy(dense)
        plan = hf_prune.plan(dense, graph=graph, budget=hf_prune.Budget(macs=0.5), allocator=allocator,
                             limits=Limits(round_to=16))  # fmt: skip
        hf_prune.apply_plan(made[title], plan, graph, verify=False)
    return made


def theirs(dense: nn.Module) -> dict[str, nn.Module]:
    """Return Torch-Pruning's models of half the MACs, by searching its pruning ratio."""
    return {f"torch-pruning {way}": half_by_torch_pruning(dense, global_pruning=way == "global")
            for way in ("uniform", "global")}  # fmt: skip


def half_by_torch_pruning(dense: nn.Module, *, global_pruning: bool) -> nn.Module:
    """Return the largest model of at most half the MACs along Torch-Pruning's ratio."""
    import torch_pruning as tp  # pyright: ignore[reportMissingImports]  (only needed for the comparison)

    whole = count_macs(lambda: dense(IMAGE))
    low, high, found = 0.0, 0.95, None
    for _ in range(9):
        middle = (low + high) / 2
        model = copy.deepcopy(dense)
        heads = {layer: count for _, count, layers in attentions(model) for layer, _ in layers}
        settings: dict[str, Any] = {"num_heads": heads, "prune_num_heads": True, "prune_head_dims": False,
                                    "head_pruning_ratio": middle}  # fmt: skip
        pruner = tp.pruner.MetaPruner(
            model, IMAGE, tp.importance.MagnitudeImportance(p=2), pruning_ratio=middle, global_pruning=global_pruning,
            ignored_layers=[module for module in model.modules() if getattr(module, "out_features", 0) == 1000],
            **(settings if heads else {}),
        )  # fmt: skip
        pruner.step()
        correct_integers(model, pruner.num_heads)
        share = count_macs(lambda model=model: model(IMAGE)) / whole
        low, high, found = (middle, high, found) if share > 0.5 else (low, middle, model)
    assert found is not None
    return found


def speedup_table(result: dict[str, Any]) -> str:
    """Return speed-ups as markdown, and in brackets which share that is of what the MACs promise."""
    names = [name for name in dict.fromkeys(row["who"] for row in result["rows"]) if name != "dense"]
    lines = ["| model, batch | " + " | ".join(names) + " |", "| --- |" + " --: |" * len(names)]
    for key in dict.fromkeys((row["model"], row["batch_size"]) for row in result["rows"]):
        rows = {row["who"]: row for row in result["rows"] if (row["model"], row["batch_size"]) == key}
        cells = [f"{rows[name]['speedup']:.2f}x ({100 * rows[name]['of_promised']:.0f}%)" for name in names]
        lines.append(f"| {key[0]}, {key[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["budgets", "speedup"]
    for part in chosen:
        {"budgets": budgets, "speedup": speedup}[part]()
