"""The training loop: one phase of training under accelerate, resumable to the bit."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_prune.errors import RecipeError
from hf_prune.recover.checkpoints import Checkpoints, Progress
from hf_prune.recover.rates import Shape, adamw, set_learning_rates


class Objective(Protocol):
    """What a phase minimises; may keep state of its own between steps."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor], *, batch_number: int) -> Tensor:
        """Return the loss of one batch; `model` is the prepared one, `batch_number` counts all batches so far."""
        ...

    def before_step(self, progress: float) -> None:
        """Look at the gradients of a step, or add to them; `progress` is the share of the phase done with this step."""
        ...

    def after_step(self) -> dict[str, float]:
        """React to an optimiser step and return numbers worth logging."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-ready."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        ...


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """How long and how fast to train.

    Attributes:
        epochs: Passes over the data; ignored where `max_steps` is set.
        max_steps: Optimiser steps; needed for streamed data, whose length nobody knows.
        learning_rate: Of the group whose shape is 1.
        weight_decay: Of matrices.
        shapes: See `adamw`.
        seed: Together with a batch's number it determines every random draw of a step.
        max_grad_norm: Clip gradients to this norm; None does not.
        logging_steps: Optimiser steps between two lines of the log.
    """

    epochs: float
    learning_rate: float
    weight_decay: float
    shapes: dict[str, Shape]
    seed: int
    max_steps: int | None = None
    max_grad_norm: float | None = None
    logging_steps: int = 10


def train_phase(
    phase: str,
    model: nn.Module,
    objective: Objective,
    loader: DataLoader,
    settings: PhaseSettings,
    *,
    accelerator: Accelerator,
    checkpoints: Checkpoints,
    log_path: Path,
) -> nn.Module:
    """Train a model in place and return it, unwrapped.

    A phase that a checkpoint marks as finished is loaded instead of trained. Whatever a step draws at random depends
    on the seed and the number of the batch, never on what ran before, so a resumed run
    ends with the weights of an uninterrupted one.

    Args:
        phase: Names checkpoints and log lines.
        model: Dense or token-pruned model.
        objective: What to minimise.
        loader: Not yet prepared batches with `pixel_values`, `labels`, `unreadable`.
        settings: Length and learning rates.
        accelerator: Devices, precision, accumulation, trackers.
        checkpoints: Where to resume from and to write to.
        log_path: JSON lines, one every `logging_steps`.

    Raises:
        RecipeError: If the loss is no longer finite, or streamed data come without `max_steps`.
    """
    optimizer = adamw(model, settings.shapes, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    progress = checkpoints.restore(phase)
    if progress.extra:
        objective.load_state_dict(progress.extra)
    num_steps, batches_per_epoch = _length(loader, accelerator, settings)
    bar = tqdm(total=num_steps, initial=progress.step, desc=phase, disable=not accelerator.is_main_process, unit="step")
    every = checkpoints.every if checkpoints.every != 0 else math.ceil(num_steps / max(settings.epochs, 1))
    prepared.train()
    while progress.step < num_steps and not progress.finished:
        for batch in _epoch_batches(loader, progress, accelerator):
            batch_number = progress.epoch * batches_per_epoch + progress.batch
            torch.manual_seed(hash((settings.seed, batch_number, accelerator.process_index)) % 2**63)
            with accelerator.accumulate(prepared):
                set_learning_rates(
                    optimizer,
                    settings.shapes,
                    learning_rate=settings.learning_rate,
                    progress=progress.step / num_steps,
                )
                with accelerator.autocast():
                    loss = objective.loss(prepared, batch, batch_number=batch_number)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    _finish_gradients(prepared, settings.max_grad_norm, accelerator)
                    objective.before_step((progress.step + 1) / num_steps)
                optimizer.step()
                optimizer.zero_grad()
            progress.batch += 1
            if not accelerator.sync_gradients:
                continue
            progress.step += 1
            bar.update()
            logs = objective.after_step()
            if progress.step % settings.logging_steps == 0 or progress.step == num_steps:
                _log(phase, progress.step, loss, logs, accelerator, bar, log_path)
            if every is not None and progress.step % every == 0 and progress.step < num_steps:
                progress.extra = objective.state_dict()
                checkpoints.save(progress)
            if progress.step == num_steps:
                break
        else:
            progress.epoch, progress.batch = progress.epoch + 1, 0
    bar.close()
    if every is not None and not progress.finished:
        progress.finished, progress.extra = True, objective.state_dict()
        checkpoints.save(progress)
    model = accelerator.unwrap_model(prepared, keep_torch_compile=False)
    accelerator.free_memory()
    return model


def _length(loader: Any, accelerator: Accelerator, settings: PhaseSettings) -> tuple[int, int]:
    """Return optimiser steps in all and batches of an epoch; streamed data count as one endless epoch."""
    try:
        batches = len(loader)
    except TypeError:
        if settings.max_steps is None:
            raise RecipeError("streamed data have no length: say how long to train with `--max_train_steps`") from None
        return settings.max_steps, 10**9
    steps = math.ceil(batches / accelerator.gradient_accumulation_steps)
    return settings.max_steps or math.ceil(settings.epochs * steps), batches


def _epoch_batches(loader: Any, progress: Progress, accelerator: Accelerator) -> Iterator[dict[str, Tensor]]:
    """Return the batches of the epoch in progress that are still to come."""
    loader.set_epoch(progress.epoch)
    if progress.batch:
        loader = accelerator.skip_first_batches(loader, progress.batch)
    return iter(loader)


def _finish_gradients(model: nn.Module, max_norm: float | None, accelerator: Accelerator) -> None:
    """Give gradients their true scale, and clip them where that is wanted."""
    if max_norm is None:
        accelerator.unscale_gradients()
    else:
        # Takes the loss scale off by itself, which may be done once a step.
        accelerator.clip_grad_norm_(model.parameters(), max_norm)


def _log(
    phase: str, step: int, loss: Tensor, logs: dict[str, float], accelerator: Accelerator, bar: Any, path: Path
) -> None:
    """Show, track and write the mean loss over processes and the objective's own numbers."""
    mean_loss = cast(Tensor, accelerator.reduce(loss.detach().float(), reduction="mean")).item()
    if not math.isfinite(mean_loss):
        raise RecipeError(
            f"the loss of '{phase}' is {mean_loss} at step {step}: lower `--learning_rate`, or turn mixed precision off"
        )
    numbers = {"loss": mean_loss, **logs}
    bar.set_postfix({name: f"{value:.3g}" for name, value in numbers.items()})
    accelerator.log({f"{phase}/{name}": value for name, value in numbers.items()}, step=step)
    if accelerator.is_main_process:
        with path.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"phase": phase, "step": step, **numbers}) + "\n")
