"""Criteria in units of the loss."""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from score_nets import loss_on, loss_without

from hf_prune.errors import CriterionError
from hf_prune.score.fisher import Fisher
from hf_prune.score.gradients import gate_slices, unit_products
from hf_prune.score.random import Random
from hf_prune.score.registry import criterion
from hf_prune.score.taylor import Taylor


def gate_derivatives(case, axis, data):
    """d loss / d gate by central differences, gates scaling the slices of what reads a unit."""
    step = 1e-4
    scaled = lambda unit, by: loss_without(case.model, axis, [unit], data, scale=by)  # noqa: E731
    slopes = [(scaled(unit, 1 + step) - scaled(unit, 1 - step)) / (2 * step) for unit in range(axis.size)]
    return torch.tensor(slopes)


def test_taylor_is_the_derivative_of_a_gate(convnet):
    convnet.model.double()
    data = [{**batch, "pixel_values": batch["pixel_values"].double()} for batch in convnet.data]
    scores = convnet.score(Taylor(), data=data)
    for axis in convnet.axes:
        slopes = [gate_derivatives(convnet, axis, [batch]).abs() for batch in data]
        torch.testing.assert_close(scores[axis.name], torch.stack(slopes).mean(0).float(), rtol=5e-3, atol=1e-5)


def test_gate_of_queries_and_keys_is_at_their_writers(vit_net):
    for axis in vit_net.axes:
        meets = any(s.name.endswith("q_proj.weight") and s.dim == 0 for s in axis.slices) and axis.kind == "head_dim"
        assert gate_slices(axis) == (axis.writers if meets else axis.readers)


def per_image_gates(case, axis):
    """`(images, size)`: d loss of one image / d gate, from activations: the sum over positions of x * dloss/dx."""
    gates = []
    for batch in case.data:
        kept, handles = [], []
        for reader in axis.readers:
            module = case.model.get_submodule(reader.name.removesuffix(".weight"))

            def keep(_module, args, kept=kept):
                # A copy of its own: what else the input is for, such as a residual path, is not this reader's.
                kept.append(args[0].clone())
                kept[-1].retain_grad()
                return (kept[-1],)

            handles.append(module.register_forward_pre_hook(keep))
        logits = case.model(batch["pixel_values"])
        F.cross_entropy(logits, batch["labels"], reduction="sum").backward()
        for handle in handles:
            handle.remove()
        products = [(x * x.grad).detach() for x in kept]
        gates.append(sum(p.flatten(2).sum(2) if p.ndim > 2 else p for p in products))
    case.model.zero_grad()
    return torch.cat(gates)


def test_fisher_is_the_activation_fisher(convnet):
    scores = convnet.score(Fisher())
    for axis in convnet.axes:
        gates = per_image_gates(convnet, axis)
        torch.testing.assert_close(scores[axis.name], gates.square().mean(0) / 2, rtol=1e-3, atol=1e-9)


def test_fisher_is_not_the_square_of_the_mean_gradient(convnet):
    scores = convnet.score(Fisher())
    for axis in convnet.axes:
        wrong = per_image_gates(convnet, axis).mean(0).square() / 2
        assert (scores[axis.name] > 1.5 * wrong).float().mean() > 0.9


def test_fisher_does_not_depend_on_how_images_are_batched(convnet):
    scores = convnet.score(Fisher())
    images = torch.cat([batch["pixel_values"] for batch in convnet.data])
    labels = torch.cat([batch["labels"] for batch in convnet.data])
    for name, values in convnet.score(Fisher(), data=zip(images.split(7), labels.split(7), strict=True)).items():
        torch.testing.assert_close(values, scores[name], rtol=1e-4, atol=1e-10)


def test_elements_by_hand(convnet):
    axis = convnet.axis_of("blocks.0.conv1.weight")
    layer, reader, norm = (convnet.model.blocks[0].get_submodule(name) for name in ("conv1", "conv2", "bn1"))
    image, label = convnet.data[0]["pixel_values"][:1], convnet.data[0]["labels"][:1]
    weights = [layer.weight, reader.weight, norm.weight, norm.bias]
    gradients = torch.autograd.grad(F.cross_entropy(convnet.model(image), label), weights)
    products = [(w * g).detach() for w, g in zip(weights, gradients, strict=True)]
    products[1] = products[1].transpose(0, 1)
    rows = torch.cat([product.reshape(32, -1) for product in products], dim=1)
    data = [(image, label)]
    for rule, expected in (
        (Taylor(form="elements"), rows.abs().sum(1)),
        (Taylor(form="group"), rows.sum(1).abs()),
        (Fisher(form="elements"), rows.square().sum(1) / 2),
    ):
        torch.testing.assert_close(convnet.score(rule, [axis], data)[axis.name], expected, rtol=1e-4, atol=1e-9)


