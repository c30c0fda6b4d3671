"""The table and the sentences of the ablation of pruning data, made from its numbers and from nothing else."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REFERENCE, FLOOR, CONTROL = "random", "random again", "rect_matched"
# Differences below so many standard errors are called none.
CERTAIN = 2.0

TITLES = {
    REFERENCE: "training images",
    FLOOR: "other training images (the noise floor)",
    "concept": "concepts, best ranked",
    "stitch": "concepts, stitched",
    "concept_low": "concepts, worst ranked",
    "segments": "random superpixels",
    CONTROL: "rectangles, as large as the concepts",
    "label_noise": "training images, random labels",
    "pixel_noise": "pixels and labels shuffled",
    "brightness": "training images, a twentieth as bright",
    "gauss": "normal noise",
    "ones": "ones",
    "shuffled units": "the first plan, other units of each layer",
    "worst units": "the lowest scores kept",
    "uniform": "the same share of every layer, random units",
}


@dataclass(frozen=True)
class Row:
    """What one source of images led to, over the seeds.

    Attributes:
        source: Key of `TITLES`.
        top1: Accuracy after training, one number a seed.
        overlap: Jaccard overlap of the kept units with those by `REFERENCE`, one number a seed; empty for itself.
        keep_ratios: Layer -> share of its units that is kept, mean over the seeds.
    """

    source: str
    top1: tuple[float, ...]
    overlap: tuple[float, ...]
    keep_ratios: Mapping[str, float]


def rows_of(records: Sequence[Mapping[str, Any]], saliency: str) -> list[Row]:
    """Gather single runs to rows, in the order of `TITLES`."""
    rows = []
    for source in TITLES:
        runs = [run for run in records if run["saliency"] == saliency and run["source"] == source]
        if not runs:
            continue
        overlap = tuple(run["overlap"] for run in runs) if source != REFERENCE else ()
        layers = {name: statistics.fmean(run["keep_ratios"][name] for run in runs) for name in runs[0]["keep_ratios"]}
        rows.append(Row(source, tuple(run["top1"] for run in runs), overlap, layers))
    return rows


def table(by_saliency: Mapping[str, Sequence[Row]]) -> str:
    """Return a table in Markdown: sources down, accuracy and overlap of each saliency across."""
    names = list(by_saliency)
    head = ["pruned by", *(f"{name}: {what}" for name in names for what in ("top-1", "overlap"))]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for source, title in TITLES.items():
        cells = []
        for name in names:
            row = next((row for row in by_saliency[name] if row.source == source), None)
            cells += ["-", "-"] if row is None else [spread(row.top1, 100, 1), spread(row.overlap, 1, 2)]
        if set(cells) != {"-"}:
            lines.append([title, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], scale: float, digits: int) -> str:
    """Return mean and standard deviation as text, "-" for no values."""
    if not values:
        return "-"
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def differs(these: Sequence[float], those: Sequence[float]) -> float:
    """Return how many standard errors the mean of `these` lies above that of `those` (Welch); 0 if that is unknown."""
    if min(len(these), len(those)) < 2:
        return 0.0
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in (these, those)))
    gap = statistics.fmean(these) - statistics.fmean(those)
    return gap / error if error else math.copysign(math.inf, gap) if gap else 0.0


def findings(saliency: str, rows: Sequence[Row]) -> list[str]:
    """Say what the numbers of one saliency say, and what they do not; nothing before there is something to compare."""
    by_source = {row.source: row for row in rows}
    if not {REFERENCE, FLOOR} <= set(by_source):
        return []
    reference, floor = by_source[REFERENCE], by_source[FLOOR]
    said = [f"{saliency}: the units kept by two sets of training images overlap by {spread(floor.overlap, 1, 2)}."]
    inside, outside = [], []
    for row in rows:
        if row.source in (REFERENCE, FLOOR) or min(len(row.overlap), len(floor.overlap)) < 2:
            continue
        away = abs(differs(row.overlap, floor.overlap)) >= CERTAIN
        (outside if away else inside).append(TITLES[row.source])
    said.append(f"No further apart than these, within {CERTAIN:g} standard errors: {_listed(inside)}.")
    said.append(f"Further apart, or closer: {_listed(outside)}.")
    for source in ("concept", "stitch"):
        if source not in by_source:
            continue
        said.append(_verdict(by_source[source], reference, "training images"))
        if CONTROL in by_source:
            said.append(_verdict(by_source[source], by_source[CONTROL], TITLES[CONTROL]))
    return said


def _verdict(row: Row, other: Row, against: str) -> str:
    sigmas, gap = differs(row.top1, other.top1), 100 * (statistics.fmean(row.top1) - statistics.fmean(other.top1))
    start = f"{TITLES[row.source].capitalize()} against {against}: {gap:+.1f} points after training"
    if abs(sigmas) < CERTAIN:
        return f"{start}, no difference that {len(row.top1)} seeds can show."
    return f"{start}, {'better' if gap > 0 else 'worse'} by {abs(sigmas):.1f} standard errors."


def _listed(names: Sequence[str]) -> str:
    return "; ".join(names) if names else "none"
