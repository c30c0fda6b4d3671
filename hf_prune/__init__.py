"""Prune HuggingFace and timm vision models to a latency target; the model keeps its class."""

import importlib
from typing import TYPE_CHECKING, Any

from hf_prune.errors import HfPruneError, HfPruneWarning
from hf_prune.late import when_imported

if TYPE_CHECKING:
    from hf_prune.allocate.allocators import Limits
    from hf_prune.allocate.budget import Budget
    from hf_prune.allocate.joint_plan import JointPlan
    from hf_prune.allocate.plan import Plan
    from hf_prune.analyse.graph import AxisGraph
    from hf_prune.data.concept_sets import pruning_source
    from hf_prune.data.concepts.discover import discover_concepts
    from hf_prune.joint import apply_joint, plan_joint
    from hf_prune.measure.model import compare, measure
    from hf_prune.pipeline import analyze, apply_plan, plan, prune
    from hf_prune.publish.describe import on_record as manifest
    from hf_prune.publish.folder_card import write_card
    from hf_prune.publish.hub import push_folder, push_to_hub
    from hf_prune.publish.save import load, save
    from hf_prune.tokens.attach import add_token_pruning, token_pruning_of
    from hf_prune.tokens.config import TokenPruningConfig
    from hf_prune.tokens.two_speed import add_two_speed, two_speed_of
    from hf_prune.tokens.two_speed_config import TwoSpeedConfig
    from hf_prune.tokens.two_speed_fit import fit_two_speed

__version__ = "0.1.0"

# Names are imported when first used: `import hf_prune` loads neither torch nor transformers.
_HOMES = {
    "AxisGraph": "hf_prune.analyse.graph",
    "Budget": "hf_prune.allocate.budget",
    "JointPlan": "hf_prune.allocate.joint_plan",
    "Limits": "hf_prune.allocate.allocators",
    "Plan": "hf_prune.allocate.plan",
    "TokenPruningConfig": "hf_prune.tokens.config",
    "TwoSpeedConfig": "hf_prune.tokens.two_speed_config",
    "add_token_pruning": "hf_prune.tokens.attach",
    "add_two_speed": "hf_prune.tokens.two_speed",
    "analyze": "hf_prune.pipeline",
    "apply_joint": "hf_prune.joint",
    "apply_plan": "hf_prune.pipeline",
    "compare": "hf_prune.measure.model",
    "discover_concepts": "hf_prune.data.concepts.discover",
    "fit_two_speed": "hf_prune.tokens.two_speed_fit",
    "load": "hf_prune.publish.save",
    "manifest": "hf_prune.publish.describe:on_record",
    "plan": "hf_prune.pipeline",
    "plan_joint": "hf_prune.joint",
    "prune": "hf_prune.pipeline",
    "pruning_source": "hf_prune.data.concept_sets",
    "push_folder": "hf_prune.publish.hub",
    "push_to_hub": "hf_prune.publish.hub",
    "save": "hf_prune.publish.save",
    "token_pruning_of": "hf_prune.tokens.attach",
    "two_speed_of": "hf_prune.tokens.two_speed",
    "write_card": "hf_prune.publish.folder_card",
}

__all__ = [
    "AxisGraph",
    "Budget",
    "HfPruneError",
    "HfPruneWarning",
    "JointPlan",
    "Limits",
    "Plan",
    "TokenPruningConfig",
    "TwoSpeedConfig",
    "add_token_pruning",
    "add_two_speed",
    "analyze",
    "apply_joint",
    "apply_plan",
    "compare",
    "discover_concepts",
    "fit_two_speed",
    "load",
    "manifest",
    "measure",
    "plan",
    "plan_joint",
    "prune",
    "pruning_source",
    "push_folder",
    "push_to_hub",
    "save",
    "token_pruning_of",
    "two_speed_of",
    "write_card",
]


def __getattr__(name: str) -> Any:
    if name == "measure":  # a package of that name, which can be called
        return importlib.import_module("hf_prune.measure")
    if name in _HOMES:
        home, _, there = _HOMES[name].partition(":")
        return getattr(importlib.import_module(home), there or name)
    raise AttributeError(f"module 'hf_prune' has no attribute '{name}'")


def _teach_transformers() -> None:
    importlib.import_module("hf_prune.publish.transformers_hook").install()


def _teach_timm() -> None:
    importlib.import_module("hf_prune.publish.timm_hook").install()


when_imported("transformers.modeling_utils", _teach_transformers)
when_imported("timm.models", _teach_timm)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
