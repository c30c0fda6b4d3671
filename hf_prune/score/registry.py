"""Criteria by name.

To add one: write `hf_prune/score/<name>.py` with a frozen dataclass that extends `Criterion` and works with its
defaults, and add a line below. The tests in `tests/score/test_criteria_contract.py` then run on it.
"""

from importlib import import_module

from hf_prune.errors import CriterionError, did_you_mean
from hf_prune.score.base import Criterion

# Name, which is the file's, -> class in it. Imported when asked for.
CRITERIA = {
    "activation": "Activation",
    "bn_scale": "BnScale",
    "fisher": "Fisher",
    "fluctuation": "Fluctuation",
    "force": "Force",
    "fpgm": "Fpgm",
    "grasp": "Grasp",
    "lamp": "Lamp",
    "magnitude": "Magnitude",
    "random": "Random",
    "snip": "Snip",
    "synflow": "Synflow",
    "taylor": "Taylor",
    "whc": "Whc",
}


def criterion(name: str | Criterion) -> Criterion:
    """Return a criterion by name, with its defaults, or the one given.

    Raises:
        CriterionError: If the name is unknown, with all names and the nearest one.
    """
    if isinstance(name, Criterion):
        return name
    if isinstance(name, type) and issubclass(name, Criterion):
        raise CriterionError(f"`criterion` must be a name or an instance, got the class; write {name.__name__}()")
    if not isinstance(name, str) or name not in CRITERIA:
        hint = did_you_mean(str(name).lower(), CRITERIA)
        raise CriterionError(
            f"`criterion` must be one of {', '.join(CRITERIA)} or an instance of Criterion, got {name!r}{hint}"
        )
    return getattr(import_module(f"hf_prune.score.{name}"), CRITERIA[name])()
