"""Accuracy against MACs of token methods, after the same short training of the same ViT.

Run     python benchmarks/token_accuracy.py --data cifar10/ --model outputs/benchmarks/vit-cifar10 \
            --picture docs/token_accuracy.png
        python benchmarks/token_accuracy.py --data cifar10/ --model outputs/benchmarks/vit-cifar10 --seeds 0 \
            --num_train 40000 --epochs 4 --num_test 10000 --keep_ratios 0.5 --methods spvit dynamicvit tome \
            class_attention random --results benchmarks/results/token_accuracy_longer.json
Writes  benchmarks/results/token_accuracy.json (or --results) and the picture, and prints the table.
Needs   the ViT of benchmarks/cifar_vit.py.

Three stages, each keeping the same share of what it sees. Every method trains on the same images in the same order,
with the same rates, on labels and the dense model's logits; SPViT and DynamicViT learn their selectors meanwhile, under
a constraint on what is kept (and SPViT from tokens of the dense model as well, as its paper says). SPViT is scored with
its own counts and, with the same weights, with fixed ones. Seeds change images, order and selectors. MACs are counted
on single images in evaluation, reducers included; those of SPViT differ from image to image.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import timm
import torch
from accelerate import Accelerator
from cifar_images import Images, load_images, top1
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hf_prune.measure.token_cost import count_macs
from hf_prune.recover.checkpoints import Checkpoints
from hf_prune.recover.distill import DistillWeights
from hf_prune.recover.loop import Objective, PhaseSettings, train_phase
from hf_prune.recover.objectives import PruneTokens, Recover
from hf_prune.recover.rates import TwoRates
from hf_prune.tokens.attach import add_token_pruning, token_pruning_of
from hf_prune.tokens.calibrate import calibrate_thresholds
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.constraint import keep_constraint
from hf_prune.tokens.reducers.registry import reducer_class
from hf_prune.tokens.schedule import even_stages, geometric

RESULTS = Path(__file__).parent / "results" / "token_accuracy.json"
METHODS = ("spvit", "dynamicvit", "evit", "tome", "class_attention", "random")
FIXED = ", fixed counts"
ROWS = ("spvit", f"spvit{FIXED}", *METHODS[1:])
KEEP_RATIOS = (0.7, 0.5)
BATCH_SIZE, RATE, BACKBONE_SHARE, NUM_CALIBRATION, NUM_COUNTED = 64, 5e-3, 0.06, 512, 32


def mean_macs(model: nn.Module, images: Tensor) -> float:
    """Return the mean MACs of single images."""
    model.eval()
    return statistics.fmean(count_macs(lambda image=image: model(image[None])) for image in images)


def pruned(dense: nn.Module, method: str, keep_ratio: float, seed: int) -> nn.Module:
    """Return a copy of the dense model with a fresh reducer before each stage."""
    model = copy.deepcopy(dense).requires_grad_(True)
    depth, heads = len(model.blocks), model.blocks[0].attn.num_heads  # type: ignore
    blocks = even_stages(depth)
    settings = TokenPruningConfig(
        method=method, before_blocks=blocks, keep_ratios=geometric(keep_ratio, len(blocks)), num_heads=heads
    )
    torch.manual_seed(seed)
    add_token_pruning(model, settings)
    return model


def objective_for(dense: nn.Module, model: nn.Module, accelerator: Accelerator, seed: int) -> Objective:
    """Return what a method trains on."""
    settings = token_pruning_of(model).settings
    if not reducer_class(settings.method).learned:
        return Recover(teacher=dense, weight=1.0)
    weights = DistillWeights(labels=1.0, logits=1.0, tokens=0.5 if settings.method == "spvit" else 0.0)
    return PruneTokens(dense, keep_constraint(settings.keep_ratios), accelerator, seed, weights=weights)


def train(model: nn.Module, dense: nn.Module, images: Images, *, epochs: float, seed: int) -> None:
    """Train in place."""
    rates = TwoRates(backbone_share=BACKBONE_SHARE, freeze_share=0.0)
    settings = PhaseSettings(
        epochs=epochs, learning_rate=RATE, weight_decay=0.05, seed=seed, max_grad_norm=1.0,
        shapes={"token_pruning": rates.selector, "": lambda p: BACKBONE_SHARE * rates.selector(p)},
    )  # fmt: skip
    rows = TensorDataset(*images)
    loader = DataLoader(
        rows,
        batch_size=BATCH_SIZE,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=lambda rows: dict(
            zip(("pixel_values", "labels"), map(torch.stack, zip(*rows, strict=True)), strict=True)
        ),
    )
    accelerator = Accelerator(cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        train_phase(
            "train", model, objective_for(dense, model, accelerator, seed), loader, settings, accelerator=accelerator,
            checkpoints=Checkpoints(Path(folder), accelerator, {}), log_path=Path(folder, "log.jsonl"),
        )  # fmt: skip


def run(
    dense: nn.Module, method: str, keep_ratio: float, data: Images, test: Images, *, epochs: float, seed: int
) -> dict[str, Any]:
    """Return what one method came to."""
    model, started = pruned(dense, method, keep_ratio, seed), time.perf_counter()
    learned = reducer_class(method).learned
    untrained = None if learned else top1(model, *test)
    train(model, dense, data, epochs=epochs, seed=seed)
    if reducer_class(method).adaptive:
        calibration = data[0][:NUM_CALIBRATION].split(64)
        calibrate_thresholds(model, lambda: calibration, token_pruning_of(model).settings.keep_ratios)
    found = {
        "method": method,
        "keep_ratio": keep_ratio,
        "seed": seed,
        "untrained": untrained,
        "top1": top1(model, *test),
        "macs": mean_macs(model, test[0][:NUM_COUNTED]),
    }
    if reducer_class(method).adaptive:
        token_pruning_of(model).runtime = "topk"
        found |= {"topk_top1": top1(model, *test), "topk_macs": mean_macs(model, test[0][:1])}
    return {**found, "seconds": time.perf_counter() - started}


def chosen(results: dict[str, Any], method: str, keep_ratio: float, key: str) -> list[float]:
    """Return one number of the runs of a method at a keep ratio, a seed each."""
    if method.endswith(FIXED):
        method, key = method.removesuffix(FIXED), f"topk_{key}"
    return [run[key] for run in results["runs"] if (run["method"], run["keep_ratio"]) == (method, keep_ratio)]


def shown(results: dict[str, Any]) -> tuple[list[str], list[float]]:
    """Return the rows and the keep ratios that have runs."""
    methods = {run["method"] for run in results["runs"]}
    ratios = sorted({run["keep_ratio"] for run in results["runs"]}, reverse=True)
    return [row for row in ROWS if row.removesuffix(FIXED) in methods], ratios


def table(results: dict[str, Any]) -> str:
    """Return mean and deviation of top-1, and the share of MACs, for every method and keep ratio."""
    rows, ratios = shown(results)
    lines = [
        "| method | " + " | ".join(f"keep {ratio}" for ratio in ratios) + " |",
        "| --- " + "| --: " * len(ratios) + "|",
    ]
    for method in rows:
        cells = []
        for ratio in ratios:
            scores = [100 * score for score in chosen(results, method, ratio, "top1")]
            macs = statistics.fmean(chosen(results, method, ratio, "macs")) / results["dense"]["macs"]
            deviation = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.fmean(scores):.1f}{deviation} ({macs:.2f})")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw top-1 against MACs, one line a method, with the range over seeds."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    dense, (rows, ratios) = results["dense"], shown(results)
    for method, colour in zip(rows, plt.get_cmap("tab10").colors, strict=False):  # type: ignore[attr-defined]
        points = sorted(
            (statistics.fmean(chosen(results, method, ratio, "macs")) / 1e6, chosen(results, method, ratio, "top1"))
            for ratio in ratios
        )
        means = [100 * statistics.fmean(scores) for _, scores in points]
        spread = [[mean - 100 * min(s) for mean, (_, s) in zip(means, points, strict=True)],
                  [100 * max(s) - mean for mean, (_, s) in zip(means, points, strict=True)]]  # fmt: skip
        axes.errorbar([macs for macs, _ in points], means, yerr=spread, label=method, color=colour, marker="o",
                      capsize=3, linewidth=1.5)  # fmt: skip
    axes.axhline(100 * dense["top1"], color="0.4", linestyle="--", linewidth=1)
    axes.annotate(f"dense, {dense['macs'] / 1e6:.0f} M", (1, 100 * dense["top1"]), xycoords=("axes fraction", "data"),
                  ha="right", va="bottom", color="0.3")  # fmt: skip
    axes.set(
        xlabel="million MACs an image",
        ylabel="top-1, %",
        title=f"CIFAR-10, ViT of 8 blocks, {results['epochs'] * results['num_train']:,.0f} images of training",
    )
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.4))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Run every method, keep ratio and seed, and write what came out after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--keep_ratios", type=float, nargs="+", default=[*KEEP_RATIOS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_train", type=int, default=8_000, help="images of each seed's epochs")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--num_test", type=int, default=4_000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, help="where to draw top-1 against MACs")
    arguments = parser.parse_args(argv)
    dense = timm.create_model(f"local-dir:{arguments.model}", pretrained=True).eval().requires_grad_(False)
    test = load_images(arguments.data, "test", arguments.num_test)
    pixels, labels = load_images(arguments.data, "train", len(arguments.seeds) * arguments.num_train)
    fresh: dict[str, Any] = {
        "num_train": arguments.num_train,
        "epochs": arguments.epochs,
        "num_test": arguments.num_test,
        "threads": torch.get_num_threads(),
        "dense": {"top1": top1(dense, *test), "macs": mean_macs(dense, test[0][:1])},
        "runs": [],
    }
    # A run that was stopped goes on where it was.
    found = json.loads(arguments.results.read_text("utf-8")) if arguments.results.is_file() else {}
    results = found if {**found, "runs": []} == fresh else fresh
    done = {(run["method"], run["keep_ratio"], run["seed"]) for run in results["runs"]}
    for place, seed in enumerate(arguments.seeds):
        part = slice(place * arguments.num_train, (place + 1) * arguments.num_train)
        for keep_ratio in arguments.keep_ratios:
            for method in arguments.methods:
                if (method, keep_ratio, seed) in done:
                    continue
                data = pixels[part], labels[part]
                outcome = run(dense, method, keep_ratio, data, test, epochs=arguments.epochs, seed=seed)
                results["runs"].append(outcome)
                print(results["runs"][-1], flush=True)
                arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.picture:
        draw(results, arguments.picture)
    print(f"dense: {results['dense']}\n{table(results)}")


if __name__ == "__main__":
    main()
