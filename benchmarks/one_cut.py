"""One cut of a ResNet-50 at initialisation: how long it takes and how much memory.

Run     python benchmarks/one_cut.py
Writes  benchmarks/results/one_cut.json and prints the table.

A ResNet-50 of timm with random weights is analysed, scored on 64 random images of 224 px, cut to half its MACs by
global rank, and verified; each row in a process of its own. Seconds are by the wall clock, with all threads; memory is
by how much the process grew at its peak from where it was when model and images were there. GraSP takes micro-batches
of several sizes.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch

import hf_prune
from hf_prune.measure.latency import device_name
from hf_prune.publish.manifest import versions
from hf_prune.score.base import Criterion
from hf_prune.score.grasp import Grasp
from hf_prune.score.registry import criterion

RESULTS = Path(__file__).parent / "results" / "one_cut.json"
NUM_IMAGES, BATCH_SIZE, KEEP_MACS = 64, 16, 0.5
CUTS = ("snip", "grasp, 4 at a time", "grasp, 16 at a time")


def criterion_of(cut: str) -> Criterion:
    """Return what a row is about."""
    name, _, rest = cut.partition(", ")
    return Grasp(micro_batch_size=int(rest.split()[0])) if rest else criterion(name)


def peak_mib() -> float:
    """Return the most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(cut: str) -> dict[str, Any]:
    """Make one cut in this process."""
    torch.manual_seed(0)
    model = timm.create_model("resnet50", zero_init_last=False).eval()
    pixels, labels = torch.randn(NUM_IMAGES, 3, 224, 224), torch.randint(0, 1000, (NUM_IMAGES,))
    data = list(zip(pixels.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))
    graph = hf_prune.analyze(model, pixels[:1])
    with torch.no_grad():
        model(pixels[:1])
    before_mib, started = peak_mib(), time.perf_counter()
    budget = hf_prune.Budget(macs=KEEP_MACS)
    plan = hf_prune.plan(
        model, graph=graph, budget=budget, criterion=criterion_of(cut), allocator="global_rank", data=data
    )
    scored_s = time.perf_counter() - started
    record = hf_prune.apply_plan(model, plan, graph)
    return {
        "plan_s": scored_s,
        "apply_s": time.perf_counter() - started - scored_s,
        "grown_mib": peak_mib() - before_mib,
        "macs": record.macs[1] / record.macs[0],
        "num_axes": len(plan.kept),
    }


def main() -> None:
    """Measure every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CUTS, help="measure one in this process and print it as JSON")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only)))
        return
    rows = {}
    for cut in CUTS:
        done = subprocess.run([sys.executable, __file__, "--only", cut], capture_output=True, text=True, check=True)
        rows[cut] = json.loads(done.stdout.splitlines()[-1])
        print(cut, rows[cut], flush=True)
    setting = {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads(), "versions": versions()}
    RESULTS.write_text(json.dumps({**setting, "num_images": NUM_IMAGES, "rows": rows}, indent=1) + "\n")
    print("| scored by | plan, s | cut and verified, s | memory, MiB |\n| --- | --: | --: | --: |")
    for cut, row in rows.items():
        print(f"| {cut} | {row['plan_s']:.0f} | {row['apply_s']:.1f} | {row['grown_mib']:.0f} |")


if __name__ == "__main__":
    main()
