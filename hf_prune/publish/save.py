"""Save a pruned model as plain safetensors and config, and get it back."""

import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import timm
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (of httpx or httpx2)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from hf_prune.analyse.running import named_tensors
from hf_prune.errors import HfPruneError, ManifestError, ModelLoadError, UnsupportedModelError
from hf_prune.publish import timm_hook, transformers_hook
from hf_prune.publish.describe import HISTORY, describe, history_of, library_of
from hf_prune.publish.folder import CONFIG, replaced
from hf_prune.publish.manifest import KEY, Manifest
from hf_prune.publish.skeleton import build, require_same_shapes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HISTORY_FILE, MEASUREMENTS_FILE = "pruning_history.json", "measurements.json"
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    processor: Any = None,
    constructor: Callable[[], nn.Module] | None = None,
    measurements: Mapping[str, Any] | None = None,
) -> Path:
    """Write a pruned model: safetensors, `config.json` with the manifest, the history, the image processor.

    Everything is written to a temporary folder first, which then takes the place of the old one: when the disk is full
    or the process is killed, the folder is what it was, or what it was to be.

    Args:
        model: Pruned, of transformers, of timm's `create_model`, or any other.
        folder: Created if missing; other files in it stay.
        base_model: Hub id of the dense weights, for the manifest; None takes the one that the model was loaded by.
        processor: Image processor to save along (transformers).
        constructor: Returns the dense model, for classes of neither library; `load` needs it again.
        measurements: What `hf_prune.compare` found, for the card.

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: If the model was not pruned, or nothing is known that could build it again.
        ManifestError: If what the config builds is not this model.
        OSError: If the folder cannot be written.
    """
    target = Path(folder)
    _require_saver(model)
    manifest = describe(model, base_model).to_dict()
    require_same_shapes(model, _skeleton(model, manifest, constructor))
    with replaced(target) as partial:
        library = library_of(model)
        if library == "transformers":
            cast(Any, model).save_pretrained(partial)
        else:
            save_file(_apart(model.state_dict()), partial / WEIGHTS, metadata={"format": "pt"})
            _write_config(model, partial / CONFIG, manifest, library)
        if processor is not None:
            processor.save_pretrained(partial)
        if history_of(model):
            _write_json(partial / HISTORY_FILE, history_of(model))
        if measurements is not None:
            _write_json(partial / MEASUREMENTS_FILE, dict(measurements))
    return target


def _require_saver(model: nn.Module) -> None:
    """Check that tensors of other kinds, as quantisation makes them, come with who can write them.

    Raises:
        UnsupportedModelError: If not.
    """
    odd = [name for name, p in model.named_parameters() if type(p.data) is not Tensor]
    if odd and getattr(model, "hf_quantizer", None) is None:
        raise UnsupportedModelError(
            f"parameters must be plain tensors to be saved, but {len(odd)} such as '{odd[0]}' are quantised; save the "
            f"model before, and quantise what is loaded: `from_pretrained(folder, quantization_config=...)`, after "
            f"which transformers saves it"
        )


def _skeleton(model: nn.Module, manifest: dict[str, Any], constructor: Callable[[], nn.Module] | None) -> nn.Module:
    library = library_of(model)
    if library == "transformers":
        transformers_hook.install()
        return transformers_hook.skeleton_of(model)
    if library == "timm":
        timm_hook.install()
        return timm_hook.skeleton_of(model, manifest)
    if constructor is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is of neither transformers nor timm's `create_model`; give `constructor`, a "
            f"function that returns the dense model, here and to `hf_prune.load`"
        )
    return _constructed(constructor, Manifest.from_dict(manifest))


