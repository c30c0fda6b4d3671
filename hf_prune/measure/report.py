"""The evidence of one run, kept as `report.json` beside the weights and printed as tables."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_prune.errors import HfPruneError

REPORT_NAME = "report.json"

RecordT = TypeVar("RecordT", bound="_Record")


@dataclass(frozen=True)
class _Record:
    """A record that goes to JSON and back without losing or inventing anything."""

    def to_json(self) -> dict[str, Any]:
        """Return dicts, tuples, text and numbers that `json.dumps` takes as they are."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls: type[RecordT], data: Mapping[str, Any]) -> RecordT:
        """Rebuild the record that `to_json` described.

        Raises:
            HfPruneError: If a key is unknown or missing, or a value is of the wrong type.
        """
        return _decode(cls, data, cls.__name__)


@dataclass(frozen=True)
class LatencyStats(_Record):
    """Milliseconds per batch: the median over timed batches and the spread around it."""

    median_ms: float
    p10_ms: float
    p90_ms: float


@dataclass(frozen=True)
class ModelRow(_Record):
    """What one model costs and how well it does.

    Args:
        name: How the tables call it, such as "dense" or "pruned".
        top1: Share of `num_images` classified correctly, in [0, 1].
        num_images: Images that were scored.
        num_unreadable: Images of the split that could not be decoded and were left out.
        params: Number of parameters, those of the token selectors included.
        macs: Multiply-accumulates per image, averaged over the images (the token count varies).
        latency: Batch size -> milliseconds per batch.
    """

    name: str
    top1: float
    num_images: int
    num_unreadable: int
    params: int
    macs: float
    latency: dict[int, LatencyStats]


@dataclass(frozen=True)
class StageRow(_Record):
    """How many patch tokens are alive after one selector, over the scored images.

    Args:
        before_block: Block that the selector sits in front of, counted from 0.
        keep_ratio_target: Share of `num_patches` that training aimed at, in (0, 1].
        tokens_kept_mean: Mean over the images; prefix and package tokens are not counted.
        tokens_kept_p10: One image in ten keeps this many or fewer.
        tokens_kept_p90: One image in ten keeps this many or more.
        num_patches: Patch tokens of the dense model.
    """

    before_block: int
    keep_ratio_target: float
    tokens_kept_mean: float
    tokens_kept_p10: float
    tokens_kept_p90: float
    num_patches: int

    @property
    def keep_ratio(self) -> float:
        """Share of the patches that is alive on average."""
        return self.tokens_kept_mean / self.num_patches


@dataclass(frozen=True)
class LatencyTarget(_Record):
    """What was asked for, what the latency table promised, and what was measured (per batch)."""

    batch_size: int
    dense_ms: float
    target_ms: float
    predicted_ms: float
    achieved_ms: float

    @property
    def relative_error(self) -> float:
        """Achieved over target, minus one: positive is slower than asked for."""
        return self.achieved_ms / self.target_ms - 1.0


@dataclass(frozen=True)
class Report(_Record):
    """All that a card or a table may say about a run.

    Args:
        method: Key of the pruning method, such as "spvit".
        base_model: Hub id or folder of the dense weights; None if this run trained them.
        base_license: Licence of those weights; None if unknown or trained here.
        dataset: Hub id, folder or name of the embedded data set.
        split: Split that the rows were scored on.
        num_labels: Number of classes.
        command: What a person types to repeat the run.
        seed: Seed of the run.
        device: Device that the latencies were measured on.
        dtype: Number format of that measurement.
        threads: CPU threads that it was allowed.
        versions: Package name -> version.
        rows: Dense first, pruned second; baselines may follow.
        stages: One row per selector, first block first.
        target: None if keep ratios were given instead of a latency.
        train_seconds: Wall-clock time of all training in the run.
        figures: File names of the pictures in the same folder.
        limits: Sentences on what the numbers do not show.

    Raises:
        HfPruneError: If there are fewer than two rows.
    """

    method: str
    base_model: str | None
    base_license: str | None
    dataset: str
    split: str
    num_labels: int
    command: str
    seed: int
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]
    rows: tuple[ModelRow, ...]
    stages: tuple[StageRow, ...]
    target: LatencyTarget | None
    train_seconds: float
    figures: tuple[str, ...]
    limits: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.rows) < 2:
            raise HfPruneError(
                f"`rows` must hold the dense model and then the pruned one, got {len(self.rows)} row(s); "
                "measure both before making a report"
            )

    @property
    def measured_on(self) -> str:
        """Device, number format and threads of the latency measurement, as text."""
        return f"{self.device}, {self.dtype}, {self.threads} thread{'s' if self.threads != 1 else ''}"

    @property
    def dense(self) -> ModelRow:
        """The model before pruning."""
        return self.rows[0]

    @property
    def pruned(self) -> ModelRow:
        """The model after pruning."""
        return self.rows[1]

    def write(self, folder: str | Path) -> Path:
        """Write `report.json` into the folder, whole or not at all, and return its path.

        Raises:
            HfPruneError: If a value is no plain finite number or text, which JSON cannot hold.
        """
        path = Path(folder) / REPORT_NAME
        try:
            text = json.dumps(self.to_json(), indent=2, allow_nan=False)
        except (TypeError, ValueError) as err:
            raise HfPruneError(
                f"a report must hold plain finite numbers and text for '{path}', but: {err}; measure again"
            ) from err
        path.parent.mkdir(parents=True, exist_ok=True)
        # A reader, or a run that is cut off here, must never see half a report.
        temporary = path.with_name(f".{REPORT_NAME}.tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        return temporary.replace(path)

    @classmethod
    def read(cls, folder: str | Path) -> "Report":
        """Read the `report.json` of a folder.

        Raises:
            HfPruneError: If the file is missing, is not JSON, or is not a report.
        """
        path = Path(folder) / REPORT_NAME
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, HfPruneError) as err:
            raise HfPruneError(
                f"'{path}' must be the report of a run, but: {err}; run the recipe again to write it"
            ) from err


