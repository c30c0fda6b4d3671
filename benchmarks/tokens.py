"""Speed of token-pruned vision transformers beside the dense model, ToMe and torch.compile, and what training costs.

Run     python benchmarks/tokens.py            (one thread: OMP_NUM_THREADS=1; `--device cuda` on a GPU)
Writes  benchmarks/results/tokens_<device>.json and prints the tables of the README.

DeiT-S and DeiT-T at 224 px with random weights, selectors before blocks 3, 6, 9 that keep 0.7, 0.49 and 0.343 of the
patches on average: thresholds are set on crops of two photographs (those inside scikit-learn), and other crops are
timed, so that every image keeps its own number. All models of a size and batch run in turns in one process, on the same
images. What counts is throughput, and the ideal is what the MACs of these images promise, reducers included.
Products: the first linear layers of all MLPs, over the tokens of one image that each stage leaves.
Training: one step of the late phase (dropped tokens leave), one of masked training, one of the dense model, with and
without a teacher; memory is what is saved for the backward pass.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from hf_prune.measure.latency import device_name, time_side_by_side
from hf_prune.measure.token_cost import count_macs
from hf_prune.publish.manifest import versions
from hf_prune.recover.objectives import Classify, PruneTokens, Recover
from hf_prune.tokens.attach import add_token_pruning, token_pruning_of
from hf_prune.tokens.calibrate import calibrate_thresholds
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.constraint import keep_constraint

RESULTS = Path(__file__).parent / "results"
MODELS = {"DeiT-S": "deit_small_patch16_224", "DeiT-T": "deit_tiny_patch16_224"}
PLACES, KEEP_RATIOS = (3, 6, 9), (0.7, 0.49, 0.343)
BATCH_SIZES, TRAIN_BATCH_SIZE, NUM_CALIBRATION, NUM_TIMED = (1, 32), 8, 32, 32


def crops(number: int, seed: int) -> Tensor:
    """Return random square crops of two photographs, `(number, 3, 224, 224)`, normalised."""
    generator = np.random.default_rng(seed)
    photos = [
        torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 127.5 - 1 for photo in load_sample_images().images
    ]
    images = []
    for index in range(number):
        photo = photos[index % 2]
        side = int(generator.integers(64, 400))
        top, left = (int(generator.integers(0, size - side)) for size in photo.shape[1:])
        crop = photo[None, :, top : top + side, left : left + side]
        images.append(F.interpolate(crop, size=(224, 224), mode="bilinear", antialias=True))
    return torch.cat(images)


def reduced(dense: nn.Module, method: str) -> nn.Module:
    """Return a copy of the dense model with fewer tokens."""
    model = copy.deepcopy(dense)
    heads = model.blocks[0].attn.num_heads  # type: ignore
    torch.manual_seed(0)
    settings = TokenPruningConfig(method=method, before_blocks=PLACES, keep_ratios=KEEP_RATIOS, num_heads=heads)
    pruning = add_token_pruning(model, settings)
    with torch.no_grad():
        for parameter in pruning.parameters():
            parameter.normal_(0, 0.3)  # fresh selectors rate all patches alike
    if method == "spvit":
        calibrate_thresholds(model, lambda: crops(NUM_CALIBRATION, seed=1).to(device_of(dense)).split(16), KEEP_RATIOS)
    return model


def device_of(model: nn.Module) -> torch.device:
    """Return where a model is."""
    return next(model.parameters()).device


@torch.no_grad()
def speed(dense: nn.Module, adaptive: nn.Module, batch_size: int, *, repeats: int, compiled: bool) -> dict[str, Any]:
    """Return the milliseconds of all models at a batch size, and what the MACs promise."""
    device = device_of(dense)
    pool = crops(NUM_TIMED, seed=2).to(device)
    batches = pool.split(batch_size)
    fixed = copy.deepcopy(adaptive)
    token_pruning_of(fixed).runtime = "topk"
    models: dict[str, nn.Module] = {
        "dense": dense,
        "spvit": adaptive,
        "spvit topk": fixed,
        "evit": reduced(dense, "evit"),
        "tome": reduced(dense, "tome"),
    }
    counts = []
    for image in pool:
        adaptive(image[None])
        counts.append([float(record.keep.sum()) for record in token_pruning_of(adaptive).take_records()])
    macs = {name: statistics.fmean(count_macs(lambda m=m, i=i: m(i[None])) for i in pool) for name, m in models.items()}
    if compiled:
        models["dense compiled"] = torch.compile(dense)  # type: ignore[assignment]
        models["spvit topk compiled"] = torch.compile(models["spvit topk"], fullgraph=True)  # type: ignore[assignment]
    runs: dict[str, Callable[[int], object]] = {
        name: lambda i, model=model: model(batches[i % len(batches)]) for name, model in models.items()
    }
    times = time_side_by_side(runs, device, repeats=repeats * len(batches))
    # Throughput: images differ, so the medians over the repeats are taken batch by batch, and added up.
    total_ms = {
        name: sum(statistics.median(values[number :: len(batches)]) for number in range(len(batches)))
        for name, values in times.items()
    }
    return {
        "batch_size": batch_size,
        "mean_ms": {name: total / len(batches) for name, total in total_ms.items()},
        "faster_than_dense": {name: total_ms["dense"] / total for name, total in total_ms.items()},
        "promised": {name: macs["dense"] / count for name, count in macs.items()},
        "kept": {
            "mean": np.mean(counts, 0).tolist(),
            "fewest": np.min(counts, 0).tolist(),
            "most": np.max(counts, 0).tolist(),
        },
    }


@torch.no_grad()
def products(dense: nn.Module, *, repeats: int) -> dict[str, float]:
    """Return what share of its time over all tokens a product of matrices takes over those that each stage leaves."""
    layers = [block.mlp.fc1 for block in dense.blocks]  # type: ignore
    lengths = [1 + round(ratio * 196) for ratio in (1.0, *KEEP_RATIOS)]
    tokens = {str(length): torch.randn(1, length, layers[0].in_features, device=device_of(dense)) for length in lengths}

    def run(pixels: Tensor) -> None:
        for layer in layers:
            layer(pixels)

    times = time_side_by_side(
        {name: lambda _, x=x: run(x) for name, x in tokens.items()}, device_of(dense), repeats=20 * repeats
    )
    whole_ms = statistics.median(times[str(lengths[0])])
    return {name: statistics.median(values) / whole_ms for name, values in times.items()}


def saved_bytes(step: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def training(dense: nn.Module, adaptive: nn.Module, *, repeats: int) -> dict[str, Any]:
    """Return time and memory of one training step, forward and backward, in every way."""
    device, accelerator = device_of(dense), Accelerator(cpu=device_of(dense).type == "cpu")
    pixels = crops(TRAIN_BATCH_SIZE, seed=3).to(device)
    batch = {"pixel_values": pixels, "labels": torch.arange(len(pixels), device=device)}
    steps: dict[str, Callable[[], Tensor]] = {}
    models: dict[str, nn.Module] = {}
    for name, objective in {
        "dense": Classify(),
        "dense, taught": Recover(teacher=dense),
        "spvit, masked": PruneTokens(dense, keep_constraint(KEEP_RATIOS), accelerator, 0, removal_start=2.0),
        "spvit, late": PruneTokens(dense, keep_constraint(KEEP_RATIOS), accelerator, 0, removal_start=0.0),
        "evit": Classify(),
    }.items():
        models[name] = copy.deepcopy(dense) if "dense" in name else reduced(dense, "evit")
        if "spvit" in name:  # fresh selectors: their samples keep what is asked for, as those of trained ones do
            torch.manual_seed(0)
            models[name] = copy.deepcopy(dense)
            add_token_pruning(models[name], token_pruning_of(adaptive).settings)
        models[name].train().requires_grad_(True)
        steps[name] = lambda o=objective, m=models[name]: o.loss(m, batch, batch_number=0)

    def whole(name: str) -> None:
        models[name].zero_grad()
        steps[name]().backward()

    times = time_side_by_side({name: lambda _, n=name: whole(n) for name in steps}, device, repeats=repeats, warmup=1)
    return {
        "batch_size": TRAIN_BATCH_SIZE,
        "median_ms": {name: statistics.median(values) for name, values in times.items()},
        "saved_mib": {name: saved_bytes(step, models[name]) / 2**20 for name, step in steps.items()},
    }


def tables(results: dict[str, Any]) -> str:
    """Return the README's tables."""
    names = ("spvit", "spvit topk", "evit", "tome", "dense compiled", "spvit topk compiled")
    lines = ["| model, batch | " + " | ".join(names) + " |", "| --- " + "| --: " * len(names) + "|"]
    for model, found in results["models"].items():
        for row in found["speed"]:
            cells = []
            for name in names:
                faster, promised = row["faster_than_dense"].get(name), row["promised"].get(name)
                share = f" ({faster / promised:.0%})" if faster and promised else ""
                cells.append("-" if faster is None else f"{faster:.2f}x{share}")
            lines.append(f"| {model}, {row['batch_size']} | " + " | ".join(cells) + " |")
    steps = ("dense", "dense, taught", "spvit, masked", "spvit, late", "evit")
    lines += ["", "| training step | " + " | ".join(steps) + " |", "| --- " + "| --: " * len(steps) + "|"]
    for model, found in results["models"].items():
        time, memory = found["training"]["median_ms"], found["training"]["saved_mib"]
        lines.append(f"| {model}, time | " + " | ".join(f"{time[s] / time['dense']:.2f}" for s in steps) + " |")
        lines.append(f"| {model}, memory | " + " | ".join(f"{memory[s] / memory['dense']:.2f}" for s in steps) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure everything on one device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--not_compiled", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    path = RESULTS / f"tokens_{device.type}.json"
    results: dict[str, Any] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "keep_ratios": list(KEEP_RATIOS),
        "models": {},
    }
    if path.is_file():  # other models, measured in the same setting, stay
        found = json.loads(path.read_text(encoding="utf-8"))
        results = found if {**found, "models": {}} == results else results
    for name in arguments.models:
        torch.manual_seed(0)
        dense = timm.create_model(MODELS[name]).to(device).eval().requires_grad_(False)
        rows, adaptive = [], reduced(dense, "spvit")
        for size in BATCH_SIZES:
            rows.append(speed(dense, adaptive, size, repeats=arguments.repeats, compiled=not arguments.not_compiled))
            print(name, rows[-1]["faster_than_dense"], flush=True)
        results["models"][name] = {
            "speed": rows,
            "products": products(dense, repeats=arguments.repeats),
            "training": training(dense, adaptive, repeats=arguments.repeats),
        }
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(tables(results))


if __name__ == "__main__":
    main()
