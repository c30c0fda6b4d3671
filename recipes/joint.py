"""Tokens, heads and MLP neurons of a vision transformer in one budget, and recover.

Expect  without arguments: the handwritten digits inside scikit-learn and a small ViT trained on the spot, cut to half
        its MACs by SPViT and a knapsack together; a few minutes on two CPU cores. On ImageNet: not measured.
Run     accelerate launch recipes/joint.py
        accelerate launch recipes/joint.py --model_name_or_path facebook/deit-small-patch16-224 \
            --dataset_name imagenet-1k --target_latency 0.5 --method evit --output_dir outputs/deit-small-joint
Source  tokens: Kong et al., SPViT, ECCV 2022, arXiv 2112.13890 (`--method spvit`), and those of the other methods
        (hf_prune/tokens/reducers); widths: Humble et al., Soft Masking for Cost-Constrained Channel Pruning, ECCV 2022
        (`--allocator knapsack`); scores: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019
        (`--criterion taylor`). That a schedule of tokens is chosen together with the widths, by measurement, is ours.
"""

import copy
import sys
import time
from dataclasses import dataclass, field
from typing import cast

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

import hf_prune
from hf_prune.allocate.allocators import ALLOCATORS
from hf_prune.allocate.joint_plan import JointPlan
from hf_prune.analyse.graph import AxisGraph
from hf_prune.errors import HfPruneError, RecipeError
from hf_prune.joint import KEEPS, apply_joint, plan_joint, reducers_for
from hf_prune.measure.accuracy import Accuracy
from hf_prune.measure.evidence import TargetShare, latency_ratio, time_models
from hf_prune.measure.joint_cost import CostOfTokens, joint_latency, joint_macs
from hf_prune.measure.latency_table import LatencyTable
from hf_prune.measure.token_cost import macs_cost
from hf_prune.measure.token_table import TokenTable, measure_token_table
from hf_prune.recipe.cut import Calibration, Cut, CutSettings, finish, open_table, train
from hf_prune.recipe.job import Job, open_job
from hf_prune.recipe.settings import parse
from hf_prune.recover.compensate import How
from hf_prune.recover.objectives import PruneTokens
from hf_prune.recover.rates import TwoRates
from hf_prune.tokens.attach import token_pruning_of
from hf_prune.tokens.calibrate import calibrate_thresholds
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.constraint import keep_constraint
from hf_prune.tokens.fit import fit_to_target
from hf_prune.tokens.reducers.registry import REDUCERS, reducer_class
from hf_prune.tokens.schedule import even_stages
from hf_prune.tokens.site import find_site

# A small ViT trained from nothing on 1,257 digits wants other settings than a pretrained one on ImageNet.
EMBEDDED_SETTINGS = {
    "num_stages": 2,
    "dense_epochs": 24.0,
    "dense_learning_rate": 2e-3,
    "num_train_epochs": 10.0,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 32,
    "augmentation": "gentle",
    "output_dir": "outputs/joint-digits",
}


@dataclass(frozen=True)
class Settings(CutSettings):
    """What this recipe decides beside what a cut does."""

    method: str = field(default="spvit", metadata={"help": "What makes tokens fewer.", "choices": [*REDUCERS]})
    num_stages: int = field(default=3, metadata={"help": "Reductions, evenly spread, where nothing else says."})
    before_blocks: list[int] | None = field(default=None, metadata={"help": "Places of the reductions."})
    keeps: list[float] = field(
        default_factory=lambda: [*KEEPS],
        metadata={"help": "Schedules to try: each reduction keeps this share of what it sees; 1 keeps all tokens."},
    )
    allocator: str = field(
        default="knapsack", metadata={"help": "Shares out what tokens leave.", "choices": [*ALLOCATORS]}
    )
    kinds: list[str] = field(
        default_factory=lambda: ["heads", "mlp"], metadata={"help": "Kinds of axes inside blocks that may be cut."}
    )
    ratio_weight: float = field(default=2.0, metadata={"help": "Weight of the quadratic keep-ratio loss."})
    ratio_multiplier_rate: float = field(default=0.05, metadata={"help": "Step of its multipliers."})
    output_dir: str = "outputs/joint"

    def check(self) -> None:
        """See `RecipeSettings.check`."""
        super().check()
        if self.target_params is not None:
            raise RecipeError("parameters do not become fewer with tokens: give `--target_macs` or `--target_latency`")
        if self.steps > 1:
            raise RecipeError("`--steps` is for recipes that cut alone: tokens and widths are decided once")


