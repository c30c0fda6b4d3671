import pytest
import torch

from hf_prune.tokens.reducers.decide import MAX_MEDIANS, GumbelNoise, bound_tail, sample_keep, threshold_keep, top_keep

CPU = torch.device("cpu")


def draw(noise, logits, stage):
    return noise.draw(len(logits), logits.shape[1], stage, CPU)


def test_processes_draw_the_rows_of_one_global_batch():
    logits = torch.zeros(6, 5, 2)
    whole = draw(GumbelNoise(seed=4, step=2), logits, stage=3)
    halves = [draw(GumbelNoise(seed=4, rank=rank, world_size=2, step=2), logits[:3], stage=3) for rank in (0, 1)]
    assert torch.equal(whole, torch.cat(halves))


def test_seed_step_and_stage_each_change_the_noise():
    logits = torch.zeros(1, 4, 2)
    first = draw(GumbelNoise(seed=0), logits, stage=1)
    assert torch.equal(first, draw(GumbelNoise(seed=0), logits, stage=1))
    for other in (
        draw(GumbelNoise(seed=1), logits, stage=1),
        draw(GumbelNoise(seed=0, step=1), logits, stage=1),
        draw(GumbelNoise(seed=0), logits, stage=2),
    ):
        assert not torch.equal(first, other)


def test_samples_keep_as_often_as_their_probability_says():
    logits = torch.tensor([1.0, 0.0]).expand(200, 100, 2)
    keep = sample_keep(logits, draw(GumbelNoise(seed=0), logits, stage=0))
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert keep.mean().item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.01)


def test_a_hard_sample_has_the_gradient_of_its_probability():
    logits = torch.randn(2, 3, 2, requires_grad=True)
    noise = draw(GumbelNoise(seed=0), logits, stage=0)
    (hard,) = torch.autograd.grad(sample_keep(logits, noise).sum(), logits)
    (soft,) = torch.autograd.grad((logits + noise).softmax(-1)[..., 0].sum(), logits)
    torch.testing.assert_close(hard, soft)
    assert soft.abs().sum() > 0


def test_the_threshold_moves_the_deterministic_decision():
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.2, 0.0]]])
    assert threshold_keep(logits, torch.tensor(0.0)).tolist() == [[1.0, 0.0, 1.0]]
    assert threshold_keep(logits, torch.tensor(0.5)).tolist() == [[1.0, 0.0, 0.0]]


def test_a_few_enormous_gradients_cannot_outweigh_all_others():
    ordinary = torch.tensor([[1.0, -2.0, 0.5, 0.0, -1.0, 3.0]])
    assert torch.equal(bound_tail(ordinary), ordinary)
    wild = torch.cat([ordinary, torch.tensor([[-1e7]])], dim=1)
    bounded = bound_tail(wild)
    assert torch.equal(bounded[:, :-1], ordinary)
    assert -MAX_MEDIANS * 2 <= bounded[0, -1] < -3
    assert torch.equal(bound_tail(1024 * wild), 1024 * bounded)  # whatever the loss is scaled by
    assert torch.equal(bound_tail(torch.zeros(2, 2)), torch.zeros(2, 2))


def test_the_best_of_those_alive_are_kept_and_no_other_count():
    margin = torch.tensor([[3.0, 9.0, 1.0, 2.0], [0.0, -1.0, -2.0, -3.0]])
    alive = torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    decision, order = top_keep(margin, alive, 2)
    assert decision.tolist() == [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]]
    assert [sorted(row) for row in order.tolist()] == [[0, 3], [0, 1]]
