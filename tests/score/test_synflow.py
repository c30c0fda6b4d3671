"""SynFlow: what flows in flows out, and no layer is emptied."""

from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from saliency_nets import mlp, points
from torch import nn

from hf_prune import analyze
from hf_prune.analyse.inputs import inputs_for
from hf_prune.errors import CriterionError, PlanError
from hf_prune.score.force import Force
from hf_prune.score.linear_flow import LinearFlow
from hf_prune.score.parts import Units, Weights, prunable_weights
from hf_prune.score.synflow import Synflow
from hf_prune.surgery.weight_masks import weight_masks


def shares_of_weights(net, image=None):
    sizes = {name: weight.numel() for name, weight in prunable_weights(net).items()}
    return Synflow(steps=1).rate(net, Weights(sizes, image), None)


def test_shares_by_hand():
    net, image = mlp(2, 2, 1)
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
        net.layers[1].weight.copy_(torch.tensor([[-4.0, 0.5]]))
    # R = 4 (1 + 2) + 0.5 (3 + 0) = 13.5
    first, second = shares_of_weights(net, image).values()
    torch.testing.assert_close(13.5 * first, torch.tensor([[4.0, 8.0], [1.5, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(13.5 * second, torch.tensor([[12.0, 1.5]], dtype=torch.float64))
    graph = analyze(net, image)
    (units,) = Synflow(steps=1).score(net, graph, list(graph.axes.values())).values()
    torch.testing.assert_close(13.5 * units, torch.tensor([12.0, 1.5]))


def test_every_layer_and_both_sides_of_every_unit_carry_the_same():
    net, image = mlp(7, 30, 11, 20, 5)
    shares = list(shares_of_weights(net, image).values())
    for share in shares:
        assert abs(float(share.sum()) - 1) < 1e-12
    for before, after in pairwise(shares):
        torch.testing.assert_close(before.sum(1), after.sum(0), rtol=1e-12, atol=1e-15)


def test_biases_shifts_and_means_are_not_there():
    """Two networks that differ in them only carry the same."""
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    image = torch.zeros(1, 2, 4, 4)
    expected = shares_of_weights(net, image)
    with torch.no_grad():
        for tensor in (net[0].bias, net[1].bias, net[1].running_mean, net[4].bias):
            tensor.normal_()
    for name, share in shares_of_weights(net, image).items():
        assert torch.equal(share, expected[name])
        assert abs(float(share.sum()) - 1) < 1e-12


def ends_of(model):
    """The shares of the first layer that sees the image and of the classifier."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Nothing but the image feeds the network.
            if any(word in name for word in ("pos_embed", "position_embeddings", "relative_position_bias_table")):
                parameter.zero_()
    shares = [float(share.sum()) for share in shares_of_weights(model.eval(), inputs_for(model)).values()]
    return shares[0], shares[-1]


NORM_FREE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5,
             "class_token": False, "global_pool": "avg"}  # fmt: skip


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_efficientnet", "test_convnext2", "test_nfnet"])
def test_what_is_not_linear_passes_everything_on(name):
    """Attention, norms, smooth activations, gates, normalisation of responses."""
    torch.manual_seed(0)
    model = timm.create_model(name, **NORM_FREE) if name.startswith("vit") else timm.create_model(name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim <= 1 or path.endswith("gain"):
                parameter.uniform_(0.5, 1.5)
    assert ends_of(model) == pytest.approx((1, 1), abs=1e-9)


def test_gated_attention_of_transformers_passes_everything_on():
    """Shifted windows with a table of positions, and masks of attention."""
    torch.manual_seed(0)
    config = transformers.SwinConfig(image_size=32, patch_size=2, embed_dim=12, depths=[2, 2], num_heads=[2, 4],
                                     window_size=4, num_labels=5)  # fmt: skip
    model = transformers.SwinForImageClassification(config)
    assert ends_of(model) == pytest.approx((1, 1), abs=1e-9)


def test_values_of_functions_stay_what_they_are():
    x, other = torch.rand(2, 3, 8, dtype=torch.float64), torch.rand(2, 3, 8, dtype=torch.float64)
    heads = [torch.rand(2, 4, 5, 6, dtype=torch.float64) for _ in range(3)]
    mask = torch.rand(5, 5) > 0.3
    mask.fill_diagonal_(True)

    few = [x[:, :2] for x in heads[1:]]

    def outputs():
        return [F.gelu(x), F.silu(x), x.sigmoid(), x.softmax(-1), F.normalize(x, dim=-1), x * other, x / other,
                x @ other.transpose(1, 2), torch.rsqrt(x), F.scaled_dot_product_attention(*heads),
                F.scaled_dot_product_attention(*heads, attn_mask=mask),
                F.scaled_dot_product_attention(*heads, is_causal=True, scale=0.3),
                F.scaled_dot_product_attention(heads[0], *few, enable_gqa=True)]  # fmt: skip

    expected = outputs()
    with LinearFlow():
        for found, value in zip(outputs(), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)


def deep_net(seed):
    return mlp(*[100] * 12, 10, seed=seed, dtype=torch.float32)


@pytest.mark.parametrize("seed", range(5))
def test_no_layer_collapses_when_weights_go_step_by_step(seed):
    """Twelve layers of a hundred units at one percent."""
    net, image = deep_net(seed)
    data = points(1000, 100, 10, seed, dtype=torch.float32)
    with pytest.raises(PlanError, match="nothing is left of 'layers"):
        weight_masks(net, "snip", 0.01, data)
    masks = weight_masks(net, "synflow", 0.01, example_inputs=image)
    kept = [int(mask.sum()) for mask in masks.values()]
    assert sum(kept) == 1110
    assert min(kept) >= 60


def test_steps_are_what_saves_the_narrowest_layer():
    torch.manual_seed(0)
    net = mlp(100, 400, 400, 20, 400, 10, dtype=torch.float32)[0]
    image = torch.zeros(1, 100)
    sizes = {name: w.numel() for name, w in prunable_weights(net).items()}
    parts = Weights(sizes, image, keep_ratio=0.002)
    number = round(0.002 * sum(sizes.values()))
    least = [
        min(int(kept.sum()) for kept in parts.best(Synflow(steps=steps).rate(net, parts, None), number).values())
        for steps in (1, 100)
    ]
    assert least[0] == 0
    assert least[1] >= 10


def test_units_of_every_axis_remain_in_a_chain():
    net, image = mlp(20, 30, 200, 8, 100, 5)
    graph = analyze(net, image)
    axes = list(graph.axes.values())
    scores = Synflow(steps=50, keep_ratio=0.1).score(net, graph, axes)
    last = {name: int((values > 50 / 51).sum()) for name, values in scores.items()}
    assert sum(last.values()) == round(0.1 * 338)
    assert min(last.values()) >= 1


def test_depth_without_norms_is_within_double_precision():
    """Numbers far beyond single precision on the way."""
    net, image = mlp(*[256] * 50, 10, dtype=torch.float32)
    shares = shares_of_weights(net, image)
    assert all(abs(float(share.sum()) - 1) < 1e-9 for share in shares.values())


def test_flow_that_is_cut_off_is_an_error():
    net, image = mlp(4, 8, 2)
    nn.init.zeros_(net.layers[1].weight)
    graph = analyze(net, image)
    with pytest.raises(CriterionError, match=r"other than zero for 'synflow', got 0\.0.*classifier before training"):
        Synflow().rate(net, Units(graph, list(graph.axes.values())), None)


@pytest.mark.parametrize(("steps", "keep_ratio"), [(0, 0.5), (10, 0), (10, 1.5)])
@pytest.mark.parametrize("kind", [Synflow, Force])
def test_schedules_without_sense_are_errors(kind, steps, keep_ratio):
    with pytest.raises(CriterionError, match=f"got {steps} and {keep_ratio}"):
        kind(steps=steps, keep_ratio=keep_ratio)