def comparison(report: Report) -> list[list[str]]:
    """Return the before/after table as text: a header, then one line per measured quantity.

    The last column sets the pruned model against the dense one. A latency column shows the median, and
    p10-p90 in brackets; batch sizes that not all models were timed at are left out.
    """
    rows, dense, pruned = report.rows, report.dense, report.pruned
    points = 100 * (pruned.top1 - dense.top1)
    lines = [
        ["", *(row.name for row in rows), "change"],
        ["top-1 (%)", *(f"{100 * row.top1:.2f}" for row in rows), f"{points:+.2f} points"],
        ["images scored", *(_images(row) for row in rows), ""],
        ["parameters", *(_si(row.params) for row in rows), _percent(dense.params, pruned.params)],
        ["MACs per image", *(_si(row.macs) for row in rows), _percent(dense.macs, pruned.macs)],
    ]
    shared = set(dense.latency).intersection(*(row.latency for row in rows))
    for size in sorted(shared):
        stats = [row.latency[size] for row in rows]
        ratio = dense.latency[size].median_ms / pruned.latency[size].median_ms
        lines.append([f"ms per batch of {size}", *map(_spread, stats), f"{ratio:.2f}x as fast"])
    return lines


def stage_table(report: Report) -> list[list[str]]:
    """Return the kept patch tokens as text: a header, then one line per selector."""
    header = ["selector before block", "patches kept (mean)", "of all", "target", "p10 to p90"]
    return [header] + [
        [
            str(stage.before_block),
            f"{stage.tokens_kept_mean:.1f} of {stage.num_patches}",
            f"{100 * stage.keep_ratio:.0f} %",
            f"{100 * stage.keep_ratio_target:.0f} %",
            f"{stage.tokens_kept_p10:.0f} to {stage.tokens_kept_p90:.0f}",
        ]
        for stage in report.stages
    ]


def target_line(target: LatencyTarget) -> str:
    """Say in one line whether the latency that was asked for was reached."""
    error = 100 * target.relative_error
    verdict = f"{abs(error):.1f} % {'over' if error > 0 else 'under'} target"
    if abs(error) < 0.05:
        verdict = "on target"
    return (
        f"batch {target.batch_size}: target {_ms(target.target_ms)} ms "
        f"({100 * target.target_ms / target.dense_ms:.0f} % of dense {_ms(target.dense_ms)} ms), "
        f"predicted {_ms(target.predicted_ms)} ms, achieved {_ms(target.achieved_ms)} ms: {verdict}"
    )


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the tables of a report; plain enough for a log file.

    Args:
        report: What to print.
        console: Where to; None is standard output.
    """
    if console is None:
        console = Console(highlight=False)
    caption = f"latency: median (p10-p90) over batches of images on {report.measured_on}"
    console.print(_table("before and after", comparison(report), caption))
    if report.stages:
        console.print(_table("patch tokens still alive", stage_table(report), "blocks are counted from 0"))
    if report.target is not None:
        console.print(Text(f"latency target, {target_line(report.target)}"))


def _table(title: str, lines: list[list[str]], caption: str) -> Table:
    # Text, not str: a name from outside may hold what rich reads as markup.
    table = Table(title=Text(title), caption=Text(caption), box=SIMPLE_HEAD, title_justify="left")
    table.caption_justify = "left"
    for index, name in enumerate(lines[0]):
        table.add_column(Text(name), justify="right" if index else "left")
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    return table


def _si(count: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:.4g}"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 99.95 else f"{value:#.3g}"


def _spread(stats: LatencyStats) -> str:
    return f"{_ms(stats.median_ms)} ({_ms(stats.p10_ms)}-{_ms(stats.p90_ms)})"


def _percent(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"


def _images(row: ModelRow) -> str:
    return f"{row.num_images:,}" + (f" ({row.num_unreadable:,} unreadable)" if row.num_unreadable else "")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Read `value` as the annotated type `kind`; `where` is the path that an error names."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _decode(args[0], value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        hints = typing.get_type_hints(kind)
        if set(hints) != set(value):
            raise HfPruneError(f"'{where}' must have the keys {sorted(hints)}, got {sorted(value)}")
        return kind(**{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_decode(args[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {_key(args[0], key, where): _decode(args[1], value[key], f"{where}.{key}") for key in value}
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    raise HfPruneError(f"'{where}' must be {getattr(kind, '__name__', kind)}, got {value!r}")


def _key(kind: type, key: Any, where: str) -> Any:
    # JSON has text keys only, so batch sizes come back as digits.
    try:
        return kind(key)
    except ValueError as err:
        raise HfPruneError(f"the keys of '{where}' must be {kind.__name__}, got {key!r}") from err