def test_absolute_values_of_batches_are_more_than_those_of_their_mean(trained):
    per_batch, of_mean = trained.score(Taylor()), trained.score(Taylor(abs_per_batch=False))
    for name, values in per_batch.items():
        assert (values >= of_mean[name] - 1e-6).all()
        assert values.mean() > 1.05 * of_mean[name].mean()


def test_batches_count_by_their_images(convnet):
    batch, images = convnet.data[0], 32
    small = {name: tensor[:8] for name, tensor in batch.items()}
    both, large, few = (convnet.score(Taylor(), data=data) for data in ([batch, small], [batch], [small]))
    for name, values in both.items():
        torch.testing.assert_close(values, (large[name] * images + few[name] * 8) / (images + 8))


@pytest.fixture(scope="module")
def ablation(trained):
    """Rise of the loss when one unit is silenced, of every axis."""
    base = loss_on(trained.model, trained.data)
    return {
        axis.name: torch.tensor(
            [loss_without(trained.model, axis, [unit], trained.data) - base for unit in range(axis.size)]
        )
        for axis in trained.axes
    }


@pytest.mark.parametrize(
    "rule",
    [Taylor(), Taylor(form="group"), Taylor(form="elements"), Fisher(), Fisher(form="elements")],
    ids=["taylor", "taylor-group", "taylor-elements", "fisher", "fisher-elements"],
)
def test_scores_follow_the_measured_loss_of_single_units(rule, trained, ablation):
    scores = trained.score(rule)
    all_scores, all_rises = torch.cat(list(scores.values())), torch.cat([ablation[name] for name in scores])
    assert len(all_scores) >= 64
    assert spearmanr(all_scores, all_rises).statistic > 0.5


def loss_without_share(trained, scores, *, lowest):
    """Mean over axes of the loss without the lowest- or highest-scored fifth of an axis."""
    losses = []
    for axis in trained.axes:
        units = scores[axis.name].topk(axis.size // 5, largest=not lowest).indices
        losses.append(loss_without(trained.model, axis, units, trained.data))
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def loss_of_chance(trained):
    chosen = [trained.score(Random(seed=seed)) for seed in range(12)]
    return sum(loss_without_share(trained, scores, lowest=True) for scores in chosen) / len(chosen)


@pytest.mark.parametrize("name", ["taylor", "fisher", "magnitude", "activation", "whc", "lamp", "bn_scale"])
def test_lowest_fifth_hurts_less_than_highest_and_than_random(name, trained, loss_of_chance):
    scores = trained.score(criterion(name))
    low, high = (loss_without_share(trained, scores, lowest=lowest) for lowest in (True, False))
    assert low < high
    assert low < loss_of_chance


def test_gradients_of_a_part_only_are_made(convnet):
    """Parameters off the axis get none, and no gradient outlives its use."""
    axis = convnet.axis_of("blocks.0.conv1.weight")
    parameters = dict(convnet.model.named_parameters())
    batch = convnet.data[0]
    with unit_products(convnet.model, {axis.name: (axis.size, gate_slices(axis))}) as sums_of:
        assert [name for name, p in parameters.items() if p.requires_grad] == ["blocks.0.conv2.weight"]
        sums_of(F.cross_entropy(convnet.model(batch["pixel_values"]), batch["labels"]))
        assert all(parameter.grad is None for parameter in parameters.values())
    assert all(parameter.requires_grad for parameter in parameters.values())


def test_loss_that_does_not_see_an_axis_gives_zeros(convnet):
    axis = convnet.axes[1]
    with unit_products(convnet.model, {axis.name: (axis.size, gate_slices(axis))}) as sums_of:
        assert sums_of(torch.tensor(1.0))[axis.name].tolist() == [0] * axis.size


def test_unknown_forms_are_errors():
    with pytest.raises(CriterionError, match="gate, group, elements, got 'mean'"):
        Taylor(form="mean")
    with pytest.raises(CriterionError, match="gate, elements, got 'group'"):
        Fisher(form="group")
    with pytest.raises(CriterionError, match="`abs_per_batch` must be True"):
        Taylor(form="elements", abs_per_batch=False)
