"""What recipes that drop or merge tokens share: settings, places and counts, the target, the student, the end."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from hf_prune.errors import RecipeError, UnsupportedModelError
from hf_prune.files import write_whole
from hf_prune.measure.evidence import TargetShare, latency_ratio, time_models
from hf_prune.measure.report import print_report
from hf_prune.measure.token_cost import BlockProbe
from hf_prune.measure.token_table import TokenTable, measure_token_table, table_setting
from hf_prune.publish.run_folder import Evidence, publish_run
from hf_prune.recipe.job import Job
from hf_prune.recipe.settings import RecipeSettings
from hf_prune.recover.objectives import PruneTokens
from hf_prune.recover.rates import TwoRates, freeze_positions
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.constraint import Constraint
from hf_prune.tokens.site import find_site

TABLE = "latency_table.json"


@dataclass(frozen=True)
class TokenSettings(RecipeSettings):
    """What recipes on tokens add to the settings of every recipe."""

    latency_batch_size: int = field(default=32, metadata={"help": "Images in a batch, for table and target."})
    latency_table: str | None = field(default=None, metadata={"help": "Use this table instead of measuring one."})
    keep_ratios: list[float] | None = field(
        default=None, metadata={"help": "Patches alive after each reduction, instead of a target."}
    )
    num_stages: int = field(default=3, metadata={"help": "Reductions, evenly spread, where nothing else says."})
    before_blocks: list[int] | None = field(default=None, metadata={"help": "Places of the reductions."})
    backbone_lr_share: float = field(
        default=0.01, metadata={"help": "Cap of the backbone's rate, of --learning_rate, while selectors learn."}
    )
    ratio_weight: float = field(default=2.0, metadata={"help": "Weight of the quadratic keep-ratio loss of selectors."})
    ratio_multiplier_rate: float = field(
        default=0.05, metadata={"help": "Step of its multipliers; 0 is the papers' loss."}
    )

    def check(self) -> None:
        """See `RecipeSettings.check`."""
        super().check()
        if self.keep_ratios is not None and self.latency_table is not None:
            raise RecipeError("give `--keep_ratios` or `--latency_table`, not both: one decides what the other would")


T = TypeVar("T", bound=TokenSettings)


def require_one_grid(model: nn.Module) -> None:
    """Check that a recipe on tokens knows a model.

    Raises:
        UnsupportedModelError: If it is no plain vision transformer, or has several grids of tokens.
    """
    stacks = find_site(model).stacks
    if len(stacks) > 1:
        raise UnsupportedModelError(
            f"recipes on tokens need a model with one grid of tokens, and {type(model).__name__} has {len(stacks)}; "
            f"use `add_token_pruning` with keep ratios of your own"
        )


def open_table(job: Job[T], making: TokenPruningConfig) -> TokenTable:
    """Read the given latency table, or the one a resumed run began with, or measure one."""
    settings, run, dense = job.settings, job.run, job.dense.model
    path = run.output_dir / TABLE
    pixels = job.pool("train", settings.latency_batch_size).batch(0, settings.latency_batch_size)
    if run.is_main and not (settings.resume_from_checkpoint and path.is_file()):
        if settings.latency_table is not None:
            table = TokenTable.read(Path(settings.latency_table))
            table.require_same_setting(table_setting(BlockProbe(dense, pixels, making)))
        else:
            run.say(f"measuring a latency table at batch {settings.latency_batch_size} ...")
            table = measure_token_table(dense, pixels, making)
        table.write(path)
    run.accelerator.wait_for_everyone()
    return TokenTable.read(path)


def decide_once(job: Job[T], decide: Callable[[], TokenPruningConfig]) -> TokenPruningConfig:
    """Let the main process decide and keep it as `tokens.json`, which all processes and a resumed run read."""
    settings, path = job.settings, job.run.output_dir / "tokens.json"
    if job.run.is_main and not (settings.resume_from_checkpoint and path.is_file()):
        write_whole(path, json.dumps(decide().to_dict(), indent=1) + "\n")
    job.run.accelerator.wait_for_everyone()
    return TokenPruningConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))


def measured_on_table(job: Job[T], pruned: nn.Module, table: TokenTable) -> float:
    """Return a latency on the scale of a table: the ratio measured on validation images times the table's dense one."""
    times = time_models({"dense": job.dense.model, "pruned": pruned}, job.pool("validation"), table.batch_size)
    return latency_ratio(times) * table.cost().dense


def target_share(table: TokenTable, tokens: TokenPruningConfig, wanted_ms: float) -> TargetShare:
    """Return the latency that was asked for and that a table promises, as shares of dense."""
    cost = table.cost()
    predicted_ms = float(cost.of_kept(torch.tensor(tokens.keep_ratios) * cost.num_patches, tokens.before_blocks))
    return TargetShare(wanted_ms / cost.dense, predicted_ms / cost.dense)


def new_student(job: Job[T]) -> nn.Module:
    """Return a trainable copy of the dense model; what is added to it will start as the seed says."""
    student = copy.deepcopy(job.dense.model).requires_grad_(True)
    freeze_positions(student)
    torch.manual_seed(job.settings.seed)
    return student


def train_selectors(
    job: Job[T],
    phase: str,
    student: nn.Module,
    constraint: Constraint,
    *,
    epochs: float,
    seed: int,
    max_steps: int | None = None,
) -> nn.Module:
    """Train a model whose selectors learn, against its dense teacher under a constraint."""
    rates = TwoRates(backbone_share=job.settings.backbone_lr_share)
    objective = PruneTokens(
        job.dense.model,
        constraint,
        job.run.accelerator,
        job.settings.seed,
        label_smoothing=job.settings.label_smoothing,
    )
    return job.train(
        phase,
        student,
        objective,
        {"token_pruning": rates.selector, "": rates.backbone},
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=job.learning_rate,
        seed=seed,
    )


def finish(job: Job[T], pruned: nn.Module, target: TargetShare | None, *, train_seconds: float) -> None:
    """Score dense and pruned on the test split, publish the folder, print the report, push where that was asked for."""
    settings = job.settings
    evidence = Evidence(
        dense=job.dense,
        pruned=pruned,
        pool=job.pool("test"),
        dense_accuracy=job.evaluate(job.dense.model, "test", "dense"),
        pruned_accuracy=job.evaluate(pruned, "test", "pruned"),
        target=target,
        batch_sizes=tuple(dict.fromkeys((1, settings.latency_batch_size))),
        train_seconds=train_seconds,
    )
    if job.run.is_main:
        print_report(publish_run(job.run, evidence, job.splits, seed=settings.seed))
        job.push()
    job.run.accelerator.end_training()
