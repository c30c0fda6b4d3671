"""Parts that go step by step, and some that come back."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from saliency_nets import mlp, points
from torch.func import functional_call

from hf_prune.errors import CriterionError
from hf_prune.score.force import Force
from hf_prune.score.grasp import Grasp
from hf_prune.score.iterative import in_steps
from hf_prune.score.parts import Units, Weights, best, prunable_weights
from hf_prune.score.snip import Snip
from hf_prune.surgery.weight_masks import weight_masks


@pytest.fixture(scope="module")
def small():
    net, _ = mlp(10, 40, 30, 5, seed=2)
    return net, points(64, 10, 5, 4) + points(64, 10, 5, 5)


def sizes_of(net):
    return {name: weight.numel() for name, weight in prunable_weights(net).items()}


def reference(net, data, *, keep_ratio, steps, returning):
    """The masks after every step, the plain way."""
    dense = {name: w.detach() for name, w in net.named_parameters()}
    mask, masks = {name: torch.ones_like(w) for name, w in dense.items()}, []
    for step in range(1, steps + 1):
        pixels, labels = data[(step - 1) % len(data)]
        sparse = {name: (w * mask[name]).requires_grad_() for name, w in dense.items()}
        gradients = torch.autograd.grad(
            F.cross_entropy(functional_call(net, sparse, (pixels,)), labels), sparse.values()
        )
        scores = {name: (dense[name] * g).abs() for name, g in zip(sparse, gradients, strict=True)}
        if not returning:
            scores = {name: score.where(mask[name] > 0, -1.0) for name, score in scores.items()}
        together = torch.cat([score.flatten() for score in scores.values()])
        least = together.topk(round(len(together) * keep_ratio ** (step / steps))).values[-1]
        mask = {name: (score >= least).double() for name, score in scores.items()}
        masks.append(mask)
    return masks


@pytest.mark.parametrize("returning", [True, False])
def test_masks_are_those_of_the_plain_loop(small, returning):
    net, data = small
    expected = reference(net, data, keep_ratio=0.1, steps=12, returning=returning)[-1]
    masks = weight_masks(net, Force(steps=12, returning=returning), 0.1, data)
    for name, mask in masks.items():
        assert torch.equal(mask.double(), expected[name])


def test_weights_come_back_in_force_only(small):
    net, data = small
    back = {}
    for returning in (True, False):
        steps = reference(net, data, keep_ratio=0.05, steps=20, returning=returning)
        pairs = pairwise(steps)
        back[returning] = sum(int((b[name] > a[name]).sum()) for a, b in pairs for name in a)
    assert back[True] > 20
    assert back[False] == 0
    masks = [weight_masks(net, Force(steps=20, returning=returning), 0.05, data) for returning in (True, False)]
    assert any((masks[0][name] != masks[1][name]).any() for name in masks[0])


def test_one_step_is_snip(small):
    net, data = small
    found, expected = weight_masks(net, Force(steps=1), 0.2, data[:1]), weight_masks(net, Snip(), 0.2, data[:1])
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


def in_ten_steps(tables, *, returning, keep_ratio=0.2):
    """Places after as many steps as tables of saliencies, and how many were kept at each."""
    steps, seen = iter(tables), []

    def rate(masks):
        seen.append(int(masks["w"].sum()) if masks else 10)
        return {"w": torch.tensor(next(steps))}

    return in_steps(rate, Weights({"w": 10}, None, keep_ratio), len(tables), returning=returning)["w"], seen


def test_parts_go_by_an_exponential_schedule_and_order_within_a_step():
    rising = [float(value) for value in range(1, 11)]
    places, seen = in_ten_steps([rising] * 4, returning=False)
    # 10 * 0.2 ** (t / 4): 6.69, 4.47, 2.99, 2
    assert seen == [10, 7, 4, 3]
    assert places.argsort().tolist() == list(range(10))
    assert (5 * places).floor().tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 4, 4]
    assert places.min() > 0
    assert places.max() < 1


@pytest.mark.parametrize("returning", [True, False])
def test_parts_that_went_come_back_when_they_are_worth_it(returning):
    rising, falling = [float(value) for value in range(1, 11)], [float(value) for value in range(10, 0, -1)]
    places, _ = in_ten_steps([rising, falling], returning=returning, keep_ratio=0.5)
    # Of the seven best of the first step, or of all, the five best of the second.
    kept = best({"w": places}, 5)["w"].nonzero().flatten().tolist()
    assert kept == ([0, 1, 2, 3, 4] if returning else [3, 4, 5, 6, 7])


def test_equal_values_go_by_position_and_numbers_are_exact():
    values = {"a": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([0.0, 2.0, 0.0])}
    for number in range(8):
        chosen = best(values, number)
        assert sum(int(kept.sum()) for kept in chosen.values()) == number
    assert best(values, 4)["a"].tolist() == [[True, True], [True, False]]
    assert best(values, 4)["b"].tolist() == [False, True, False]


def test_every_axis_keeps_a_unit(convnet):
    parts = Units(convnet.graph, convnet.axes, keep_ratio=0.01)
    values = {axis.name: torch.full((axis.size,), float(number)) for number, axis in enumerate(convnet.axes)}
    assert [int(kept.sum()) for kept in parts.best(values, 5).values()] == [1, 1, 3]
    assert [int(kept.sum()) for kept in parts.best(values, 0).values()] == [1, 1, 1]


def test_masks_of_units_are_zero_at_what_reads_them(convnet):
    """Masked weights compute what the network without the units does."""
    parts = Units(convnet.graph, convnet.axes)
    kept = {axis.name: torch.arange(axis.size) % 3 > 0 for axis in convnet.axes}
    masks, weights = parts.masks(kept), dict(convnet.model.named_parameters())
    images = convnet.data[0]["pixel_values"]
    found = functional_call(convnet.model, {name: weights[name] * mask for name, mask in masks.items()}, (images,))
    with torch.no_grad():
        for axis in convnet.axes:
            for s in axis.readers:
                line = weights[s.name].movedim(s.dim, 0)
                line[(s.units >= 0) & ~kept[axis.name][s.units]] = 0
    torch.testing.assert_close(found, convnet.model(images))


def test_steps_take_batches_in_turn(convnet):
    seen = []
    convnet.model.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].sum())))
    convnet.score(Force(steps=5))
    first, second = (float(batch["pixel_values"].sum()) for batch in convnet.data)
    assert seen == [first, second, first, second, first]


@pytest.mark.parametrize("rule", [Force(), Snip(), Grasp()])
def test_images_without_a_label_are_an_error_and_no_endless_search(rule, convnet):
    images, labels = torch.zeros(2, 1, 8, 8), torch.tensor([-100, -100])
    with pytest.raises(CriterionError, match="must see an image with a label"):
        convnet.score(rule, data=[(images, labels)])
