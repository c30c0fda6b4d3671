"""SNIP: derivatives of gates."""

import pytest
import timm
import torch
import torch.nn.functional as F
from saliency_nets import gated_weights, in_double, mean_loss, mlp, ones_for, points
from score_nets import ConvNet, digits
from torch import nn

from hf_prune import Budget, analyze, prune
from hf_prune.errors import CriterionError, HfPruneWarning
from hf_prune.score.parts import Units
from hf_prune.score.registry import criterion
from hf_prune.score.snip import Snip
from hf_prune.score.taylor import Taylor
from hf_prune.surgery.gates import add_gates


def rated(rule, model, data, image=None):
    graph = analyze(model, image)
    return graph, rule.rate(model, Units(graph, list(graph.axes.values())), data)


def test_scores_are_derivatives_of_gates(case):
    in_double(case)
    gates = ones_for(case.axes)
    mean_loss(case, gated_weights(case, gates)).backward()
    scores = Snip().rate(case.model, Units(case.graph, case.axes), case.data)
    for axis in case.axes:
        expected = gates[axis.name].grad.abs()
        torch.testing.assert_close(scores[axis.name].double(), expected, rtol=1e-6, atol=1e-7 * float(expected.max()))


def test_scores_are_gradients_of_the_gates_that_models_are_given(convnet):
    """Those of `surgery.gates`, on channels of convolutions."""
    scores = convnet.score(Snip())
    gates = add_gates(convnet.model, convnet.graph)
    pixels, labels = (torch.cat([batch[key] for batch in convnet.data]) for key in ("pixel_values", "labels"))
    F.cross_entropy(convnet.model(pixels), labels).backward()
    for name, gate in gates.items():
        largest = float(scores[name].max())
        torch.testing.assert_close(scores[name], gate.values.grad.abs(), rtol=1e-4, atol=1e-5 * largest)


def test_absolute_value_comes_last(case):
    """Neither over batches, as in Taylor, nor over weights."""
    scores, per_batch, abs_sum = (case.score(rule) for rule in (Snip(), Taylor(), Snip(form="abs_sum")))
    for name, values in scores.items():
        assert (values <= per_batch[name] * 1.0001 + 1e-9).all()
        assert (values <= abs_sum[name] * 1.0001 + 1e-9).all()
        assert values.mean() < 0.9 * abs_sum[name].mean()
    mean_first = case.score(Taylor(abs_per_batch=False))
    for name, values in scores.items():
        torch.testing.assert_close(values, mean_first[name], rtol=1e-3, atol=1e-5 * float(values.max()))


def weight_times_gradient(case):
    mean_loss(case, dict(case.model.named_parameters())).backward()
    return {name: (p * p.grad).detach() for name, p in case.model.named_parameters()}


