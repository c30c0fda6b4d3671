"""Processor time and memory to analyse a model and halve it, beside Torch-Pruning.

Run     python benchmarks/speed.py
Writes  benchmarks/results/speed.json and prints the table.
Needs   the extra `bench`.

Every measurement has a process of its own, ours and theirs in turn; the model (random weights) is built before the
clock starts. Ours: analyse, plan by magnitude, cut and repair; once more with the verification, on by default, that
runs the model twice with numbers. Theirs: dependency graph, ranking by magnitude, cut, set up as in coverage_rival.py.
Memory is what the process grew by at its peak, as a share of the weights; it is taken in a first run, the time is
the least of five more on fresh models (now and then Python's garbage collector takes longer than the work).
"""

import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import timm
import torch
import transformers
from torch import Tensor, nn

from hf_prune.measure.latency import device_name

RESULTS = Path(__file__).parent / "results" / "speed.json"
TOOLS = ("ours", "ours verified", "torch-pruning")
SIZE_PX = 224
REPEATS = 5
BYTES_OF_MAXRSS = 1 if platform.system() == "Darwin" else 1024


def of_timm(name: str) -> Callable[[], nn.Module]:
    """Return what builds a timm model."""
    return lambda: timm.create_model(name)


def of_transformers(family: str, **settings: Any) -> Callable[[], nn.Module]:
    """Return what builds a classifier of transformers."""
    config = cast(Any, getattr(transformers, f"{family}Config"))
    return lambda: getattr(transformers, f"{family}ForImageClassification")(config(**settings))


MODELS: dict[str, Callable[[], nn.Module]] = {
    name: of_timm(name)
    for name in (
        "vit_base_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50",
        "mobilenetv3_large_100", "efficientnet_b0", "eva02_small_patch14_224",
    )
} | {
    "HF ViT-B": of_transformers("ViT"),
    "HF Swin-T": of_transformers("Swin"),
    "HF ConvNeXtV2-T": of_transformers("ConvNextV2"),
    "HF DINOv2-S": of_transformers("Dinov2", hidden_size=384, num_attention_heads=6, image_size=224),
}  # fmt: skip


def halve(tool: str, model: nn.Module, inputs: Tensor) -> None:
    """Take half of everything, in place."""
    if tool == "torch-pruning":
        from coverage_rival import halve as halve_there

        halve_there(model, inputs, fewer_heads=False, record={})
        return
    import hf_prune

    graph = hf_prune.analyze(model, inputs)
    hf_prune.apply_plan(model, hf_prune.plan(model, graph=graph, keep_ratio=0.5), graph, verify=tool == "ours verified")


def work(name: str, tool: str, answer: Connection) -> None:
    """Measure in a process of its own."""
    torch.set_num_threads(1)
    inputs = torch.randn(1, 3, SIZE_PX, SIZE_PX)
    model = MODELS[name]().eval()
    size = weight_bytes(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        halve(tool, model, inputs)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * BYTES_OF_MAXRSS
        # The first call also imports what torch imports when it is needed first; the later ones are the work.
        seconds = min(seconds_for(name, tool, inputs) for _ in range(REPEATS))
        answer.send({"cpu_s": seconds, "memory_grown": grown / size, "left": weight_bytes(model) / size})
    except Exception as err:
        answer.send({"error": f"{type(err).__name__}: {err}"[:200]})


def seconds_for(name: str, tool: str, inputs: Tensor) -> float:
    """Return the processor time for a fresh model."""
    model = MODELS[name]().eval()
    started = time.process_time()
    halve(tool, model, inputs)
    return time.process_time() - started


def weight_bytes(model: nn.Module) -> int:
    """Return how large the parameters and buffers are."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def measure(name: str, tool: str) -> dict[str, Any]:
    """Return what the process found."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(name, tool, send))
    child.start()
    send.close()
    try:
        return receive.recv()
    finally:
        child.join()


def main() -> None:
    """Measure all models with all tools."""
    results: dict[str, Any] = {"machine": device_name(torch.device("cpu")), "torch": torch.__version__, "models": {}}
    for name in MODELS:
        results["models"][name] = {tool: measure(name, tool) for tool in TOOLS}
        print(name, results["models"][name], flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Return processor seconds, their ratio and memory as Markdown."""
    lines = [
        "| model | ours, s | verified, s | Torch-Pruning, s | ours / theirs | memory, ours | memory, theirs |",
        "| --- " * 7 + "|",
    ]
    ratios = []
    for name, row in results["models"].items():
        ours, verified, theirs = (row[tool] for tool in TOOLS)
        ratio = ours["cpu_s"] / theirs["cpu_s"] if "cpu_s" in theirs else None
        ratios += [] if ratio is None else [ratio]
        cells = [f"{one['cpu_s']:.2f}" if "cpu_s" in one else "fails" for one in (ours, verified, theirs)]
        cells += ["-" if ratio is None else f"{ratio:.2f}"]
        cells += [f"{one['memory_grown']:.2f}" if "cpu_s" in one else "-" for one in (verified, theirs)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\nMedian ratio {statistics.median(ratios):.2f}."


if __name__ == "__main__":
    main()
