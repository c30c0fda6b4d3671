"""A latency table: milliseconds of a block against its token count, measured on the device at hand."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_prune.errors import LatencyTableError
from hf_prune.files import write_whole
from hf_prune.measure.latency import device_name, require_same_setting, time_side_by_side
from hf_prune.measure.token_cost import BlockProbe, TokenCost
from hf_prune.tokens.config import TokenPruningConfig

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """Measured milliseconds of one model's parts at a grid of sequence lengths.

    The settings under which it was measured are part of it: a table is only used where they all agree.

    Attributes:
        device: `cpu`, `cuda`, ...
        device_name: What the device calls itself.
        dtype: Data type of the weights.
        batch_size: Images in a batch.
        threads: CPU threads of torch.
        model: Class, width, heads, depth, prefix tokens and patches of the model, and the selectors' making.
        torch_version: Release it was measured with; informative.
        repeats: Timed runs behind each median.
        tokens: Sequence lengths of the grid, increasing.
        block_ms: Median of one block at each.
        selector_ms: Median of scoring, packaging and removing at each.
        dense_ms: Median of the whole dense model.
    """

    device: str
    device_name: str
    dtype: str
    batch_size: int
    threads: int
    model: dict[str, Any]
    torch_version: str
    repeats: int
    tokens: tuple[int, ...]
    block_ms: tuple[float, ...]
    selector_ms: tuple[float, ...]
    dense_ms: float
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        lengths = {len(self.tokens), len(self.block_ms), len(self.selector_ms)}
        times = (*self.block_ms, *self.selector_ms, self.dense_ms)
        if self.format_version != FORMAT_VERSION:
            raise LatencyTableError(f"`format_version` must be {FORMAT_VERSION}, got {self.format_version!r}")
        if len(lengths) != 1 or len(self.tokens) < 2 or list(self.tokens) != sorted(set(self.tokens)):
            raise LatencyTableError("`tokens` must increase, with one `block_ms` and `selector_ms` for each")
        if not all(isinstance(time, int | float) and 0 < time < float("inf") for time in times):
            raise LatencyTableError("every time in a latency table must be a positive number of milliseconds")

    def cost(self) -> TokenCost:
        """Return the table as a cost in milliseconds, made monotone and interpolated between its points."""
        last = self.tokens[-1]
        lengths = np.arange(last + 1)
        block, selector = (
            torch.tensor(np.interp(lengths, self.tokens, np.maximum.accumulate(times)))
            for times in (self.block_ms, self.selector_ms)
        )
        depth, prefix = self.model["depth"], self.model["num_prefix_tokens"]
        patches = self.model["num_patches"]
        rest = max(self.dense_ms - depth * float(block[prefix + patches]), 0.0)
        return TokenCost(block, selector, rest, depth, prefix, patches, packages=self.model["selector"]["packages"])

    def write(self, path: Path) -> None:
        """Write the table as JSON; the file appears whole or not at all."""
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "TokenTable":
        """Read a table written by `write`.

        Raises:
            LatencyTableError: If the file is missing, no JSON, or not a table.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            names = {field.name for field in fields(cls)}
            if set(data) != names:
                raise LatencyTableError(f"a latency table must hold {sorted(names)}, got {sorted(data)}")
            lists = {key: tuple(data[key]) for key in ("tokens", "block_ms", "selector_ms")}
            return cls(**{**data, **lists})
        except (OSError, json.JSONDecodeError, TypeError, LatencyTableError) as err:
            raise LatencyTableError(
                f"no latency table could be read from '{path}': {err}; measure one by leaving "
                f"`--latency_table` out, it is written to the output folder"
            ) from err

    def require_same_setting(self, wanted: dict[str, Any]) -> None:
        """Check that the table was measured for this model, device and batch.

        Args:
            wanted: As returned by `table_setting`.

        Raises:
            LatencyTableError: With every value that differs.
        """
        require_same_setting(self, wanted)


def table_setting(probe: BlockProbe) -> dict[str, Any]:
    """Return what a table must agree on with the model, device and batch of a probe."""
    site, settings = probe.site, probe.pruning.settings
    return {
        "device": probe.x.device.type,
        "device_name": device_name(probe.x.device),
        "dtype": str(next(site.blocks.parameters()).dtype).removeprefix("torch."),
        "batch_size": len(probe.x),
        "threads": torch.get_num_threads(),
        "model": {
            "blocks": type(next(site.blocks.children())).__name__,
            "dim": site.stacks[0].dim,
            "num_heads": site.num_heads,
            "depth": site.depth,
            "num_prefix_tokens": site.num_prefix_tokens,
            "num_patches": probe.num_patches,
            "selector": {
                key: getattr(settings, key)
                for key in ("method", "num_heads", "share_head_mlp", "paper_mlp1", "packages")
            },
        },
    }


@torch.no_grad()
def measure_token_table(
    model: nn.Module, pixel_values: Tensor, settings: TokenPruningConfig, *, repeats: int = 50, step: int = 8
) -> TokenTable:
    """Time one block, one selector and the whole dense model on this device.

    All lengths are timed in turns, so that a slow spell of the machine does not bend the curve.

    Args:
        model: Dense model of a supported kind, in evaluation mode.
        pixel_values: An example batch `(B, 3, H, W)` on the device.
        settings: What the selectors will be like.
        repeats: Timed runs behind each median.
        step: Tokens between two points of the grid.

    Cost: about `repeats * N / step` runs of one block and one selector.
    """
    probe = BlockProbe(model, pixel_values, settings)
    prefix, longest = probe.site.num_prefix_tokens, probe.x.shape[1] + 1
    lengths = sorted({prefix + 1, *range(longest, prefix + 1, -step)})
    runs = {f"block {length}": probe.block(length) for length in lengths}
    runs |= {f"selector {length}": probe.selector(length) for length in lengths}
    runs["dense"] = probe.run_model
    calls = {name: (lambda _repeat, run=run: run()) for name, run in runs.items()}
    times = time_side_by_side(calls, probe.x.device, repeats=repeats)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return TokenTable(
        **table_setting(probe),
        torch_version=torch.__version__,
        repeats=repeats,
        tokens=tuple(lengths),
        block_ms=tuple(medians[f"block {length}"] for length in lengths),
        selector_ms=tuple(medians[f"selector {length}"] for length in lengths),
        dense_ms=medians["dense"],
    )
