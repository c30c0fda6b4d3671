"""How many architectures can be pruned, and what stands in the way of the others.

Run     python benchmarks/coverage.py                       all models, ours and Torch-Pruning; resumes
        python benchmarks/coverage.py --only 'timm/vit*'     some of them; --redo measures again
        python benchmarks/coverage.py --trace-only --results trace.jsonl
        python benchmarks/coverage.py --table                the table from what was measured
Writes  benchmarks/results/coverage.jsonl, a line a model and tool, and docs/coverage.md.

Each model is built from its configuration with random weights, in a process of its own with a limit on time and
memory; half of every free axis is removed; the result must run forward and backward, return outputs of the dense shapes
and have lost 30 % of the parameters.
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import resource
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from coverage_models import build, zoo

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.jsonl"
GIB = 2**30


def work(name: str, tool: str, trace_only: bool, memory: int, answer: Connection) -> None:
    """Measure one model in a process of its own and send the record."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    resource.setrlimit(resource.RLIMIT_AS, (memory * GIB, memory * GIB))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record: dict[str, Any] = {"name": name, "tool": tool}
    try:
        model, inputs = build(name)
        record["params"] = sum(p.numel() for p in model.parameters())
        if tool == "hf_prune":
            from coverage_ours import measure

            measure(model, inputs, trace_only=trace_only, record=record)
        else:
            from coverage_rival import measure_rival

            measure_rival(name, model, inputs, record)
    except Exception as err:
        place = traceback.extract_tb(err.__traceback__)[-1]
        record["error"] = f"{type(err).__name__}: {str(err).strip().splitlines()[0][:300] if str(err).strip() else ''}"
        record["where"] = f"{Path(place.filename).name}:{place.lineno}"
    answer.send(record)
    answer.close()


def measure_apart(name: str, tool: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in a child process and return its record, or why there is none."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(name, tool, arguments.trace_only, arguments.memory, send))
    started = time.perf_counter()
    child.start()
    send.close()
    record: dict[str, Any] = {"name": name, "tool": tool}
    try:
        if receive.poll(arguments.time_limit):
            record = receive.recv()
        else:
            record["error"] = f"Timeout: longer than {arguments.time_limit} s"
    except EOFError:
        child.join(10)
        record["error"] = f"Died: the process ended with code {child.exitcode}"
    child.kill()
    child.join()
    return record | {"seconds": round(time.perf_counter() - started, 1)}


def read_results(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the last record of every model and tool."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {(record["name"], record["tool"]): record for record in map(json.loads, lines)}


def write_results(path: Path, records: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Replace the results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records.values()), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="models whose name matches, such as 'hf/*'")
    parser.add_argument("--redo", action="store_true", help="measure again what is in the results")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--table", action="store_true", help="write docs/coverage.md from the results and stop")
    parser.add_argument("--trace-only", action="store_true", help="analyse, but do not prune")
    parser.add_argument("--without-torch-pruning", action="store_true", help="measure hf_prune alone")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--time-limit", type=float, default=120, metavar="SECONDS", help="of one model")
    parser.add_argument("--memory", type=int, default=12, metavar="GIB", help="address space of one model")
    return parser.parse_args()


def main() -> None:
    """Measure what is not in the results yet."""
    arguments = parse_arguments()
    if arguments.table:
        from coverage_table import write_table

        write_table(read_results(arguments.results), ROOT / "docs" / "coverage.md")
        return
    names = [name for name in zoo() if fnmatch.fnmatch(name, arguments.only)]
    if arguments.list:
        print("\n".join(names))
        return
    tools = ["hf_prune"] if arguments.trace_only or arguments.without_torch_pruning else ["hf_prune", "torch-pruning"]
    done = read_results(arguments.results)
    if arguments.redo:
        done = {key: record for key, record in done.items() if key[0] not in names or key[1] not in tools}
        write_results(arguments.results, done)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        for tool in tools:
            if (name, tool) in done:
                continue
            record = measure_apart(name, tool, arguments)
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            verdict = record.get("error") or ("counts" if record.get("counts") else "traced")
            print(f"{name:50} {tool:14} {record['seconds']:6.1f} s  {verdict[:120]}", flush=True)


if __name__ == "__main__":
    main()
