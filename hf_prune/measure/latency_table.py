"""A latency table: milliseconds of every operator of a model at a grid of sizes, measured on the device at hand.

The time of any cut of the model is then a sum of look-ups. What operators run, and how their shapes follow from the
sizes of axes, is known from the analysis, so there is nothing to write for a new architecture.
"""

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (of httpx or httpx2)
from torch import nn

from hf_prune.allocate.allocators import SAFE_KINDS
from hf_prune.allocate.costs import SumOfTerms
from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.errors import LatencyTableError
from hf_prune.files import write_whole
from hf_prune.measure.closing import time_cut
from hf_prune.measure.latency import device_name, require_same_setting
from hf_prune.measure.operator_times import (
    STEP_ELSEWHERE,
    STEPS,
    OperatorTimes,
    measure_operator,
    require_times,
    time_of,
)
from hf_prune.measure.operators import operators_of

FORMAT_VERSION = 1
FILE = "latency_table.json"


@dataclass(frozen=True)
class WholeAndSum:
    """Milliseconds of a model as a whole, and of its operators added up."""

    whole_ms: float
    sum_ms: float

    def __post_init__(self) -> None:
        require_times((self.whole_ms, self.sum_ms))

    @property
    def additivity_error(self) -> float:
        """The sum over the whole, minus one."""
        return self.sum_ms / self.whole_ms - 1


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Measured milliseconds of one model's operators.

    The settings under which it was measured are part of it: a table only serves where they all agree.

    Attributes:
        device: `cpu`, `cuda`, ...
        device_name: What the device calls itself.
        dtype: Data type of the weights.
        batch_size: Images in a batch.
        threads: CPU threads of torch.
        model: Class of the model; informative, for what counts is that every operator has an entry.
        torch_version: Release it was measured with.
        entries: Operator, in words -> its times.
        dense: Milliseconds of the whole dense model, and of its operators added up.
        quarter: The same of the model with a quarter of every width; timed in turns with the dense one.
        step: Sizes at which kernels are cheap are multiples of this.
    """

    device: str
    device_name: str
    dtype: str
    batch_size: int
    threads: int
    model: str
    torch_version: str
    entries: dict[str, OperatorTimes]
    dense: "WholeAndSum"
    quarter: "WholeAndSum"
    step: int
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise LatencyTableError(f"`format_version` must be {FORMAT_VERSION}, got {self.format_version!r}")
        if self.step < 1:
            raise LatencyTableError("`step` of a latency table must be 1 or more")

    def calibration(self) -> tuple[float, float]:
        """Return by what to multiply a sum of operators, and what to add in milliseconds, to get the whole model.

        The line through the two models that were run as a whole. What is added is the interpreter's work between the
        operators, which does not shrink with them; it is never negative.
        """
        (whole, added), (less, few) = astuple(self.dense), astuple(self.quarter)
        slope = (whole - less) / (added - few) if added > few else 0.0
        if 0 < slope <= whole / added:
            return slope, whole - slope * added
        return whole / added, 0.0

    def step_for(self, axes: Iterable[AxisInfo]) -> int:
        """Return of what sizes should be multiples: the step, or a half or quarter ... of it where axes are small."""
        smallest, step = min((axis.size for axis in axes if axis.kind not in ("heads", "groups")), default=1), self.step
        while step > 1 and smallest < 4 * step:
            step //= 2
        return step

    def cost(self, graph: AxisGraph, tag_of: Callable[[str], Hashable] = lambda _: None) -> SumOfTerms:
        """Return milliseconds as a function of the sizes of a model's axes.

        Args:
            graph: The analysed model.
            tag_of: Returns a tag for the operators in a module from its path; see `SumOfTerms.scaled`.

        Raises:
            LatencyTableError: If the model has an operator that was not measured.
        """
        batch, operators = operators_of(graph, self.batch_size)
        missing = [op.key for op in operators if op.key not in self.entries]
        if missing:
            raise LatencyTableError(
                f"a latency table must hold every operator of the model, but {len(missing)} of {len(operators)} are "
                f"not in it, such as '{missing[0]}'; measure a table for this model, batch and image size"
            )
        factor, constant = self.calibration()
        counts = Counter((op.key, op.dims, tag_of(op.module)) for op in operators)
        terms, tags = [], []
        for op in operators:
            # The same thing done again, to as many numbers, is one term.
            tag = tag_of(op.module)
            count = counts.pop((op.key, op.dims, tag), 0)
            if count:
                terms.append((op.dims, time_of(op, self.entries[op.key], factor * count, self.step)))
                tags.append(tag)
        return SumOfTerms(batch, terms, constant, tags)

    def write(self, path: str | Path) -> None:
        """Write the table as JSON; the file appears whole or not at all."""
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "LatencyTable":
        """Read a table written by `write`.

        Raises:
            LatencyTableError: If the file is missing, no JSON, or not a table.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            names = {field.name for field in fields(cls)}
            if not isinstance(data, dict) or set(data) != names:
                raise LatencyTableError(f"a latency table must hold {sorted(names)}")
            entries = {
                str(key): OperatorTimes(tuple(tuple(sizes) for sizes in entry["sizes"]), tuple(entry["ms"]))
                for key, entry in data["entries"].items()
            }
            wholes = {key: WholeAndSum(**data[key]) for key in ("dense", "quarter")}
            return cls(**{**data, **wholes, "entries": entries})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, LatencyTableError) as err:
            raise LatencyTableError(
                f"no latency table could be read from '{path}': {err}; measure one with `hf-prune latency-table`"
            ) from err

    @classmethod
    def from_hub(
        cls, repo_id: str, *, filename: str = FILE, revision: str | None = None, token: str | None = None
    ) -> "LatencyTable":
        """Read a table that somebody measured and put on the Hub.

        Raises:
            LatencyTableError: If there is none, or it is not a table.
        """
        try:
            path = hf_hub_download(repo_id, filename, revision=revision, token=token)
        except (OSError, ValueError, HTTPError) as err:
            raise LatencyTableError(f"no '{filename}' could be fetched from '{repo_id}' on the Hub: {err}") from err
        return cls.read(path)

    def require_same_setting(self, wanted: Mapping[str, Any]) -> None:
        """Check that the table was measured on this device, in this way.

        Args:
            wanted: As returned by `table_setting`.

        Raises:
            LatencyTableError: With every value that differs.
        """
        require_same_setting(self, wanted)


