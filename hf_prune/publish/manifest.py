"""The manifest: what was done to a model, as data in its config.json, checked as data from strangers.

Everything in it is addressed by names as they stand in the checkpoint file, never by module paths, which change
between releases of transformers while files stay.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any

from hf_prune.errors import ManifestError
from hf_prune.tokens.attach import ATTRIBUTE
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.reducers.registry import reducer_class
from hf_prune.tokens.two_speed import ATTRIBUTE as TWO_SPEED
from hf_prune.tokens.two_speed_config import TwoSpeedConfig

KEY = "hf_prune"
FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `config.json` holds under `hf_prune`.

    Attributes:
        structure: How the skeleton differs from the dense one, see `publish.structure_json`; None if it does not.
        tokens: The token selectors, or those of two-speed FFNs; None if there are none.
        blocks: Prefix of the transformer blocks in the checkpoint file, for example `vit.encoder.layer`.
        selectors: Prefix of the selectors in the checkpoint file, for example `vit.token_pruning`.
        base_model: Hub id of the dense weights, if there is one.
        created_with: Package name to version.
    """

    structure: Mapping[str, Any] | None = None
    tokens: TokenPruningConfig | TwoSpeedConfig | None = None
    blocks: str = ""
    selectors: str = ""
    base_model: str | None
    created_with: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as JSON-ready data."""
        tokens = self.tokens and {
            "blocks": self.blocks, "selectors": self.selectors, **self.tokens.to_dict()
        }  # fmt: skip
        return {
            "format_version": FORMAT_VERSION,
            "min_reader_version": FORMAT_VERSION if self.structure else 1,
            "created_with": dict(self.created_with),
            "base_model": self.base_model,
            "structure": self.structure,
            "tokens": tokens,
        }

    def is_of_this_release(self, library: str) -> bool:
        """Return whether the library that lays the model out is the one of the time of saving, up to fixes."""
        return _release(self.created_with.get(library, "")) == _release(_installed(library))

    def without_tokens(self) -> "Manifest":
        """Return the manifest of a part of the model that runs no blocks."""
        return replace(self, tokens=None)

    def selectors_are_cut(self) -> bool:
        """Return whether the selectors were there when the model was cut, and were cut with it."""
        tensors = (self.structure or {}).get("tensors")
        return bool(self.tokens) and isinstance(tensors, Mapping) and any(
            str(name).startswith(f"{self.selectors}.") for name in tensors
        )  # fmt: skip

    @classmethod
    def from_dict(cls, data: Any) -> "Manifest":
        """Read a manifest.

        Raises:
            ManifestError: If it is no manifest, of a later format, or holds anything unknown or out of range.
        """
        data = _upgraded(data)
        _require_keys(
            data, {"format_version", "min_reader_version", "created_with", "base_model", "structure", "tokens"}, KEY
        )
        base, made, structure = data["base_model"], data["created_with"], data["structure"]
        if base is not None and not isinstance(base, str):
            raise ManifestError(f"`base_model` must be text or null, got {type(base).__name__}")
        if not isinstance(made, Mapping) or not all(isinstance(item, str) for pair in made.items() for item in pair):
            raise ManifestError("`created_with` must map package names to versions")
        if structure is not None and not isinstance(structure, Mapping):
            raise ManifestError(f"`structure` must be an object or null, got {type(structure).__name__}")
        if structure is None and data["tokens"] is None:
            raise ManifestError("a manifest must hold a structure or tokens, got neither")
        return cls(structure=structure, base_model=base, created_with=dict(made), **_tokens(data["tokens"]))

    def require_names(self, checkpoint_keys: Iterable[str]) -> None:
        """Check that the checkpoint beside the manifest holds what it names.

        Raises:
            ManifestError: If not: the two belong to different models.
        """
        if self.tokens is None:
            return
        keys, prefix = set(checkpoint_keys), f"{self.selectors}.selectors."
        learned = isinstance(self.tokens, TwoSpeedConfig) or reducer_class(self.tokens.method).learned
        wanted = {str(block) for block in self.tokens.before_blocks or ()} if learned else set()
        held = {key.removeprefix(prefix).partition(".")[0] for key in keys if learned and key.startswith(prefix)}
        if held != wanted or not any(key.startswith(f"{self.blocks}.") for key in keys):
            raise ManifestError(
                f"the manifest names blocks '{self.blocks}.*' and selectors before blocks {sorted(wanted)}, but the "
                f"checkpoint holds {sorted(held) or 'none'}; config.json and the weights belong to different models"
            )


def _upgraded(data: Any) -> Any:
    """Return what a manifest of an earlier format says, in the current one.

    Format 1 knew tokens alone.

    Raises:
        ManifestError: If it needs a later reader.
    """
    if not isinstance(data, Mapping):
        raise ManifestError(f"`{KEY}` must be an object, got {type(data).__name__}")
    numbers = data.get("format_version"), data.get("min_reader_version")
    if any(type(number) is not int or number < 1 for number in numbers) or numbers[1] > FORMAT_VERSION:  # type: ignore
        raise ManifestError(
            f"this hf_prune reads manifests of format {FORMAT_VERSION}, got one that needs {numbers[1]!r:.40}; "
            f"upgrade with `pip install -U hf-prune`"
        )
    return {"structure": None, **data} if numbers[0] == 1 else data


def _tokens(tokens: Any) -> dict[str, Any]:
    """Return the fields of a manifest on tokens."""
    if tokens is None:
        return {}
    if not isinstance(tokens, Mapping):
        raise ManifestError(f"`{KEY}.tokens` must be an object, got {tokens!r:.80}")
    rest = {key: value for key, value in tokens.items() if key not in ("blocks", "selectors")}
    names = {key: tokens.get(key) for key in ("blocks", "selectors")}
    if not all(isinstance(name, str) and re.fullmatch(r"[A-Za-z_][\w.]{0,200}", name) for name in names.values()):
        raise ManifestError(f"`blocks` and `selectors` must be names of a checkpoint, got {names!r:.120}")
    kind = TwoSpeedConfig if rest.get("method") == TwoSpeedConfig.method else TokenPruningConfig
    return {"tokens": kind.from_dict(rest), **names}


def versions() -> dict[str, str]:
    """Return the versions of the packages that shape a saved model."""
    return {name: version(name) for name in ("hf-prune", "torch", "transformers", "timm")}


def checkpoint_prefixes(checkpoint_keys: Iterable[str]) -> tuple[str, str]:
    """Return the prefixes of blocks and selectors among the names of a checkpoint, as if there were any selectors."""
    keys = list(checkpoint_keys)
    places = [(key, name) for key in keys for name in (ATTRIBUTE, TWO_SPEED) if f"{name}." in key]
    selectors = next((key.partition(f"{name}.")[0] + name for key, name in places), ATTRIBUTE)
    others = (re.match(r"(.*?)\.\d+\.", key) for key in keys if not key.startswith(selectors))
    blocks, _ = Counter(match.group(1) for match in others if match).most_common(1)[0]
    return blocks, selectors


@cache
def _installed(library: str) -> str:
    return version(library)


def _release(number: str) -> list[str]:
    return number.split(".")[:2]


def _require_keys(data: Any, names: set[str], where: str) -> None:
    if not isinstance(data, Mapping) or set(data) != names:
        came = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise ManifestError(f"`{where}` must hold exactly {sorted(names)}, got {came!s:.200}")
