"""Training checkpoints that are either whole or absent, and that know which run they belong to."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_prune.errors import CheckpointError

PROGRESS_FILE = "progress.json"
PARTIAL = ".partial"


@dataclass
class Progress:
    """How far a phase of training has come.

    Attributes:
        phase: Name of the phase, for example `dense` or `spvit`.
        step: Optimiser steps done.
        epoch: Epoch in progress.
        batch: Batches of that epoch done.
        finished: Whether the phase is over.
        extra: State of the objective (multipliers), JSON-ready.
    """

    phase: str
    step: int = 0
    epoch: int = 0
    batch: int = 0
    finished: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Checkpoints:
    """Checkpoints of one run, in one folder, a subfolder `<phase>-step_<n>` each.

    Attributes:
        folder: Where they lie.
        accelerator: Saves and loads models, optimisers, scaler and random states.
        run: Settings that must be the same for a checkpoint to be resumed from.
        resume: Whether to resume; otherwise checkpoints are written but never read.
        every: Optimiser steps between two checkpoints; None writes none, 0 one an epoch.
        keep: Most recent checkpoints of a phase that are kept.
    """

    folder: Path
    accelerator: Accelerator
    run: dict[str, Any]
    resume: bool = False
    every: int | None = None
    keep: int = 2

    def save(self, progress: Progress) -> None:
        """Write everything needed to go on from here; all processes must call it.

        The folder gets its name only once it is complete, so a run killed in the middle leaves the one before.

        Raises:
            CheckpointError: If the disk refuses (full, not writable); earlier checkpoints stay as they are.
        """
        final = self.folder / f"{progress.phase}-step_{progress.step:07d}"
        partial = final.with_name(final.name + PARTIAL)
        main = self.accelerator.is_main_process
        try:
            if main:
                for leftover in self.folder.glob(f"*{PARTIAL}"):
                    shutil.rmtree(leftover)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()
            if main:
                record = {"run": self.run, "progress": vars(progress)}
                (partial / PROGRESS_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
                if final.exists():
                    _discard(final)
                partial.rename(final)
                for old in self._found(progress.phase)[: -self.keep]:
                    _discard(old)
        except (OSError, RuntimeError) as err:
            raise CheckpointError(
                f"no checkpoint could be written to '{final}': {err}; earlier checkpoints are untouched. "
                f"Make room or choose another `--output_dir`, then go on with `--resume_from_checkpoint latest`"
            ) from err
        self.accelerator.wait_for_everyone()

    def restore(self, phase: str) -> Progress:
        """Load the latest checkpoint of a phase, or return the start of it if there is none or none is wanted.

        Raises:
            CheckpointError: If it cannot be read or is of another run.
        """
        found = self._found(phase) if self.resume else []
        if not found:
            return Progress(phase)
        record = self.read_record(found[-1])
        try:
            self.accelerator.load_state(str(found[-1]))
            return Progress(**record["progress"])
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as err:
            raise CheckpointError(
                f"the checkpoint '{found[-1]}' cannot be loaded ({err}); delete that folder to go on from the one "
                f"before it"
            ) from err

    def check(self) -> None:
        """Check, before any work, that there is something to resume from and that it is of this run.

        Raises:
            CheckpointError: If not.
        """
        if not self.resume:
            return
        found = self._found("*")
        if not found:
            raise CheckpointError(
                f"`--resume_from_checkpoint` needs a checkpoint in '{self.folder}', but there is none; start "
                f"without it, with `--checkpointing_steps`"
            )
        for path in found:
            self.read_record(path)

    def read_record(self, path: Path) -> dict[str, Any]:
        """Return the record of a checkpoint after checking that it belongs to this run.

        Raises:
            CheckpointError: If it is unreadable or its settings differ, with the settings that do.
        """
        try:
            record = json.loads((path / PROGRESS_FILE).read_text(encoding="utf-8"))
            run = record["run"]
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise CheckpointError(f"'{path}' is no checkpoint of hf_prune ({err})") from err
        differing = [
            f"{key} was {run.get(key)!r} and is {self.run.get(key)!r}"
            for key in sorted({*run, *self.run})
            if run.get(key) != self.run.get(key)
        ]
        if differing:
            raise CheckpointError(
                f"the checkpoint '{path}' belongs to another run: {'; '.join(differing)}; start with the same "
                f"settings, or without `--resume_from_checkpoint`"
            )
        return record

    def _found(self, phase: str) -> list[Path]:
        """Return the complete checkpoints of a phase, oldest first."""
        paths = self.folder.glob(f"{phase}-step_*")
        return sorted((path for path in paths if path.suffix != PARTIAL), key=lambda path: path.name[-7:])


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name first, so a run killed in the middle leaves nothing that looks whole."""
    leftover = checkpoint.with_name(f"{checkpoint.name}.old{PARTIAL}")
    checkpoint.rename(leftover)
    shutil.rmtree(leftover)
