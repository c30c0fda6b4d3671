"""Make functions forget what they remember of earlier runs.

A table of positions behind `functools.lru_cache` is computed in a model's first run only, or whenever its size is new.
Runs that are to be compared operation by operation must all start without it.
"""

import functools
import sys
from collections.abc import Iterator
from inspect import signature
from types import FunctionType
from typing import Any

from torch import nn

CACHED = type(functools.lru_cache(int))


def forget(model: nn.Module) -> None:
    """Empty the caches of all functions in the classes of a model's modules and in the files that define them."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    files = {base.__module__ for base in classes if base.__module__.partition(".")[0] not in ("torch", "builtins")}
    places = [vars(base) for base in classes if base.__module__ in files]
    places += [vars(sys.modules[name]) for name in files if name in sys.modules]
    for cached in {function for place in places for value in list(place.values()) for function in _cached(value)}:
        cached.cache_clear()


def _cached(value: Any) -> Iterator[Any]:
    """Yield the cached function that a value is or encloses, if it has arguments."""
    if isinstance(value, FunctionType | staticmethod | classmethod | CACHED):
        function = getattr(value, "__func__", value)
        inner = [_content(cell) for cell in getattr(function, "__closure__", None) or ()]
        for candidate in (function, *inner):
            if isinstance(candidate, CACHED) and signature(candidate).parameters:
                yield candidate


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
