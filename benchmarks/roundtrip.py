"""Whether every model that can be pruned comes back: saved, loaded by its own library in another process, equal bits.

Run     python benchmarks/roundtrip.py                      all models of coverage.py; resumes
        python benchmarks/roundtrip.py --only 'timm/vit*'   some of them; --redo measures again
Writes  benchmarks/results/roundtrip.jsonl, a line a model, and prints the counts.

Half of every free axis is removed. transformers models are loaded by `from_pretrained` of their class and by
`AutoModel.from_pretrained` without their head, timm models by `timm.create_model("local-dir:...")`, all others by
`hf_prune.load` with their constructor. Every tensor of the outputs must be equal, bit by bit. The process that loads
has never seen the model; it is a fork of one that has only imported the libraries, which saves seconds a model.
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import timm
import torch
import transformers
from coverage_models import build, zoo
from coverage_ours import KEEP, run

import hf_prune
from hf_prune.allocate.allocators import Limits
from hf_prune.analyse.graph import KINDS
from hf_prune.analyse.running import quiet_run

RESULTS = Path(__file__).parent / "results" / "roundtrip.jsonl"


def save(name: str, folder: Path, record: dict[str, Any]) -> None:
    """Prune and save a model, and how it answers."""
    model, inputs = build(name)
    headless = headless_of(model, inputs)
    graph = hf_prune.analyze(model, inputs)
    hf_prune.apply_plan(
        model, hf_prune.plan(model, graph=graph, keep_ratio=KEEP, limits=Limits(kinds=KINDS)), graph, verify=False
    )
    started = time.perf_counter()
    hf_prune.save(model, folder, constructor=lambda: build(name)[0])
    record["save_s"] = round(time.perf_counter() - started, 2)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    manifest = config.get("hf_prune") or (config.get("model_args") or {}).get("manifest")
    record["manifest_kb"] = round(len(json.dumps(manifest)) / 1024, 1)
    record["library"] = (
        "transformers" if isinstance(model, transformers.PreTrainedModel) else config.get("library", "timm")
    )
    answers = {"whole": answer(model, inputs)}
    if headless is not None:
        answers["headless"] = answer(headless, inputs)
    torch.save((inputs, answers), folder / "answers.pt")


def headless_of(model: torch.nn.Module, inputs: Any) -> torch.nn.Module | None:
    """Return the part that `AutoModel` builds, if it can be called alone and gives there what it gives here."""
    part = getattr(model, getattr(model, "base_model_prefix", None) or "-", None)
    # A backbone is its model.
    if not isinstance(part, transformers.PreTrainedModel) or part is model or "For" not in type(model).__name__:
        return None
    try:
        alone = answer(transformers.AutoModel.from_config(model.config).eval(), inputs)
    except ValueError:
        return None
    inside = answer(part, inputs)
    shapes = [[tuple(t.shape) for t in out] if isinstance(out, list) else None for out in (alone, inside)]
    return part if shapes[0] and shapes[1] and shapes[0][: len(shapes[1])] == shapes[1] else None


def try_dense(name: str, folder: Path, record: dict[str, Any]) -> None:
    """Find out whether the library gets the dense model back at all."""
    model, inputs = build(name)
    folder = folder / "dense"
    record["dense_comes_back"] = False
    if record["library"] == "timm":
        timm.models.save_for_hf(model, str(folder), safe_serialization=True)
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        cast(Any, model).save_pretrained(folder)
        loaded = cast(Any, type(model)).from_pretrained(str(folder))
    record["dense_comes_back"] = same(answer(loaded.eval(), inputs), answer(model, inputs), {})


def answer(model: torch.nn.Module, inputs: Any) -> list[torch.Tensor] | str:
    """Return what a model answers, or why it does not."""
    try:
        with quiet_run(model):
            return run(model, inputs)
    except Exception as err:
        return f"{type(err).__name__}: {err}"[:200]


def load(name: str, folder: Path, record: dict[str, Any]) -> None:
    """Load a model as its library does, and compare its answers."""
    inputs, answers = torch.load(folder / "answers.pt")
    started = time.perf_counter()
    if record["library"] == "timm":
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    elif record["library"] == "transformers":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = getattr(transformers, config["architectures"][0]).from_pretrained(str(folder))
    else:
        model = hf_prune.load(folder, constructor=lambda: build(name)[0])
    record["load_s"] = round(time.perf_counter() - started, 2)
    record["equal"] = same(answer(model.eval(), inputs), answers["whole"], record)
    if "headless" in answers and not isinstance(answers["headless"], str):
        headless = transformers.AutoModel.from_pretrained(str(folder))
        record["headless_equal"] = same(answer(headless.eval(), inputs), answers["headless"], record)


def same(found: Any, expected: Any, record: dict[str, Any]) -> bool:
    """Compare answers bit by bit; a fresh pooler may add outputs behind the shared ones."""
    if isinstance(found, str) or isinstance(expected, str):
        record["error"] = f"answers {found!s:.200} where it answered {expected!s:.100}" if found != expected else None
        return found == expected
    pairs = list(zip(found, expected, strict=False))
    right = len(found) >= len(expected) and all(torch.equal(a, b) or _both_nan(a, b) for a, b in pairs)
    if not right:
        shapes = [(tuple(a.shape), tuple(b.shape)) for a, b in pairs if not torch.equal(a, b)]
        record["error"] = f"{len(found)} outputs for {len(expected)}; unequal: {shapes[:2]}"
    return right


def _both_nan(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())


def apart(do: Callable[..., None], name: str, folder: Path, record: dict[str, Any], limit: float) -> dict[str, Any]:
    """Do something in a process of its own and return the record as it was left."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(do, name, folder, record, send))
    child.start()
    send.close()
    try:
        record = receive.recv() if receive.poll(limit) else record | {"error": f"Timeout: longer than {limit} s"}
    except EOFError:
        record = record | {"error": f"Died: code {child.exitcode}"}
    child.kill()
    child.join()
    return record


