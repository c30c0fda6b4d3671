import pytest
import torch
from scipy.stats import spearmanr
from score_nets import digits
from torch import nn

from hf_prune import analyze
from hf_prune.errors import CriterionError
from hf_prune.score.bn_scale import BnScale, expected_relu
from hf_prune.score.magnitude import Magnitude


def test_score_is_the_mean_scale_of_all_norms_on_the_axis(convnet):
    net, scores = convnet.model, convnet.score(BnScale())
    inner, width = net.blocks[0].bn1.weight, [net.bn.weight, net.blocks[0].bn2.weight, net.blocks[2].bn2.weight]
    inner_axis, width_axis = convnet.axis_of("blocks.0.conv1.weight"), convnet.axis_of("stem.weight")
    torch.testing.assert_close(scores[inner_axis.name], inner.abs().detach())
    torch.testing.assert_close(scores[width_axis.name], torch.stack(width).abs().mean(0).detach())


def test_expected_relu_is_what_sampling_gives():
    mean, deviation = torch.tensor([-1.0, 0.0, 0.7, 2.0]), torch.tensor([0.5, 1.0, 2.0, 0.1])
    x = mean[:, None] + deviation[:, None] * torch.randn(4, 400_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(expected_relu(mean, deviation), x.relu().mean(1), rtol=0.02, atol=2e-4)
    assert expected_relu(mean, deviation)[0] == pytest.approx(0.0042, abs=1e-4)


def test_expected_relu_of_no_deviation_is_relu():
    mean = torch.tensor([-2.0, 0.0, 3.0])
    torch.testing.assert_close(expected_relu(mean, torch.zeros(3)), mean.relu())


def test_expectation_follows_measured_activations(trained):
    measured = []
    with torch.no_grad():
        block = trained.model.blocks[0]
        handle = block.bn1.register_forward_hook(lambda _m, _i, out: measured.append(out.relu().mean((0, 2, 3))))
        trained.model(digits()[0][:500])
        handle.remove()
    name = trained.axis_of("blocks.0.conv1.weight").name
    expected = trained.score(BnScale(statistic="expected_relu"))[name]
    assert spearmanr(expected, measured[0]).statistic > 0.8


def test_expectation_sees_a_norm_that_shifts_a_channel_dead(convnet):
    name = convnet.axis_of("blocks.0.conv1.weight").name
    with torch.no_grad():
        convnet.model.blocks[0].bn1.weight[4], convnet.model.blocks[0].bn1.bias[4] = 3.0, -20.0
    assert convnet.score(BnScale())[name].argmax() == 4
    assert convnet.score(BnScale(statistic="expected_relu"))[name].argmin() == 4


def mixed():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 12),
                        nn.ReLU(), nn.Linear(12, 3))  # fmt: skip
    with torch.no_grad():
        net[1].weight.uniform_(0.1, 0.3)
    return net, analyze(net, torch.zeros(1, 1, 8, 8))


def test_axis_without_batch_norm_is_an_error_that_says_what_to_do():
    net, graph = mixed()
    with pytest.raises(CriterionError, match=r"1 of 2 have none \('hidden'\); .*BnScale\(fallback=Magnitude\(\)\)"):
        BnScale().score(net, graph, list(graph.axes.values()))


def test_fallback_scores_axes_without_batch_norm_at_the_level_of_the_others():
    net, graph = mixed()
    axes = list(graph.axes.values())
    scores = BnScale(fallback=Magnitude()).score(net, graph, axes)
    (name,) = (axis.name for axis in axes if axis.kind == "mlp")
    (channels,) = (values for axis, values in scores.items() if axis != name)
    assert scores[name].mean() == pytest.approx(float(channels.mean()), rel=1e-5)
    assert torch.equal(scores[name].argsort(), Magnitude().score(net, graph, axes)[name].argsort())


def test_unknown_statistic_is_an_error():
    with pytest.raises(CriterionError, match="'scale' or 'expected_relu', got 'mean'"):
        BnScale(statistic="mean")