def table_setting(model: nn.Module, batch_size: int) -> dict[str, Any]:
    """Return what a table must agree on with a model and its device."""
    parameter = next(model.parameters())
    return {
        "device": parameter.device.type,
        "device_name": device_name(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
    }


def measure_latency_table(model: nn.Module, graph: AxisGraph, *, batch_size: int = 1) -> LatencyTable:
    """Time every operator of a model at a grid of sizes, and the whole dense model, on the model's device.

    Args:
        model: Dense.
        graph: Its analysis.
        batch_size: Images a batch.

    Cost: seconds to a few minutes (benchmarks/latency.py); memory of one operator at a time, and a copy of the model.
    """
    device = next(model.parameters()).device
    batch, operators = operators_of(graph, batch_size)
    step = STEPS.get(device.type, STEP_ELSEWHERE)
    by_key = {op.key: op for op in operators}
    with torch.inference_mode():
        entries = {key: measure_operator(op, device, step) for key, op in by_key.items()}
    quarter = {name: max(1, axis.size // 4) for name, axis in graph.axes.items() if axis.kind in SAFE_KINDS}
    added = SumOfTerms(batch, [(op.dims, time_of(op, entries[op.key], 1.0, step)) for op in operators])
    kept = {graph.axes[name].leaf: torch.arange(size) for name, size in quarter.items()}
    dense_ms, quarter_ms = time_cut(model, graph, kept, batch_size)
    return LatencyTable(
        **table_setting(model, batch_size),
        model=type(model).__name__,
        entries=entries,
        dense=WholeAndSum(dense_ms, added({})),
        quarter=WholeAndSum(quarter_ms, added(quarter)),
        step=step,
    )
