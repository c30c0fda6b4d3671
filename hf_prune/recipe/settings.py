"""The settings that every recipe takes; names follow transformers' `run_image_classification_no_trainer.py`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from transformers import HfArgumentParser

from hf_prune.data.source import EMBEDDED
from hf_prune.data.transforms import AUGMENTATIONS
from hf_prune.errors import RecipeError

# Settings that may differ between a run and the one that resumes it.
NOT_OF_THE_RUN = (
    "output_dir",
    "overwrite_output_dir",
    "checkpointing_steps",
    "resume_from_checkpoint",
    "latency_table",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "hub_private",
)


@dataclass(frozen=True)
class RecipeSettings:
    """Data, training and output of any recipe. A recipe derives its own settings from these."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id, local folder or timm name of a dense classifier. Default: a small model."},
    )
    dataset_name: str = field(default=EMBEDDED, metadata={"help": "Hub id, local folder, parquet file, or digits."})
    dataset_config_name: str | None = None
    image_column_name: str | None = None
    label_column_name: str | None = None
    streaming: bool = field(default=False, metadata={"help": "Stream the dataset; needs --max_train_steps."})
    train_val_split: float = 0.15
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    augmentation: str = field(
        default="deit", metadata={"help": "deit, gentle (small crops only) or none.", "choices": [*AUGMENTATIONS]}
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that decode images."})

    num_train_epochs: float = 30.0
    max_train_steps: int | None = None
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = field(default=None, metadata={"help": "Default: 5e-4 * global batch / 512."})
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    dense_epochs: float = field(default=0.0, metadata={"help": "Train the dense model first."})
    dense_learning_rate: float = 1e-4
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Fresh head; wants --dense_epochs."})
    mixed_precision: str | None = None
    seed: int = 0

    output_dir: str = "outputs/run"
    overwrite_output_dir: bool = False
    checkpointing_steps: str | None = field(default=None, metadata={"help": "Number of steps, or 'epoch'."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "'latest': go on in --output_dir."})
    logging_steps: int = 10
    with_tracking: bool = False
    report_to: str = "all"
    expected_processes: int | None = field(default=None, metadata={"help": "Stop if fewer or more were started."})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads of a process. Default: its cores."})
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = None
    hub_private: bool = False

    def check(self) -> None:
        """Check what can be checked without opening anything.

        Raises:
            RecipeError: If two settings contradict each other or one is malformed.
        """
        if self.resume_from_checkpoint not in (None, "latest"):
            raise RecipeError(
                f"`--resume_from_checkpoint` must be 'latest' (of `--output_dir`), got '{self.resume_from_checkpoint}'"
            )
        every = self.checkpointing_steps
        if every is not None and every != "epoch" and not (every.isdigit() and int(every) > 0):
            raise RecipeError(f"`--checkpointing_steps` must be a number of steps or 'epoch', got '{every}'")
        if self.push_to_hub and not self.hub_model_id:
            raise RecipeError("`--push_to_hub` needs `--hub_model_id owner/name`")
        if self.ignore_mismatched_sizes and not self.dense_epochs:
            raise RecipeError("a fresh head must be trained before it can teach: add `--dense_epochs 5`, for example")

    @property
    def checkpoint_every(self) -> int | None:
        """Optimiser steps between two checkpoints; None for none, 0 for one an epoch."""
        every = self.checkpointing_steps
        return None if every is None else 0 if every == "epoch" else int(every)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON-ready data."""
        return dataclasses.asdict(self)

    def of_the_run(self) -> dict[str, Any]:
        """Return the settings that must be the same for a checkpoint to be resumed from."""
        return {key: value for key, value in self.to_json().items() if key not in NOT_OF_THE_RUN}


S = TypeVar("S", bound=RecipeSettings)


def parse(settings_class: type[S], arguments: Sequence[str], *, description: str | None, embedded: dict[str, Any]) -> S:
    """Read a command line.

    Args:
        settings_class: What to fill.
        arguments: Without the program's name.
        description: Shown by `--help`.
        embedded: Defaults where no model is named: a small model trained on the spot wants settings of its own.
    """
    parser = HfArgumentParser(cast(Any, settings_class), description=description)
    given, _ = parser.parse_known_args(arguments)
    if given.model_name_or_path is None:
        parser.set_defaults(**embedded)
    return settings_class(**vars(parser.parse_args(arguments)))
