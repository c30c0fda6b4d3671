"""The embedded default of recipes/spvit.py for several seeds, each a run of its own, as one table.

Run     python benchmarks/spvit_digits.py --seeds 0 1 2
Writes  benchmarks/results/spvit_digits.json and prints the table of the README.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hf_prune.measure.report import Report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "spvit_digits.json"


def run_seed(seed: int, folder: Path) -> dict[str, object]:
    """Run the recipe and return its report with the wall-clock time of the whole command."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "accelerate.commands.launch", "recipes/spvit.py"]
    subprocess.run([*command, "--seed", str(seed), "--output_dir", str(folder)], check=True, cwd=ROOT)
    return {"seed": seed, "wall_clock_s": time.perf_counter() - started, "report": Report.read(folder).to_json()}


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        runs = [run_seed(seed, Path(folder) / f"seed{seed}") for seed in seeds]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print("| seed | dense top-1 | pruned top-1 | MACs ratio | latency ratio | off target | whole run |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(table_row(run) for run in runs))


if __name__ == "__main__":
    main()
