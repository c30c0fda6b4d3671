"""What makes a token-pruned model: plain data, stored in its manifest and enough to rebuild it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from hf_prune.errors import ManifestError

Packages = Literal["single", "per_stage"]


@dataclass(frozen=True, kw_only=True)
class TokenPruningConfig:
    """Where the selectors sit and what they are made of.

    Attributes:
        before_blocks: 0-indexed blocks that a selector precedes, strictly increasing.
        keep_ratios: Fraction of the image's patches meant to be alive after each selector, in (0, 1].
        num_heads: Channel slices a selector scores separately; divides the model width.
        share_head_mlp: One scoring MLP for all heads (as in the released SPViT code) instead of one each.
        paper_mlp1: First MLP as the paper writes it (width d to d/2, used for the local and the global
            feature alike); False is the released code (d to d, one half for each).
        packages: `"single"` keeps one package token that re-absorbs its predecessor; `"per_stage"`
            keeps one per selector, as the released checkpoints do.

    Raises:
        ManifestError: If a value is out of its range.
    """

    before_blocks: tuple[int, ...]
    keep_ratios: tuple[float, ...]
    num_heads: int
    share_head_mlp: bool = False
    paper_mlp1: bool = True
    packages: Packages = "single"

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
        if any(low < high for low, high in pairwise(ratios)):
            raise ManifestError(f"`keep_ratios` must not grow (a dropped token never returns), got {ratios!r}")
        if type(self.num_heads) is not int or self.num_heads < 1:
            raise ManifestError(f"`num_heads` must be a positive integer, got {self.num_heads!r}")
        if type(self.share_head_mlp) is not bool or type(self.paper_mlp1) is not bool:
            raise ManifestError("`share_head_mlp` and `paper_mlp1` must be true or false")
        if self.packages not in ("single", "per_stage"):
            raise ManifestError(f"`packages` must be 'single' or 'per_stage', got {self.packages!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready data."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, data: Any) -> "TokenPruningConfig":
        """Rebuild the settings from data that may come from a stranger.

        Raises:
            ManifestError: If a key is unknown or missing, or a value is out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
            came = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ManifestError(f"token settings must hold exactly {sorted(names)}, got {came}")
        sequences = {key: data[key] for key in ("before_blocks", "keep_ratios")}
        if any(not isinstance(value, list | tuple) or len(value) > 1000 for value in sequences.values()):
            raise ManifestError("`before_blocks` and `keep_ratios` must be short lists")
        return cls(**{**data, **{key: tuple(value) for key, value in sequences.items()}})
