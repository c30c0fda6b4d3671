"""Accuracy right after the cut, criterion by criterion, beside Torch-Pruning's form of the same criterion.

Run     python benchmarks/one_shot.py --weights resnet56-cifar10/model.safetensors --data cifar10/
Writes  benchmarks/results/one_shot_resnet56.json and prints the table.
Needs   the extra `bench`; a trained CIFAR ResNet-56 (keys as in cifar_resnet.py) and CIFAR-10 as parquet files
        (`test-*.parquet`, `train-*.parquet`), whose images are scaled by ImageNet's mean and deviation.

Both sides get the same widths: the inner channels of every block, the same share of each, no fine-tuning. What differs
is how a criterion adds up what the layers say of a channel. The third number is ours with the same criterion where all
channels of the network, those of the residual stream too, are ranked together under the same budget of MACs.
"""

import argparse
import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp  # pyright: ignore[reportMissingImports]  (only needed for the comparison)
from cifar_images import load_images, top1
from cifar_resnet import CifarResNet
from safetensors.torch import load_file
from torch import Tensor, nn

import hf_prune
from hf_prune.allocate.allocators import Limits
from hf_prune.analyse.graph import AxisGraph
from hf_prune.score.base import Criterion
from hf_prune.score.fisher import Fisher
from hf_prune.score.magnitude import Magnitude
from hf_prune.score.registry import criterion
from hf_prune.score.taylor import Taylor

RESULTS = Path(__file__).parent / "results" / "one_shot_resnet56.json"
REMOVED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
EXAMPLE = torch.zeros(1, 3, 32, 32)
NUM_CALIBRATION = 512
# The channels between the two convolutions of a block.
INNER = re.compile(r"layer\d\.\d\.conv1\.channels")
# Ours, and the same criterion there; those that it does not have stand alone.
PAIRS: dict[str, tuple[Any, Callable[[], Any] | None]] = {
    "random": ("random", lambda: tp.importance.RandomImportance()),
    "magnitude L1": (Magnitude(p=1), lambda: tp.importance.MagnitudeImportance(p=1)),
    "magnitude L2": ("magnitude", lambda: tp.importance.MagnitudeImportance(p=2)),
    "lamp": ("lamp", lambda: tp.importance.LAMPImportance()),
    "fpgm": ("fpgm", lambda: tp.importance.FPGMImportance()),
    "bn_scale": ("bn_scale", lambda: tp.importance.BNScaleImportance()),
    "taylor": ("taylor", lambda: tp.importance.TaylorImportance()),
    "taylor, elements": (Taylor(form="elements"), lambda: tp.importance.TaylorImportance()),
    "fisher": ("fisher", lambda: tp.importance.HessianImportance()),
    "fisher, elements": (Fisher(form="elements"), lambda: tp.importance.HessianImportance()),
    "whc": ("whc", None),
    "activation": ("activation", None),
}


class Once(Criterion):
    """A criterion that scores a model once, for budgets to be compared."""

    needs = "none"

    def __init__(self, inner: Criterion, model: nn.Module, graph: AxisGraph, data: Any) -> None:
        self.name, self.comparable = inner.name, inner.comparable  # pyright: ignore[reportAttributeAccessIssue]
        self.scores = inner.score(model, graph, list(graph.axes.values()), data)

    def score(self, model: nn.Module, graph: AxisGraph, axes: Any, data: Any = None) -> dict[str, Tensor]:
        """Return what was found before."""
        return {axis.name: self.scores[axis.name] for axis in axes}


def load_model(weights: Path) -> nn.Module:
    """Return the trained dense network."""
    model = CifarResNet(56)
    model.load_state_dict(load_file(weights))
    return model.eval()


