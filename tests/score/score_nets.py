"""Small networks for tests of criteria, and what is done to the units of their axes."""

from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_prune import analyze
from hf_prune.analyse.axes import Axis
from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.analyse.running import named_tensors
from hf_prune.analyse.trace import Recording


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ConvNet(nn.Module):
    """Residual, with a BatchNorm on every axis: the width of 16, and 32 channels inside each block."""

    def __init__(self, in_channels=1, width=16, hidden=32):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, hidden), nn.MaxPool2d(2), Block(width, hidden))
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        return self.fc(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


def random_convnet():
    """A net whose norms and biases are far from their trivial start, with statistics of real images."""
    torch.manual_seed(0)
    net = ConvNet()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1:
                spread = 0.3 * torch.randn_like(parameter)
                parameter.copy_(spread if name.endswith("bias") else 1 + spread.clamp(-0.9, 0.9))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        net.train()(digits()[0][:256])
    return net.eval()


class TwoLayers(nn.Module):
    """One axis with the rows of one layer: what reads them is zero and so says nothing about them."""

    def __init__(self, rows):
        super().__init__()
        self.first, self.second = nn.Linear(rows.shape[1], len(rows), bias=False), nn.Linear(len(rows), 2, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(rows)
            self.second.weight.zero_()

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


def scores_of_rows(criterion, rows):
    """Scores of units that are the given vectors."""
    net = TwoLayers(torch.as_tensor(rows, dtype=torch.float32))
    graph = analyze(net, torch.zeros(1, net.first.in_features))
    (scores,) = criterion.score(net, graph, list(graph.axes.values())).values()
    return scores


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits as `(N, 1, 8, 8)`, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)


def batches(num_images=64, batch_size=32):
    """The first digits, as a list of batches."""
    pixels, labels = digits()
    return [
        {"pixel_values": pixels[start : start + batch_size], "labels": labels[start : start + batch_size]}
        for start in range(0, num_images, batch_size)
    ]


def train_on_digits(net, num_steps=120):
    """Train for a few seconds, to an accuracy of more than 90 %."""
    pixels, labels = digits()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    net.train()
    for _ in range(num_steps):
        chosen = torch.randint(len(labels), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(pixels[chosen]), labels[chosen]).backward()
        optimizer.step()
    net.zero_grad()
    return net.eval()


@torch.no_grad()
def loss_on(net, data):
    losses = [F.cross_entropy(net(b["pixel_values"]), b["labels"], reduction="sum") for b in data]
    return torch.stack(losses).sum().item() / sum(len(b["labels"]) for b in data)


@torch.no_grad()
def loss_without(net, axis: AxisInfo, units, data, scale=0.0):
    """The loss when nothing (or only a part) of some units passes on to what reads them."""
    parameters = dict(net.named_parameters())
    before = {reader.name: parameters[reader.name].clone() for reader in axis.readers}
    for reader in axis.readers:
        index = torch.isin(reader.units, torch.as_tensor(units)).nonzero().flatten()
        parameters[reader.name].movedim(reader.dim, 0)[index] *= scale
    loss = loss_on(net, data)
    for name, weight in before.items():
        parameters[name].copy_(weight)
    return loss


@torch.no_grad()
def permute_units(model, axis: AxisInfo, order):
    """Put the units of an axis in another order everywhere: the same function of the input."""
    tensors = named_tensors(model)
    for slice_ in axis.slices:
        index = torch.arange(len(slice_.units))
        places = [(slice_.units == unit).nonzero().flatten() for unit in range(axis.size)]
        for new, old in enumerate(order.tolist()):
            index[places[new]] = places[old]
        tensor = tensors[slice_.name]
        tensor.copy_(tensor.index_select(slice_.dim, index))


@torch.no_grad()
def kill_unit(model, axis: AxisInfo, unit):
    """Zero what produces a unit: weights, biases, and the scale and shift of norms."""
    parameters = dict(model.named_parameters())
    for slice_ in axis.writers + axis.carriers:
        if slice_.name in parameters:
            parameters[slice_.name].movedim(slice_.dim, 0)[slice_.units == unit] = 0


def tiny_graph(axis: AxisInfo) -> AxisGraph:
    """A graph that holds one axis made by hand."""
    return AxisGraph({axis.name: axis}, {}, Recording({}), nn.Identity(), None, {})


def axis_of(size, writers=(), readers=(), carriers=()) -> AxisInfo:
    """An axis made by hand."""
    slices = {"writers": tuple(writers), "readers": tuple(readers), "carriers": tuple(carriers)}
    facts = {"name": "axis", "kind": "other", "size": size, "leaf": Axis(size), "inexact": None, "num_params": 0}
    return AxisInfo(**facts, **slices, can_gate=bool(readers))
