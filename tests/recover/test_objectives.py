import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_prune.recover.objectives import Classify, Recover


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return {"pixel_values": torch.randn(5, 6), "labels": torch.tensor([0, 1, 2, 0, 1])}


def loss_of(objective, student, batch):
    return objective.loss(student, batch, batch_number=0)


def test_recovery_is_cross_entropy_plus_the_divergence_from_the_teacher(batch):
    student, teacher = nn.Linear(6, 3), nn.Linear(6, 3)
    plain = loss_of(Classify(0.1), student, batch)
    assert loss_of(Recover(0.1), student, batch) == plain
    assert loss_of(Recover(0.1, teacher, 0.0), student, batch) == plain
    found, taught = student(batch["pixel_values"]).softmax(-1), teacher(batch["pixel_values"]).softmax(-1)
    divergence = (taught * (taught / found).log()).sum(-1).mean()
    torch.testing.assert_close(loss_of(Recover(0.1, teacher, 2.0), student, batch), plain + 2 * divergence)


def test_a_student_that_says_what_the_teacher_says_learns_from_labels_alone(batch):
    student = nn.Linear(6, 3)
    expected = F.cross_entropy(student(batch["pixel_values"]), batch["labels"])
    torch.testing.assert_close(loss_of(Recover(0.0, student, 5.0), student, batch), expected)


def test_the_teacher_does_not_learn(batch):
    student, teacher = nn.Linear(6, 3), nn.Linear(6, 3)
    loss_of(Recover(0.0, teacher, 1.0), student, batch).backward()
    assert teacher.weight.grad is None
    assert student.weight.grad is not None
