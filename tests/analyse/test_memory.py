"""Models that remember things between runs are traced as they run every time, and are left as they were."""

import functools

import pytest
import torch
from torch import nn

from hf_prune.pipeline import analyze, prune

IMAGE = torch.zeros(1, 3, 8, 8)


@functools.lru_cache
def ramp(size, device):
    return torch.arange(size, device=device) / size


class Remembering(nn.Module):
    """Adds a ramp to its input, computed once."""

    def __init__(self, *, how):
        super().__init__()
        self.how, self.table, self.tables = how, None, {}
        self.body, self.head = nn.Conv2d(3, 12, 3), nn.Linear(12, 5)
        self.empty = nn.Parameter(torch.empty(1, 0, 12))

    def forward(self, x):
        if self.how == "in a function":
            table = ramp(x.shape[-1], x.device)
        elif self.how == "in a dictionary":
            table = (
                self.tables[x.device]
                if x.device in self.tables
                else torch.arange(x.shape[-1], device=x.device) / x.shape[-1]
            )
            self.tables[x.device] = table
        else:
            if self.table is None:
                made = torch.arange(x.shape[-1], device=x.device) / x.shape[-1]
                if self.how == "in a buffer":
                    del self.table
                    self.register_buffer("table", made)
                else:
                    self.table = made
            table = self.table
        tokens = torch.cat([self.empty.expand(len(x), -1, -1), self.body(x + table).flatten(2).transpose(1, 2)], 1)
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("how", ["in a function", "in an attribute", "in a buffer", "in a dictionary"])
def test_what_is_computed_once_does_not_stand_in_the_way(how):
    ramp.cache_clear()
    model = Remembering(how=how)
    assert analyze(model, IMAGE).axes["body.channels"].size == 12
    prune(model, IMAGE, keep_ratio=0.5)
    assert (model.body.out_channels, model.empty.shape) == (6, (1, 0, 6))
    assert (model.table, model.tables) == (None, {})
    assert "table" not in model._buffers
    assert model(torch.ones(2, 3, 8, 8)).isfinite().all()


class Forgetting(nn.Module):
    """Keeps a table of its weights until its mode is set, as attention biases are kept."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 12), nn.Linear(12, 5)
        self.scale, self.tables = nn.Parameter(torch.rand(12)), {}

    def train(self, mode=True):
        self.tables = {}
        return super().train(mode)

    def forward(self, x):
        return self.head(self.body(x) * self.tables.setdefault("scale", self.scale.exp()))


def test_a_table_made_before_pruning_is_forgotten():
    model = Forgetting().eval()
    with torch.no_grad():
        model(torch.zeros(1, 3))
    prune(model, torch.zeros(1, 3), keep_ratio=0.5)
    assert model(torch.ones(2, 3)).shape == (2, 5)
