import pytest
import torch
from torch import nn

from hf_prune.recover.rates import TwoRates, adamw, freeze_positions, set_learning_rates, warmup_cosine


def test_the_two_rates_are_the_published_ones():
    rates = TwoRates()
    assert rates.selector(0.0) == pytest.approx(1.0)
    assert rates.selector(1.0) * 5e-4 == pytest.approx(1e-5)
    assert rates.backbone(4.9 / 30) == 0.0
    assert rates.backbone(5.1 / 30) == pytest.approx(0.01)
    assert all(rates.backbone(p / 100) <= rates.selector(p / 100) for p in range(101))


def test_warmup_rises_then_falls_to_zero():
    shape = warmup_cosine(0.1)
    assert shape(0.0) == 0.0
    assert shape(0.05) == pytest.approx(0.5)
    assert shape(0.1) == pytest.approx(1.0)
    assert shape(1.0) == pytest.approx(0.0)


def test_groups_follow_names_and_vectors_are_not_decayed():
    model = nn.ModuleDict({"token_pruning": nn.Linear(2, 2), "body": nn.Linear(2, 2)})
    shapes = {"token_pruning": lambda progress: 1.0, "": lambda progress: progress}
    optimizer = adamw(model, shapes, learning_rate=0.1, weight_decay=0.05)
    set_learning_rates(optimizer, shapes, learning_rate=0.1, progress=0.5)
    found = {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found[model["token_pruning"].weight] == (0.1, 0.05)
    assert found[model["token_pruning"].bias] == (0.1, 0.0)
    assert found[model["body"].weight] == (0.05, 0.05)


def test_frozen_parameters_are_in_no_group():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = adamw(model, {"": lambda progress: 1.0}, learning_rate=0.1, weight_decay=0.0)
    assert [parameter.shape for group in optimizer.param_groups for parameter in group["params"]] == [
        torch.Size([2, 2])
    ]


def test_class_token_and_positions_stay_as_they_are(dense):
    freeze_positions(dense)
    frozen = {name.rpartition(".")[2] for name, parameter in dense.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert frozen <= {"cls_token", "pos_embed", "position_embeddings", "weight"}
    assert sum(parameter.requires_grad for parameter in dense.parameters()) > 40