def main(settings: Settings) -> None:
    """Decide on tokens and widths together, cut, recover, and publish."""
    job = open_job(settings, name="hf_prune_joint", check_model=find_site)
    started = time.perf_counter()
    job.train_dense()
    data = Calibration.of(job)
    graph = hf_prune.analyze(job.dense.model, data.image)
    reducers = reducers_for(job.dense.model, settings.method, _stages(job))
    tables = open_tables(job, data, graph, reducers)
    joint = decide(job, data, graph, tables)
    student = make(job, joint, graph, data)
    learns = joint.tokens is not None and reducer_class(settings.method).learned
    untrained = None if learns else job.evaluate(student, "test", "cut")
    target = None
    if tables is not None:
        target = TargetShare(joint.limit / joint.dense, joint.predicted / joint.dense)
    if learns:
        student = train_selectors(job, joint, student)
        target = fit(job, joint, student, graph, tables)
    else:
        student = train(job, student, "recover", epochs=settings.num_train_epochs, seed=settings.seed,
                        max_steps=settings.max_train_steps)  # fmt: skip

    def macs_of(accuracy: Accuracy) -> float:
        parts = macs_cost(job.dense.model, data.image, reducers)
        cost = CostOfTokens(joint_macs(job.dense.model, graph, parts), reducers, joint.sizes, parts.num_patches)
        return float(cost.of_kept(accuracy.kept, reducers.before_blocks).mean())

    cut = Cut(student.eval(), untrained, target)
    finish(job, "joint", cut, started=started, macs_of=macs_of if learns else None)


def _stages(job: Job[Settings]) -> tuple[int, ...]:
    settings = job.settings
    return tuple(settings.before_blocks or even_stages(find_site(job.dense.model).depth, settings.num_stages))


def open_tables(
    job: Job[Settings], data: Calibration, graph: AxisGraph, reducers: TokenPruningConfig
) -> tuple[LatencyTable, TokenTable] | None:
    """Read the tables a resumed run began with, or measure them; None without a target in milliseconds."""
    settings, dense, path = job.settings, job.dense.model, job.run.output_dir / "token_table.json"
    table = open_table(job, dense, graph)
    if table is None:
        return None
    if job.run.is_main and not (settings.resume_from_checkpoint and path.is_file()):
        pixels = job.pool("train", table.batch_size).batch(0, table.batch_size)
        measure_token_table(dense, pixels, reducers, repeats=20).write(path)
    job.run.accelerator.wait_for_everyone()
    return table, TokenTable.read(path)


def decide(
    job: Job[Settings], data: Calibration, graph: AxisGraph, tables: tuple[LatencyTable, TokenTable] | None
) -> JointPlan:
    """Make the plan on the main process and keep it as a file, which all processes and a resumed run read."""
    settings, path = job.settings, job.run.output_dir / "joint_plan.json"
    table, token_table = tables or (None, None)
    if job.run.is_main and not (settings.resume_from_checkpoint and path.is_file()):
        joint = plan_joint(
            job.dense.model,
            graph=graph,
            budget=settings.budget,
            data=data.batches,
            method=settings.method,
            stages=_stages(job),
            keeps=settings.keeps,
            criterion=settings.criterion,
            allocator=settings.allocator,
            kinds=settings.kinds,
            limits=settings.limits,
            compensation=_how(settings),
            table=table,
            token_table=token_table,
        )
        for choice in joint.choices:
            kept = ", ".join(f"{ratio:.0%}" for ratio in choice.keep_ratios) or "all"
            job.run.say(
                f"patches kept {kept}: {choice.kept_widths:.0%} of the widths, {choice.divergence:.4f} nats off"
            )
        joint.write(path)
    job.run.accelerator.wait_for_everyone()
    return JointPlan.read(path)


