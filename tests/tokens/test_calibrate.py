import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build_dense, build_pruned, pixel_batch

from hf_prune.tokens.calibrate import calibrate_thresholds, split_point


def test_thresholds_make_deterministic_decisions_keep_the_target_share_of_every_stage():
    model = build_dense("vit")
    pruning = build_pruned(model)
    for selector in pruning.selectors.values():
        selector.keep_threshold.fill_(3.0)
    batches = [pixel_batch(16, seed=1), pixel_batch(8, seed=2)]
    reached = calibrate_thresholds(model, lambda: iter(batches), (0.55, 0.2))
    assert reached == pytest.approx([0.55, 0.2], abs=0.002)
    with torch.no_grad():
        model(torch.cat(batches))
    first, second = (record.keep for record in pruning.take_records())
    assert first.mean().item() == pytest.approx(0.55, abs=0.002)
    assert second.mean().item() == pytest.approx(0.2, abs=0.002)
    assert len(set(first.sum(1).tolist())) > 5  # still adaptive
    assert not model.training


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=50, unique=True), st.integers(-3, 60))
def test_a_split_point_lets_just_so_many_through(values, num_keep):
    margins = torch.tensor([float(value) for value in values])
    kept = int((margins >= split_point(margins, num_keep)).sum())
    assert kept == min(max(num_keep, 0), len(values))
