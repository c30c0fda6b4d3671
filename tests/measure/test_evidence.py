import numpy as np
import pytest
import torch
from tiny_models import NUM_CLASSES, NUM_PATCHES, build_dense, build_pruned, pixel_batch

from hf_prune.measure.accuracy import Accuracy
from hf_prune.measure.evidence import PixelPool, TargetShare, latency_ratio, mean_macs, stage_rows, time_models
from hf_prune.measure.token_cost import macs_cost
from hf_prune.tokens.attach import token_pruning_of
from hf_prune.tokens.config import TokenPruningConfig


def pool(num_images: int) -> PixelPool:
    labels = torch.arange(num_images) % NUM_CLASSES
    labels[0] = -100
    batches = [{"pixel_values": pixel_batch(num_images), "labels": labels}] * 2
    return PixelPool(batches, 1000, torch.device("cpu"))


def test_a_pool_holds_readable_images_and_full_batches():
    images = pool(10)
    assert len(images.pixels) == 18
    assert (images.labels >= 0).all()
    assert images.batch(5, 8).shape[0] == 8
    assert images.num_batches(8) == 2


def test_models_are_timed_on_every_batch_of_the_pool():
    seen = {"dense": [], "pruned": []}

    class Probe(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            seen[self.name].append(x)

    images = pool(10)
    times = time_models({name: Probe(name) for name in seen}, images, 4, seconds=0.01)
    assert len(times["dense"]) == images.num_batches(4) == 4  # one number a batch
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))
    assert latency_ratio({"dense": [2.0, 4.0], "pruned": [1.0, 2.0]}) == 0.5


def test_a_target_is_told_in_the_milliseconds_of_its_measurement():
    target = TargetShare(0.6, 0.55).measured({"dense": [10.0, 30.0], "pruned": [11.0, 15.0]}, 32)
    assert (target.dense_ms, target.target_ms, target.predicted_ms, target.achieved_ms) == pytest.approx(
        (20, 12, 11, 13)
    )


def test_macs_are_the_mean_over_images_not_those_of_the_mean_image():
    model = build_dense("vit")
    settings = TokenPruningConfig(before_blocks=(2, 4), keep_ratios=(0.65, 0.3), num_heads=4)
    cost = macs_cost(model, pixel_batch(1), settings)
    build_pruned(model, settings)
    kept = torch.tensor([[60.0, 50.0], [20.0, 0.0]])
    accuracy = Accuracy(0.5, 2, 0, kept)
    each = cost.of_kept(kept, (2, 4))
    assert mean_macs(cost, accuracy, model) == pytest.approx(each.mean().item())
    first, second = stage_rows(accuracy, model, NUM_PATCHES)
    assert (first.tokens_kept_mean, second.tokens_kept_mean) == (40.0, 25.0)
    assert first.tokens_kept_p10 == pytest.approx(np.percentile([60, 20], 10))
    assert second.keep_ratio_target == token_pruning_of(model).settings.keep_ratios[1]
