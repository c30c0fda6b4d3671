"""What makes a model with two-speed FFNs: plain data, stored in its manifest and enough to rebuild it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_prune.errors import ManifestError
from hf_prune.tokens.config import TokenPruningConfig


@dataclass(frozen=True, kw_only=True)
class TwoSpeedConfig:
    """Where tokens are told apart, and how many take the whole FFN: stored in the manifest.

    Attributes:
        keep_ratios: Fraction of the stage's tokens that take the whole FFN after each selector, in (0, 1]; never
            growing within a stage.
        before_blocks: 0-indexed blocks over all stages that a selector precedes, strictly increasing. It decides for
            the rest of its stage, or until the next one. None is the first block of every stage but the first, that
            is, behind every patch merging.

    Raises:
        ManifestError: If a value is out of its range.
    """

    method: ClassVar[str] = "two_speed"

    keep_ratios: tuple[float, ...]
    before_blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.predictors()

    def predictors(self) -> TokenPruningConfig:
        """Return the settings of the selectors, which are DynamicViT's."""
        blocks = tuple(range(len(self.keep_ratios))) if self.before_blocks is None else self.before_blocks
        return TokenPruningConfig(method="dynamicvit", before_blocks=blocks, keep_ratios=self.keep_ratios)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready data."""
        blocks = None if self.before_blocks is None else list(self.before_blocks)
        return {"method": self.method, "before_blocks": blocks, "keep_ratios": list(self.keep_ratios)}

    @classmethod
    def from_dict(cls, data: Any) -> "TwoSpeedConfig":
        """Rebuild the settings from data that may come from a stranger.

        Raises:
            ManifestError: If a key is unknown or missing, or a value is out of range.
        """
        names = {"method", "before_blocks", "keep_ratios"}
        if not isinstance(data, Mapping) or set(data) != names or data["method"] != cls.method:
            came = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ManifestError(f"two-speed settings must hold exactly {sorted(names)}, got {came!s:.200}")
        blocks, ratios = data["before_blocks"], data["keep_ratios"]
        if any(not isinstance(value, list | tuple) or len(value) > 1000 for value in (blocks, ratios)):
            raise ManifestError("`before_blocks` and `keep_ratios` must be short lists")
        return cls(before_blocks=tuple(blocks), keep_ratios=tuple(ratios))
