"""Save a token-pruned model as plain safetensors and config, and get it back."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import timm
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (of httpx or httpx2)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from torch import nn

from hf_prune.errors import ManifestError, ModelLoadError
from hf_prune.publish import transformers_hook
from hf_prune.publish.manifest import KEY, Manifest, checkpoint_prefixes, versions
from hf_prune.tokens.attach import add_token_pruning, token_pruning_of

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def save(
    model: nn.Module, folder: str | os.PathLike[str], *, base_model: str | None = None, processor: Any = None
) -> Path:
    """Write a token-pruned model: safetensors, `config.json` with the manifest, the image processor.

    Everything is written to a temporary folder beside the files first and moved in place by renaming, `config.json`
    last, so a full disk or a killed process does not leave a folder that looks loadable and is not.

    Args:
        model: Token-pruned transformers or timm model.
        folder: Created if missing; other files in it stay.
        base_model: Hub id of the dense weights, for the manifest.
        processor: Image processor to save along (transformers).

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: If the model is not token-pruned.
        OSError: If the folder cannot be written.
    """
    target, settings = Path(folder), token_pruning_of(model).settings
    partial = target / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        is_transformers = isinstance(model, transformers.PreTrainedModel)
        if is_transformers:
            model.save_pretrained(partial)
        else:
            save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, partial / WEIGHTS)
        blocks, selectors = checkpoint_prefixes(checkpoint_keys(partial))
        manifest = Manifest(
            tokens=settings, blocks=blocks, selectors=selectors, base_model=base_model, created_with=versions()
        ).to_dict()
        if is_transformers:
            setattr(model.config, KEY, manifest)
            model.config.save_pretrained(partial)
        else:
            save_config_for_hf(model, str(partial / CONFIG), model_config={KEY: manifest})
        if processor is not None:
            processor.save_pretrained(partial)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == CONFIG):
            path.replace(target / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def load(folder_or_id: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> nn.Module:
    """Return the model that `save` wrote, in evaluation mode, of its own class, with equal logits.

    Nothing is unpickled; the manifest is checked before anything is built.

    Args:
        folder_or_id: A local folder, or "owner/name" on the Hub (kept in the Hub's cache).
        revision: Branch, tag or commit on the Hub.
        token: For private repositories; None takes the one that is logged in.

    Raises:
        ModelLoadError: If there is no readable model.
        ManifestError: If the manifest is missing, malformed, or does not fit the weights.
    """
    path = _local(folder_or_id, revision, token)
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"must be a JSON object, got {type(config).__name__}")
    except (OSError, ValueError) as err:
        raise ModelLoadError(f"no model could be read from '{path}': {CONFIG}: {err}") from err
    if KEY not in config:
        raise ManifestError(
            f"'{path / CONFIG}' holds no `{KEY}` manifest: it is not a model that hf_prune pruned; "
            f"load it with transformers or timm"
        )
    manifest = Manifest.from_dict(config[KEY])
    manifest.require_names(checkpoint_keys(path))
    model = _load_timm(path, manifest) if "architecture" in config else _load_transformers(path, config)
    return model.eval()


def _local(folder_or_id: str | os.PathLike[str], revision: str | None, token: str | None) -> Path:
    """Return the folder, fetched from the Hub where it is not a local one."""
    path, name = Path(folder_or_id), str(folder_or_id)
    if path.exists() or not REPO_ID.fullmatch(name):
        return path
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError, HTTPError) as err:
        raise ModelLoadError(
            f"'{name}' must be a local folder or a model on the Hub that you may read; there is no such folder, and "
            f"the Hub said: {err}"
        ) from err


def checkpoint_keys(folder: Path) -> list[str]:
    """Return the names of all tensors of a checkpoint, sharded or not, without reading them.

    Raises:
        ModelLoadError: If there are no readable weights.
    """
    try:
        if (folder / INDEX).is_file():
            return sorted(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            return sorted(weights.keys())
    except (OSError, ValueError, KeyError, SafetensorError) as err:
        raise ModelLoadError(f"no safetensors weights could be read from '{folder}': {err}") from err


def _load_transformers(path: Path, config: dict[str, Any]) -> nn.Module:
    name = (config.get("architectures") or [None])[0]
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ModelLoadError(f"`architectures` in '{path / CONFIG}' must name a transformers model, got {name!r:.80}")
    transformers_hook.install()
    try:
        model, info = cast(Any, kind).from_pretrained(path, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as err:
        raise ModelLoadError(f"the weights in '{path}' do not fit its config: {err}") from err
    _require_complete(path, info["missing_keys"], info["unexpected_keys"])
    return model


def _load_timm(path: Path, manifest: Manifest) -> nn.Module:
    try:
        model = cast(nn.Module, timm.create_model(f"local-dir:{path}", pretrained=False))
        add_token_pruning(model, manifest.tokens)
        missing, unexpected = model.load_state_dict(load_file(path / WEIGHTS), strict=False)
    except (OSError, RuntimeError, TypeError, SafetensorError) as err:
        raise ModelLoadError(f"the weights in '{path}' do not fit its config: {err}") from err
    _require_complete(path, missing, unexpected)
    return model


def _require_complete(path: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    if missing or unexpected:
        raise ModelLoadError(
            f"the weights in '{path}' must be those of its config: missing {sorted(missing)[:5]}, "
            f"unexpected {sorted(unexpected)[:5]}"
        )