def prune_there(model: nn.Module, importance: Any, widths: dict[str, int], data: tuple[Tensor, Tensor]) -> nn.Module:
    """Return a copy pruned by Torch-Pruning to given widths of named convolutions."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    inner = {modules[name]: width for name, width in widths.items()}
    pruner = tp.pruner.BasePruner(
        model,
        EXAMPLE,
        importance=importance,
        pruning_ratio=0.0,
        # It rounds what stays down: half a channel more makes that exact.
        pruning_ratio_dict={layer: 1 - (width + 0.5) / layer.out_channels for layer, width in inner.items()},  # pyright: ignore
        ignored_layers=[m for m in modules.values() if isinstance(m, nn.Conv2d | nn.Linear) and m not in inner],
    )
    accumulate(model, importance, *data)
    pruner.step()
    for layer, width in inner.items():
        assert layer.out_channels == width, f"asked for {width} channels, got {layer.out_channels}"
    return model.eval()


def accumulate(model: nn.Module, importance: Any, images: Tensor, labels: Tensor) -> None:
    """Give a criterion there the gradients it looks at, in the way its documentation shows."""
    if isinstance(importance, tp.importance.HessianImportance):
        importance.zero_grad()
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            model.zero_grad()
            F.cross_entropy(model(image), label).backward()
            importance.accumulate_grad(model)
    elif isinstance(importance, tp.importance.TaylorImportance):
        F.cross_entropy(model(images), labels).backward()


def main() -> None:
    """Cut, count and classify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=10_000, help="of the test set")
    parser.add_argument("--only", choices=PAIRS, help="measure one criterion again, and keep the rows of the others")
    arguments = parser.parse_args()
    dense = load_model(arguments.weights)
    test = load_images(arguments.data, "test", arguments.num_images)
    calibration = load_images(arguments.data, "train", NUM_CALIBRATION)
    results: dict[str, Any] = {"num_test_images": len(test[1]), "dense_top1": top1(dense, *test), "rows": []}
    print(f"dense: {results['dense_top1']:.2%} of {len(test[1])} test images")
    graph = hf_prune.analyze(dense, EXAMPLE)
    batches = list(zip(*(part.split(64) for part in calibration), strict=True))
    if arguments.only:
        kept = json.loads(RESULTS.read_text(encoding="utf-8"))
        assert kept["num_test_images"] == len(test[1]), "the rows of the others are of another number of images"
        results["rows"] = [row for row in kept["rows"] if row["criterion"] != arguments.only]
    for title, (ours, _) in PAIRS.items():
        if arguments.only not in (None, title):
            continue
        scored = Once(criterion(ours), dense, graph, batches)
        for removed in REMOVED:
            results["rows"].append(
                {"criterion": title, "removed": removed}
                | compare(dense, graph, title, scored, removed, test, calibration)
            )
            print(results["rows"][-1], flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def compare(
    dense: nn.Module,
    graph: Any,
    title: str,
    scored: Criterion,
    removed: float,
    test: tuple[Tensor, Tensor],
    calibration: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """Return accuracy and share of MACs of each way to remove some share of the MACs by one criterion."""
    there = PAIRS[title][1]
    outer = [name for name in graph.axes if not INNER.fullmatch(name)]
    row: dict[str, Any] = {}
    for way, settings in {
        "ours": {"allocator": "uniform", "limits": Limits(protect=outer)},
        "ours_global": {"allocator": "global_rank"},
    }.items():
        model, budget = copy.deepcopy(dense), hf_prune.Budget(macs=1 - removed)
        plan = hf_prune.plan(model, graph=graph, criterion=scored, budget=budget, **settings)
        macs = hf_prune.apply_plan(model, plan, graph, verify=False).macs
        row[way] = {"top1": top1(model, *test), "macs": macs[1] / macs[0]}
        if way == "ours" and there is not None:
            widths = {name.removesuffix(".channels"): len(kept) for name, kept in plan.kept.items()}
            row["torch_pruning"] = {"top1": top1(prune_there(dense, there(), widths, calibration), *test)}
    return row


def table(results: dict[str, Any]) -> str:
    """Return top-1 in percent for every criterion and share removed: ours / Torch-Pruning / ours ranked globally."""
    header = "| criterion | " + " | ".join(f"-{removed:.0%}" for removed in REMOVED) + " |"
    lines = [header, "| --- " * (len(REMOVED) + 1) + "|"]
    for title in PAIRS:
        rows = [row for row in results["rows"] if row["criterion"] == title]
        cells = [
            " / ".join(
                f"{100 * row[way]['top1']:.1f}" if way in row else "-"
                for way in ("ours", "torch_pruning", "ours_global")
            )
            for row in rows
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
