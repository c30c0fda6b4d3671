"""What the comparison with the silenced twin sees, and in which precision."""

import copy

import pytest
import torch
from nets import network, of_order_one
from test_scales import TOKENS, Attention, divided, given_nothing
from torch import nn

from hf_prune.allocate.plan import Plan
from hf_prune.pipeline import analyze, apply_plan, plan
from hf_prune.surgery.verify import in_double

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_half_precision_is_compared_in_double():
    model = network(["conv", "residual"]).bfloat16()
    dense = copy.deepcopy(model)
    graph = analyze(model, IMAGE.bfloat16())
    record = apply_plan(model, plan(model, graph=graph, keep_ratio=0.5), graph)
    assert record.difference < 1e-9
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    values = {float(value) for tensor in dense.parameters() for value in tensor.flatten()}
    assert all(float(value) in values for tensor in model.parameters() for value in tensor.flatten())


def test_double_comes_back_to_the_bit():
    model = network(["conv"])
    before = copy.deepcopy(model.state_dict())
    with in_double(model):
        assert model(IMAGE.double()).dtype is torch.float64
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype is after[name].dtype for name in before)


def test_a_shared_layer_is_silenced_wherever_it_is_used():
    class Refined(nn.Module):
        """Two heads that share their first layer under different names."""

        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(2))
            self.second[0].weight, self.second[0].bias = self.first[0].weight, self.first[0].bias

        def forward(self, x):
            return self.first(x), self.second(x.flip(1))

    model = of_order_one(Refined())
    graph = analyze(model, TOKENS)
    (axis,) = graph.axes.values()
    assert axis.size == 16
    assert apply_plan(model, Plan.of(graph, {axis.name: [3, 5, 11]}), graph).difference < 1e-5
    assert model.second[0].weight is model.first[0].weight


@pytest.mark.parametrize("attend", [given_nothing, divided])
def test_scales_outlive_a_second_cut(attend):
    torch.manual_seed(0)
    once = of_order_one(nn.Sequential(Attention(attend), nn.Linear(24, 5)))
    twice = copy.deepcopy(once)
    for model, cuts in ((once, [[0, 5]]), (twice, [[0, 2, 5], [0, 2]])):
        for kept in cuts:
            graph = analyze(model, TOKENS)
            width = next(a for a in graph.axes.values() if any(s.name == "0.k.weight" and s.dim == 0 for s in a.writers)
                         and a.kind == "head_dim")  # fmt: skip
            apply_plan(model, Plan.of(graph, {width.name: kept}), graph)
    assert torch.allclose(once(TOKENS), twice(TOKENS), atol=1e-5)
