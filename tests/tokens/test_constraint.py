import pytest
import torch

from hf_prune.tokens.constraint import global_mean, keep_constraint, latency_constraint

TARGETS = (0.6, 0.3)


def settle(constraint, pull: float, steps: int = 3000) -> list[float]:
    """Minimise a task loss that always wants more tokens, together with the constraint."""
    logits = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(steps):
        keep = logits.sigmoid()
        optimizer.zero_grad()
        (constraint.loss(keep) - pull * keep.sum()).backward()
        optimizer.step()
        constraint.update(keep)
    return logits.sigmoid().tolist()


def test_the_multiplier_reaches_targets_that_the_published_loss_misses():
    published = settle(keep_constraint(TARGETS, rate=0.0), pull=0.3)
    ours = settle(keep_constraint(TARGETS), pull=0.3)
    assert max(abs(a - b) for a, b in zip(published, TARGETS, strict=True)) > 0.1
    assert ours == pytest.approx(TARGETS, abs=0.005)


def test_at_rate_zero_the_loss_is_the_published_one():
    constraint = keep_constraint(TARGETS, weight=2.0, rate=0.0)
    mean_keep = torch.tensor([0.7, 0.5])
    constraint.update(mean_keep)
    assert constraint.loss(mean_keep).item() == pytest.approx(2.0 * (0.1**2 + 0.2**2) / 2)


def test_multipliers_survive_a_checkpoint():
    first, second = keep_constraint(TARGETS), keep_constraint(TARGETS)
    first.update(torch.tensor([0.9, 0.9]))
    second.load_state_dict(first.state_dict())
    mean_keep = torch.tensor([0.8, 0.5])
    assert first.loss(mean_keep) == second.loss(mean_keep) != keep_constraint(TARGETS).loss(mean_keep)


class LinearCost:
    num_patches = 10
    dense = 20.0

    def of_kept(self, kept, before_blocks, *, per_stage_packages=False):
        return 1.0 + kept.double().sum(-1)


def test_a_latency_constraint_leaves_open_who_keeps_what():
    constraint = latency_constraint(LinearCost(), 8.0, (1, 2))
    keep = settle(constraint, pull=0.05)
    assert 1 + 10 * sum(keep) == pytest.approx(8.0, rel=0.01)
    assert latency_constraint(LinearCost(), 30.0, (1, 2)).loss(torch.tensor([0.5, 0.5])) == 0


def test_the_mean_over_processes_has_the_local_gradient():
    class TwoProcesses:
        num_processes = 2

        def reduce(self, value, reduction):
            return (value + 0.4) / 2

    local = torch.tensor([0.8], requires_grad=True)
    mean = global_mean(local, TwoProcesses())
    mean.square().sum().backward()
    assert mean.item() == pytest.approx(0.6)
    assert local.grad.item() == pytest.approx(2 * 0.6)
