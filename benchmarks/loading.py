"""What loading a pruned model costs, and whether the oldest supported libraries can.

Run     python benchmarks/loading.py
        python benchmarks/loading.py --oldest    also installs transformers 5.0.0 and timm 1.0.23 beside, in a folder
Writes  benchmarks/results/loading.json and prints it.

A ViT-B with half of its heads and neurons, as many in every layer but not the same ones in all, so that its
manifest is as long as it gets, against a dense ViT whose layers have as many bytes altogether; `from_pretrained` in
turns. Imports are timed in fresh processes. The oldest libraries load what the newest have saved, and answer within
1e-5 of it (their attention is not the same code).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import timm
import torch
import transformers

import hf_prune
from hf_prune.measure.latency import device_name

RESULTS = Path(__file__).parent / "results" / "loading.json"
REPEATS = 7
OLDEST = [
    "transformers==5.0.0",
    "timm==1.0.23",
    "huggingface-hub<2",
    "tokenizers<0.23.1",
    "httpx",
    "httpcore",
    "h11",
    "certifi",
    "anyio",
    "idna",
    "sniffio",
    "shellingham",
    "typer-slim",
]
LOAD = """
import json, sys, torch
import hf_prune, timm, transformers
folder = sys.argv[1]
images = torch.load(f"{folder}/images.pt")
answers = {}
with torch.no_grad():
    for name in ("vit", "swin", "resnet"):
        model = transformers.AutoModelForImageClassification.from_pretrained(f"{folder}/{name}").eval()
        answers[name] = model(images).logits
    for name in ("timm-vit", "timm-resnet"):
        answers[name] = timm.create_model(f"local-dir:{folder}/{name}", pretrained=True).eval()(images)
torch.save(answers, f"{folder}/answers.pt")
print(json.dumps({"transformers": transformers.__version__, "timm": timm.__version__}))
"""


def cut_unevenly(model: torch.nn.Module, inputs: Any = None) -> torch.nn.Module:
    """Take about half of all heads, neurons and inner channels, one more in every other layer."""
    graph = hf_prune.analyze(model, inputs)
    kept = {
        name: range(axis.size // 2 + number % 2)
        for number, (name, axis) in enumerate(graph.axes.items())
        if axis.kind in ("heads", "mlp", "channels") and axis.size > 2
    }
    hf_prune.apply_plan(model, hf_prune.Plan.of(graph, kept), graph, verify=False)
    return model


def time_loading(folder: Path) -> dict[str, Any]:
    """Return seconds to load a pruned ViT-B and a dense ViT of the same size."""
    kind, configure = transformers.ViTForImageClassification, cast(Any, transformers.ViTConfig)
    pruned = cut_unevenly(kind(configure()))
    hf_prune.save(pruned, folder / "pruned")
    params = sum(p.numel() for p in pruned.parameters())
    rest = sum(p.numel() for p in kind(configure(intermediate_size=1)).parameters())
    neurons = (params - rest) // (12 * (2 * 768 + 1))
    dense = kind(configure(intermediate_size=max(1, neurons)))
    dense.save_pretrained(folder / "dense")
    sizes = {name: (folder / name / "model.safetensors").stat().st_size for name in ("pruned", "dense")}
    times: dict[str, list[float]] = {"pruned": [], "dense": []}
    for repeat in range(REPEATS + 1):
        for name, seconds in times.items():
            started = time.perf_counter()
            kind.from_pretrained(folder / name)
            seconds += [time.perf_counter() - started] if repeat else []
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {"bytes": sizes, "seconds": medians, "ratio": medians["pruned"] / medians["dense"]}


def time_imports() -> dict[str, float]:
    """Return median seconds of fresh processes that import torch, and torch and hf_prune."""
    codes = {"torch": "import torch", "torch and hf_prune": "import torch, hf_prune"}
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(REPEATS):
        for name, code in codes.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def try_oldest(folder: Path) -> dict[str, Any]:
    """Return versions of the oldest libraries, and how far their answers are from those of the newest."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    image = {"image_size": 64, "num_labels": 10}
    models = {
        "vit": transformers.ViTForImageClassification(
            cast(Any, transformers.ViTConfig)(**sizes, **image, patch_size=8)
        ),
        "swin": transformers.SwinForImageClassification(
            cast(Any, transformers.SwinConfig)(**image, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4)
        ),
        "resnet": transformers.ResNetForImageClassification(
            cast(Any, transformers.ResNetConfig)(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], num_labels=10)
        ),
        "timm-vit": timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10),
        "timm-resnet": timm.create_model("resnet18", num_classes=10),
    }
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.save(images, folder / "images.pt")
    expected = {}
    for name, model in models.items():
        cut_unevenly(model.eval(), images[:1])
        hf_prune.save(model, folder / name)
        with torch.no_grad():
            out = model(images)
        expected[name] = out if isinstance(out, torch.Tensor) else out.logits
    site = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), *OLDEST]
    subprocess.run(command, check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(Path(__file__).parents[1])])}
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300]}
    found = torch.load(folder / "answers.pt")
    differences = {name: float((found[name] - expected[name]).abs().max()) for name in expected}
    return {"versions": json.loads(done.stdout.splitlines()[-1]), "largest_difference": differences}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oldest", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results: dict[str, Any] = {"machine": device_name(torch.device("cpu")), "imports_s": time_imports()}
    with tempfile.TemporaryDirectory() as temporary:
        results["vit_b"] = time_loading(Path(temporary))
    if arguments.oldest:
        with tempfile.TemporaryDirectory() as temporary:
            results["oldest"] = try_oldest(Path(temporary))
    text = json.dumps(results, indent=1)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
