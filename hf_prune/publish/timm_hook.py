"""Lets timm build a pruned model: an architecture called `hf_prune`, on timm's own stage for pruned models.

`create_model` reads the architecture and its arguments from config.json, and builds in this order: the dense model,
what pruning did to it, its weights, the wrapper for feature maps. The second is where we come in. That one private
name of timm is touched here and nowhere else.
"""

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from hf_prune.errors import ManifestError, UnsupportedModelError

ARCHITECTURE = "hf_prune"
# The manifest of the model that is being built, and what builds its dense skeleton.
_to_do: ContextVar[Any] = ContextVar("hf_prune_to_do", default=None)


def install() -> None:
    """Register the architecture and take part in timm's builder; may be called again."""
    from timm.models import _builder, is_model, register_model

    if is_model(ARCHITECTURE):
        return
    builder: Any = _builder  # the name is private
    original = builder.adapt_model_from_file

    def adapt(model: nn.Module, variant: str) -> nn.Module:
        if _to_do.get() is None:
            return original(model, variant)
        manifest, dense = _to_do.get()
        from hf_prune.analyse.running import named_tensors
        from hf_prune.publish.skeleton import build

        build(model, manifest, {name: name for name in named_tensors(model)}, whole=True, dense=dense)
        _to_do.set(None)
        return model

    builder.adapt_model_from_file = adapt
    register_model(hf_prune)


def hf_prune(pretrained: bool = False, base: str = "", manifest: Any = None, **settings: Any) -> nn.Module:
    """Build a pruned timm model.

    Args:
        pretrained: Whether to load the weights that `pretrained_cfg` among the settings points at.
        base: Name of the dense architecture.
        manifest: What was done to it; see `publish.manifest`.
        settings: As the dense architecture takes them.

    Raises:
        ManifestError: If the manifest is malformed or does not fit.
    """
    from timm.models import is_model, model_entrypoint

    from hf_prune.publish.manifest import Manifest

    if not isinstance(base, str) or not is_model(base) or base == ARCHITECTURE:
        raise ManifestError(f"`base` must be an architecture of timm, got {base!r:.80}")

    def dense() -> nn.Module:
        kept = {name: value for name, value in settings.items() if name not in ("features_only", "out_indices")}
        with torch.device("meta"):
            return model_entrypoint(base)(pretrained=False, **kept)

    token = _to_do.set((Manifest.from_dict(manifest), dense))
    try:
        model = model_entrypoint(base)(pretrained=pretrained, pruned=True, **settings)
        if _to_do.get() is not None:
            raise UnsupportedModelError(f"timm builds '{base}' on a way of its own that knows no pruned models")
    finally:
        _to_do.reset(token)
    model.pretrained_cfg["architecture"] = ARCHITECTURE
    return model


def base_of(model: nn.Module) -> str | None:
    """Return the name of the dense architecture of a timm model; None if timm's factory did not build it."""
    configuration = getattr(model, "pretrained_cfg", None)
    name = configuration.get("architecture") if isinstance(configuration, dict) else None
    return getattr(model, "_model_args", {}).get("base") if name == ARCHITECTURE else name


def arguments_of(model: nn.Module) -> dict[str, Any]:
    """Return what a model was built with, as far as timm knows it, without what is on record elsewhere."""
    from timm.models import _input

    found = dict(_input.get_model_args(model)) if hasattr(_input, "get_model_args") else {}
    # The wrapper of transformers gives the number of classes itself.
    return {name: value for name, value in found.items() if name not in ("num_classes", "base", "manifest")}


def describe(model: nn.Module, manifest: dict[str, Any] | None) -> None:
    """Write a manifest where timm looks when it saves a model."""
    base = base_of(model)
    arguments = {k: v for k, v in getattr(model, "_model_args", {}).items() if k not in ("base", "manifest")}
    if manifest is not None:
        arguments |= {"base": base, "manifest": manifest}
    model._model_args = arguments  # type: ignore[assignment]
    model.pretrained_cfg["architecture"] = base if manifest is None else ARCHITECTURE  # type: ignore[index]


def skeleton_of(model: nn.Module, manifest: dict[str, Any]) -> nn.Module:
    """Return what a saved model's config builds, without weights."""
    import timm

    settings = {"num_classes": model.num_classes, **arguments_of(model)}
    with torch.device("meta"):
        return timm.create_model(ARCHITECTURE, base=base_of(model), manifest=manifest, **settings)