def _constructed(constructor: Callable[[], nn.Module], manifest: Manifest) -> nn.Module:
    model = constructor()
    build(model, manifest, {name: name for name in named_tensors(model)}, whole=True)
    return model


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors no two of which share memory, as the format demands."""
    taken: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        shared = tensor.untyped_storage().data_ptr() in taken
        result[name] = tensor.clone() if shared else tensor.contiguous()
        taken.add(tensor.untyped_storage().data_ptr())
    return result


def _write_config(model: nn.Module, path: Path, manifest: dict[str, Any], library: str) -> None:
    if library == "torch":
        _write_json(path, {"library": "torch", "class": type(model).__qualname__, KEY: manifest})
        return
    save_config_for_hf(model, str(path))
    config = json.loads(path.read_text(encoding="utf-8"))
    arguments = {**config.get("model_args", {}), **timm_hook.arguments_of(model)}
    config["architecture"] = timm_hook.ARCHITECTURE
    config["model_args"] = {
        **{name: value for name, value in arguments.items() if name != "num_classes"},
        "base": timm_hook.base_of(model),
        "manifest": manifest,
    }
    _write_json(path, config)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def load(
    folder_or_id: str | os.PathLike[str],
    *,
    constructor: Callable[[], nn.Module] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> nn.Module:
    """Return the model that `save` wrote, in evaluation mode, of its own class, with equal logits.

    Nothing is unpickled; the manifest is checked before anything is built.

    Args:
        folder_or_id: A local folder, or "owner/name" on the Hub (kept in the Hub's cache).
        constructor: Returns the dense model, for classes of neither transformers nor timm.
        revision: Branch, tag or commit on the Hub.
        token: For private repositories; None takes the one that is logged in.

    Raises:
        ModelLoadError: If there is no readable model.
        ManifestError: If the manifest is missing, malformed, or does not fit the weights.
    """
    path = _local(folder_or_id, revision, token)
    config, data = _read_config(path)
    # A model of transformers may say all by the fields of its configuration.
    manifest = None if data is None else Manifest.from_dict(data)
    if manifest is not None:
        manifest.require_names(checkpoint_keys(path))
    if "architecture" in config and "model_type" not in config:
        model = _load_timm(path)
    elif manifest is not None and config.get("library") == "torch":
        model = _load_own(path, manifest, constructor)
    else:
        model = _load_transformers(path, config)
    vars(model)[HISTORY] = _history(path)
    return model.eval()


def _read_config(path: Path) -> tuple[dict[str, Any], Any]:
    """Return a folder's config and the manifest in it."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"must be a JSON object, got {type(config).__name__}")
    except (OSError, ValueError, RecursionError) as err:
        raise ModelLoadError(f"no model could be read from '{path}': {CONFIG}: {err}") from err
    arguments = config.get("model_args")
    data = config.get(KEY) or (arguments.get("manifest") if isinstance(arguments, dict) else None)
    if data is None and not ("model_type" in config and (path / HISTORY_FILE).is_file()):
        raise ManifestError(
            f"'{path / CONFIG}' holds no `{KEY}` manifest: it is not a model that hf_prune pruned; "
            f"load it with transformers or timm"
        )
    return config, data


def _history(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads((path / HISTORY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []  # informative only, and not every saver writes it
    return found if isinstance(found, list) else []


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


def _load_timm(path: Path) -> nn.Module:
    timm_hook.install()
    try:
        return cast(nn.Module, timm.create_model(f"local-dir:{path}", pretrained=True))
    except (OSError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError) as err:
        if isinstance(err, HfPruneError):
            raise
        raise ModelLoadError(f"the weights in '{path}' do not fit its config: {err}") from err


def _load_own(path: Path, manifest: Manifest, constructor: Callable[[], nn.Module] | None) -> nn.Module:
    if constructor is None:
        raise ModelLoadError(f"'{path}' holds a class of its own; give `constructor`, which returns the dense model")
    model = _constructed(constructor, manifest)
    try:
        weights = OrderedDict(load_file(path / WEIGHTS))
        # Modules may ask for the version of the code that saved them; the file does not tell.
        weights._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (OSError, RuntimeError, SafetensorError) as err:
        raise ModelLoadError(f"the weights in '{path}' do not fit its config: {err}") from err
    _require_complete(path, missing, unexpected)
    return model


def _require_complete(path: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    if missing or unexpected:
        raise ModelLoadError(
            f"the weights in '{path}' must be those of its config: missing {sorted(missing)[:5]}, "
            f"unexpected {sorted(unexpected)[:5]}"
        )
