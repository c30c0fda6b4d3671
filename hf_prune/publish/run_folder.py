"""The output folder of a finished run: model, evidence, pictures and card."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import transformers
from torch import nn

from hf_prune.data.images import ImageSplits
from hf_prune.errors import HfPruneError
from hf_prune.measure.accuracy import Accuracy
from hf_prune.measure.evidence import (
    PixelPool,
    TargetShare,
    draw_figures,
    mean_macs,
    model_row,
    stage_rows,
    time_models,
)
from hf_prune.measure.latency import device_name
from hf_prune.measure.report import Report
from hf_prune.measure.token_cost import count_macs, macs_cost
from hf_prune.models import DenseModel
from hf_prune.publish.card import render_card
from hf_prune.publish.manifest import versions
from hf_prune.publish.save import load, save
from hf_prune.recipe.run import Run
from hf_prune.tokens.attach import token_pruning_of
from hf_prune.tokens.reducers.registry import reducer_class
from hf_prune.tokens.site import logits_of


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a run found out, before it is written down.

    Attributes:
        dense: The dense model and where it came from.
        pruned: The pruned model.
        pool: Images of the scored split, to time with and to draw.
        dense_accuracy: Of the dense model.
        pruned_accuracy: Of the pruned model.
        target: What latency was asked for; None if keep ratios were.
        batch_sizes: Batch sizes to time; the last is the target's.
        train_seconds: Wall-clock time of training.
    """

    dense: DenseModel
    pruned: nn.Module
    pool: PixelPool
    dense_accuracy: Accuracy
    pruned_accuracy: Accuracy
    target: TargetShare | None
    batch_sizes: tuple[int, ...]
    train_seconds: float


def publish_run(run: Run, evidence: Evidence, splits: ImageSplits, *, seed: int) -> Report:
    """Measure what is still missing, and write model, report, pictures and card to the output folder.

    The saved model is loaded again and must give the very logits of the one in memory.

    Raises:
        HfPruneError: If it does not.
    """
    dense, pruned, pool = evidence.dense, evidence.pruned, evidence.pool
    models = {"dense": dense.model, "pruned": pruned}
    times = {size: time_models(models, pool, size) for size in evidence.batch_sizes}
    settings, image = token_pruning_of(pruned).settings, pool.batch(0, 1)
    cost = macs_cost(dense.model, image, settings)
    if reducer_class(settings.method).adaptive:
        macs = mean_macs(cost, evidence.pruned_accuracy, pruned)
    else:
        macs = count_macs(lambda: pruned(image))  # those of every image
    rows = (
        model_row("dense", dense.model, evidence.dense_accuracy, cost.dense, times),
        model_row("pruned", pruned, evidence.pruned_accuracy, macs, times),
    )
    folder, base = run.output_dir, dense.name
    save(pruned, folder, base_model=base, processor=dense.processor)
    require_same_logits(pruned, load(folder).to(pool.pixels.device), pool)
    batch_size = evidence.batch_sizes[-1]
    target = None if evidence.target is None else evidence.target.measured(times[batch_size], batch_size)
    figures = draw_figures(
        folder,
        pruned,
        pool,
        evidence.pruned_accuracy,
        rows,
        label_names=splits.label_names,
        mean=dense.preprocessing.mean,
        std=dense.preprocessing.std,
        batch_size=batch_size,
        target_ms=None if target is None else target.target_ms,
    )
    report = Report(
        method=settings.method,
        base_model=base,
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
        rows=rows,
        stages=stage_rows(evidence.pruned_accuracy, pruned, cost.num_patches),
        target=target,
        train_seconds=evidence.train_seconds,
        figures=figures,
        limits=tuple(limits_of(evidence.pruned_accuracy, splits.notes)),
    )
    report.write(folder)
    library: Literal["transformers", "timm"] = (
        "transformers" if isinstance(pruned, transformers.PreTrainedModel) else "timm"
    )
    card = render_card(report, load_snippet=f'model = hf_prune.load("{folder.name}")', library_name=library)
    card.save(folder / "README.md")
    return report


def limits_of(accuracy: Accuracy, notes: Sequence[str]) -> list[str]:
    """Say what the numbers do not show."""
    limits = list(notes)
    error = (accuracy.top1 * (1 - accuracy.top1) / accuracy.num_images) ** 0.5
    limits.append(f"accuracy is measured on {accuracy.num_images} images; its standard error is about {error:.1%}")
    if accuracy.num_unreadable:
        limits.append(f"{accuracy.num_unreadable} images of the split could not be read and do not count")
    return limits


@torch.no_grad()
def require_same_logits(pruned: nn.Module, loaded: nn.Module, pool: PixelPool) -> None:
    """Check that a model that was saved and loaded is the one in memory.

    Raises:
        HfPruneError: If its logits differ.
    """
    pixels = pool.batch(0, min(8, len(pool.pixels)))
    first, second = logits_of(pruned(pixels)), logits_of(loaded(pixels))
    if not torch.equal(first, second):
        raise HfPruneError(
            f"the saved model must give the logits of the trained one, but they differ by up to "
            f"{(first - second).abs().max():.3g}; the folder is not to be trusted, please report this"
        )
