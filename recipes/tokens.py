"""Fewer tokens in a vision transformer, merged or dropped, by any method but SPViT (which is recipes/spvit.py).

Expect  without arguments: EViT at 60% of the MACs, on the handwritten digits inside scikit-learn and a small ViT
        trained on the spot, a few minutes on two CPU cores. On ImageNet: not measured.
Run     accelerate launch recipes/tokens.py
        accelerate launch recipes/tokens.py --method tome --schedule blocks --target_latency 0.7 \
            --model_name_or_path facebook/deit-small-patch16-224 --dataset_name imagenet-1k \
            --output_dir outputs/deit-small-tome
Source  --method tome: Bolya et al., ICLR 2023; pitome: Tran et al., NeurIPS 2024; evit: Liang et al., ICLR 2022;
        dynamicvit: Rao et al., NeurIPS 2021; diffrate: Chen et al., ICCV 2023; class_attention, random: baselines.
"""

import copy
import sys
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from hf_prune.errors import HfPruneError, RecipeError
from hf_prune.measure.evidence import TargetShare
from hf_prune.measure.token_cost import TokenCost, count_macs, macs_cost
from hf_prune.measure.token_table import TokenTable
from hf_prune.recipe.job import Job, open_job
from hf_prune.recipe.settings import parse
from hf_prune.recipe.tokens import (
    TokenSettings,
    decide_once,
    finish,
    measured_on_table,
    new_student,
    open_table,
    require_one_grid,
    target_share,
    train_selectors,
)
from hf_prune.recover.objectives import Recover
from hf_prune.recover.rates import warmup_cosine
from hf_prune.tokens.attach import add_token_pruning
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.constraint import keep_constraint
from hf_prune.tokens.fit import fit_to_target
from hf_prune.tokens.rate_search import search_rates
from hf_prune.tokens.reducers.registry import REDUCERS, reducer_class
from hf_prune.tokens.schedule import even_stages, even_steps_for, keep_ratios_for, macs_target, target_ms
from hf_prune.tokens.site import find_site

METHODS = [name for name in REDUCERS if name != "spvit"]
SCHEDULES = {"stages": keep_ratios_for, "blocks": even_steps_for}
TARGETS = ("keep_ratios", "target_macs", "target_latency")
# Kept by every reduction before the ratios are known: those that have nothing to do cost nothing.
USUAL_KEEP = 0.7

# A small ViT trained from nothing on 1,257 digits wants other settings than a pretrained one on ImageNet.
EMBEDDED_SETTINGS = {
    "dense_epochs": 24.0,
    "dense_learning_rate": 2e-3,
    "num_train_epochs": 4.0,
    "learning_rate": 5e-4,
    "backbone_lr_share": 0.3,
    "per_device_train_batch_size": 32,
    "augmentation": "gentle",
    "output_dir": "outputs/tokens-digits",
}


@dataclass(frozen=True)
class Settings(TokenSettings):
    """What this recipe adds to the settings of recipes on tokens."""

    method: str = field(default="evit", metadata={"help": "What makes tokens fewer.", "choices": METHODS})
    target_macs: float | None = field(default=None, metadata={"help": "At most 1: fraction of dense. Default: 0.6."})
    target_latency: float | None = field(
        default=None, metadata={"help": "At most 1: fraction of the dense latency. Above: milliseconds per batch."}
    )
    schedule: str = field(
        default="stages",
        metadata={
            "help": "stages: a few, each keeping the same share of what it sees. blocks: before every block but the "
            "first, each taking away as many tokens.",
            "choices": [*SCHEDULES],
        },
    )
    num_train_epochs: float = field(default=0.0, metadata={"help": "Training with fewer tokens; 0 trains nothing."})
    distill_weight: float = field(default=1.0, metadata={"help": "Of the dense model's logits in the loss."})
    search_steps: int = field(default=300, metadata={"help": "diffrate: batches to learn the schedule from."})
    calibration_images: int = field(default=512, metadata={"help": "diffrate: images to learn the schedule from."})
    output_dir: str = "outputs/tokens"

    def check(self) -> None:
        """See `RecipeSettings.check`."""
        super().check()
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"give one of `--{'`, `--'.join(TARGETS)}`, got {' and '.join(given)}")
        if self.method == "diffrate" and given not in ([], ["target_macs"]):
            raise RecipeError(f"'diffrate' learns its counts for MACs: give `--target_macs`, not `--{given[0]}`")
        if self.latency_table is not None and self.target_latency is None:
            raise RecipeError("`--latency_table` is for a `--target_latency`")
        if self.learns and not self.trains:
            raise RecipeError(f"'{self.method}' must learn which tokens to keep: add `--num_train_epochs 30`, say")

    @property
    def learns(self) -> bool:
        """Whether the method has parameters."""
        return reducer_class(self.method).learned

    @property
    def trains(self) -> bool:
        """Whether there is any training with fewer tokens."""
        return bool(self.num_train_epochs or self.max_train_steps)


def main(settings: Settings) -> None:
    """Give a dense model fewer tokens, within a budget, and publish it."""
    job = open_job(settings, name="hf_prune_tokens", check_model=require_one_grid)
    making = places(job)
    table = None if settings.target_latency is None else open_table(job, making)
    if settings.method == "diffrate":
        refuse_unreachable(job, making)
    else:  # before any training: counts do not depend on weights
        making = decide_once(job, lambda: choose_counts(job, making, table))
    started = time.perf_counter()
    job.train_dense()
    if settings.method == "diffrate":
        making = decide_once(job, lambda: learn_counts(job, making))
    student = new_student(job)
    add_token_pruning(student, making)
    pruned = train(job, student, making) if settings.trains else student
    finish(job, pruned.eval(), shares(job, making, table), train_seconds=time.perf_counter() - started)


