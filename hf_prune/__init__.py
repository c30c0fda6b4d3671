"""Prune HuggingFace and timm vision models to a latency target; the model keeps its class."""

import importlib
from typing import TYPE_CHECKING, Any

from hf_prune.errors import HfPruneError, HfPruneWarning

if TYPE_CHECKING:
    from hf_prune.allocate.allocators import Limits
    from hf_prune.allocate.budget import Budget
    from hf_prune.allocate.plan import Plan
    from hf_prune.analyse.graph import AxisGraph
    from hf_prune.pipeline import analyze, apply_plan, plan, prune
    from hf_prune.publish.hub import push_folder
    from hf_prune.publish.save import load, save
    from hf_prune.tokens.attach import add_token_pruning, token_pruning_of
    from hf_prune.tokens.config import TokenPruningConfig

__version__ = "0.1.0"

# Names are imported when first used: `import hf_prune` loads neither torch nor transformers.
_HOMES = {
    "AxisGraph": "hf_prune.analyse.graph",
    "Budget": "hf_prune.allocate.budget",
    "Limits": "hf_prune.allocate.allocators",
    "Plan": "hf_prune.allocate.plan",
    "TokenPruningConfig": "hf_prune.tokens.config",
    "add_token_pruning": "hf_prune.tokens.attach",
    "analyze": "hf_prune.pipeline",
    "apply_plan": "hf_prune.pipeline",
    "load": "hf_prune.publish.save",
    "plan": "hf_prune.pipeline",
    "prune": "hf_prune.pipeline",
    "push_folder": "hf_prune.publish.hub",
    "save": "hf_prune.publish.save",
    "token_pruning_of": "hf_prune.tokens.attach",
}

__all__ = [
    "AxisGraph",
    "Budget",
    "HfPruneError",
    "HfPruneWarning",
    "Limits",
    "Plan",
    "TokenPruningConfig",
    "add_token_pruning",
    "analyze",
    "apply_plan",
    "load",
    "plan",
    "prune",
    "push_folder",
    "save",
    "token_pruning_of",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hf_prune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
