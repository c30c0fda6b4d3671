"""Plans that a model's own configuration can tell: the model then loads without hf_prune.

Where every MLP keeps as many neurons, `intermediate_size` says so, and no manifest is needed. Nothing here knows the
fields of any model: numbers of the configuration that are the dense size of something that was cut are tried at the
new size, and what they build must be the pruned skeleton, in every shape and in every number that its code holds.
"""

import copy
from collections import defaultdict
from itertools import combinations
from typing import Any

import torch
from torch import nn

from hf_prune.publish.manifest import KEY
from hf_prune.surgery.structure import rebuild, structure_of

MOST_FIELDS = 6


def fields_for(model: Any) -> dict[str, Any] | None:
    """Return the fields of a transformers model's configuration that build it as it is; None if there are none.

    An empty dictionary means that the configuration says so already.

    Cost: two skeletons without weights; where fields are found, one more for each combination of them that is tried,
    64 at most.
    """
    structure = structure_of(model)
    if structure.calls or structure.removed:
        return None
    dense = _built(model, {})
    if dense is None:
        return None
    candidates, before = _candidates(model, dense), _facts(dense)
    rebuild(dense, structure)
    wanted = _facts(dense)
    if before == wanted:
        return {}
    if not 0 < len(candidates) <= MOST_FIELDS:
        return None
    for number in range(len(candidates), 0, -1):
        for names in combinations(candidates, number):
            fields = {name: candidates[name] for name in names}
            built = _built(model, fields)
            if built is not None and _facts(built) == wanted:
                return fields
    return None


def _candidates(model: Any, dense: nn.Module) -> dict[str, Any]:
    """Return the fields that hold dense sizes, or heads, with the sizes that these have now, where that is one."""
    now: dict[int, set[int]] = defaultdict(set)
    before = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        for n, m in zip(parameter.shape, before[name].shape, strict=True):
            now[m].add(n)
    for path, values in structure_of(model).attributes.items():
        old = vars(dense.get_submodule(path))
        for name, value in values.items():
            if type(value) is int and type(old.get(name)) is int:
                now[old[name]].add(value)
    changed = {size: sizes.pop() for size, sizes in now.items() if len(sizes) == 1 and size not in sizes}
    fields: dict[str, Any] = {}
    for name, value in model.config.to_dict().items():
        if type(value) is int and changed.get(value, value) != value:
            fields[name] = changed[value]
        elif isinstance(value, list | tuple) and value and all(type(part) is int for part in value):
            new = [changed.get(part, part) for part in value]
            fields |= {name: new} if new != list(value) else {}
    return fields


def _built(model: Any, fields: dict[str, Any]) -> nn.Module | None:
    """Return the skeleton that the configuration with other fields builds, or None if it builds none."""
    config = copy.deepcopy(model.config)
    vars(config).pop(KEY, None)
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        with torch.device("meta"):
            return type(model)._from_config(config)
    except Exception:
        # A constructor may object to a size in any way it likes; then this is not the configuration.
        return None


def _facts(model: nn.Module) -> dict[Any, Any]:
    """Return all shapes, and all numbers that modules hold."""
    shapes = {name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    numbers = {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) in (int, float) or (isinstance(value, tuple | list) and all(type(n) is int for n in value))
    }
    return shapes | numbers