def places(job: Job[Settings]) -> TokenPruningConfig:
    """Return where reductions go, with keep ratios that are given, or stand in for those to be found."""
    settings, depth = job.settings, find_site(job.dense.model).depth
    if settings.before_blocks:
        blocks = tuple(settings.before_blocks)
    elif settings.schedule == "blocks" or settings.method == "diffrate":
        blocks = tuple(range(1, depth))
    else:
        blocks = even_stages(depth, len(settings.keep_ratios or []) or settings.num_stages)
    ratios = tuple(settings.keep_ratios or [USUAL_KEEP] * len(blocks))
    return TokenPruningConfig(method=settings.method, before_blocks=blocks, keep_ratios=ratios)


def choose_counts(job: Job[Settings], making: TokenPruningConfig, table: TokenTable | None) -> TokenPruningConfig:
    """Return keep ratios that meet the target, by what the model with so many tokens is counted or measured to cost."""
    settings, image = job.settings, one_image(job)
    trial = copy.deepcopy(job.dense.model).eval()
    if settings.keep_ratios is None:
        cost = macs_cost(trial, image, making) if table is None else table.cost()
        target = target_of(settings, cost)
        solve = partial(SCHEDULES[settings.schedule], cost, before_blocks=making.before_blocks)
        pruning = add_token_pruning(trial, with_ratios(making, solve(target)))
        fit_to_target(
            pruning,
            cost,
            target,
            calibrate=lambda _ratios: None,
            measure=lambda: count_macs(lambda: trial(image)) if table is None else measured_on_table(job, trial, table),
            solve=solve,
        )
        making = pruning.settings
    else:
        add_token_pruning(trial, making)
    with torch.no_grad():
        trial(image)  # what one reduction cannot do is refused here
    job.run.say(f"{making.method} before blocks {making.before_blocks}, keep ratios "
                f"{', '.join(f'{ratio:.3f}' for ratio in making.keep_ratios)}")  # fmt: skip
    return making


def target_of(settings: Settings, cost: TokenCost) -> float:
    """Return the target in the unit of the cost."""
    if settings.target_latency is not None:
        return target_ms(settings.target_latency, cost.dense)
    return macs_target(settings.target_macs or 0.6, cost.dense)


def refuse_unreachable(job: Job[Settings], making: TokenPruningConfig) -> None:
    """Check before any work that counts can be learned for the target."""
    cost = macs_cost(job.dense.model, one_image(job), making)
    keep_ratios_for(cost, target_of(job.settings, cost), making.before_blocks)


def learn_counts(job: Job[Settings], making: TokenPruningConfig) -> TokenPruningConfig:
    """Learn what every block drops and merges, on training images."""
    settings = job.settings
    pool = job.pool("train", settings.calibration_images)
    size = settings.per_device_train_batch_size
    job.run.say(f"learning what {len(making.before_blocks)} reductions drop and merge ...")
    return search_rates(
        job.dense.model,
        list(zip(pool.pixels.split(size), pool.labels.split(size), strict=True)),
        target_macs=settings.target_macs or 0.6,
        before_blocks=making.before_blocks,
        num_steps=settings.search_steps,
    )


def train(job: Job[Settings], student: nn.Module, making: TokenPruningConfig) -> nn.Module:
    """Train with fewer tokens: predictors under a constraint on what they keep, everything else as after any cut."""
    settings = job.settings
    if settings.learns:
        constraint = keep_constraint(
            making.keep_ratios, weight=settings.ratio_weight, rate=settings.ratio_multiplier_rate
        )
        return train_selectors(
            job,
            settings.method,
            student,
            constraint,
            epochs=settings.num_train_epochs,
            max_steps=settings.max_train_steps,
            seed=settings.seed + 1,
        )
    return job.train(
        settings.method,
        student,
        Recover(settings.label_smoothing, job.dense.model, settings.distill_weight),
        {"": warmup_cosine()},
        epochs=settings.num_train_epochs,
        max_steps=settings.max_train_steps,
        learning_rate=job.learning_rate,
        seed=settings.seed + 1,
        max_grad_norm=1.0,
    )


def shares(job: Job[Settings], making: TokenPruningConfig, table: TokenTable | None) -> TargetShare | None:
    """Return the latency that was asked for and predicted; None if something else was asked for."""
    if table is None:
        return None
    return target_share(table, making, target_of(job.settings, table.cost()))


def one_image(job: Job[Settings]) -> Tensor:
    """Return an image `(1, 3, H, W)`."""
    return job.pool("train", 1).batch(0, 1)


def with_ratios(making: TokenPruningConfig, ratios: tuple[float, ...]) -> TokenPruningConfig:
    """Return settings with other keep ratios."""
    return TokenPruningConfig(method=making.method, before_blocks=making.before_blocks, keep_ratios=ratios)


if __name__ == "__main__":
    try:
        main(parse(Settings, sys.argv[1:], description=__doc__, embedded=EMBEDDED_SETTINGS))
    except HfPruneError as err:
        sys.exit(f"{type(err).__name__}: {err}")
