import pytest
import torch
from torch import nn

from hf_prune import analyze
from hf_prune.analyse.graph import Slice
from hf_prune.errors import CriterionError
from hf_prune.score.base import layer_rows, relative, unit_rows
from hf_prune.score.magnitude import Magnitude


def test_rows_of_an_output_dimension_are_the_rows():
    weight = torch.randn(4, 3)
    assert torch.equal(unit_rows(weight, Slice("w", 0, torch.arange(4)), 4), weight)


def test_rows_of_an_input_dimension_are_the_columns():
    weight = torch.randn(4, 3, 2, 2)
    rows = unit_rows(weight, Slice("w", 1, torch.arange(3)), 3)
    assert torch.equal(rows, weight.transpose(0, 1).reshape(3, -1))


def test_rows_of_a_head_are_all_its_indices():
    weight = torch.arange(12.0).view(6, 2)
    rows = unit_rows(weight, Slice("w", 0, torch.tensor([0, 0, 0, 1, 1, 1])), 2)
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_rows_of_interleaved_units_and_without_those_of_another_axis():
    weight = torch.arange(7.0)
    rows = unit_rows(weight, Slice("w", 0, torch.tensor([-1, 0, 1, 2, 0, 1, 2])), 3)
    assert rows.tolist() == [[1, 4], [2, 5], [3, 6]]


def test_rows_are_float32_and_carry_no_gradient():
    weight = nn.Parameter(torch.randn(2, 2, dtype=torch.bfloat16))
    rows = unit_rows(weight, Slice("w", 0, torch.arange(2)), 2)
    assert rows.dtype == torch.float32
    assert not rows.requires_grad


def test_every_entry_of_a_real_axis_is_in_one_row(case):
    tensors = {**dict(case.model.named_parameters()), **dict(case.model.named_buffers())}
    for axis in case.axes:
        for member in axis.slices:
            tensor = tensors[member.name].float()
            rows = unit_rows(tensor, member, axis.size)
            kept = tensor.movedim(member.dim, 0)[member.units >= 0]
            torch.testing.assert_close(rows.sum(), kept.sum(), rtol=1e-4, atol=1e-3)
            for unit in (0, axis.size - 1):
                expected = tensor.movedim(member.dim, 0)[member.units == unit].flatten()
                assert torch.equal(rows[unit], expected)


def test_weight_and_bias_of_a_layer_are_one_row():
    layer = nn.Linear(3, 4)
    (rows,) = layer_rows(layer, [Slice("weight", 0, torch.arange(4)), Slice("bias", 0, torch.arange(4))], 4)
    assert torch.equal(rows, torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach())


def test_buffers_are_no_weights(convnet):
    axis = convnet.axis_of("stem.weight")
    names = [member.name for member in axis.carriers]
    assert any(name.endswith("running_mean") for name in names)
    assert [rows.shape[1] for rows in layer_rows(convnet.model, axis.carriers, axis.size)] == [2, 2, 2]


def test_relative_values_have_mean_one_and_zeros_stay():
    assert relative(torch.tensor([1.0, 3.0])).tolist() == [0.5, 1.5]
    assert relative(torch.zeros(3)).tolist() == [0, 0, 0]


def test_analysis_of_another_model_is_an_error():
    large = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    small = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = analyze(large, torch.zeros(1, 3))
    with pytest.raises(CriterionError, match=r"should have 8 entries and its shape is \(6, 3\); analyze the model"):
        Magnitude().score(small, graph, list(graph.axes.values()))


def test_infinite_weights_are_an_error(convnet):
    with torch.no_grad():
        convnet.model.stem.weight[0] = float("inf")
    with pytest.raises(CriterionError, match=r"'magnitude' gave .* for a unit of 'channels'"):
        convnet.score(Magnitude())
