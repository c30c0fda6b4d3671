"""The output folder of a run that cut a model: the model, its evidence, pictures and card."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hf_prune.data.images import ImageSplits
from hf_prune.measure.accuracy import Accuracy
from hf_prune.measure.evidence import PixelPool, TargetShare, draw_figures, model_row, stage_rows, time_models
from hf_prune.measure.figures import plot_latency_accuracy
from hf_prune.measure.latency import device_name
from hf_prune.measure.report import ModelRow, Report, StageRow
from hf_prune.measure.token_cost import count_macs
from hf_prune.models import DenseModel
from hf_prune.publish.folder_card import write_card
from hf_prune.publish.manifest import versions
from hf_prune.publish.run_folder import limits_of, require_same_logits
from hf_prune.publish.save import load, save
from hf_prune.recipe.run import Run
from hf_prune.tokens.attach import token_pruning_of
from hf_prune.tokens.pruning import TokenPruning

FIGURE = "latency_accuracy.png"


@dataclass(frozen=True, kw_only=True)
class CutEvidence:
    """What a run found out, before it is written down.

    Attributes:
        method: Key of the recipe.
        dense: The dense model and where it came from.
        pruned: The pruned model.
        pool: Images of the scored split, to time with.
        dense_accuracy: Of the dense model.
        pruned_accuracy: Of the pruned model.
        untrained_accuracy: Right after the last cut; None if there was nothing to recover.
        target: What latency was asked for; None if something else was.
        batch_sizes: Batch sizes to time; the last is the target's.
        train_seconds: Wall-clock time of training and cutting.
        notes: What else a reader should know.
        figures: Pictures in the folder already, to be shown before those of every run.
        pruned_macs: Of the pruned model, mean over the images; None where all images cost the same, and are counted.
    """

    method: str
    dense: DenseModel
    pruned: nn.Module
    pool: PixelPool
    dense_accuracy: Accuracy
    pruned_accuracy: Accuracy
    untrained_accuracy: Accuracy | None
    target: TargetShare | None
    batch_sizes: tuple[int, ...]
    train_seconds: float
    notes: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    pruned_macs: float | None = None


def publish_cut(run: Run, evidence: CutEvidence, splits: ImageSplits, *, seed: int) -> Report:
    """Measure what is still missing, and write model, report, pictures and card to the output folder.

    The saved model is loaded again and must give the very logits of the one in memory.

    Raises:
        HfPruneError: If it does not.
    """
    dense, pruned, pool, folder = evidence.dense, evidence.pruned, evidence.pool, run.output_dir
    models = {"dense": dense.model, "pruned": pruned}
    times = {size: time_models(models, pool, size) for size in evidence.batch_sizes}
    macs = {name: float(count_macs(lambda model=model: model(pool.batch(0, 1)))) for name, model in models.items()}
    macs["pruned"] = evidence.pruned_macs or macs["pruned"]
    accuracy = {"dense": evidence.dense_accuracy, "pruned": evidence.pruned_accuracy}
    rows = [model_row(name, models[name], accuracy[name], macs[name], times) for name in models]
    if evidence.untrained_accuracy is not None:
        measured = {size: {"cut, untrained": by_name["pruned"]} for size, by_name in times.items()}
        rows.append(model_row("cut, untrained", pruned, evidence.untrained_accuracy, macs["pruned"], measured))
    save(pruned, folder, base_model=dense.name, processor=dense.processor)
    require_same_logits(pruned, load(folder).to(pool.pixels.device), pool)
    batch_size = evidence.batch_sizes[-1]
    target = None if evidence.target is None else evidence.target.measured(times[batch_size], batch_size)
    figures = _draw(evidence, splits, folder, rows, batch_size, None if target is None else target.target_ms)
    report = Report(
        method=evidence.method,
        base_model=dense.name,
        base_license=dense.license,
        dataset=splits.source,
        split="test",
        num_labels=splits.num_labels,
        command=run.command,
        seed=seed,
        device=device_name(pool.pixels.device),
        dtype=str(next(pruned.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        versions=versions(),
        rows=tuple(rows),
        stages=_stages(evidence),
        target=target,
        train_seconds=evidence.train_seconds,
        figures=(*evidence.figures, *figures),
        limits=(*limits_of(evidence.pruned_accuracy, splits.notes), *evidence.notes),
    )
    report.write(folder)
    write_card(folder)
    return report


def _has_tokens(model: nn.Module) -> bool:
    return any(isinstance(module, TokenPruning) for module in model.modules())


@torch.no_grad()
def _stages(evidence: CutEvidence) -> tuple[StageRow, ...]:
    """Return how many patches survive each reduction, if there are any."""
    pruned = evidence.pruned
    if not _has_tokens(pruned):
        return ()
    pruned(evidence.pool.batch(0, 1))
    num_patches = token_pruning_of(pruned).take_records()[0].keep.shape[1]
    return stage_rows(evidence.pruned_accuracy, pruned, num_patches)


def _draw(
    evidence: CutEvidence,
    splits: ImageSplits,
    folder: Path,
    rows: Sequence[ModelRow],
    batch_size: int,
    target_ms: float | None,
) -> tuple[str, ...]:
    """Draw latency and accuracy, and what became of tokens; return the names of the files."""
    if not _has_tokens(evidence.pruned):
        plot_latency_accuracy(rows[:2], batch_size, folder / FIGURE, target_ms=target_ms)
        return (FIGURE,)
    preprocessing = evidence.dense.preprocessing
    return draw_figures(
        folder,
        evidence.pruned,
        evidence.pool,
        evidence.pruned_accuracy,
        rows[:2],
        label_names=splits.label_names,
        mean=preprocessing.mean,
        std=preprocessing.std,
        batch_size=batch_size,
        target_ms=target_ms,
    )
