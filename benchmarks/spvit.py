"""Whole runs of recipes/spvit.py, one process each, as one table.

Run     python benchmarks/spvit.py digits --seeds 0 1 2
        python benchmarks/spvit.py photos --seeds 0 --dataset_name uoft-cs/cifar10 --dense_epochs 4
Writes  benchmarks/results/spvit_<set>.json and prints the table of the README.

`digits` is the embedded default. `photos` trains a ViT of the same size (6 blocks of width 96, 64 patches) on a dataset
of small photos first; what is not a setting of this script goes to the recipe. Models and cards stay in
outputs/benchmarks/.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

from hf_prune.measure.report import Report

ROOT = Path(__file__).parents[1]
OUTPUTS = Path("outputs", "benchmarks")
PHOTOS = [
    "--target_latency", "0.85", "--num_stages", "2", "--dense_learning_rate", "2e-3", "--learning_rate", "1e-3",
    "--backbone_lr_share", "0.3", "--per_device_train_batch_size", "64", "--label_smoothing", "0",
    "--augmentation", "none", "--dense_epochs", "4", "--num_train_epochs", "2", "--logging_steps", "50",
]  # fmt: skip


def make_vit(folder: Path, num_labels: int) -> None:
    """Write the small ViT of the embedded default, untrained, for another number of classes."""
    from hf_prune.models import embedded_vit

    dense = embedded_vit([f"class {index}" for index in range(num_labels)])
    cast(Any, dense.model).save_pretrained(folder)
    dense.processor.save_pretrained(folder)


def run_seed(seed: int, folder: Path, settings: list[str]) -> dict[str, object]:
    """Run the recipe and return its report with the wall-clock time of the whole command."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "accelerate.commands.launch", "recipes/spvit.py", *settings]
    output = ["--seed", str(seed), "--output_dir", str(folder), "--overwrite_output_dir"]
    subprocess.run([*command, *output], check=True, cwd=ROOT)
    return {"seed": seed, "wall_clock_s": time.perf_counter() - started, "report": Report.read(ROOT / folder).to_json()}


def table_row(run: dict[str, object]) -> str:
    """Return one line of the README's table."""
    report = Report.from_json(run["report"])  # type: ignore[arg-type]
    dense, pruned = report.dense, report.pruned
    batch_size = max(pruned.latency)
    ratio = pruned.latency[batch_size].median_ms / dense.latency[batch_size].median_ms
    target = "-" if report.target is None else f"{report.target.relative_error:+.1%}"
    return (
        f"| {run['seed']} | {dense.top1:.2%} | {pruned.top1:.2%} | {pruned.macs / dense.macs:.2f} | {ratio:.2f} "
        f"| {target} | {run['wall_clock_s']:.0f} s |"
    )


def main() -> None:
    """Run all seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=["digits", "photos"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_labels", type=int, default=10, help="classes of the photos")
    arguments, settings = parser.parse_known_args()
    if arguments.set == "photos":
        make_vit(ROOT / OUTPUTS / "vit", arguments.num_labels)
        settings = ["--model_name_or_path", str(OUTPUTS / "vit"), *PHOTOS, *settings]
    runs = [run_seed(seed, OUTPUTS / f"spvit-{arguments.set}-{seed}", settings) for seed in arguments.seeds]
    results = ROOT / "benchmarks" / "results" / f"spvit_{arguments.set}.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print("| seed | dense top-1 | pruned top-1 | MACs ratio | latency ratio | off target | whole run |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(table_row(run) for run in runs))


if __name__ == "__main__":
    main()