def _work(do: Callable[..., None], name: str, folder: Path, record: dict[str, Any], send: Connection) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        do(name, folder, record)
    except Exception as err:
        place = traceback.extract_tb(err.__traceback__)[-1]
        record["error"] = (
            f"{do.__name__}: {type(err).__name__}: {str(err)[:300]} ({Path(place.filename).name}:{place.lineno})"
        )
    send.send(record)


def main() -> None:
    """Measure what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN")
    parser.add_argument("--redo", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--time-limit", type=float, default=120, metavar="SECONDS")
    arguments = parser.parse_args()
    names = [name for name in zoo() if fnmatch.fnmatch(name, arguments.only)]
    lines = arguments.results.read_text(encoding="utf-8").splitlines() if arguments.results.exists() else []
    done = {record["name"]: record for record in map(json.loads, lines)}
    for name in names:
        if name in done and not arguments.redo:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            record = apart(save, name, Path(temporary), {"name": name}, arguments.time_limit)
            if not record.get("error"):
                record = apart(load, name, Path(temporary), record, arguments.time_limit)
            record["comes_back"] = bool(record.get("equal")) and record.get("headless_equal", True)
            if record.get("library") in ("timm", "transformers") and not record["comes_back"]:
                record = apart(try_dense, name, Path(temporary), record, arguments.time_limit)
        done[name] = record
        text = "".join(json.dumps(done[name]) + "\n" for name in sorted(done))
        arguments.results.write_text(text, encoding="utf-8")
        print(f"{name:50} {'equal' if record['comes_back'] else record.get('error')}", flush=True)
    kinds = (
        (
            r.get("library"),
            "back" if r["comes_back"] else "not back, nor dense" if r.get("dense_comes_back") is False else "not back",
        )
        for r in done.values()
    )
    print(Counter(kinds))


if __name__ == "__main__":
    main()
