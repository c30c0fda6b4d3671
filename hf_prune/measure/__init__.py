"""Accuracy, cost and latency, and the pictures of them; `hf_prune.measure(model)` measures a model."""

import sys
from types import ModuleType
from typing import Any


class _Measure(ModuleType):
    """The package bears the name of the function that users call: it is both."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from hf_prune.measure.model import measure

        return measure(*args, **kwargs)


sys.modules[__name__].__class__ = _Measure
