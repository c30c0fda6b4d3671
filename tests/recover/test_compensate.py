import copy

import pytest
import timm
import torch
from tiny_models import build_dense, pixel_batch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune import Plan, analyze, apply_plan
from hf_prune.errors import CompensationError
from hf_prune.recover.compensate import compensated


def pruned(model, graph, plan, data, **settings):
    """A compensated and cut copy."""
    model = copy.deepcopy(model)
    with compensated(model, graph, plan, data, **settings):
        record = apply_plan(model, plan, graph)
    return model, record


@torch.no_grad()
def error_of(model, dense, x):
    return float((model(x) - dense(x)).square().mean() / dense(x).var())


def plain_cut(model, graph, plan):
    model = copy.deepcopy(model)
    apply_plan(model, plan, graph)
    return model


def linear_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 5)).eval()


def conv_net(*, norm=False, bias=True):
    """The middle channels are linear in four inputs, so four of them can speak for all."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 12, 1), nn.Conv2d(12, 6, 3, stride=2, bias=bias)]
    layers += [nn.BatchNorm2d(6)] if norm else []
    net = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 3)).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net


def first_axis(graph, size):
    return next(name for name, axis in graph.axes.items() if axis.size == size)


def batches(x, size=64):
    return [{"pixel_values": part} for part in x.split(size)]


def test_linear_combinations_of_kept_units_are_lost_without_a_trace():
    net, x = linear_net(), torch.randn(300, 4)
    graph = analyze(net, x[:1])
    plan = Plan.of(graph, {first_axis(graph, 12): range(6)})
    model, record = pruned(net, graph, plan, batches(x))
    assert error_of(plain_cut(net, graph, plan), net, x) > 0.1
    assert error_of(model, net, torch.randn(50, 4)) < 1e-6
    assert record.difference is not None
    assert record.difference < 1e-4


@pytest.mark.parametrize("kind", ["bias", "norm"])
def test_convolution_is_fitted_with_its_constant(kind):
    # Without a bias of its own, the constant goes to the norm behind it.
    net, x = conv_net(norm=kind == "norm", bias=kind == "bias"), torch.randn(100, 4, 9, 9)
    x = x[..., :8, :8]
    graph = analyze(net, x[:1])
    plan = Plan.of(graph, {first_axis(graph, 12): range(2, 8)})
    model, _ = pruned(net, graph, plan, batches(x))
    assert error_of(plain_cut(net, graph, plan), net, x) > 0.1
    assert error_of(model, net, torch.randn(20, 4, 8, 8)) < 1e-5


@pytest.mark.parametrize("how", ["mean", "least_squares"])
def test_constant_units_go_into_the_bias(how):
    net, x = linear_net(), torch.randn(300, 4)
    with torch.no_grad():
        net[0].weight[6:] = 0
    graph = analyze(net, x[:1])
    plan = Plan.of(graph, {first_axis(graph, 12): range(6)})
    model, _ = pruned(net, graph, plan, batches(x), how=how)
    assert error_of(plain_cut(net, graph, plan), net, x) > 1e-2
    assert error_of(model, net, torch.randn(50, 4)) < 1e-6


def test_error_of_a_reader_is_that_of_the_least_squares_solution():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 5)).eval(), torch.randn(400, 8)
    graph = analyze(net, x[:1])
    kept = [0, 3, 4, 7, 9]
    plan = Plan.of(graph, {first_axis(graph, 12): kept})
    with torch.no_grad():
        inputs, wanted = net[:2](x)[:, kept], net(x)
        affine = torch.cat([inputs, torch.ones(len(x), 1)], 1)
        best = affine @ torch.linalg.lstsq(affine, wanted).solution
        optimum = float((best - wanted).square().mean() / wanted.var())
    fitted = error_of(pruned(net, graph, plan, batches(x))[0], net, x)
    shifted = error_of(pruned(net, graph, plan, batches(x), how="mean")[0], net, x)
    assert fitted == pytest.approx(optimum, rel=1e-2)
    assert fitted < shifted < error_of(plain_cut(net, graph, plan), net, x)


def vit():
    model = build_dense("vit")
    return model, analyze(model), [{"pixel_values": pixel_batch(16, seed=seed)} for seed in range(4)]


@torch.no_grad()
def logits_error(model, dense, data):
    pairs = [(model(**batch).logits, dense(**batch).logits) for batch in data]
    return float(sum((found - wanted).square().sum() for found, wanted in pairs))


@pytest.mark.parametrize("kind", ["heads", "mlp", "embed"])
def test_units_of_a_transformer_are_compensated(kind):
    # A head is a block of channels; an embedding width has many readers, behind norms that see it as a whole.
    model, graph, data = vit()
    axes = [axis for axis in graph.axes.values() if axis.kind == kind]
    plan = Plan.of(graph, {axis.name: range(axis.size // 2) for axis in axes})
    for how in ("mean", "least_squares"):
        found, _ = pruned(model, graph, plan, data, how=how)
        assert logits_error(found, model, data) < 0.9 * logits_error(plain_cut(model, graph, plan), model, data)


def test_removed_head_that_repeats_another_is_taken_over():
    model, graph, data = vit()
    axis = graph.axes["vit.layers.0.attention.heads"]
    size = 48 // axis.size
    attention = model.get_submodule("vit.layers.0.attention")
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            for tensor in attention.get_submodule(name).parameters():
                tensor[size : 2 * size] = tensor[:size]
    plan = Plan.of(graph, {axis.name: [0, *range(2, axis.size)]})
    found, _ = pruned(model, graph, plan, data)
    assert logits_error(found, model, data) < 1e-4 * logits_error(plain_cut(model, graph, plan), model, data)


def test_transformers_conv1d_is_fitted():
    torch.manual_seed(0)
    net, x = nn.Sequential(Conv1D(12, 4), Conv1D(5, 12)).eval(), torch.randn(300, 4)
    nn.init.normal_(net[0].weight)
    nn.init.normal_(net[1].weight)
    graph = analyze(net, x[:1])
    plan = Plan.of(graph, {first_axis(graph, 12): range(6)})
    assert error_of(pruned(net, graph, plan, batches(x))[0], net, torch.randn(50, 4)) < 1e-6


def test_timm_resnet_loses_less_and_still_equals_its_silenced_twin():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    x = torch.randn(24, 3, 64, 64)
    graph = analyze(model, x[:1])
    axes = [axis for axis in graph.axes.values() if axis.kind == "channels"]
    plan = Plan.of(graph, {axis.name: range(axis.size // 2) for axis in axes})
    found, record = pruned(model, graph, plan, batches(x, 8))
    assert record.difference is not None
    assert error_of(found, model, x) < 0.5 * error_of(plain_cut(model, graph, plan), model, x)


def test_constant_of_a_removed_branch_stays():
    model, graph, data = vit()
    plan = Plan.removing(graph, "vit.layers.1.mlp")
    found, _ = pruned(model, graph, plan, data)
    assert logits_error(found, model, data) < 0.9 * logits_error(plain_cut(model, graph, plan), model, data)


class Odd(nn.Module):
    """Layers that cannot be fitted by themselves: one runs twice, two share a weight, one is grouped."""

    def __init__(self):
        super().__init__()
        self.inner, self.twice = nn.Linear(4, 12), nn.Linear(12, 12)
        self.first, self.second = nn.Linear(12, 6, bias=False), nn.Linear(12, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.twice(self.twice(self.inner(x)).relu())
        return self.first(x) + self.second(x.relu())


def test_layers_that_run_twice_or_share_weights_are_left_alone():
    torch.manual_seed(0)
    net, x = Odd().eval(), torch.randn(200, 4)
    graph = analyze(net, x[:1])
    plan = Plan.of(graph, {first_axis(graph, 12): range(6)})
    before = copy.deepcopy(net.state_dict())
    with compensated(net, graph, plan, batches(x)):
        after = copy.deepcopy(net.state_dict())
        apply_plan(net, plan, graph)
    for name in ("twice.weight", "twice.bias", "first.weight"):
        assert torch.equal(before[name], after[name])


class Mixer(nn.Module):
    """A layer that takes channels for positions."""

    def __init__(self):
        super().__init__()
        self.inner, self.mix, self.out = nn.Linear(4, 12), nn.Linear(7, 7), nn.Linear(12, 3)

    def forward(self, x):
        return self.out(self.mix(self.inner(x).transpose(1, 2)).transpose(1, 2))


def test_layer_that_sees_cut_channels_as_positions_is_left_alone():
    torch.manual_seed(0)
    net, x = Mixer().eval(), torch.randn(100, 7, 4)
    graph = analyze(net, x[:1])
    plan, mix = Plan.of(graph, {first_axis(graph, 12): range(6)}), net.mix.weight.detach().clone()
    model, _ = pruned(net, graph, plan, batches(x))
    assert torch.equal(model.mix.weight, mix)
    # Its bias differs from place to place, so that nothing behind it can make up for all.
    assert error_of(model, net, x) < 0.1 * error_of(plain_cut(net, graph, plan), net, x)


def test_few_positions_fit_no_more_than_the_bias():
    net, x = linear_net(), torch.randn(20, 4)
    graph = analyze(net, x[:1])
    plan, weight = Plan.of(graph, {first_axis(graph, 12): range(6)}), net[1].weight[:, :6].detach().clone()
    model, _ = pruned(net, graph, plan, batches(x))
    assert torch.equal(model[1].weight, weight)
    assert error_of(model, net, x) < error_of(plain_cut(net, graph, plan), net, x)


def facts(model):
    return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.parametrize("when", ["body", "data", "copy"])
def test_model_is_left_as_it_was_if_something_fails(when):
    net, x = conv_net(norm=True), torch.randn(40, 4, 8, 8)
    graph = analyze(net, x[:1])
    plan = Plan.of(graph, {first_axis(graph, 12): range(6)})
    net.train()
    net[1].eval()
    state, before = copy.deepcopy(net.state_dict()), facts(net)

    def data():
        yield x, None
        if when == "data":
            raise OSError("the disk is gone")

    def fail_in_the_cut_copy(*_):
        if net[1].weight.ne(state["1.weight"]).any():
            raise OSError("out of memory")

    def cut_and_fail():
        with compensated(net, graph, plan, data()):
            assert when == "body"
            assert not torch.equal(net[1].weight, state["1.weight"])
            raise OSError("no space")

    handle = net[5].register_forward_pre_hook(fail_in_the_cut_copy) if when == "copy" else None
    message = {"body": "no space", "data": "the disk is gone", "copy": "out of memory"}[when]
    with pytest.raises(OSError, match=message):
        cut_and_fail()
    if handle is not None:
        handle.remove()
    assert facts(net) == before
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_labels_play_no_part_but_mark_what_could_not_be_read():
    net, x = linear_net(), torch.randn(300, 4)
    graph = analyze(net, x[:1])
    plan = Plan.of(graph, {first_axis(graph, 12): range(6)})
    plain, _ = pruned(net, graph, plan, batches(x, 300))
    spoilt = torch.cat([x, torch.full((5, 4), 1e6)])
    labels = torch.cat([torch.arange(300), torch.full((5,), -1)])
    marked, _ = pruned(net, graph, plan, [(spoilt, labels)])
    assert torch.equal(plain[1].weight, marked[1].weight)


def test_data_that_do_not_fit_are_an_error():
    net = linear_net()
    graph = analyze(net, torch.zeros(1, 4))
    plan = Plan.of(graph, {first_axis(graph, 12): range(6)})
    for data, message in ((None, "got no data"), ([], "at least one image"), ([{"images": 1}], "got .'images'.")):
        with pytest.raises(CompensationError, match=message), compensated(net, graph, plan, data):
            raise AssertionError("unreachable")
    message = "'mean' or 'least_squares', got 'median'"
    with pytest.raises(CompensationError, match=message), compensated(net, graph, plan, [], how="median"):
        raise AssertionError("unreachable")
