"""Give a dense skeleton what its manifest says: the structure, the tokens."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from hf_prune.analyse.running import named_tensors
from hf_prune.errors import ManifestError, SurgeryError, TraceError
from hf_prune.publish.manifest import Manifest
from hf_prune.publish.structure_json import from_json, part_of
from hf_prune.surgery.rederive import rederive
from hf_prune.surgery.structure import Structure, rebuild
from hf_prune.tokens.attach import TokenPruning, add_token_pruning
from hf_prune.tokens.two_speed import TwoSpeed, add_two_speed
from hf_prune.tokens.two_speed_config import TwoSpeedConfig


def build(
    model: nn.Module,
    manifest: Manifest,
    names: Mapping[str, str],
    *,
    whole: bool,
    dense: Callable[[], nn.Module] | None = None,
) -> None:
    """Prune a dense skeleton as its manifest says; may be done again.

    Args:
        model: Changed in place; on any device.
        manifest: What was done.
        names: Name of a tensor in the checkpoint file -> its name in the model.
        whole: Whether the manifest was made for this class, so that all it names must be there.
        dense: Builds the dense skeleton once more, to look at where the model may be laid out otherwise than when it
            was saved; None if it cannot be.

    Raises:
        ManifestError: If the manifest does not fit the model.
    """
    if manifest.selectors_are_cut():
        before = set(named_tensors(model))
        add_tokens(model, manifest)
        names = {**names, **{name: name for name in named_tensors(model) if name not in before}}
    if manifest.structure is not None:
        rebuild(model, structure_for(model, manifest, names, whole=whole, dense=dense))
    add_tokens(model, manifest)


def structure_for(
    model: nn.Module,
    manifest: Manifest,
    names: Mapping[str, str],
    *,
    whole: bool,
    dense: Callable[[], nn.Module] | None,
) -> Structure:
    """Return what the manifest says for a model as it is laid out here and now.

    Raises:
        ManifestError: If it does not fit.
    """
    assert manifest.structure is not None
    here = "transformers" if hasattr(model, "main_input_name") else "timm"
    same_release, fresh = manifest.is_of_this_release(here), _fresh_parameters(model, manifest, names)
    is_as_saved = dense is None or (same_release and not fresh)
    structure = from_json(manifest.structure, model, names, whole=whole, layout=same_release)
    if is_as_saved or dense is None or len(fresh) == len(list(model.parameters())):
        return structure
    other = dense()
    rebuild(other, Structure(removed=structure.removed))
    try:
        found = rederive(other, structure)
    except (SurgeryError, TraceError) as err:
        if same_release:
            return structure  # the fresh layers stay as they are
        raise ManifestError(
            f"the model was saved with {dict(manifest.created_with)} and {type(model).__name__} is laid out otherwise "
            f"here, where it cannot be pruned in the same way: {err}"
        ) from err
    return replace(found, removed=structure.removed, features=structure.features)


def _fresh_parameters(model: nn.Module, manifest: Manifest, names: Mapping[str, str]) -> list[str]:
    """Return the parameters that the saved model had not, those of a pooler for instance."""
    assert manifest.structure is not None
    saved = set(manifest.structure.get("parts") or ())
    known = {now for disk, now in names.items() if part_of(disk) in saved}
    return [name for name, _ in model.named_parameters() if name not in known]


def add_tokens(model: nn.Module, manifest: Manifest) -> None:
    """Add the selectors, if there are to be any and there are none yet."""
    if manifest.tokens is None or any(isinstance(module, TokenPruning | TwoSpeed) for module in model.modules()):
        return
    if isinstance(manifest.tokens, TwoSpeedConfig):
        add_two_speed(model, manifest.tokens)
    else:
        add_token_pruning(model, manifest.tokens)


def require_same_shapes(model: nn.Module, built: nn.Module) -> None:
    """Check that what a saved model's config builds is the model.

    Raises:
        ManifestError: If it is not.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    wrong = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if wrong:
        first = wrong[0]
        raise ManifestError(
            f"what the config builds must be the model that is saved, but {len(wrong)} tensors differ: '{first}' has "
            f"shape {ours.get(first)} here and {theirs.get(first)} there; was the model changed by hand, or built with "
            f"arguments that are not in its config?"
        )
