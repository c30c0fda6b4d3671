"""Networks and derivatives for tests of saliencies, computed in another way than by them."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from hf_prune.score.gradients import gate_slices


class Mlp(nn.Module):
    """Layers of the given widths with a function between them."""

    def __init__(self, *widths, function=F.relu, bias=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(widths))
        self.function = function

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.function(layer(x))
        return self.layers[-1](x)


def mlp(*widths, seed=0, function=F.relu, bias=False, dtype=torch.float64):
    """A network in double precision with the variance of signals kept, and an image for it."""
    torch.manual_seed(seed)
    net = Mlp(*widths, function=function, bias=bias).to(dtype)
    for layer in net.layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return net, torch.zeros(1, widths[0], dtype=dtype)


def points(num_points, width, num_classes, seed=1, dtype=torch.float64):
    """One batch of random points with random labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(num_points, width, generator=generator, dtype=dtype)
    return [(pixels, torch.randint(num_classes, (num_points,), generator=generator))]


def in_double(case):
    """A case with its model and images in double precision."""
    case.model.double()
    case.data = [{**batch, "pixel_values": batch["pixel_values"].double()} for batch in case.data]
    return case


def gated_weights(case, gates):
    """The weights, with the slices that read a unit times its gate, as a function of the gates."""
    weights = {name: parameter.detach() for name, parameter in case.model.named_parameters()}
    for axis in case.axes:
        if axis.name in gates:
            factors = torch.cat([gates[axis.name], torch.ones(1, dtype=gates[axis.name].dtype)])
            for s in gate_slices(axis):
                if s.name in weights:
                    shape = [-1 if d == s.dim else 1 for d in range(weights[s.name].ndim)]
                    weights[s.name] = weights[s.name] * factors[s.units].view(shape)
    return weights


def ones_for(axes):
    return {axis.name: torch.ones(axis.size, dtype=torch.float64, requires_grad=True) for axis in axes}


def mean_loss(case, weights, temperature=1.0, data=None):
    """The mean cross-entropy of all images together."""
    data = data or case.data
    pixels = torch.cat([batch["pixel_values"] for batch in data])
    labels = torch.cat([batch["labels"] for batch in data])
    output = functional_call(case.model, weights, (pixels,))
    return F.cross_entropy(getattr(output, "logits", output) / temperature, labels)
