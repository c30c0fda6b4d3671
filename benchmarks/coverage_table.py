"""docs/coverage.md from the results of benchmarks/coverage.py."""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
FAMILIES = {
    "timm": "timm",
    "hf": "transformers, classification and dense tasks",
    "hf/backbone": "transformers, backbones",
    "tv": "torchvision",
    "own": "a user's own",
}
HEAD = """# Which architectures can be pruned

Written by `python benchmarks/coverage.py --table`; do not edit.

{count} models: one small variant or more of every architecture module of timm and of every image model type and
backbone of transformers, torchvision models, and some as a user writes them. Each is built from its configuration with
random weights in which every unit matters, and half of every free axis is removed. It counts if it was traced, cut and
verified, runs forward and backward, returns outputs of the dense shapes, and has lost 30 % of its parameters or more.

Torch-Pruning runs in the same benchmark on the same weights at the same ratio. It is told the output layers and the
numbers of heads, and the integers of attention layers are corrected afterwards. It has no verification of its own, so
what runs is taken as right. Processes are stopped after the time that the table of misses names.
"""


def write_table(results: dict[tuple[str, str], Record], path: Path) -> None:
    """Write the page."""
    ours = {name: record for (name, tool), record in results.items() if tool == "hf_prune"}
    theirs = {name: record for (name, tool), record in results.items() if tool == "torch-pruning"}
    text = "\n".join(
        [HEAD.format(count=len(ours)), *_summary(ours, theirs), "", *_figures(ours), "", *_misses(ours, theirs)]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def _family(name: str) -> str:
    prefix = name.rpartition("/")[0]
    return FAMILIES[prefix]


def _summary(ours: dict[str, Record], theirs: dict[str, Record]) -> list[str]:
    """Return the counts by family."""
    rows = [
        "| family | models | traced | pruned and verified | counts | Torch-Pruning counts |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for family in [*FAMILIES.values(), "all"]:
        names = [name for name in ours if family in ("all", _family(name))]
        figures = [_number(ours, names, key) for key in ("traced", "verified", "counts")]
        if not names:
            continue
        tried = sum(name in theirs for name in names)
        rival = f"{_number(theirs, names, 'counts')} of {tried}" if tried else "not measured"
        rows.append(f"| {family} | {len(names)} | " + " | ".join(map(str, figures)) + f" | {rival} |")
    return rows


def _number(records: dict[str, Record], names: Iterable[str], key: str) -> int:
    return sum(bool(records.get(name, {}).get(key)) for name in names)


def _figures(ours: dict[str, Record]) -> list[str]:
    """Return how long it takes and how much goes."""

    def of(key: str, choose: Callable[[list[float]], float]) -> float:
        return choose([float(record[key]) for record in ours.values() if record.get(key) is not None])

    median = statistics.median
    exact = sum(record.get("difference") is not None for record in ours.values())
    cut = sum(bool(record.get("verified")) for record in ours.values())
    return [
        f"Analysis takes {of('analyse_s', median):.1f} s in the median and {of('analyse_s', max):.0f} s at most",
        f"(one CPU thread). In the median {of('share_free', median):.0%} of the parameters are on free axes, and",
        f"{of('gone', median):.0%} are gone when every free axis is halved. Of {cut} pruned models, {exact} equal",
        "their silenced dense twin; in the others a norm or an average over a cut axis makes them differ by design,",
        "and what is checked are shapes, counts and that they run.",
    ]


def _misses(ours: dict[str, Record], theirs: dict[str, Record]) -> list[str]:
    """Return what does not count, each with its reason."""
    rows = ["## What does not count", ""]
    for title, records in (("hf_prune", ours), ("Torch-Pruning", theirs)):
        missed = {name: record for name, record in records.items() if name in ours and not record.get("counts")}
        if not records:
            continue
        rows += [f"### {title}: {len(missed)}", "", "| model | reason |", "| --- | --- |"]
        rows += [f"| {name} | {reason(record)} |" for name, record in sorted(missed.items())] + [""]
    return rows[:-1]


def reason(record: Record) -> str:
    """Return why a model does not count, with what is frozen most where too little is gone."""
    text = record.get("error") or "not measured"
    frozen = [reason for reason in record.get("frozen", {}) if not reason.startswith("it is part of the model's")]
    if text.startswith("only") and frozen:
        text += f"; frozen: {frozen[0]}"
    return text.replace("|", "\\|")[:250]
