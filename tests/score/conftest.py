"""Networks, their analysis and their data."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from score_nets import batches, random_convnet, train_on_digits
from tiny_models import build_dense, pixel_batch
from torch import nn

from hf_prune import analyze
from hf_prune.analyse.graph import AxisGraph, AxisInfo


@dataclass
class Case:
    model: nn.Module
    graph: AxisGraph
    data: list

    @property
    def axes(self) -> Sequence[AxisInfo]:
        return list(self.graph.axes.values())

    @property
    def has_batch_norm(self) -> bool:
        return any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules())

    def score(self, criterion, axes=None, data=None):
        return criterion.score(self.model, self.graph, axes or self.axes, data or self.data)

    def axis_of(self, parameter, dim=0) -> AxisInfo:
        """The axis along a dimension of a parameter."""
        return next(axis for axis in self.axes if (parameter, dim) in {(s.name, s.dim) for s in axis.slices})

    def copy(self) -> "Case":
        """The same with a model of its own."""
        return replace(self, model=copy.deepcopy(self.model))


@cache
def convnet_case() -> Case:
    net = random_convnet()
    return Case(net, analyze(net, torch.zeros(1, 1, 8, 8)), batches())


@cache
def vit_case() -> Case:
    model = build_dense("vit")
    data = [{"pixel_values": pixel_batch(4, seed=seed), "labels": torch.arange(4)} for seed in range(2)]
    return Case(model, analyze(model), data)


@pytest.fixture
def convnet() -> Case:
    """A CNN of random weights; its axes are the residual width and the channels inside each block."""
    return convnet_case().copy()


@pytest.fixture
def vit_net() -> Case:
    return vit_case().copy()


@pytest.fixture(params=[convnet_case, vit_case], ids=["convnet", "vit"])
def case(request) -> Case:
    return request.param().copy()


@pytest.fixture(scope="session")
def trained() -> Case:
    """Trained on digits; tests must leave it as it is."""
    net = train_on_digits(random_convnet())
    return Case(net, convnet_case().graph, batches(256, 32))
