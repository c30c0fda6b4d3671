"""What recipes that cut heads, neurons and channels share: settings, the budget, cuts and recoveries in turn."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

import hf_prune
from hf_prune.allocate.allocators import ALLOCATORS, SAFE_KINDS, Limits
from hf_prune.allocate.budget import Budget, cost_of
from hf_prune.allocate.plan import Plan
from hf_prune.analyse.graph import AxisGraph
from hf_prune.errors import BudgetError, RecipeError
from hf_prune.measure.accuracy import Accuracy
from hf_prune.measure.evidence import TargetShare
from hf_prune.measure.latency_table import FILE, LatencyTable, measure_latency_table, table_setting
from hf_prune.measure.report import Report, print_report
from hf_prune.publish.cut_folder import CutEvidence, publish_cut
from hf_prune.recipe.job import Job
from hf_prune.recipe.settings import RecipeSettings
from hf_prune.recover.compensate import How, compensated
from hf_prune.recover.norms import settle_norms
from hf_prune.recover.objectives import Recover
from hf_prune.recover.rates import warmup_cosine
from hf_prune.score.registry import CRITERIA, criterion

TARGETS = ("target_latency", "target_macs", "target_params")


@dataclass(frozen=True)
class CutSettings(RecipeSettings):
    """What recipes that cut add to the settings of every recipe."""

    target_latency: float | None = field(
        default=None, metadata={"help": "At most 1: fraction of the dense latency. Above: milliseconds per batch."}
    )
    target_macs: float | None = field(default=None, metadata={"help": "At most 1: fraction of dense. Default: 0.5."})
    target_params: float | None = field(default=None, metadata={"help": "At most 1: fraction of dense."})
    latency_batch_size: int = field(default=16, metadata={"help": "Images in a batch, for table and target."})
    latency_table: str | None = field(default=None, metadata={"help": "Use this table instead of measuring one."})
    criterion: str = field(default="taylor", metadata={"help": "How units are scored.", "choices": [*CRITERIA]})
    allocator: str = field(default="isomorphic", metadata={"help": "Shares the budget out.", "choices": [*ALLOCATORS]})
    kinds: list[str] = field(default_factory=list, metadata={"help": "Kinds of axes that may be cut."})
    round_to: int = field(default=1, metadata={"help": "Sizes become multiples of this."})
    min_keep_ratio: float = 0.1
    protect: list[str] = field(default_factory=list, metadata={"help": "Patterns of axes that stay whole."})
    compensation: str = field(
        default="least_squares",
        metadata={"help": "Fit kept weights to the dense outputs.", "choices": ["none", "mean", "least_squares"]},
    )
    calibration_images: int = field(default=512, metadata={"help": "For criteria and compensation; held in memory."})
    steps: int = field(default=1, metadata={"help": "Cuts on the way to the budget, with training in between."})
    step_epochs: float = field(default=1.0, metadata={"help": "Training between two cuts."})
    distill_weight: float = field(default=1.0, metadata={"help": "Of the dense model's logits in the loss."})

    def check(self) -> None:
        """See `RecipeSettings.check`."""
        super().check()
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"give one of `--{'`, `--'.join(TARGETS)}`, got {' and '.join(given)}")
        if self.steps < 1 or self.calibration_images < 1:
            raise RecipeError("`--steps` and `--calibration_images` must be 1 or more")
        if self.latency_table is not None and (self.target_latency is None or self.steps > 1):
            raise RecipeError("`--latency_table` is for a single cut to a `--target_latency`")
        _ = self.limits, self.budget  # both raise where a number is out of range

    @property
    def budget(self) -> Budget:
        """What the pruned model may cost."""
        macs = 0.5 if all(getattr(self, name) is None for name in TARGETS) else self.target_macs
        return Budget(macs=macs, params=self.target_params, latency_ms=self.target_latency)

    @property
    def limits(self) -> Limits:
        """Which sizes are allowed."""
        return Limits(
            kinds=tuple(self.kinds) or SAFE_KINDS,
            protect=self.protect,
            round_to=self.round_to,
            min_keep_ratio=self.min_keep_ratio,
        )


C = TypeVar("C", bound=CutSettings)


@dataclass(frozen=True)
class Calibration:
    """Training images as evaluation sees them, with their labels.

    Attributes:
        batches: Pairs of images and labels.
    """

    batches: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, job: Job[C]) -> "Calibration":
        """Take as many as the settings say."""
        pool, size = job.pool("train", job.settings.calibration_images), job.settings.per_device_eval_batch_size
        return cls(list(zip(pool.pixels.split(size), pool.labels.split(size), strict=True)))

    @property
    def image(self) -> Tensor:
        """One image `(1, C, H, W)`."""
        return self.batches[0][0][:1]


def open_table(job: Job[C], model: nn.Module, graph: AxisGraph) -> LatencyTable | None:
    """Read the given latency table, or the one a resumed run began with, or measure one; None without such a target."""
    settings, run, path = job.settings, job.run, job.run.output_dir / FILE
    if settings.target_latency is None:
        return None
    if run.is_main and not (settings.resume_from_checkpoint and path.is_file()):
        if settings.latency_table is not None:
            table = LatencyTable.read(Path(settings.latency_table))
            table.require_same_setting(table_setting(model, settings.latency_batch_size))
        else:
            run.say(f"measuring a latency table at batch {settings.latency_batch_size} ...")
            table = measure_latency_table(model, graph, batch_size=settings.latency_batch_size)
        table.write(path)
    run.accelerator.wait_for_everyone()
    return LatencyTable.read(path)


def cut_and_recover(job: Job[C]) -> "Cut":
    """Cut a copy of the dense model to the budget, in one step or several, training after each; return all of it."""
    settings, data = job.settings, Calibration.of(job)
    student = copy.deepcopy(job.dense.model).requires_grad_(True)
    target: TargetShare | None = None
    dense_cost = 0.0
    for number in range(1, settings.steps + 1):
        graph = hf_prune.analyze(student, data.image)
        table = open_table(job, student, graph) if number == 1 else None
        if number == 1:
            dense_cost = cost_of(graph, settings.budget, table)[0]({})
        budget = _budget_of_step(settings.budget, dense_cost, number, settings.steps)
        plan = decide(job, student, graph, data, budget, table, number)
        with compensation(settings, student, graph, plan, data):
            record = hf_prune.apply_plan(student, plan, graph)
        job.run.say(f"cut {number} of {settings.steps}: {record.macs[1] / record.macs[0]:.1%} of the MACs left, "
                    f"{record.params[1] / record.params[0]:.1%} of the parameters")  # fmt: skip
        if number < settings.steps:
            student = train(job, student, f"step_{number}", epochs=settings.step_epochs, seed=settings.seed + number)
        elif number == 1:
            target = target_of(settings, graph, plan, table)
    untrained = job.evaluate(student, "test", "cut")
    student = train(job, student, "recover", epochs=settings.num_train_epochs, seed=settings.seed,
                    max_steps=settings.max_train_steps)  # fmt: skip
    settle_norms(student, data.batches)
    return Cut(student.eval(), untrained, target)


def target_of(settings: CutSettings, graph: AxisGraph, plan: Plan, table: LatencyTable | None) -> TargetShare | None:
    """Return the latency that was asked for and that a plan promises, as shares of dense; None without a table."""
    if table is None:
        return None
    cost, limit = cost_of(graph, settings.budget, table)
    sizes = {name: len(units) for name, units in plan.kept.items()}
    return TargetShare(limit / cost({}), cost(sizes) / cost({}))


@dataclass(frozen=True)
class Cut:
    """A model that was cut and trained.

    Attributes:
        model: As it is in the end.
        untrained: How well it did right after the last cut; None if masks were learned and nothing was left to lose.
        target: The latency that was asked for and predicted; None if something else was.
    """

    model: nn.Module
    untrained: Accuracy | None
    target: TargetShare | None


def _budget_of_step(budget: Budget, dense: float, number: int, steps: int) -> Budget:
    """Return the budget of one of several cuts: geometric from dense to the target; shares are of the model at hand."""
    if budget.value <= 1:
        return Budget(**{budget.quantity: budget.value ** (1 / steps)})
    if budget.value >= dense:
        raise BudgetError(
            f"the target must be below what the dense model costs, {dense:,.6g}, got {budget.value:,.6g}; nothing "
            f"would be pruned"
        )
    return Budget(**{budget.quantity: dense * (budget.value / dense) ** (number / steps)})


def limits_for(settings: CutSettings, graph: AxisGraph, table: LatencyTable | None) -> Limits:
    """Return which sizes are allowed; with a table those at which kernels are cheap."""
    limits = settings.limits
    if table is None:
        return limits
    step = table.step_for(limits.choose(list(graph.axes.values())))
    return replace(limits, round_to=math.lcm(limits.round_to, step))


def decide(
    job: Job[C], model: nn.Module, graph: AxisGraph, data: Calibration, budget: Budget, table: Any, number: int
) -> Plan:
    """Make the plan of a cut on the main process and keep it as a file, which all processes and a resumed run read."""
    settings, path = job.settings, job.run.output_dir / f"plan_{number}.json"
    if job.run.is_main and not (settings.resume_from_checkpoint and path.is_file()):
        plan = hf_prune.plan(
            model,
            graph=graph,
            budget=budget,
            criterion=criterion(settings.criterion),
            allocator=settings.allocator,
            limits=settings.limits,
            data=data.batches,
            table=table,
            batch_size=settings.latency_batch_size,
        )
        plan.write(path)
    job.run.accelerator.wait_for_everyone()
    return Plan.read(path)


@contextmanager
def compensation(
    settings: CutSettings, model: nn.Module, graph: AxisGraph, plan: Plan, data: Calibration
) -> Iterator[None]:
    """Cut inside, so that kept weights take over from what goes; does nothing where that is not wanted."""
    if settings.compensation == "none":
        yield
        return
    with compensated(model, graph, plan, data.batches, how=cast(How, settings.compensation)):
        yield


def train(
    job: Job[C], model: nn.Module, phase: str, *, epochs: float, seed: int, max_steps: int | None = None
) -> nn.Module:
    """Train a cut model on labels and on what the dense one says."""
    settings = job.settings
    objective = Recover(settings.label_smoothing, job.dense.model, settings.distill_weight)
    return job.train(
        phase,
        model,
        objective,
        {"": warmup_cosine()},
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=job.learning_rate,
        seed=seed,
        max_grad_norm=1.0,
    )


def finish(
    job: Job[C],
    method: str,
    cut: Cut,
    *,
    started: float,
    notes: Sequence[str] = (),
    figures: Sequence[str] = (),
    macs_of: Callable[[Accuracy], float] | None = None,
) -> None:
    """Score dense and pruned on the test split, publish the folder, print the report, push where that was asked for.

    Args:
        job: Of the recipe.
        method: Key of the recipe.
        cut: What came out.
        started: When training began, by `time.perf_counter`.
        notes: What a reader of the card should know.
        figures: Files in the output folder that the card shows first.
        macs_of: Returns the mean MACs of an image from the tokens that images kept; None counts them on one image.
    """
    settings, accuracy = job.settings, job.evaluate(cut.model, "test", "pruned")
    evidence = CutEvidence(
        method=method,
        dense=job.dense,
        pruned=cut.model,
        pool=job.pool("test"),
        dense_accuracy=job.evaluate(job.dense.model, "test", "dense"),
        pruned_accuracy=accuracy,
        untrained_accuracy=cut.untrained,
        target=cut.target,
        batch_sizes=tuple(dict.fromkeys((1, settings.latency_batch_size))),
        train_seconds=time.perf_counter() - started,
        notes=tuple(notes),
        figures=tuple(figures),
        pruned_macs=None if macs_of is None else macs_of(accuracy),
    )
    if job.run.is_main:
        report: Report = publish_cut(job.run, evidence, job.splits, seed=settings.seed)
        print_report(report)
        job.push()
    job.run.accelerator.end_training()
