"""Soft and permanent masks at a high pruning ratio: accuracy after the same training, seed by seed.

Run     python benchmarks/soft_masking.py
Writes  benchmarks/results/soft_masking.json and prints the table.

The digits inside scikit-learn, and a small ResNet trained on them first. From there every run has the same budget of
MACs, the same number of steps and the same order of images; only the gradient of what is masked differs. 360 test
images: the standard error of an accuracy is about one point, and seeds differ by several.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import hf_prune
from hf_prune.allocate.allocators import Limits, Problem
from hf_prune.allocate.budget import Budget, cost_of
from hf_prune.data.digits import load_digits_dataset
from hf_prune.recover.checkpoints import Checkpoints
from hf_prune.recover.loop import Objective, PhaseSettings, train_phase
from hf_prune.recover.objectives import Classify
from hf_prune.recover.rates import warmup_cosine
from hf_prune.recover.soft_masking import RewiringSchedule, SoftMasking, maskable
from hf_prune.surgery.masks import Mode
from hf_prune.tokens.site import logits_of

RESULTS = Path(__file__).parent / "results" / "soft_masking.json"
MODES: tuple[Mode, ...] = ("soft", "permanent")
KEPT_MACS = (0.2,)
DENSE_EPOCHS, EPOCHS, REWIRE_STEPS = 6.0, 12.0, 24
IMAGE = torch.zeros(1, 3, 32, 32)


def small_resnet() -> nn.Module:
    """Return an untrained ResNet of six basic blocks, 16, 32 and 64 channels wide."""
    config = cast(Any, transformers.ResNetConfig)(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2],
                                       layer_type="basic", num_labels=10)  # fmt: skip
    return transformers.ResNetForImageClassification(config)


class Digits(Dataset):
    """A split of the digits as tensors, grey scaled up to the size of the model's images."""

    def __init__(self, split: str, size: int) -> None:
        rows = load_digits_dataset()[split]
        ink = np.stack([np.asarray(image) for image in cast(Any, rows["image"])])
        pixels = torch.from_numpy(ink).float()[:, None] / 127.5 - 1
        self.pixels = F.interpolate(pixels, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
        self.labels = torch.tensor(rows["label"])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


@torch.no_grad()
def top1(model: nn.Module, split: Digits) -> float:
    """Return the share of images that are classified rightly."""
    found = torch.cat([logits_of(model.eval()(pixels)).argmax(1) for pixels in split.pixels.split(128)])
    return float((found == split.labels).float().mean())


def train(model: nn.Module, objective: Objective, split: Digits, *, epochs: float, rate: float, seed: int) -> None:
    """Train a model in place."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(split, batch_size=64, shuffle=True, generator=generator)
    settings = PhaseSettings(
        epochs=epochs,
        learning_rate=rate,
        weight_decay=0.05,
        shapes={"": warmup_cosine()},
        seed=seed,
        max_grad_norm=1.0,
    )
    accelerator = Accelerator(cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, log = Checkpoints(Path(folder), accelerator, {}), Path(folder, "log.jsonl")
        train_phase("train", model, objective, loader, settings, accelerator=accelerator, checkpoints=checkpoints,
                    log_path=log)  # fmt: skip


def prune(dense: nn.Module, mode: Mode, kept_macs: float, splits: dict[str, Digits], seed: int) -> dict[str, Any]:
    """Return what one run under masks came to."""
    model = copy.deepcopy(dense).train()
    graph = hf_prune.analyze(model, IMAGE)
    limits = Limits(min_keep_ratio=0.0)
    axes = maskable(limits.choose(list(graph.axes.values())))
    problem = Problem(axes, {}, *cost_of(graph, Budget(macs=kept_macs)), limits)
    objective = SoftMasking(
        model, graph, Classify(), problem, Accelerator(cpu=True), mode, RewiringSchedule(every=REWIRE_STEPS)
    )
    train(model, objective, splits["train"], epochs=EPOCHS, rate=2e-3, seed=seed)
    record = hf_prune.apply_plan(model, objective.finish(), graph)
    return {
        "mode": mode,
        "kept_macs": kept_macs,
        "seed": seed,
        "top1": top1(model, splits["test"]),
        "macs": record.macs[1] / record.macs[0],
        "num_rewirings": len(objective.rewirings),
        "num_returned": sum(rewiring.num_returned for rewiring in objective.rewirings),
        "num_pruned": sum(rewiring.num_pruned for rewiring in objective.rewirings),
    }


def table(results: dict[str, Any]) -> str:
    """Return mean top-1 and the range over seeds for every mode and share of MACs."""
    lines = ["| MACs | " + " | ".join(MODES) + " |", "| --- " * (len(MODES) + 1) + "|"]
    for kept_macs in KEPT_MACS:
        cells = []
        for mode in MODES:
            runs = [run for run in results["runs"] if (run["mode"], run["kept_macs"]) == (mode, kept_macs)]
            scores = [100 * run["top1"] for run in runs]
            returned = np.mean([run["num_returned"] for run in runs])
            cells.append(f"{np.mean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f}), {returned:.0f} back")
        lines.append(f"| {kept_macs:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train dense models, prune each in every way, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments, started = parser.parse_args(), time.perf_counter()
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "dense_top1": [], "runs": []}
    for seed in arguments.seeds:
        torch.manual_seed(seed)
        dense = small_resnet()
        splits = {name: Digits(name, 32) for name in ("train", "test")}
        train(dense, Classify(), splits["train"], epochs=DENSE_EPOCHS, rate=3e-3, seed=seed)
        results["dense_top1"].append(top1(dense, splits["test"]))
        for kept_macs in KEPT_MACS:
            for mode in MODES:
                results["runs"].append(prune(dense, mode, kept_macs, splits, seed))
                print(results["runs"][-1], flush=True)
    results["wall_clock_s"] = time.perf_counter() - started
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"dense: {results['dense_top1']}\n{table(results)}")


if __name__ == "__main__":
    main()
