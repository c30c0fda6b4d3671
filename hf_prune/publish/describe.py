"""What is on record of a pruned model, in memory: its manifest, its history, and what its own saver will write."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from hf_prune.analyse.running import named_tensors
from hf_prune.errors import UnsupportedModelError
from hf_prune.publish import timm_hook, transformers_hook
from hf_prune.publish.manifest import KEY, Manifest, checkpoint_prefixes, versions
from hf_prune.publish.structure_json import to_json
from hf_prune.publish.uniform import fields_for
from hf_prune.surgery.structure import Structure, structure_of
from hf_prune.tokens.pruning import TokenPruning
from hf_prune.tokens.two_speed import TwoSpeed

if TYPE_CHECKING:
    from hf_prune.pipeline import PruneRecord

HISTORY = "_hf_prune_history"
BASE_MODEL = "_hf_prune_base_model"


def library_of(model: nn.Module) -> Literal["transformers", "timm", "torch"]:
    """Return what saves and loads a model, "torch" for a user's own classes; no library is imported for that."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}
    if "transformers.modeling_utils.PreTrainedModel" in names:
        return "transformers"
    return "timm" if timm_hook.base_of(model) else "torch"


def manifest_of(model: nn.Module, base_model: str | None = None) -> Manifest:
    """Return what makes the model's skeleton from the dense one.

    Args:
        model: Pruned.
        base_model: Hub id of the dense weights; None takes the one that the model was loaded by.

    Raises:
        UnsupportedModelError: If hf_prune did not prune the model.
    """
    structure = structure_of(model)
    tokens = next((module for module in model.modules() if isinstance(module, TokenPruning | TwoSpeed)), None)
    if structure == Structure() and tokens is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} must be pruned by hf_prune in this process, or be loaded from a model that was; "
            f"a dense model is saved as always"
        )
    gone = [removed.tensor for removed in structure.removed.values()]
    if library_of(model) == "transformers":
        names = transformers_hook.disk_names(model, gone)
    else:
        names = {name: name for name in (*model.state_dict(), *named_tensors(model), *gone)}
    blocks, selectors = checkpoint_prefixes(sorted(names.values())) if tokens is not None else ("", "")
    return Manifest(
        structure=None if structure == Structure() else to_json(model, names),
        tokens=None if tokens is None else tokens.settings,
        blocks=blocks,
        selectors=selectors,
        base_model=base_model or base_model_of(model),
        created_with=versions(),
    )


def base_model_of(model: nn.Module) -> str | None:
    """Return the Hub id of the dense weights, if the model knows; those of timm do not know where theirs are from."""
    config = getattr(model, "config", None)
    earlier = getattr(config, KEY, None) or getattr(model, "_model_args", {}).get("manifest")
    earlier = earlier or next(iter(history_of(model)), None)
    if isinstance(earlier, Mapping):
        return earlier.get("base_model")
    name = getattr(config, "_name_or_path", None)
    return name if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/")) else None


def describe(model: nn.Module, base_model: str | None = None) -> Manifest:
    """Write the manifest where the model's own `save_pretrained`, or timm's, will save it; return it.

    Where the configuration of a transformers model can say all of it, it does, and there is no manifest.
    """
    manifest = manifest_of(model, base_model)
    library = library_of(model)
    if library == "transformers":
        fields = None if manifest.tokens is not None else fields_for(model)
        transformers_hook.describe(model, manifest.to_dict() if fields is None else None, fields or {})
    elif library == "timm":
        timm_hook.describe(model, manifest.to_dict())
    return manifest


def history_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the cuts of a model in order: plans, parameters and MACs before and after, how they were verified."""
    return vars(model).get(HISTORY, [])


def note(model: nn.Module, record: "PruneRecord", tokens: Mapping[str, Any] | None = None) -> None:
    """Add a cut, or reducers by their settings, to the history, and describe the model anew."""
    step = {
        "plan": record.plan.to_json(),
        "params": list(record.params),
        "macs": list(record.macs),
        "difference_from_silenced": record.difference,
        "not_compared_because": record.not_exact,
        "base_model": base_model_of(model),
        "versions": versions(),
        **({} if tokens is None else {"tokens": dict(tokens)}),
    }
    vars(model)[HISTORY] = [*history_of(model), step]
    describe(model)


def on_record(model: nn.Module) -> dict[str, Any]:
    """Return all that is on record of a pruned model, JSON-ready: its manifest, and its history.

    Raises:
        UnsupportedModelError: If hf_prune did not prune it.
    """
    return {**manifest_of(model).to_dict(), "history": history_of(model)}
