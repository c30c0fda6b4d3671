"""Soft masking for cost-constrained channel pruning (SMCP): one training run that prunes and lets units come back.

Expect  without arguments: the handwritten digits inside scikit-learn and a small ResNet trained on the spot, masked to
        half its MACs while it trains on; a few minutes on two CPU cores. Accuracies, and ImageNet: not measured yet.
Run     accelerate launch recipes/smcp.py
        accelerate launch recipes/smcp.py --model_name_or_path timm/resnet50.a1_in1k --dataset_name imagenet-1k \
            --target_latency 0.5 --num_train_epochs 90 --rewire_steps 320 --output_dir outputs/resnet50-smcp
Source  Humble et al., Soft Masking for Cost-Constrained Channel Pruning, ECCV 2022, arXiv 2211.02206. Works on heads
        and MLP neurons of transformers as it does on channels. Differs: AdamW, and the dense model's logits beside the
        labels (`--distill_weight 0` leaves them out); the cost counts both sides of every layer, so that the cut model
        is within the budget; importance is first-order Taylor, which the published code does not take by default.
"""

import copy
import dataclasses
import sys
import time
from dataclasses import dataclass, field
from typing import cast, get_args

import hf_prune
from hf_prune.allocate.allocators import Problem
from hf_prune.allocate.budget import cost_of
from hf_prune.errors import HfPruneError
from hf_prune.models import embedded_resnet
from hf_prune.recipe.cut import Calibration, Cut, CutSettings, finish, limits_for, open_table, target_of
from hf_prune.recipe.job import Job, open_job
from hf_prune.recipe.settings import parse
from hf_prune.recover.norms import settle_norms
from hf_prune.recover.objectives import Recover
from hf_prune.recover.rates import warmup_cosine
from hf_prune.recover.soft_masking import NormScaling, Ramp, RewiringSchedule, SoftMasking, maskable
from hf_prune.surgery.masks import Mode

# A small ResNet trained from nothing on 1,257 digits wants other settings than a pretrained one on ImageNet.
EMBEDDED_SETTINGS = {
    "dense_epochs": 12.0,
    "dense_learning_rate": 3e-3,
    "num_train_epochs": 12.0,
    "learning_rate": 1e-3,
    "rewire_steps": 20,
    "per_device_train_batch_size": 32,
    "augmentation": "gentle",
    "output_dir": "outputs/smcp-digits",
}


@dataclass(frozen=True)
class Settings(CutSettings):
    """What SMCP adds to the settings of recipes that cut; `--criterion`, `--allocator`, `--steps` play no part."""

    mode: str = field(
        default="soft",
        metadata={
            "help": "Masked weights learn on, keep their values, or are zero for good.",
            "choices": get_args(Mode),
        },
    )
    rewire_steps: int = field(default=80, metadata={"help": "Optimiser steps between two decisions."})
    warmup_share: float = field(default=10 / 90, metadata={"help": "Of training, before the first decision."})
    cooldown_share: float = field(default=25 / 90, metadata={"help": "Of training, after the last one."})
    ramp: str = field(default="exp", metadata={"help": "How the ratio grows.", "choices": get_args(Ramp)})
    norm_scaling: str = field(
        default="none", metadata={"help": "Shrinks batch norms behind masks.", "choices": get_args(NormScaling)}
    )
    pruned_decay: float = field(default=2e-4, metadata={"help": "Weight decay of masked weights alone."})
    importance_ema: float = field(default=0.9, metadata={"help": "Share of the old average of importance."})
    output_dir: str = "outputs/smcp"

    def check(self) -> None:
        """See `RecipeSettings.check`."""
        super().check()
        _ = self.schedule  # raises where a number is out of range

    @property
    def schedule(self) -> RewiringSchedule:
        """When masks are decided anew."""
        return RewiringSchedule(
            every=self.rewire_steps,
            warmup_share=self.warmup_share,
            cooldown_share=self.cooldown_share,
            ramp=cast(Ramp, self.ramp),
        )


def main(settings: Settings) -> None:
    """Train a dense model on under masks until it is within the budget, cut what is masked, and publish it."""
    job = open_job(settings, name="hf_prune_smcp", embedded=embedded_resnet)
    started = time.perf_counter()
    job.train_dense()
    finish(job, "smcp", mask_and_cut(job), started=started)


def mask_and_cut(job: Job[Settings]) -> Cut:
    """Train a copy of the dense model under soft masks and cut it by the last of them."""
    settings, data = job.settings, Calibration.of(job)
    student = copy.deepcopy(job.dense.model).requires_grad_(True)
    graph = hf_prune.analyze(student, data.image)
    table = open_table(job, student, graph)
    limits = limits_for(settings, graph, table)
    axes = maskable(limits.choose(list(graph.axes.values())))
    objective = SoftMasking(
        student,
        graph,
        Recover(settings.label_smoothing, job.dense.model, settings.distill_weight),
        Problem(axes, {}, *cost_of(graph, settings.budget, table), limits),
        job.run.accelerator,
        mode=cast(Mode, settings.mode),
        schedule=settings.schedule,
        norm_scaling=cast(NormScaling, settings.norm_scaling),
        pruned_decay=settings.pruned_decay,
        ema=settings.importance_ema,
    )
    student = job.train(
        "smcp",
        student,
        objective,
        {"": warmup_cosine()},
        epochs=settings.num_train_epochs,
        max_steps=settings.max_train_steps,
        learning_rate=job.learning_rate,
        seed=settings.seed,
    )
    returned = sum(rewiring.num_returned for rewiring in objective.rewirings)
    job.run.say(f"{len(objective.rewirings)} decisions, {returned} units came back")
    how = {"method": "SMCP", "budget": f"{settings.budget.quantity} {settings.budget.value:g}", "masks": settings.mode}
    plan = dataclasses.replace(objective.finish(), how=how)
    hf_prune.apply_plan(student, plan, graph)
    settle_norms(student, data.batches)
    return Cut(student.eval(), None, target_of(settings, graph, plan, table))


if __name__ == "__main__":
    try:
        main(parse(Settings, sys.argv[1:], description=__doc__, embedded=EMBEDDED_SETTINGS))
    except HfPruneError as err:
        sys.exit(f"{type(err).__name__}: {err}")
