"""A cut model equals its silenced twin, costs what was predicted, and any failure leaves the dense one untouched."""

import copy
import random

import pytest
import timm
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nets import BLOCKS, network, of_order_one, random_network
from torch import nn

from hf_prune.allocate.plan import Plan
from hf_prune.analyse.cost import Cost
from hf_prune.errors import PlanError, SurgeryError
from hf_prune.measure.token_cost import count_macs
from hf_prune.pipeline import analyze, apply_plan

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cut_randomly(model, random_, *, inputs=IMAGE, kinds=None):
    """Cut every free axis at random and return the record and how the silenced dense model answers."""
    graph = analyze(model, inputs)
    kept = {}
    for name, axis in graph.axes.items():
        if kinds is None or axis.kind in kinds:
            kept[name] = random_.sample(range(axis.size), random_.randint(1, axis.size))
    return graph, apply_plan(model, Plan.of(graph, kept), graph)


def check(model, record, inputs=IMAGE):
    assert record.params[1] == sum(parameter.numel() for parameter in model.parameters())
    assert record.macs[1] == count_macs(lambda: model(inputs))
    assert record.difference is not None or record.not_exact
    again = Cost.of(analyze(model, inputs))
    assert (again.params({}), again.macs({})) == (record.params[1], record.macs[1])
    model.train()
    out = model(torch.cat([inputs, inputs + 0.1]))
    (out if isinstance(out, torch.Tensor) else out.logits).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_cut_to_equality(block):
    model = network([block])
    graph, record = cut_randomly(model, random.Random(1))
    assert record.params[1] < record.params[0]
    assert not any("no rule" in reason for reason in graph.frozen.values())
    check(model, record)


@settings(max_examples=25)
@given(st.randoms(use_true_random=False), st.integers(1, 4))
def test_random_networks_are_cut_to_equality(random_, num_blocks):
    _, model = random_network(random_, num_blocks)
    graph = analyze(model, IMAGE)
    assume(graph.axes)
    kept = {name: random_.sample(range(a.size), random_.randint(1, a.size - 1)) for name, a in graph.axes.items()}
    check(model, apply_plan(model, Plan.of(graph, kept), graph))


def test_heads_are_cut_where_the_code_computes_sizes_for_itself():
    model = network(["attention", "attention"])
    graph = analyze(model, IMAGE)
    heads = [name for name, axis in graph.axes.items() if axis.kind == "heads"]
    assert len(heads) == 2
    record = apply_plan(model, Plan.of(graph, {heads[0]: [1, 3]}), graph)
    assert record.difference < 1e-5
    assert any(record.repairs.calls.values())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IMAGE), model(IMAGE))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18", "convnext_atto"])
def test_published_architectures(name):
    settings_ = {"img_size": 64, "window_size": 4} if "swin" in name else {"img_size": 64} if "vit" in name else {}
    model = of_order_one(timm.create_model(name, num_classes=10, **settings_))
    inputs = torch.randn(1, 3, 64, 64)
    _, record = cut_randomly(model, random.Random(0), inputs=inputs, kinds=("heads", "mlp", "channels", "groups"))
    assert record.difference is not None
    assert record.difference < 1e-4
    check(model, record, inputs)


def test_the_head_dimension_of_transformers_models_keeps_the_dense_scale():
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                                    image_size=32, patch_size=8, num_labels=5)  # fmt: skip
    model = of_order_one(transformers.ViTForImageClassification(config))
    graph = analyze(model)
    (first, *_) = [name for name, axis in graph.axes.items() if axis.kind == "head_dim"]
    record = apply_plan(model, Plan.of(graph, {first: range(7)}), graph)
    assert record.difference < 1e-5


def test_a_plan_of_another_model_is_refused():
    small, large = analyze(network(["conv"]), IMAGE), network(["wide conv"])
    name = next(name for name, axis in small.axes.items() if axis.size == 12)
    plan = Plan.of(small, {name: [0, 1]})
    with pytest.raises(PlanError, match="must be of this model"):
        apply_plan(large, plan, analyze(large, IMAGE))
    with pytest.raises(PlanError, match=r"no axis .* did you mean"):
        Plan.of(small, {name + "s": [0]})
    with pytest.raises(PlanError, match="must be integers from 0"):
        Plan.of(small, {name: [99]})
    with pytest.raises(PlanError, match="removes nothing"):
        apply_plan(network(["conv"]), Plan({}, {}), small)
    with pytest.raises(PlanError, match="part of the model's output"):
        Plan.of(small, {next(name for name, why in small.frozen.items() if "output" in why): [0]})


def test_a_failed_verification_leaves_the_model_as_it_was(monkeypatch):
    model = network(["residual", "attention"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numbers = {path: dict(vars(module)) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    graph = analyze(model, IMAGE)
    plan = Plan.of(graph, {name: range(axis.size // 2) for name, axis in graph.axes.items() if axis.kind != "other"})
    monkeypatch.setattr("hf_prune.pipeline.require_equal", lambda *_: (_ for _ in ()).throw(SurgeryError("differs")))
    expected = model(IMAGE)
    with pytest.raises(SurgeryError, match="differs"):
        apply_plan(model, plan, graph)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(IMAGE), expected)
    for path, module in model.named_modules():
        if path in numbers:
            assert module.out_channels == numbers[path]["out_channels"]


def test_verification_notices_a_wrong_cut(monkeypatch):
    from hf_prune.surgery import apply

    model = network(["conv"])
    graph = analyze(model, IMAGE)
    name = next(name for name, axis in graph.axes.items() if axis.size == 12)
    original = apply.slice_tensor

    def wrong(tensor, indices):
        rolled = [index.roll(1) if len(index) == 6 and tensor.ndim == 4 else index for index in indices]
        return original(tensor, rolled)

    monkeypatch.setattr(apply, "slice_tensor", wrong)
    with pytest.raises(SurgeryError, match="differ by"):
        apply_plan(model, Plan.of(graph, {name: range(6)}), graph)


def test_shared_weights_are_cut_once_and_stay_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.middle = nn.Linear(8, 8)
            self.again = self.middle
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            return self.last(torch.relu(self.again(torch.relu(self.middle(torch.relu(self.first(x)))))))

    model, inputs = Shared().eval(), torch.randn(1, 6)
    graph = analyze(model, inputs)
    (name,) = graph.axes
    record = apply_plan(model, Plan.of(graph, {name: [0, 2, 5]}), graph)
    assert model.again.weight is model.middle.weight
    assert model.middle.weight.shape == (3, 3)
    assert record.difference < 1e-6


def test_pruning_twice_is_the_composed_plan():
    once, twice = network(["conv", "residual"]), network(["conv", "residual"])
    graph = analyze(twice, IMAGE)
    first = Plan.of(graph, {name: range(1, axis.size) for name, axis in graph.axes.items()})
    apply_plan(twice, first, graph)
    smaller = analyze(twice, IMAGE)
    assert list(smaller.axes) == list(graph.axes)
    second = Plan.of(smaller, {name: range(0, axis.size, 2) for name, axis in smaller.axes.items()})
    apply_plan(twice, second, smaller)
    apply_plan(once, first.then(second), graph)
    assert torch.equal(once(IMAGE), twice(IMAGE))
    assert Plan.from_json(first.to_json()) == first
