"""Magnitude, LAMP, FPGM, WHC and random numbers."""

import pytest
import torch
from score_nets import axis_of, scores_of_rows, tiny_graph
from torch import nn

from hf_prune.analyse.graph import Slice
from hf_prune.errors import CriterionError
from hf_prune.score.fpgm import Fpgm
from hf_prune.score.lamp import Lamp, lamp
from hf_prune.score.magnitude import Magnitude
from hf_prune.score.random import Random
from hf_prune.score.similarity import unit_gram
from hf_prune.score.whc import Whc

TOY = [(0, 1), (1.1, 0.05), (-1.2, 0.05)]


def test_toy_of_three_filters():
    """Antiparallel filters are redundant for WHC; the small one goes first for L2, the central one for FPGM."""
    assert scores_of_rows(Whc(), TOY).argmin() == 1
    assert scores_of_rows(Fpgm(), TOY).argmin() == 0
    assert scores_of_rows(Magnitude(p=2), TOY).argmin() == 0


def test_whc_is_its_formula():
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    norms = rows.norm(dim=1)
    cosine = nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    expected = torch.stack(
        [sum(norms[i] * norms[j] * (1 - cosine[i, j].abs()) for j in range(6) if j != i) for i in range(6)]
    )
    torch.testing.assert_close(scores_of_rows(Whc(), rows), expected / norms.mean() ** 2)


def test_fpgm_is_its_formula():
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scores_of_rows(Fpgm(), rows), torch.cdist(rows, rows).sum(1))


def test_duplicates_among_orthogonal_filters_go_first_but_tie_in_norm():
    rows = torch.eye(8)
    rows[5] = rows[2]
    for rule in (Fpgm(), Whc()):
        scores = scores_of_rows(rule, rows)
        assert set(scores.topk(2, largest=False).indices.tolist()) == {2, 5}
    assert scores_of_rows(Magnitude(), rows).unique().numel() == 1


def test_fpgm_keeps_a_dead_filter_when_the_others_have_much_in_common():
    """The documented exception: zero is far from filters around a common offset."""
    rows = 1 + 0.1 * torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    assert scores_of_rows(Fpgm(), rows).argmax() == 3
    assert scores_of_rows(Whc(), rows).argmin() == 3


def test_antiparallel_filters_are_far_for_fpgm_and_redundant_for_whc():
    rows = torch.eye(6)
    rows[4] = -rows[1]
    assert set(scores_of_rows(Fpgm(), rows).topk(2).indices.tolist()) == {1, 4}
    assert set(scores_of_rows(Whc(), rows).topk(2, largest=False).indices.tolist()) == {1, 4}


def test_similarity_is_over_all_layers():
    """Two units whose filters are equal but which are read differently are not redundant."""
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    axis = axis_of(8, [Slice("0.weight", 0, torch.arange(8))], [Slice("1.weight", 1, torch.arange(8))])
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(8))
        net[0].weight[5] = net[0].weight[2]
        net[1].weight.copy_(torch.eye(8))
    gram = unit_gram(net, axis)
    assert gram[2, 5] == pytest.approx(1)
    assert gram[2, 2] == pytest.approx(2)
    with torch.no_grad():
        net[1].weight[:, 5] = net[1].weight[:, 2]
    assert unit_gram(net, axis)[2, 5] == pytest.approx(2)


def test_norms_scale_a_unit_and_tables_are_a_part_of_it():
    net = nn.ModuleDict({"linear": nn.Linear(4, 4, bias=False), "norm": nn.LayerNorm(4), "table": nn.Embedding(9, 4)})
    carriers = [Slice("norm.weight", 0, torch.arange(4)), Slice("table.weight", 1, torch.arange(4))]
    axis = axis_of(4, [Slice("linear.weight", 0, torch.arange(4))], carriers=carriers)
    with torch.no_grad():
        net["linear"].weight.copy_(torch.eye(4))
        net["table"].weight.zero_()
    torch.testing.assert_close(unit_gram(net, axis), torch.eye(4))
    with torch.no_grad():
        net["norm"].weight.copy_(torch.tensor([2.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(unit_gram(net, axis), torch.diag(torch.tensor([4.0, 1.0, 1.0, 0.0])))
    with torch.no_grad():
        net["norm"].weight.zero_()
        net["table"].weight[3] = 1
    torch.testing.assert_close(unit_gram(net, axis), torch.eye(4) + 1)


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_of_two_layers_by_hand(p):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    arange = torch.arange(2)
    axis = axis_of(2, [Slice("0.weight", 0, arange), Slice("0.bias", 0, arange)], [Slice("1.weight", 1, arange)])
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[2.0, 2.0], [0.0, 0.0]]))
        net[0].bias.copy_(torch.tensor([1.0, 1.0]))
        net[1].weight.copy_(torch.tensor([[1.0, 3.0]]))
    both = {1: [4 + 1, 0 + 3], 2: [8 + 1, 0 + 9]}[p]
    scores = Magnitude(p=p).score(net, tiny_graph(axis), [axis])["axis"]
    assert scores.tolist() == pytest.approx([2 * value / sum(both) for value in both])
    only = Magnitude(p=p, writers_only=True).score(net, tiny_graph(axis), [axis])["axis"]
    assert only.tolist() == pytest.approx([2, 0])


def test_magnitude_has_mean_one_whatever_the_scale(convnet):
    before = convnet.score(Magnitude())
    with torch.no_grad():
        for parameter in convnet.model.parameters():
            parameter *= 10
    for name, values in convnet.score(Magnitude()).items():
        assert values.mean() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(values, before[name])


def test_writers_only_ignores_readers(convnet):
    axis, rule = convnet.axes[0], Magnitude(p=1, writers_only=True)
    before = convnet.score(rule, [axis])
    with torch.no_grad():
        convnet.model.fc.weight[:, 2] += 5
    assert torch.equal(convnet.score(rule, [axis])[axis.name], before[axis.name])


def test_norm_must_be_one_or_two():
    with pytest.raises(CriterionError, match="must be 1 or 2, got 3"):
        Magnitude(p=3)


def test_lamp_by_hand():
    assert lamp(torch.tensor([4.0, 1.0, 3.0])).tolist() == pytest.approx([1, 1 / 8, 3 / 7])


def test_lamp_of_nothing_still_keeps_one():
    assert lamp(torch.zeros(3)).tolist() == [0, 0, 1]


def test_best_unit_of_every_axis_has_lamp_one(case):
    for values in case.score(Lamp()).values():
        assert values.max() == 1
        assert (values == 1).sum() == 1


def test_lamp_keeps_the_order_of_magnitude(convnet):
    magnitudes = convnet.score(Magnitude())
    for name, values in convnet.score(Lamp()).items():
        assert torch.equal(values.argsort(), magnitudes[name].argsort())


def test_lamp_does_not_see_the_scale_of_an_axis(convnet):
    before = convnet.score(Lamp())
    with torch.no_grad():
        for parameter in convnet.model.parameters():
            parameter *= 7
    for name, values in convnet.score(Lamp()).items():
        torch.testing.assert_close(values, before[name])


def test_random_numbers_hang_on_seed_and_axis(convnet):
    first, second = convnet.score(Random(seed=0)), convnet.score(Random(seed=1))
    names = list(first)
    assert not torch.equal(first[names[0]], second[names[0]])
    assert not torch.equal(first[names[1]], first[names[2]])
    assert all((values < 1).all() for values in first.values())
