"""The softmax scale of a cut model is the dense one, wherever its code takes it from."""

import math

import pytest
import torch
import torch.nn.functional as F
from nets import of_order_one
from torch import nn

from hf_prune.allocate.plan import Plan
from hf_prune.pipeline import analyze, apply_plan

TOKENS = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(0))


def given_nothing(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def given_a_scale(q, k, v):
    return F.scaled_dot_product_attention(query=q, key=k, value=v, scale=1 / math.sqrt(q.size(-1)))


def divided(q, k, v):
    return (q @ k.mT / math.sqrt(k.shape[-1])).softmax(-1) @ v


def multiplied(q, k, v):
    return ((k.shape[-1] ** -0.5 * q) @ k.mT).softmax(-1) @ v


def in_place(q, k, v):
    scores = q @ k.mT
    scores *= q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v


class Attention(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend, self.num_heads = attend, 4
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def net(attend):
    torch.manual_seed(0)
    return of_order_one(nn.Sequential(Attention(attend), Attention(attend), nn.Linear(24, 5)))


def axis_named(graph, name):
    (found,) = (axis for axis in graph.axes.values() if any(s.name == name and s.dim == 0 for s in axis.writers)
                and axis.kind == "head_dim")  # fmt: skip
    return found


@pytest.mark.parametrize("attend", [given_nothing, given_a_scale, divided, multiplied, in_place])
def test_the_scale_stays(attend):
    model = net(attend)
    graph = analyze(model, TOKENS)
    width = axis_named(graph, "0.k.weight")
    assert width.size == 6
    record = apply_plan(model, Plan.of(graph, {width.name: [0, 2, 5]}), graph)
    assert record.difference < 1e-5
    scales = [value for calls in record.repairs.calls.values() for row in calls.values() for value in row.values()]
    assert [value for value in scales if isinstance(value, float)] == [
        pytest.approx(6**-0.5 if attend is not divided else 6**0.5)
    ]
    assert list(record.repairs.calls) == ["0"]
    model.train()(TOKENS).sum().backward()


def test_other_widths_leave_the_scale_alone():
    model = net(given_nothing)
    graph = analyze(model, TOKENS)
    values = axis_named(graph, "1.v.weight")
    record = apply_plan(model, Plan.of(graph, {values.name: [1, 4]}), graph)
    assert record.difference < 1e-5
    assert record.repairs.calls == {}
