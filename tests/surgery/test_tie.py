"""Widths that code takes for one are tied rather than frozen."""

import pytest
import torch
from nets import of_order_one
from torch import nn

from hf_prune.analyse.axes import resolve
from hf_prune.pipeline import analyze, apply_plan, plan

TOKENS = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    """Torch's own transformer layers, whose attention takes the width of its input for heads times their width."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.layers(self.embed(x) if hasattr(self, "embed") else x).mean(1))


class Embedded(Encoder):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(24, 24)


def test_heads_go_with_the_width_around_them():
    torch.manual_seed(0)
    model = of_order_one(Embedded())
    graph = analyze(model, TOKENS)
    (heads,) = (axis for axis in graph.axes.values() if axis.kind == "heads")
    assert heads.size == 4
    touched = {s.name for s in heads.slices}
    assert {"embed.weight", "head.weight", "layers.layers.2.norm2.weight"} <= touched
    assert all(f"layers.layers.{i}.self_attn.in_proj_weight" in touched for i in range(3))
    record = apply_plan(model, plan(model, graph=graph, keep_ratio=0.5), graph)
    assert record.params[1] < 0.4 * record.params[0]
    attention = model.layers.layers[1].self_attn
    assert (attention.embed_dim, attention.num_heads, attention.head_dim) == (12, 2, 6)
    assert model(torch.cat([TOKENS, TOKENS])).shape == (2, 5)


def test_what_cannot_be_tied_is_frozen():
    graph = analyze(of_order_one(Encoder()), TOKENS)
    assert {axis.kind for axis in graph.axes.values()} == {"mlp"}
    assert all(resolve(axis.leaf) is axis.leaf for axis in graph.axes.values())


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_of_a_learned_query(need_weights):
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.query = nn.Linear(24, 16), nn.Parameter(torch.randn(1, 1, 16))
            self.pool, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 5)

        def forward(self, x):
            x = self.embed(x)
            return self.head(self.pool(self.query.expand(len(x), -1, -1), x, x, need_weights=need_weights)[0])

    model = of_order_one(Pool())
    graph = analyze(model, TOKENS)
    record = apply_plan(model, plan(model, graph=graph, keep_ratio=0.5), graph)
    assert (model.pool.num_heads, model.pool.embed_dim, model.embed.out_features) == (2, 8, 8)
    if need_weights:  # the weights that it also returns are averaged over heads
        assert record.not_exact == ["heads: the model averages or sums over its units"]
    else:
        assert record.difference < 1e-5
