"""Reducers by name.

To add one: write `hf_prune/tokens/reducers/<name>.py` with a subclass of `Selector` or `Merger` and add a line below.
The tests in `tests/tokens/reducers/test_contract.py` then run on it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from hf_prune.errors import ManifestError, did_you_mean

if TYPE_CHECKING:
    from hf_prune.tokens.reducers.base import Reducer

# Name, which is the file's, -> class in it. Imported when asked for.
REDUCERS = {
    "class_attention": "ClassAttention",
    "diffrate": "DropAndMerge",
    "dynamicvit": "TokenPredictor",
    "evit": "Evit",
    "pitome": "EnergyMerge",
    "random": "Random",
    "spvit": "SoftTokenSelector",
    "tome": "BipartiteMerge",
}


def reducer_class(name: object) -> "type[Reducer]":
    """Return the class of a reducer.

    Raises:
        ManifestError: If the name is unknown, with all names and the nearest one.
    """
    if not isinstance(name, str) or name not in REDUCERS:
        hint = did_you_mean(str(name).lower(), REDUCERS)
        raise ManifestError(f"`method` must be one of {', '.join(REDUCERS)}, got {name!r:.80}{hint}")
    return getattr(import_module(f"hf_prune.tokens.reducers.{name}"), REDUCERS[name])
