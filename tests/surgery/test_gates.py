import accelerate
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from nets import network, of_order_one

from hf_prune.allocate.plan import Plan
from hf_prune.errors import PlanError
from hf_prune.pipeline import analyze, apply_plan
from hf_prune.surgery.gates import add_gates, fold_gates, norm_scales

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return network(["residual", "attention", "gated", "grouped"], flatten=True)


def test_open_gates_change_nothing_and_closed_ones_are_the_cut(model):
    expected = model(IMAGE)
    graph = analyze(model, IMAGE[:1])
    gates = add_gates(model, graph)
    assert set(gates) == {name for name, axis in graph.axes.items() if axis.can_gate}
    assert torch.allclose(model(IMAGE), expected, atol=1e-6)
    kept = {name: range(axis.size // 2) for name, axis in graph.axes.items() if name in gates and axis.size > 1}
    with torch.no_grad():
        for name, units in kept.items():
            gates[name].values[len(units) :] = 0
    gated = model(IMAGE)
    fold_gates(model)
    assert torch.allclose(model(IMAGE), gated, atol=1e-6)
    apply_plan(model, Plan.of(graph, kept), graph)
    assert torch.allclose(model(IMAGE), gated, atol=1e-5)


def test_folding_any_values_is_exact_and_leaves_a_plain_model(model):
    keys = set(model.state_dict())
    gates = add_gates(model, analyze(model, IMAGE[:1]))
    with torch.no_grad():
        for gate in gates.values():
            gate.values.uniform_(-1, 2)
    gated = model(IMAGE)
    fold_gates(model)
    assert set(model.state_dict()) == keys
    assert torch.allclose(model(IMAGE), gated, atol=1e-5, rtol=1e-5)
    with pytest.raises(PlanError, match="no gates"):
        fold_gates(model)


def test_the_gradient_of_a_gate_is_the_sum_of_weight_times_gradient_over_its_readers(model):
    graph = analyze(model, IMAGE[:1])
    names = [name for name, axis in graph.axes.items() if axis.can_gate]
    model(IMAGE).square().sum().backward()
    expected = {}
    params = dict(model.named_parameters())
    for name in names:
        total = torch.zeros(graph.axes[name].size + 1)
        for s in graph.axes[name].readers:
            product = (params[s.name] * params[s.name].grad).movedim(s.dim, 0).flatten(1).sum(1).detach()
            total.index_add_(0, torch.where(s.units < 0, graph.axes[name].size, s.units), product)
        expected[name] = total[:-1]
    model.zero_grad()
    gates = add_gates(model, graph)
    model(IMAGE).square().sum().backward()
    for name, gate in gates.items():
        torch.testing.assert_close(gate.values.grad, expected[name], rtol=1e-3, atol=1e-3 * expected[name].abs().max())


def test_gates_train_under_accelerate_and_bfloat16():
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                                    image_size=16, patch_size=8, num_labels=5)  # fmt: skip
    model = of_order_one(transformers.ViTForImageClassification(config))
    gates = add_gates(model, analyze(model))
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss = prepared(pixel_values=torch.randn(2, 3, 16, 16)).logits.float().square().sum()
    accelerator.backward(loss)
    optimizer.step()
    moved = [gate for gate in gates.values() if not torch.equal(gate.values, torch.ones_like(gate.values))]
    assert len(moved) == len(gates)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_gates_compile(model):
    gates = add_gates(model, analyze(model, IMAGE[:1]))
    with torch.no_grad():
        next(iter(gates.values())).values.mul_(0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-4)


def test_batch_norm_scales_are_found():
    model = network(["conv"])
    graph = analyze(model, IMAGE[:1])
    scales = [norm_scales(model, axis) for axis in graph.axes.values()]
    assert [len(found) for found in scales] == [1] * len(graph.axes)
    assert scales[0][0] is model[0][1].weight


def test_axes_without_readers_are_refused(model):
    graph = analyze(model, IMAGE[:1])
    with pytest.raises(PlanError, match="read by layers alone"):
        add_gates(model, graph, ["no.such.axis"])
    width = next(name for name, axis in graph.axes.items() if axis.kind == "head_dim")
    with pytest.raises(PlanError, match="read by layers alone"):
        add_gates(model, graph, [width])
    add_gates(model, graph)
    with pytest.raises(PlanError, match="already"):
        add_gates(model, graph)