def test_heads_are_rated_by_what_reads_and_by_what_makes_them_and_not_by_queries_and_keys(vit_net):
    in_double(vit_net)
    products, scores = weight_times_gradient(vit_net), vit_net.score(Snip())
    heads = [axis for axis in vit_net.axes if axis.kind == "heads"]
    assert len(heads) == 6
    for axis in heads:
        (reader,) = axis.readers
        path = reader.name.removesuffix("o_proj.weight")
        by_head = lambda name: products[path + name].reshape(4, -1).sum(1)  # noqa: B023, E731
        values = by_head("v_proj.weight") + by_head("v_proj.bias")
        readers = products[reader.name].unflatten(1, (4, -1)).sum((0, 2))
        torch.testing.assert_close(readers, values, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(scores[axis.name].double(), readers.abs(), rtol=1e-5, atol=1e-8)
        queries = by_head("q_proj.weight") + by_head("q_proj.bias")
        keys = by_head("k_proj.weight") + by_head("k_proj.bias")
        torch.testing.assert_close(queries, keys, rtol=1e-7, atol=1e-12)
        assert (queries.abs() - readers.abs()).abs().max() > 0.1 * readers.abs().max()


@pytest.mark.parametrize(("function", "is_homogeneous"), [(F.relu, True), (F.gelu, False)])
def test_what_makes_a_unit_says_the_same_where_the_function_is_homogeneous(function, is_homogeneous):
    net, image = mlp(6, 12, 10, 4, function=function, bias=True)
    data = points(40, 6, 4)
    graph, scores = rated(Snip(), net, data, image)
    F.cross_entropy(net(data[0][0]), data[0][1]).backward()
    for layer, axis in zip(net.layers, graph.axes.values(), strict=False):
        inside = (layer.weight * layer.weight.grad).sum(1) + layer.bias * layer.bias.grad
        difference = (scores[axis.name].double() - inside.detach().abs()).abs().max()
        assert (difference < 1e-7) if is_homogeneous else (difference > 1e-2 * inside.abs().max())


def fresh_convnet():
    torch.manual_seed(0)
    return ConvNet()


def test_norms_that_have_seen_nothing_normalise_by_the_batch():
    """As in training; their statistics do not move."""
    net = fresh_convnet()
    graph, scores = rated(Snip(), net, [tuple(t[:64] for t in digits())], torch.zeros(1, 1, 8, 8))
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(not norm.running_mean.any() and not norm.num_batches_tracked for norm in norms)
    gates = add_gates(net.train(), graph)
    F.cross_entropy(net(digits()[0][:64]), digits()[1][:64]).backward()
    for name, gate in gates.items():
        torch.testing.assert_close(scores[name], gate.values.grad.abs(), rtol=1e-3, atol=1e-6)


def test_norms_that_have_seen_data_use_their_statistics():
    net = fresh_convnet()
    net(digits()[0][:256])
    graph, scores = rated(Snip(), net, [tuple(t[:64] for t in digits())], torch.zeros(1, 1, 8, 8))
    gates = add_gates(net.eval(), graph)
    F.cross_entropy(net(digits()[0][:64]), digits()[1][:64]).backward()
    for name, gate in gates.items():
        torch.testing.assert_close(scores[name], gate.values.grad.abs(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "force"])
def test_branches_that_start_at_zero_are_said_to_be_silent(name):
    net = fresh_convnet()
    for module in net.modules():
        if hasattr(module, "bn2"):
            nn.init.zeros_(module.bn2.weight)
    with pytest.warns(
        HfPruneWarning, match=rf"nothing in 2 of 3 \('blocks.0.*any difference to '{name}'.*zero_init_last"
    ):
        rated(criterion(name), net, [tuple(t[:32] for t in digits())], torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "force"])
@pytest.mark.parametrize("model", ["test_vit", "test_efficientnet"])
def test_models_are_cut_by_saliencies(model, name):
    torch.manual_seed(0)
    model = timm.create_model(model, num_classes=5)
    num_before = sum(p.numel() for p in model.parameters())
    data = [(torch.randn(4, *model.default_cfg["input_size"]), torch.arange(4))]
    rule = criterion(name)
    rule = type(rule)(steps=3) if hasattr(rule, "steps") else rule
    prune(model, budget=Budget(params=0.6), criterion=rule, allocator="global_rank", data=data)
    assert 0.4 < sum(p.numel() for p in model.parameters()) / num_before <= 0.6


@pytest.mark.parametrize("name", ["grasp", "force"])
def test_infinite_losses_and_missing_labels_are_errors(name, convnet):
    images, labels = torch.full((2, 1, 8, 8), float("inf")), torch.tensor([0, 1])
    with pytest.raises(CriterionError, match="the loss must be finite, got nan"):
        convnet.score(criterion(name), data=[(images, labels)])
    with pytest.raises(CriterionError, match="needs labels"):
        convnet.score(criterion(name), data=[{"pixel_values": torch.zeros(2, 1, 8, 8)}])


def test_unknown_form_is_an_error():
    with pytest.raises(CriterionError, match="must be one of gate, abs_sum, got 'magnitude'"):
        Snip(form="magnitude")
