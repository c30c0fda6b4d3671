"""Accuracy at half the MACs: right after the cut, compensated without training, and after the same short fine-tuning.

Run     python benchmarks/recovery.py --weights resnet56-cifar10/model.safetensors --data cifar10/
        python benchmarks/recovery.py --weights mobilenet_v1_0.25_128-clothing/ --data clothing/
Writes  benchmarks/results/recovery_resnet56.json or recovery_clothing.json, and prints the table.
Needs   the extra `bench`; a CIFAR ResNet-56 (keys as in cifar_resnet.py) or the folder of a MobileNetV1 of
        transformers; its images as parquet files (`train-*.parquet`, `test-*.parquet`).

Rows: ours; Torch-Pruning, whose variant is the best of `THERE`, uniform or global, for each column by the first 2,000
test images (ours were chosen in the same way, by hand); random scores, every layer cut alike. Columns: one-shot; batch
norms recalibrated; kept weights fitted to the dense model by least squares; fine-tuned from what `START` says.
Calibration, fine-tuning and random scores are drawn anew for every seed; the table shows means and standard deviations.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import torch_pruning as tp  # pyright: ignore[reportMissingImports]  (only needed for the comparison)
from cifar_images import Images, augmented, load_images, top1
from one_shot import EXAMPLE, INNER, load_model
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_prune
from hf_prune.allocate.allocators import Limits
from hf_prune.allocate.plan import Plan
from hf_prune.analyse.graph import AxisGraph
from hf_prune.recover.compensate import compensated
from hf_prune.recover.norms import recalibrate_norms
from hf_prune.score.random import Random
from hf_prune.tokens.site import logits_of

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("one_shot", "recalibrated", "least_squares", "fine_tuned")
# What fine-tuning starts from.
START = {"ours": "least_squares", "torch_pruning": "recalibrated", "random": "recalibrated"}
KEEP_MACS, NUM_CALIBRATION, NUM_CHOOSING = 0.5, 512, 2_000
# By task and column.
OURS: dict[str, dict[str, dict[str, str]]] = {
    "resnet56": {
        "one_shot": {"criterion": "fluctuation", "allocator": "global_rank"},
        "recalibrated": {"criterion": "fpgm", "allocator": "global_rank"},
        "least_squares": {"criterion": "fpgm", "allocator": "global_rank"},
    },
    "clothing": {
        "one_shot": {"criterion": "taylor", "allocator": "uniform"},
        "recalibrated": {"criterion": "fluctuation", "allocator": "uniform"},
        "least_squares": {"criterion": "fluctuation", "allocator": "global_rank"},
    },
}
THERE: dict[str, Callable[[], Any]] = {
    "L1": lambda: tp.importance.MagnitudeImportance(p=1),
    "L2": lambda: tp.importance.MagnitudeImportance(p=2),
    "LAMP": lambda: tp.importance.LAMPImportance(),
    "FPGM": lambda: tp.importance.FPGMImportance(),
    "Taylor": lambda: tp.importance.TaylorImportance(),
}


@dataclass
class Task:
    """A trained model and its images.

    Attributes:
        name: Of the file of results.
        dense: The model.
        example: A blank image.
        train: Images and labels.
        test: Images and labels.
        graph: The analysis of the model.
        protect: Axes that every method leaves whole.
    """

    name: str
    dense: nn.Module
    example: Tensor
    train: Images
    test: Images
    graph: AxisGraph
    protect: list[str]


def cifar(weights: Path, data: Path, num_images: int, num_train: int) -> Task:
    """Return the ResNet-56; only the channels inside its blocks are cut, for Torch-Pruning knows no others there."""
    dense = load_model(weights)
    graph = hf_prune.analyze(dense, EXAMPLE)
    train, test = load_images(data, "train", num_train), load_images(data, "test", num_images)
    outer = [name for name in graph.axes if not INNER.fullmatch(name)]
    return Task("resnet56", dense, EXAMPLE, train, test, graph, outer)


def clothing(folder: Path, data: Path, num_images: int, num_train: int) -> Task:
    """Return a MobileNet of transformers."""
    dense = AutoModelForImageClassification.from_pretrained(folder).eval()
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            # The class is made with 0.9997, with which statistics are those of the last batch.
            module.momentum = 0.05
    processor = AutoImageProcessor.from_pretrained(folder)

    def read(split: str, number: int) -> Images:
        rows = datasets.load_dataset(
            "parquet", data_files=str(data / f"{split}-*.parquet"), split="train", streaming=True
        )
        rows = list(rows.take(number))
        pixels = processor([row["image"].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
        return pixels, torch.tensor([row["label"] for row in rows])

    train, test = read("train", num_train), read("test", num_images)
    example = torch.zeros_like(train[0][:1])
    return Task("clothing", dense, example, train, test, hf_prune.analyze(dense, example), [])


@torch.no_grad()
def macs_of(model: nn.Module, example: Tensor) -> int:
    """Return the multiply-accumulates of convolutions and linear layers."""
    total = 0

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        places = (
            output.numel() // output.shape[-3] if isinstance(layer, nn.Conv2d) else output.numel() // output.shape[-1]
        )
        total += places * layer.weight.numel()  # pyright: ignore

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    model(example)
    for handle in handles:
        handle.remove()
    return total


def batches(images: Images, size: int = 64) -> list[dict[str, Tensor]]:
    """Return images as a loader would give them."""
    return [{"pixel_values": x, "labels": y} for x, y in zip(images[0].split(size), images[1].split(size), strict=True)]


def plan_here(task: Task, calibration: Images, **settings: Any) -> Plan:
    """Return one of our plans within the budget."""
    return hf_prune.plan(
        task.dense,
        graph=task.graph,
        budget=hf_prune.Budget(macs=KEEP_MACS),
        limits=Limits(protect=task.protect),
        data=batches(calibration),
        **settings,
    )


def cut_here(task: Task, plan: Plan, calibration: Images, state: str) -> nn.Module:
    """Return the model cut by a plan: as it is, with new statistics of norms, or with fitted weights."""
    model = copy.deepcopy(task.dense)
    if state == "least_squares":
        with compensated(model, task.graph, plan, batches(calibration)):
            hf_prune.apply_plan(model, plan, task.graph)
        return model
    hf_prune.apply_plan(model, plan, task.graph)
    return with_recalibrated(model, calibration)[state]


def with_recalibrated(plain: nn.Module, calibration: Images) -> dict[str, nn.Module]:
    """Return a cut model, and one with new statistics."""
    fresh = copy.deepcopy(plain)
    recalibrate_norms(fresh, batches(calibration, 128))
    return {"one_shot": plain, "recalibrated": fresh}


def cut_there(task: Task, variant: tuple[str, bool], calibration: Images) -> nn.Module:
    """Return the largest model within the budget that Torch-Pruning makes, by bisection of its pruning ratio."""
    limit = KEEP_MACS * macs_of(task.dense, task.example)
    low, high, best = 0.0, 0.95, None
    for _ in range(9):
        middle = (low + high) / 2
        model = _prune_there(task, variant, middle, calibration)
        if macs_of(model, task.example) <= limit:
            high, best = middle, model
        else:
            low = middle
    assert best is not None, f"Torch-Pruning meets no budget with {variant}"
    return best


def _prune_there(task: Task, variant: tuple[str, bool], ratio: float, calibration: Images) -> nn.Module:
    model, (criterion, everywhere) = copy.deepcopy(task.dense), variant
    whole = {name.removesuffix(".channels") for name in task.graph.axes if name not in task.protect}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    # Where axes are protected, the others are one layer each.
    outer = [module for name, module in convolutions if task.protect and name not in whole]
    importance = THERE[criterion]()
    pruner = tp.pruner.BasePruner(
        model,
        task.example,
        importance=importance,
        pruning_ratio=ratio,
        global_pruning=everywhere,
        ignored_layers=[*linear, *outer],
        output_transform=logits_of,
    )
    if criterion == "Taylor":
        F.cross_entropy(logits_of(model(calibration[0])), calibration[1]).backward()
    pruner.step()
    model.zero_grad()
    return model.eval()


def fine_tune(model: nn.Module, train: Images, *, num_epochs: int, lr: float, seed: int) -> nn.Module:
    """Return a copy trained with SGD, cosine, random crops and flips."""
    model, generator = copy.deepcopy(model).train(), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    num_steps = num_epochs * (len(train[1]) // 128 or 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_epochs):
        for images, labels in augmented(train, generator):
            optimizer.zero_grad()
            F.cross_entropy(logits_of(model(images)), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def choose_there(task: Task, calibration: Images) -> dict[str, tuple[str, bool]]:
    """Return for each state the variant of Torch-Pruning that is best on some test images."""
    found: dict[str, dict[tuple[str, bool], float]] = {"one_shot": {}, "recalibrated": {}}
    few = (task.test[0][:NUM_CHOOSING], task.test[1][:NUM_CHOOSING])
    for criterion in THERE:
        for everywhere in (False, True):
            variant = (criterion, everywhere)
            for state, model in with_recalibrated(cut_there(task, variant, calibration), calibration).items():
                found[state][variant] = top1(model, *few)
            print("Torch-Pruning", variant, {state: f"{of[variant]:.2%}" for state, of in found.items()}, flush=True)
    return {state: max(of, key=lambda variant: of[variant]) for state, of in found.items()}


def measure(task: Task, seed: int, there: dict[str, tuple[str, bool]], arguments: Any) -> list[dict[str, Any]]:
    """Return top-1 of every row and column for one seed."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(task.train[1]), generator=generator)[:NUM_CALIBRATION]
    calibration, rows = (task.train[0][chosen], task.train[1][chosen]), []
    blind = plan_here(task, calibration, criterion=Random(seed=seed), allocator="uniform")
    states = {
        "ours": {
            state: cut_here(task, plan_here(task, calibration, **settings), calibration, state)
            for state, settings in OURS[task.name].items()
        },
        "torch_pruning": {
            state: with_recalibrated(cut_there(task, variant, calibration), calibration)[state]
            for state, variant in there.items()
        },
        "random": {state: cut_here(task, blind, calibration, state) for state in OURS[task.name]},
    }
    dense = macs_of(task.dense, task.example)
    for row, models in states.items():
        start = time.perf_counter()
        tuned = fine_tune(
            models[START[row]], task.train, num_epochs=arguments.epochs, lr=arguments.learning_rate, seed=seed
        )
        seconds = time.perf_counter() - start
        accuracies = {state: top1(model, *task.test) for state, model in (models | {"fine_tuned": tuned}).items()}
        macs = {state: macs_of(model, task.example) / dense for state, model in models.items()}
        rows.append({"row": row, "seed": seed, "top1": accuracies, "macs": macs, "fine_tuning_s": seconds})
        print(rows[-1], flush=True)
    return rows


