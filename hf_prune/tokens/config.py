"""What makes a token-pruned model: plain data, stored in its manifest and enough to rebuild it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from hf_prune.errors import ManifestError
from hf_prune.tokens.reducers.registry import reducer_class

Packages = Literal["single", "per_stage", "none"]


@dataclass(frozen=True, kw_only=True)
class TokenPruningConfig:
    """Where tokens become fewer, by which method, and what its parts are made of.

    Attributes:
        method: See `reducers.registry`.
        before_blocks: 0-indexed blocks that a reduction precedes, strictly increasing.
        keep_ratios: Fraction of the image's patches meant to be alive after each reduction, in (0, 1].
        num_heads: SPViT: channel slices a selector scores separately; divides the model width.
        share_head_mlp: SPViT: one scoring MLP for all heads (as in the released code) instead of one each.
        paper_mlp1: SPViT: first MLP as the paper writes it (width d to d/2, used for the local and the global
            feature alike); False is the released code (d to d, one half for each).
        packages: What becomes of dropped tokens. `"single"`: one package token that re-absorbs its predecessor;
            `"per_stage"`: one for every reduction, as SPViT's released checkpoints have; `"none"`: they are gone. None
            takes what the method does (spvit and evit: single).
        proportional: Whether attention counts a merged token as often as it has patches (ToMe's equation 1).
        merge_ratios: DiffRate: of the image's patches, the fraction that each reduction merges; what else it takes
            away is dropped.
        keep_grid: Give every block's output the full grid again, dropped patches with their last features: for dense
            heads. Always so in backbones that return maps.

    Raises:
        ManifestError: If a value is out of its range.
    """

    before_blocks: tuple[int, ...]
    keep_ratios: tuple[float, ...]
    num_heads: int = 1
    share_head_mlp: bool = False
    paper_mlp1: bool = True
    packages: Packages | None = None
    method: str = "spvit"
    proportional: bool = True
    merge_ratios: tuple[float, ...] = ()
    keep_grid: bool = False

    def __post_init__(self) -> None:
        blocks, ratios = self.before_blocks, self.keep_ratios
        if not blocks or any(type(block) is not int or block < 0 for block in blocks):
            raise ManifestError(f"`before_blocks` must be block indices from 0, got {blocks!r}")
        if any(low >= high for low, high in pairwise(blocks)):
            raise ManifestError(f"`before_blocks` must be strictly increasing, got {blocks!r}")
        if len(ratios) != len(blocks):
            raise ManifestError(f"`keep_ratios` must hold one value per selector ({len(blocks)}), got {ratios!r}")
        if any(type(ratio) not in (int, float) or not 0 < ratio <= 1 for ratio in ratios):
            raise ManifestError(f"`keep_ratios` must lie in (0, 1], got {ratios!r}")
        if type(self.num_heads) is not int or self.num_heads < 1:
            raise ManifestError(f"`num_heads` must be a positive integer, got {self.num_heads!r}")
        flags = ("share_head_mlp", "paper_mlp1", "proportional", "keep_grid")
        if any(type(getattr(self, flag)) is not bool for flag in flags):
            raise ManifestError(f"{', '.join(f'`{flag}`' for flag in flags)} must be true or false")
        kind = reducer_class(self.method)
        if self.packages is None:
            object.__setattr__(self, "packages", kind.packages)
        if self.packages not in get_args(Packages):
            raise ManifestError(f"`packages` must be one of {get_args(Packages)}, got {self.packages!r}")
        self._check_merging()
        if kind.reads == "attention" and blocks[0] == 0:
            raise ManifestError(
                f"`before_blocks` must start at 1 or later for '{self.method}', which reads the attention of the block "
                f"before, got {blocks!r}"
            )

    def _check_merging(self) -> None:
        merged = self.merge_ratios
        if self.method != "diffrate":
            if merged:
                raise ManifestError(f"`merge_ratios` are for 'diffrate', got {merged!r} for '{self.method}'")
            return
        if not merged:
            object.__setattr__(self, "merge_ratios", (0.0,) * len(self.keep_ratios))
            return
        gone = [before - after for before, after in pairwise((1.0, *self.keep_ratios))]
        if len(merged) != len(gone) or any(
            type(part) not in (int, float) or not 0 <= part <= most + 1e-6
            for part, most in zip(merged, gone, strict=False)
        ):
            raise ManifestError(
                f"`merge_ratios` must hold one value per reduction, at most what it takes away ({gone}), got {merged!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready data."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, data: Any) -> "TokenPruningConfig":
        """Rebuild the settings from data that may come from a stranger; what earlier releases did not know may lack.

        Raises:
            ManifestError: If a key is unknown or missing, or a value is out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        needed = names - {"method", "proportional", "merge_ratios", "keep_grid"}
        if not isinstance(data, Mapping) or not needed <= set(data) <= names:
            came = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ManifestError(f"token settings must hold exactly {sorted(names)}, got {came}")
        sequences = {key: data[key] for key in ("before_blocks", "keep_ratios", "merge_ratios") if key in data}
        if any(not isinstance(value, list | tuple) or len(value) > 1000 for value in sequences.values()):
            raise ManifestError("`before_blocks`, `keep_ratios` and `merge_ratios` must be short lists")
        return cls(**{**data, **{key: tuple(value) for key, value in sequences.items()}})
