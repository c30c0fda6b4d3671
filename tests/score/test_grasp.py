"""GraSP: what removing a part does to the squared norm of the gradient."""

import pytest
import torch
import torch.nn.functional as F
from saliency_nets import gated_weights, in_double, mean_loss, mlp, ones_for, points
from scipy.stats import spearmanr

from hf_prune.errors import CriterionError
from hf_prune.score.grasp import Grasp
from hf_prune.score.parts import Units, Weights, prunable_weights
from hf_prune.score.snip import Snip
from hf_prune.surgery.weight_masks import weight_masks

TEMPERATURE = 2.0


def shares_of(scores):
    """What the score was made of: x + sqrt(x^2 + 1) -> x."""
    return {name: (score.double() - 1 / score.double()) / 2 for name, score in scores.items()}


@pytest.fixture(scope="module")
def small():
    """A network of 172 weights, its data, and what each weight's removal does to the squared norm of the gradient."""
    net, _ = mlp(6, 10, 8, 4, function=torch.tanh, seed=3)
    data = points(60, 6, 4)

    def squared_norm():
        loss = F.cross_entropy(net(data[0][0]) / TEMPERATURE, data[0][1])
        return sum(g.square().sum() for g in torch.autograd.grad(loss, list(net.parameters()))).item()

    base, changes = squared_norm(), {}
    for name, weight in net.named_parameters():
        changes[name] = torch.zeros_like(weight)
        for index in range(weight.numel()):
            before = weight.data.flatten()[index].item()
            weight.data.view(-1)[index] = 0
            changes[name].view(-1)[index] = squared_norm() - base
            weight.data.view(-1)[index] = before
    return net, data, base, changes


def rated_weights(rule, net, data):
    return rule.rate(net, Weights({name: w.numel() for name, w in prunable_weights(net).items()}), data)


def flat(values):
    return torch.cat([v.detach().flatten() for v in values.values()])


def test_scores_are_of_second_order_and_signed(small):
    net, data, base, changes = small
    shares = flat(shares_of(rated_weights(Grasp(temperature=TEMPERATURE), net, data)))
    predicted = -shares * base / len(shares)
    assert len(shares) >= 160
    correlation = torch.corrcoef(torch.stack([predicted, flat(changes)]))[0, 1]
    assert correlation > 0.7
    # To first order the change is the prediction itself, not its double.
    slope = (predicted * flat(changes)).sum() / predicted.square().sum()
    assert 0.7 < slope < 1.4
    assert abs(spearmanr(shares, flat(rated_weights(Snip(), net, data))).statistic) < 0.5


def test_small_steps_towards_zero_change_what_is_predicted(small):
    """The derivative itself, without the error of a whole step: every weight a little smaller."""
    net, data, base, _ = small
    shares = shares_of(rated_weights(Grasp(temperature=TEMPERATURE), net, data))

    def squared_norm(name, index, step):
        weights = {key: w.detach().clone() for key, w in net.named_parameters()}
        weights[name].view(-1)[index] *= 1 - step
        leaves = {key: w.requires_grad_() for key, w in weights.items()}
        logits = torch.func.functional_call(net, leaves, (data[0][0],)) / TEMPERATURE
        gradients = torch.autograd.grad(F.cross_entropy(logits, data[0][1]), list(leaves.values()))
        return sum(g.square().sum() for g in gradients).item()

    for name, share in shares.items():
        for index in range(0, share.numel(), 9):
            slope = (squared_norm(name, index, 1e-5) - squared_norm(name, index, -1e-5)) / 2e-5
            expected = -share.flatten()[index].item() * base / len(flat(shares))
            assert slope == pytest.approx(expected, rel=1e-5, abs=1e-9 * base)


def test_weights_that_gradients_need_are_kept(small):
    net, data, _, changes = small
    kept = flat(weight_masks(net, Grasp(temperature=TEMPERATURE), 0.5, data))
    assert kept.sum() == 86
    # What is kept lowers the norm when it goes; what is not raises it.
    assert flat(changes)[kept].mean() < 0 < flat(changes)[~kept].mean()


def test_order_is_that_of_ascending_saliency(small):
    net, data, _, _ = small
    scores = rated_weights(Grasp(temperature=TEMPERATURE), net, data)
    assert (flat(scores) > 0).all()
    assert flat(scores).argsort().tolist() == flat(shares_of(scores)).argsort().tolist()


def test_units_are_derivatives_of_gates_on_the_flow_of_gradients(case):
    """Heads and neurons of a ViT, channels of a CNN: half the derivative of g g by a gate, with its sign."""
    in_double(case)
    gates = ones_for(case.axes)
    weights = gated_weights(case, gates)
    seen = {name: weights[name] for name in prunable_weights(case.model)}
    for name in seen:
        if not seen[name].requires_grad:
            seen[name] = weights[name] = seen[name].clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = mean_loss(case, weights, temperature=200.0)
        gradients = torch.autograd.grad(loss, list(seen.values()), create_graph=True)
    flow = sum(g.square().sum() for g in gradients)
    slopes = torch.autograd.grad(flow, list(gates.values()))
    shares = shares_of(Grasp().rate(case.model, Units(case.graph, case.axes), case.data))
    num_units = sum(axis.size for axis in case.axes)
    for (name, share), slope in zip(shares.items(), slopes, strict=True):
        expected = num_units * slope / flow.detach()
        torch.testing.assert_close(share, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())), name


def test_micro_batches_equal_the_full_batch(case):
    in_double(case)
    everything = [{key: torch.cat([batch[key] for batch in case.data]) for key in ("pixel_values", "labels")}]
    parts = Units(case.graph, case.axes)
    full = Grasp(micro_batch_size=1000).rate(case.model, parts, everything)
    for rule, data in ((Grasp(micro_batch_size=3), everything), (Grasp(micro_batch_size=5), case.data)):
        for name, values in rule.rate(case.model, parts, data).items():
            torch.testing.assert_close(values, full[name], rtol=1e-5, atol=1e-7)


def test_graph_of_one_micro_batch_is_in_memory_at_a_time(convnet):
    sizes = []
    convnet.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    convnet.score(Grasp(micro_batch_size=12))
    assert sizes == [11, 11, 10] * 4


def test_data_that_come_once_are_gone_through_twice(convnet):
    expected, found = convnet.score(Grasp()), convnet.score(Grasp(), data=iter(convnet.data))
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_dead_units_count_as_without_influence(convnet):
    axis = convnet.axes[1]
    with torch.no_grad():
        for norm in ("bn1.weight", "bn1.bias"):
            convnet.model.blocks[0].get_parameter(norm)[5] = 0
    assert convnet.score(Grasp())[axis.name][5] == 1


def test_settings_and_gradients_that_vanish_are_errors(convnet):
    with pytest.raises(CriterionError, match="must be positive, got 0 and 16"):
        Grasp(temperature=0)
    with pytest.raises(CriterionError, match=r"must be positive, got 200\.0 and 0"):
        Grasp(micro_batch_size=0)
    for parameter in convnet.model.parameters():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(CriterionError, match="the gradient must not vanish"):
        convnet.score(Grasp())