def _how(settings: Settings) -> How | None:
    return None if settings.compensation == "none" else cast(How, settings.compensation)


def make(job: Job[Settings], joint: JointPlan, graph: AxisGraph, data: Calibration) -> nn.Module:
    """Return a copy of the dense model, cut, compensated and with its reducers."""
    student = copy.deepcopy(job.dense.model).requires_grad_(True)
    torch.manual_seed(job.settings.seed)
    record = apply_joint(student, joint, graph, compensation=_how(job.settings), data=data.batches)
    job.run.say(f"{record.macs[1] / record.macs[0]:.1%} of the MACs left, {record.params[1] / record.params[0]:.1%} of "
                f"the parameters")  # fmt: skip
    return student


def train_selectors(job: Job[Settings], joint: JointPlan, student: nn.Module) -> nn.Module:
    """Train selectors and what is left of the dense model together, until every selector keeps its share."""
    settings, tokens = job.settings, joint.tokens
    assert tokens is not None
    constraint = keep_constraint(tokens.keep_ratios, weight=settings.ratio_weight, rate=settings.ratio_multiplier_rate)
    objective = PruneTokens(
        job.dense.model, constraint, job.run.accelerator, settings.seed, label_smoothing=settings.label_smoothing
    )
    # A cut has something to recover, so the rest learns as fast as the selectors, and from the start.
    rates = TwoRates(backbone_share=1.0, freeze_share=0.0)
    return job.train(
        "joint",
        student,
        objective,
        {"token_pruning": rates.selector, "": rates.backbone},
        epochs=settings.num_train_epochs,
        max_steps=settings.max_train_steps,
        learning_rate=job.learning_rate,
        seed=settings.seed,
    ).eval()


def fit(
    job: Job[Settings],
    joint: JointPlan,
    student: nn.Module,
    graph: AxisGraph,
    tables: tuple[LatencyTable, TokenTable] | None,
) -> TargetShare | None:
    """Set thresholds for the keep ratios; for milliseconds, shift these until validation images take the target."""
    pruning, batches, tokens = token_pruning_of(student), job.calibration_batches(), joint.tokens
    assert tokens is not None
    if tables is None:
        calibrate_thresholds(student, batches, tokens.keep_ratios)
        return None
    table, token_table = tables
    cost = CostOfTokens(
        joint_latency(job.dense.model, graph, table, token_table), tokens, joint.sizes, token_table.cost().num_patches
    )
    models, pool = {"dense": job.dense.model, "pruned": student}, job.pool("validation")

    def measure() -> float:
        """Return the pruned latency on the scale of the table: measured ratio times the table's dense latency."""
        times = time_models(models, pool, table.batch_size)
        return cast(float, broadcast_object_list([latency_ratio(times) * cost.dense])[0])

    fit_to_target(
        pruning,
        cost,
        joint.limit,
        calibrate=lambda ratios: calibrate_thresholds(student, batches, ratios),
        measure=measure,
    )
    kept = torch.tensor(pruning.settings.keep_ratios) * cost.num_patches
    predicted_ms = float(cost.of_kept(kept, tokens.before_blocks))
    return TargetShare(joint.limit / cost.dense, predicted_ms / cost.dense)


if __name__ == "__main__":
    try:
        main(parse(Settings, sys.argv[1:], description=__doc__, embedded=EMBEDDED_SETTINGS))
    except HfPruneError as err:
        sys.exit(f"{type(err).__name__}: {err}")
