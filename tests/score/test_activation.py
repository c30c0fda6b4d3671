import pytest
import torch
from torch import nn

from hf_prune import analyze
from hf_prune.errors import CriterionError
from hf_prune.score.activation import Activation


def captured(model, path, data):
    """What arrives at a layer, over all batches."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in data:
            model(batch["pixel_values"])
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("statistic", ["mean_abs", "rms"])
def test_channel_scores_are_what_arrives_at_the_next_convolution(statistic, convnet):
    axis, x = convnet.axis_of("blocks.0.conv1.weight"), captured(convnet.model, "blocks.0.conv2", convnet.data)
    expected = x.abs().mean((0, 2, 3)) if statistic == "mean_abs" else x.square().mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(convnet.score(Activation(statistic=statistic))[axis.name], expected)


def test_batches_of_different_size_count_by_their_images(convnet):
    whole = convnet.score(Activation())
    images = torch.cat([batch["pixel_values"] for batch in convnet.data])
    parts = [{"pixel_values": part} for part in images.split([1, 50, 13])]
    for name, values in convnet.score(Activation(), data=parts).items():
        torch.testing.assert_close(values, whole[name])


def test_axis_with_several_readers_is_their_mean(convnet):
    axis = convnet.axis_of("fc.weight", 1)
    paths = [reader.name.removesuffix(".weight") for reader in axis.readers]
    assert len(paths) == 3
    means = []
    for path in paths:
        x = captured(convnet.model, path, convnet.data).abs()
        means.append(x.mean([d for d in range(x.ndim) if d != 1]))
    torch.testing.assert_close(convnet.score(Activation())[axis.name], torch.stack(means).mean(0))


def test_heads_and_neurons_of_a_transformer(vit_net):
    scores = vit_net.score(Activation())
    x = captured(vit_net.model, "vit.layers.2.attention.o_proj", vit_net.data).abs()
    torch.testing.assert_close(scores["vit.layers.2.attention.heads"], x.unflatten(-1, (4, 12)).mean((0, 1, 3)))
    x = captured(vit_net.model, "vit.layers.2.mlp.fc2", vit_net.data).abs()
    torch.testing.assert_close(scores["vit.layers.2.mlp.hidden"], x.mean((0, 1)))


def test_queries_and_keys_are_seen_where_they_are_written(vit_net):
    (axis,) = (axis for axis in vit_net.axes if axis.name == "vit.layers.0.attention.head_dim")
    assert not axis.readers
    means = []
    for name in ("q_proj", "k_proj"):
        module, seen = vit_net.model.get_submodule(f"vit.layers.0.attention.{name}"), []
        handle = module.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.detach()))
        with torch.no_grad():
            for batch in vit_net.data:
                vit_net.model(batch["pixel_values"])
        handle.remove()
        means.append(torch.cat(seen).abs().unflatten(-1, (4, 12)).mean((0, 1, 2)))
    torch.testing.assert_close(vit_net.score(Activation(), [axis])[axis.name], torch.stack(means).mean(0))


def test_grouped_convolution_reads_the_same_unit_of_every_group():
    net = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 1, groups=3), nn.Flatten(), nn.Linear(216, 2))
    graph = analyze(net, torch.zeros(1, 1, 8, 8))
    data = [{"pixel_values": torch.randn(5, 1, 8, 8)}]
    x = captured(net, "2", data).abs().mean((0, 2, 3))
    axes = [a for a in graph.axes.values() if any((r.name, len(r.units)) == ("2.weight", 4) for r in a.readers)]
    assert [axis.size for axis in axes] == [4]
    scores = Activation().score(net, graph, axes, data)[axes[0].name]
    torch.testing.assert_close(scores, x.view(3, 4).mean(0))


def test_channels_behind_a_flatten_are_read_at_all_positions():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    graph = analyze(net, torch.zeros(1, 1, 8, 8))
    data = [{"pixel_values": torch.randn(5, 1, 8, 8)}]
    (axis,) = graph.axes.values()
    expected = captured(net, "1", data).relu().mean((0, 2, 3))
    torch.testing.assert_close(Activation().score(net, graph, [axis], data)[axis.name], expected)


class Functional(nn.Module):
    """Its layers never run as modules."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.first.weight).relu(), self.second.weight)


def test_layers_that_do_not_run_as_modules_are_an_error():
    net = Functional()
    graph = analyze(net, torch.zeros(1, 4))
    with pytest.raises(CriterionError, match=r"must see what arrives at the layers of an axis.*'hidden'.*use 'taylor'"):
        Activation().score(net, graph, list(graph.axes.values()), [{"pixel_values": torch.randn(2, 4)}])


def test_unknown_statistic_is_an_error():
    with pytest.raises(CriterionError, match="'mean_abs' or 'rms', got 'max'"):
        Activation(statistic="max")
