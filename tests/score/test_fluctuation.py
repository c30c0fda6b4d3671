import pytest
import torch
from torch import nn

from hf_prune import analyze
from hf_prune.errors import CriterionError
from hf_prune.score.fluctuation import Fluctuation


def scored(net, images, num_parts=1):
    """Scores of the only axis of a net."""
    graph = analyze(net, torch.zeros_like(images[:1]))
    (axis,) = graph.axes.values()
    data = [{"pixel_values": part} for part in images.chunk(num_parts)]
    return Fluctuation().score(net, graph, [axis], data)[axis.name]


def two_linears():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3))
        net[1].weight.copy_(torch.tensor([[1.0, 2.0, 10.0], [1.0, 0.0, 10.0]]))
    return net


@pytest.mark.parametrize("num_parts", [1, 4])
def test_variance_times_squared_norm_by_hand(num_parts):
    # Variances 4, 1 and 0 (a constant, though large); squared norms 2, 4 and 200: energies 8, 4 and 0, of mean 4.
    x = torch.tensor([[2.0, 1.0, 5.0], [-2.0, -1.0, 5.0], [2.0, -1.0, 5.0], [-2.0, 1.0, 5.0]])
    torch.testing.assert_close(scored(two_linears(), x, num_parts), torch.tensor([2.0, 1.0, 0.0]))


def test_a_large_mean_does_not_hide_a_small_variance():
    x = torch.tensor([[0.1, 0.0, 0.0], [-0.1, 0.0, 0.0]]) + torch.tensor([1000.0, 1000.0, 1000.0])
    torch.testing.assert_close(scored(two_linears(), x, 2), torch.tensor([3.0, 0.0, 0.0]), rtol=1e-2, atol=1e-2)


def test_kernel_positions_of_a_convolution_add_up():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 2))
    graph, x = analyze(net, torch.zeros(1, 1, 8, 8)), torch.randn(6, 1, 8, 8)
    axis = next(axis for axis in graph.axes.values() if axis.size == 4)
    energy = net[0](x).var((0, 2, 3), correction=0) * net[1].weight.square().sum((0, 2, 3))
    scores = Fluctuation().score(net, graph, [axis], [{"pixel_values": x}])[axis.name]
    torch.testing.assert_close(scores, (energy / energy.mean()).detach())


def test_the_channels_of_a_head_add_up(vit_net):
    seen = []
    layer = vit_net.model.get_submodule("vit.layers.2.attention.o_proj")
    handle = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in vit_net.data:
            vit_net.model(batch["pixel_values"])
    handle.remove()
    energy = torch.cat(seen).var((0, 1), correction=0) * layer.weight.detach().square().sum(0)
    energy = energy.view(4, 12).sum(1)
    scores = vit_net.score(Fluctuation())["vit.layers.2.attention.heads"]
    torch.testing.assert_close(scores, energy / energy.mean())


def test_grouped_convolution_counts_the_weights_of_each_group():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 1, groups=3), nn.Flatten(), nn.Linear(216, 2))
    graph, x = analyze(net, torch.zeros(1, 1, 8, 8)), torch.randn(5, 1, 8, 8)
    axis = next(a for a in graph.axes.values() if any((r.name, len(r.units)) == ("2.weight", 4) for r in a.readers))
    variances = net[1](net[0](x)).var((0, 2, 3), correction=0).view(3, 4)
    weights = net[2].weight[:, :, 0, 0].square().view(3, 2, 4).sum(1)
    energy = (variances * weights).sum(0).detach()
    scores = Fluctuation().score(net, graph, [axis], [{"pixel_values": x}])[axis.name]
    torch.testing.assert_close(scores, energy / energy.mean())


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.first.weight).relu(), self.second.weight)


def test_layers_that_do_not_run_as_modules_are_an_error():
    with pytest.raises(CriterionError, match=r"must see what arrives at the layers of an axis.*use 'taylor'"):
        scored(Functional(), torch.randn(2, 4))
