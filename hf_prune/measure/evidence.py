"""Dense beside pruned: the measurements that tables, cards and pictures are made of."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_prune.measure.accuracy import Accuracy
from hf_prune.measure.figures import plot_latency_accuracy, plot_token_histogram
from hf_prune.measure.latency import summarize, time_side_by_side
from hf_prune.measure.patch_figures import plot_patches
from hf_prune.measure.report import LatencyStats, LatencyTarget, ModelRow, StageRow
from hf_prune.measure.token_cost import TokenCost, count_params
from hf_prune.tokens.attach import token_pruning_of
from hf_prune.tokens.reducers.base import Merger
from hf_prune.tokens.reducers.registry import reducer_class
from hf_prune.tokens.site import logits_of

MIN_REPEATS, MAX_REPEATS = 30, 200
MOST_STAGES = 5  # in a picture
DROPPED, MERGED, HISTOGRAM, COMPARISON = (
    "dropped_patches.png", "merged_patches.png", "tokens_kept.png", "latency_accuracy.png"
)  # fmt: skip


@dataclass(frozen=True)
class TargetShare:
    """A latency target as shares of the dense latency, so that it holds on a machine whose speed drifts.

    Attributes:
        wanted: What was asked for.
        predicted: What the latency table says of the final keep ratios.
    """

    wanted: float
    predicted: float

    def measured(self, times: dict[str, list[float]], batch_size: int) -> LatencyTarget:
        """Return target and result in the milliseconds of one side-by-side measurement (see `time_models`)."""
        dense_ms, pruned_ms = float(np.mean(times["dense"])), float(np.mean(times["pruned"]))
        return LatencyTarget(batch_size, dense_ms, self.wanted * dense_ms, self.predicted * dense_ms, pruned_ms)


class PixelPool:
    """The first images of a split, kept as pixels, cut into batches of any size.

    Memory: `num_images` images; a few hundred are enough to time with.
    """

    def __init__(self, loader: DataLoader, num_images: int, device: torch.device) -> None:
        pixels, labels, count = [], [], 0
        for batch in loader:
            readable = batch["labels"] >= 0
            pixels.append(batch["pixel_values"][readable])
            labels.append(batch["labels"][readable])
            count += int(readable.sum())
            if count >= num_images:
                break
        self.pixels = torch.cat(pixels)[:num_images].to(device)
        self.labels = torch.cat(labels)[:num_images]

    def batch(self, number: int, batch_size: int) -> Tensor:
        """Return batch `number`, wrapping around; every batch is full."""
        start = number * batch_size
        index = torch.arange(start, start + batch_size, device=self.pixels.device) % len(self.pixels)
        return self.pixels[index]

    def num_batches(self, batch_size: int) -> int:
        """Return how many different full batches there are, at least one."""
        return max(len(self.pixels) // batch_size, 1)


@torch.no_grad()
def time_models(
    models: dict[str, nn.Module], pool: PixelPool, batch_size: int, *, seconds: float = 8.0
) -> dict[str, list[float]]:
    """Return milliseconds per batch of several models on the same real batches, taken in turns.

    An adaptive model is as fast as its images are easy, so every batch of the pool is used equally often: for about
    `seconds` in all, but at least 30 and at most 200 times a model.
    """
    num_batches = min(pool.num_batches(batch_size), MIN_REPEATS)

    def runner(model: nn.Module) -> Callable[[int], object]:
        return lambda repeat: model(pool.batch(repeat % num_batches, batch_size))

    runs = {name: runner(model.eval()) for name, model in models.items()}
    one_round_ms = num_batches * sum(map(sum, time_side_by_side(runs, pool.pixels.device, repeats=1).values()))
    repeats = min(max(num_batches * seconds * 1e3 / one_round_ms, MIN_REPEATS), MAX_REPEATS)
    rounds = math.ceil(repeats / num_batches)
    times = time_side_by_side(runs, pool.pixels.device, repeats=rounds * num_batches)
    # One number a batch: the fastest of its rounds. What else happens on a machine only ever makes a run slower, and it
    # slows the many small operations of a selector more than a dense block, so medians of a busy hour mislead.
    return {name: np.reshape(values, (rounds, num_batches)).min(0).tolist() for name, values in times.items()}


def latency_ratio(times: dict[str, list[float]]) -> float:
    """Return the mean pruned latency over the mean dense latency."""
    return float(np.mean(times["pruned"]) / np.mean(times["dense"]))


def model_row(
    name: str, model: nn.Module, accuracy: Accuracy, macs: float, times: dict[int, dict[str, list[float]]]
) -> ModelRow:
    """Put together what one model costs and how well it does."""
    latency: dict[int, LatencyStats] = {size: summarize(by_name[name]) for size, by_name in times.items()}
    return ModelRow(
        name, accuracy.top1, accuracy.num_images, accuracy.num_unreadable, count_params(model), macs, latency
    )


def stage_rows(accuracy: Accuracy, model: nn.Module, num_patches: int) -> tuple[StageRow, ...]:
    """Describe how many patches survive each selector."""
    settings = token_pruning_of(model).settings
    rows = []
    for stage, (block, ratio) in enumerate(zip(settings.before_blocks, settings.keep_ratios, strict=True)):
        kept = accuracy.kept[:, stage].numpy()
        p10, p90 = np.percentile(kept, [10, 90])
        rows.append(StageRow(block, ratio, float(kept.mean()), float(p10), float(p90), num_patches))
    return tuple(rows)


def mean_macs(cost: TokenCost, accuracy: Accuracy, model: nn.Module) -> float:
    """Return the MACs of an image, averaged over the images of an evaluation."""
    return float(cost.of_kept(accuracy.kept, token_pruning_of(model).settings.before_blocks).mean())


@torch.no_grad()
def draw_figures(
    folder: Path,
    model: nn.Module,
    pool: PixelPool,
    accuracy: Accuracy,
    rows: Sequence[ModelRow],
    *,
    label_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    target_ms: float | None,
) -> tuple[str, ...]:
    """Draw the pictures of a run and return their file names.

    The images shown are those that keep the fewest, a middling number, and the most patches, so that the
    picture shows how far the counts adapt. Where they do not adapt there is no histogram of them.
    """
    pruning, few = token_pruning_of(model), min(len(pool.pixels), 64)
    kind, blocks = reducer_class(pruning.settings.method), pruning.settings.before_blocks
    predictions = logits_of(model(pool.pixels[:few])).argmax(-1).cpu()
    run = pruning.last_run
    assert run is not None
    # The state after a reduction is noted under the number of the block behind the one that it precedes.
    sources = [run.tokens[block + 1].sources().cpu() for block in blocks]
    order = (sources[-1] >= 0).sum(1).argsort(stable=True)
    shown = order[torch.linspace(0, few - 1, min(6, few)).long()]
    pixels = pool.pixels[shown.to(pool.pixels.device)].cpu()
    images = pixels * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    num_patches = sources[0].shape[1]
    rows_of_patches = round((num_patches * pixels.shape[-2] / pixels.shape[-1]) ** 0.5)
    stage_names = [f"before block {block}" for block in blocks]
    names = [MERGED if issubclass(kind, Merger) else DROPPED]
    few_stages = sorted({round(i) for i in np.linspace(0, len(blocks) - 1, min(len(blocks), MOST_STAGES))})
    plot_patches(
        images.clamp(0, 1).numpy(),
        [sources[stage][shown].numpy() for stage in few_stages],
        (rows_of_patches, num_patches // rows_of_patches),
        titles=[f"{label_names[int(pool.labels[i])]}, predicted {label_names[int(predictions[i])]}" for i in shown],
        stage_names=[stage_names[stage] for stage in few_stages],
        path=folder / names[0],
        packages=str(pruning.settings.packages),
    )
    if kind.adaptive:
        kept = [column.numpy().astype(int) for column in accuracy.kept.unbind(1)]
        plot_token_histogram(kept, num_patches, stage_names=stage_names, path=folder / HISTOGRAM)
        names.append(HISTOGRAM)
    plot_latency_accuracy(rows, batch_size, folder / COMPARISON, target_ms=target_ms)
    return (*names, COMPARISON)
