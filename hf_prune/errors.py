"""The errors this library raises: each says what must hold, what came, where, and what to do."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, names: Iterable[str], *, most: int = 1) -> str:
    """Return the end of a message about an unknown name: the nearest of those there are, or nothing."""
    near = difflib.get_close_matches(str(name), list(names), n=most)
    return f"; did you mean {', '.join(near)}?" if near else ""


class HfPruneError(Exception):
    """Root of every error raised on purpose by hf_prune."""


class UnsupportedModelError(HfPruneError, TypeError):
    """The model is of a kind that the requested operation cannot work on."""


class ModelLoadError(HfPruneError, OSError):
    """No model could be read from the given id or folder."""


class BudgetError(HfPruneError, ValueError):
    """The target cannot be reached, or contradicts the model or the table."""


class DataError(HfPruneError, ValueError):
    """The dataset is missing, empty, unlabelled, unreadable, or does not fit the model."""


class LatencyTableError(HfPruneError, ValueError):
    """A latency table is malformed or was measured for something else."""


class ManifestError(HfPruneError, ValueError):
    """A stored `hf_prune` manifest is malformed or does not fit the model it came with."""


class CheckpointError(HfPruneError, ValueError):
    """A training checkpoint is missing, broken, or belongs to another run."""


class RecipeError(HfPruneError, ValueError):
    """A recipe was started with settings that contradict each other or the machine."""


class HfPruneWarning(UserWarning):
    """Something was left out or replaced, and the result says so."""


class TraceError(HfPruneError):
    """A model cannot be run or followed."""


class SurgeryError(HfPruneError):
    """A cut model is not what was predicted; the model was left as it was."""


class PlanError(HfPruneError, ValueError):
    """A plan is malformed or belongs to another model."""


class CriterionError(HfPruneError, ValueError):
    """A criterion is unknown, is set up wrongly, lacks data, or cannot score an axis."""


class CompensationError(HfPruneError, ValueError):
    """Compensation is set up wrongly or lacks images."""