def table(results: dict[str, Any]) -> str:
    """Return top-1 in percent, mean and standard deviation over seeds."""
    lines = ["| | one-shot | norms recalibrated | least squares | fine-tuned |", "| --- | --: | --: | --: | --: |"]
    for row, title in {"ours": "ours", "torch_pruning": "Torch-Pruning", "random": "random"}.items():
        cells = []
        for column in COLUMNS:
            found = [100 * r["top1"][column] for r in results["rows"] if r["row"] == row and column in r["top1"]]
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{spread}" if found else "-")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Cut, compensate, fine-tune, classify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="safetensors of ResNet-56, or a folder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=10_000, help="of the test set")
    parser.add_argument("--train_images", type=int, default=6_000, help="for calibration and fine-tuning")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=0.01)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    load = clothing if arguments.weights.is_dir() else cifar
    task = load(arguments.weights, arguments.data, arguments.num_images, arguments.train_images)
    results: dict[str, Any] = {
        "num_test_images": len(task.test[1]),
        "num_train_images": len(task.train[1]),
        "num_epochs": arguments.epochs,
        "learning_rate": arguments.learning_rate,
        "dense_top1": top1(task.dense, *task.test),
        "ours": OURS[task.name],
    }
    print(f"dense: {results['dense_top1']:.2%}", flush=True)
    there = choose_there(task, (task.train[0][:NUM_CALIBRATION], task.train[1][:NUM_CALIBRATION]))
    results["torch_pruning"] = {state: {"criterion": c, "global": g} for state, (c, g) in there.items()}
    results["rows"] = [row for seed in range(arguments.num_seeds) for row in measure(task, seed, there, arguments)]
    path = arguments.output / f"recovery_{task.name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
