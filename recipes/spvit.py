"""Latency-aware soft token pruning (SPViT) of a vision transformer.

Expect  without arguments: the handwritten digits inside scikit-learn and a small ViT trained on the spot, a few minutes
        on two CPU cores (benchmarks/spvit.py measures it). On ImageNet: not measured yet.
Run     accelerate launch recipes/spvit.py
        accelerate launch recipes/spvit.py --model_name_or_path facebook/deit-small-patch16-224 \
            --dataset_name imagenet-1k --target_latency 0.6 --output_dir outputs/deit-small-spvit
Source  Kong et al., SPViT: Enabling Faster Vision Transformers via Latency-Aware Soft Token Pruning,
        ECCV 2022, arXiv 2112.13890.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from typing import cast

from accelerate.utils import broadcast_object_list
from torch import nn

from hf_prune.errors import HfPruneError, RecipeError
from hf_prune.measure.evidence import TargetShare
from hf_prune.measure.token_cost import TokenCost
from hf_prune.measure.token_table import TokenTable
from hf_prune.recipe.job import Job, open_job
from hf_prune.recipe.settings import parse
from hf_prune.recipe.tokens import (
    TokenSettings,
    finish,
    measured_on_table,
    new_student,
    open_table,
    require_one_grid,
    target_share,
    train_selectors,
)
from hf_prune.tokens.attach import add_token_pruning, token_pruning_of
from hf_prune.tokens.calibrate import calibrate_thresholds
from hf_prune.tokens.config import Packages, TokenPruningConfig
from hf_prune.tokens.constraint import keep_constraint, latency_constraint
from hf_prune.tokens.fit import fit_to_target
from hf_prune.tokens.insertion import Trial, insert_from_the_back, merge_similar, spend_room
from hf_prune.tokens.schedule import even_stages, keep_ratios_for, target_ms
from hf_prune.tokens.site import find_site

# A small ViT trained from nothing on 1,257 digits wants other settings than a pretrained one on ImageNet.
EMBEDDED_SETTINGS = {
    "target_latency": 0.85,
    "num_stages": 2,
    "dense_epochs": 24.0,
    "dense_learning_rate": 2e-3,
    "num_train_epochs": 10.0,
    "learning_rate": 1.5e-3,
    "backbone_lr_share": 0.3,
    "per_device_train_batch_size": 32,
    "augmentation": "gentle",
    "output_dir": "outputs/spvit-digits",
}


@dataclass(frozen=True)
class Settings(TokenSettings):
    """What SPViT adds to the settings of recipes on tokens."""

    target_latency: float = field(
        default=0.6, metadata={"help": "At most 1: fraction of the dense latency. Above: milliseconds per batch."}
    )
    block_to_stage: bool = field(
        default=False, metadata={"help": "Find the selectors' places by inserting them from the last block on."}
    )
    insertion_epochs: float = field(default=1.0, metadata={"help": "Training after each insertion."})
    insertion_max_drop: float = field(
        default=0.005, metadata={"help": "Validation accuracy that an inserted selector may cost, 0 to 1."}
    )
    selector_heads: int | None = field(default=None, metadata={"help": "Default: the attention heads of the model."})
    share_head_mlp: bool = field(default=False, metadata={"help": "One scoring MLP for all heads, as released."})
    released_mlp1: bool = field(default=False, metadata={"help": "First MLP of the released code, not the paper's."})
    packages: str = field(
        default="single", metadata={"help": "single or per_stage.", "choices": ["single", "per_stage"]}
    )
    output_dir: str = "outputs/spvit"

    def check(self) -> None:
        """See `RecipeSettings.check`."""
        super().check()
        if self.block_to_stage and (self.keep_ratios or self.before_blocks or self.packages == "per_stage"):
            raise RecipeError(
                "`--block_to_stage` finds places and keep ratios itself, for a single package: leave "
                "`--keep_ratios`, `--before_blocks` and `--packages per_stage` out"
            )


def main(settings: Settings) -> None:
    """Prune a dense model to a latency target and publish it."""
    job = open_job(settings, name="hf_prune_spvit", check_model=require_one_grid)
    table = open_table(job, selector_making(job))
    making = choose_keep_ratios(job, table.cost())
    started = time.perf_counter()
    job.train_dense()
    pruned = find_stages(job, making, table.cost()) if settings.block_to_stage else insert_stages(job, making)
    pruned = prune_tokens(job, pruned)
    train_seconds = time.perf_counter() - started

    finish(job, pruned, fit_latency(job, pruned, table), train_seconds=train_seconds)


def selector_making(job: Job[Settings]) -> TokenPruningConfig:
    """Return where the selectors go and what they are like, before their keep ratios are known."""
    settings, site = job.settings, find_site(job.dense.model)
    if settings.block_to_stage:
        blocks = tuple(range(1, site.depth))
    else:
        num_stages = settings.num_stages if settings.keep_ratios is None else len(settings.keep_ratios)
        blocks = settings.before_blocks or even_stages(site.depth, num_stages)
    return TokenPruningConfig(
        before_blocks=tuple(blocks),
        keep_ratios=tuple(settings.keep_ratios or [1.0] * len(blocks)),
        num_heads=settings.selector_heads or site.num_heads,
        share_head_mlp=settings.share_head_mlp,
        paper_mlp1=not settings.released_mlp1,
        packages=cast(Packages, settings.packages),
    )


def choose_keep_ratios(job: Job[Settings], cost: TokenCost) -> TokenPruningConfig:
    """Turn the latency target into keep ratios by the table, unless they are given."""
    making, settings = selector_making(job), job.settings
    if settings.keep_ratios is not None:
        return making
    target = target_ms(settings.target_latency, cost.dense)
    if settings.block_to_stage:
        # Places are found later; what no selector can reach is refused now.
        keep_ratios_for(cost, target, (1,))
        return making
    return dataclasses.replace(making, keep_ratios=keep_ratios_for(cost, target, making.before_blocks))


def insert_stages(job: Job[Settings], making: TokenPruningConfig) -> nn.Module:
    """Put selectors at fixed places into a copy of the dense model."""
    student = new_student(job)
    add_token_pruning(student, making)
    return student


def find_stages(job: Job[Settings], making: TokenPruningConfig, cost: TokenCost) -> nn.Module:
    """Block-to-stage training: insert selectors from the last block on, then keep one a stage."""
    settings, dense, student = job.settings, job.dense.model, new_student(job)
    target = target_ms(settings.target_latency, cost.dense)

    def try_block(blocks: tuple[int, ...]) -> Trial:
        if len(blocks) == 1:
            add_token_pruning(student, dataclasses.replace(making, before_blocks=blocks, keep_ratios=(0.95,)))
        else:
            token_pruning_of(student).insert_first(blocks[0])
        train_selectors(
            job,
            f"insert_{blocks[0]:02d}",
            student,
            latency_constraint(cost, target, blocks, weight=settings.ratio_weight, rate=settings.ratio_multiplier_rate),
            epochs=settings.insertion_epochs,
            seed=settings.seed + 1 + len(blocks),
        )
        accuracy = job.evaluate(student, "validation")
        kept = accuracy.kept.mean(0) / cost.num_patches
        job.run.say(
            f"selectors before blocks {blocks}: {accuracy.top1:.2%}, alive {[round(k, 2) for k in kept.tolist()]}"
        )
        return Trial(accuracy.top1, tuple(kept.tolist()))

    stages = insert_from_the_back(
        try_block,
        cost,
        target,
        depth=find_site(dense).depth,
        dense_top1=job.evaluate(dense, "validation").top1,
        max_drop=settings.insertion_max_drop,
    )
    stages = spend_room(merge_similar(stages), cost, target)
    token_pruning_of(student).keep_selectors(stages.before_blocks, stages.keep_ratios)
    ratios = ", ".join(f"{ratio:.3f}" for ratio in stages.keep_ratios)
    job.run.say(f"stages: before blocks {stages.before_blocks}, keep ratios {ratios}")
    return student


def prune_tokens(job: Job[Settings], student: nn.Module) -> nn.Module:
    """Train selectors and backbone until every selector keeps its share."""
    settings = job.settings
    constraint = keep_constraint(
        token_pruning_of(student).settings.keep_ratios,
        weight=settings.ratio_weight,
        rate=settings.ratio_multiplier_rate,
    )
    pruned = train_selectors(
        job,
        "spvit",
        student,
        constraint,
        epochs=settings.num_train_epochs,
        max_steps=settings.max_train_steps,
        seed=settings.seed + 1,
    )
    return pruned.eval()


def fit_latency(job: Job[Settings], pruned: nn.Module, table: TokenTable) -> TargetShare | None:
    """Set thresholds for the keep ratios, shifting them until the latency on validation images is the target."""
    settings, batches = job.settings, job.calibration_batches()
    if settings.keep_ratios is not None:
        calibrate_thresholds(pruned, batches, settings.keep_ratios)
        return None
    cost, pruning = table.cost(), token_pruning_of(pruned)
    wanted_ms = target_ms(settings.target_latency, cost.dense)
    fit_to_target(
        pruning,
        cost,
        wanted_ms,
        calibrate=lambda ratios: calibrate_thresholds(pruned, batches, ratios),
        measure=lambda: cast(float, broadcast_object_list([measured_on_table(job, pruned, table)])[0]),
    )
    return target_share(table, pruning.settings, wanted_ms)


if __name__ == "__main__":
    try:
        main(parse(Settings, sys.argv[1:], description=__doc__, embedded=EMBEDDED_SETTINGS))
    except HfPruneError as err:
        sys.exit(f"{type(err).__name__}: {err}")
