"""Lets transformers build a pruned model from its config: one wrapper, idle without a manifest."""

import copy
import functools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hf_prune.publish.manifest import KEY

NUMBER = re.compile(r"\.\d+\.")


def install() -> None:
    """Make every transformers model with a manifest in its config build itself pruned; may be called again.

    `post_init` is the last line of every model's constructor and runs before weights are loaded, so shards, dtypes and
    device maps see the pruned skeleton. A model without a manifest is not touched.
    """
    from transformers.modeling_utils import PreTrainedModel

    original = PreTrainedModel.post_init
    if hasattr(original, "hf_prune_original"):
        return

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        data = getattr(self.config, KEY, None)
        if data is not None:
            _build(self, data)
        return result

    post_init.hf_prune_original = original  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]


def uninstall() -> None:
    """Undo `install`."""
    from transformers.modeling_utils import PreTrainedModel

    original = getattr(PreTrainedModel.post_init, "hf_prune_original", None)
    if original is not None:
        PreTrainedModel.post_init = original  # type: ignore[method-assign]


def _build(model: Any, data: Any) -> None:
    from hf_prune.publish.manifest import Manifest
    from hf_prune.publish.skeleton import build
    from hf_prune.tokens.site import tokens_owner

    manifest = Manifest.from_dict(data)
    # Parts of a model are models with the same config: an encoder alone has no tokens of its own to prune.
    if manifest.tokens is not None and not hasattr(tokens_owner(model), "embeddings"):
        manifest = manifest.without_tokens()
    whole = type(model).__name__ in (getattr(model.config, "architectures", None) or [])
    tensors = (manifest.structure or {}).get("tensors")
    names = checkpoint_names(model, [*map(str, tensors)] if isinstance(tensors, Mapping) else (), whole=whole)
    build(model, manifest, names, whole=whole, dense=lambda: _dense_skeleton(model))


def _dense_skeleton(model: Any) -> nn.Module:
    config = copy.deepcopy(model.config)
    vars(config).pop(KEY)
    with torch.device("meta"):
        return type(model)._from_config(config)


def disk_names(model: Any, others: Iterable[str] = ()) -> dict[str, str]:
    """Return for every tensor of a transformers model its name in a checkpoint file.

    Tensors that the file holds in another form (merged, transposed) keep the name they have in the model.

    Args:
        model: Its weights are not looked at.
        others: Names of tensors that the model does not have any more.
    """
    from transformers.core_model_loading import revert_weight_conversion

    from hf_prune.analyse.running import named_tensors

    own = {**model.state_dict(), **named_tensors(model)}
    shapes = {name: tensor.shape for name, tensor in own.items()} | dict.fromkeys(others, torch.Size([1]))
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    ours = {id(tensor): name for name, tensor in tensors.items()}
    renamed = {ours.get(id(tensor)): name for name, tensor in revert_weight_conversion(model, dict(tensors)).items()}
    return {name: renamed.get(name, name) for name in tensors}


def disk_names_by_pattern(model: Any, others: Iterable[str] = ()) -> dict[str, str] | None:
    """Return what `disk_names` does, ten times as fast: blocks that differ in their number are renamed as the first is.

    None if the names in the file do not have the numbers where the names in the model have them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    from hf_prune.analyse.running import named_tensors

    numbered = {name: NUMBER.search(name) for name in (*model.state_dict(), *named_tensors(model), *others)}
    patterns = {name: NUMBER.sub(".0.", name, count=1) for name in numbered}
    tensors = {pattern: torch.empty(1, device="meta") for pattern in patterns.values()}
    ours = {id(tensor): pattern for pattern, tensor in tensors.items()}
    try:
        reverted = revert_weight_conversion(model, dict(tensors))
    except (RuntimeError, IndexError, ValueError):
        return None  # merged tensors have shapes that matter
    renamed = {ours.get(id(tensor)): name for name, tensor in reverted.items()}
    names = {}
    for name, number in numbered.items():
        disk = renamed.get(patterns[name])
        if disk is None or (number is not None and ".0." not in disk):
            return None
        names[name] = disk if number is None else NUMBER.sub(number.group(), disk, count=1)
    return names


def checkpoint_names(model: Any, wanted: Collection[str] = (), *, whole: bool = True) -> dict[str, str]:
    """Return the name in a model for every name in a checkpoint of it, of its base model, or of one with a head.

    Parts that an inner model has lost already count with what they were.

    Args:
        model: Skeleton.
        wanted: Names that should be found; if the quick way finds them, it will do.
        whole: Whether all of them should be, or most.
    """
    from hf_prune.surgery.structure import KEY as STRUCTURE

    inner = [(path, vars(module).get(STRUCTURE)) for path, module in model.named_modules()]
    lost = [
        ".".join(filter(None, (path, removed.tensor)))
        for path, structure in inner
        if structure is not None
        for removed in structure.removed.values()
    ]
    quick = disk_names_by_pattern(model, lost) if wanted else None
    if quick is not None:
        found = _with_and_without_prefix(model, quick)
        num_missing = sum(name not in found for name in wanted)
        if num_missing <= (0 if whole else len(wanted) // 2):
            return found
    return _with_and_without_prefix(model, disk_names(model, lost))


def _with_and_without_prefix(model: Any, disk_names: Mapping[str, str]) -> dict[str, str]:
    names = {disk: now for now, disk in disk_names.items()}
    prefix = f"{model.base_model_prefix}."
    more = {disk.removeprefix(prefix): now for disk, now in names.items()}
    more |= {prefix + disk: now for disk, now in names.items()}
    return {now: now for now in names.values()} | more | names


def describe(model: Any, manifest: dict[str, Any] | None, fields: Mapping[str, Any]) -> None:
    """Write a manifest, or else fields, into a model's config, so that `save_pretrained` saves it."""
    for name, value in fields.items():
        setattr(model.config, name, value)
    if manifest is None:
        vars(model.config).pop(KEY, None)
    else:
        setattr(model.config, KEY, manifest)


def skeleton_of(model: Any) -> nn.Module:
    """Return what a model's config builds, without weights."""
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config))
