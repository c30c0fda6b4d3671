"""The start of a run: processes, output folder, seeds; everything that can be refused is refused here."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from hf_prune.errors import RecipeError


@dataclass(frozen=True)
class Run:
    """A run that may begin.

    Attributes:
        accelerator: Devices, processes, precision, trackers.
        output_dir: Exists and can be written to.
        command: What was typed, for the card.
    """

    accelerator: Accelerator
    output_dir: Path
    command: str

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.accelerator.is_main_process

    def say(self, message: str) -> None:
        """Print a line on the main process."""
        self.accelerator.print(message)


def start_run(
    output_dir: str,
    *,
    seed: int,
    resume: bool = False,
    overwrite: bool = False,
    expected_processes: int | None = None,
    gradient_accumulation_steps: int = 1,
    mixed_precision: str | None = None,
    tracker: str | None = None,
) -> Run:
    """Open the output folder and the accelerator.

    Args:
        output_dir: Created if missing; must be empty unless resuming or overwriting.
        seed: Seeds every library; training draws from it step by step.
        resume: The folder holds an interrupted run to go on with.
        overwrite: Write into a folder that is not empty.
        expected_processes: Processes the launch command was meant to start. `accelerate launch --cpu --num_processes 2`
            starts one and says nothing; with this set, the run says so and stops.
        gradient_accumulation_steps: Batches an optimiser step.
        mixed_precision: `no`, `fp16` or `bf16`; None leaves it to `accelerate config`.
        tracker: Where to log to (`tensorboard`, `wandb`, `trackio`, `all` ...), or None.

    Raises:
        RecipeError: If the folder cannot be used, the processes are not as expected, or the tracker is missing.
    """
    folder = Path(output_dir)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=gradient_accumulation_steps,
            mixed_precision=mixed_precision,
            log_with=tracker,
            project_dir=str(folder),
        )
    except (ValueError, ImportError) as err:
        raise RecipeError(f"the run cannot start: {err}") from err
    if expected_processes is not None and accelerator.num_processes != expected_processes:
        raise RecipeError(
            f"`--expected_processes` is {expected_processes}, but the launch command started "
            f"{accelerator.num_processes}; on CPUs use `ACCELERATE_USE_CPU=true torchrun --nproc_per_node "
            f"{expected_processes} recipes/...`, because `accelerate launch --cpu` starts a single process"
        )
    # The main process creates the folder; the others must not find it "not empty" because of that.
    if accelerator.is_main_process:
        _open_folder(folder, may_hold_files=resume or overwrite)
    accelerator.wait_for_everyone()
    set_seed(seed)
    command = " ".join(
        ["accelerate launch", *(os.path.relpath(arg) if i == 0 else arg for i, arg in enumerate(sys.argv))]
    )
    return Run(accelerator, folder, command)


def _open_folder(folder: Path, *, may_hold_files: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
        held = sorted(path.name for path in folder.iterdir())
    except OSError as err:
        raise RecipeError(f"`--output_dir` must be a folder that can be written to, got '{folder}': {err}") from err
    if held and not may_hold_files:
        raise RecipeError(
            f"`--output_dir` must be empty, but '{folder}' holds {', '.join(held[:5])}; choose another one, "
            f"continue with `--resume_from_checkpoint latest`, or add `--overwrite_output_dir`"
        )


def use_all_threads(num_threads: int | None) -> int:
    """Set torch's CPU threads, which launchers lower to one, and return how many there are.

    Args:
        num_threads: None takes every core this process may run on, shared out among local processes.
    """
    if num_threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_threads = max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    torch.set_num_threads(num_threads)
    return num_threads
