"""Single weights that are masked, chosen by saliencies or by chance."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from hf_prune.errors import CriterionError, PlanError
from hf_prune.score.force import Force
from hf_prune.score.grasp import Grasp
from hf_prune.score.registry import criterion
from hf_prune.score.synflow import Synflow
from hf_prune.surgery.mask_controls import redraw_weights, shuffled, smart_ratio_masks
from hf_prune.surgery.weight_masks import (
    MaskOnWeight,
    add_weight_masks,
    fold_weight_masks,
    layer_keep_ratios,
    overlap,
    require_no_empty_layer,
    weight_masks,
)
from hf_prune.tokens.site import logits_of


def small_net(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(192, 4))


WEIGHTS = {"0.weight": 72, "3.weight": 864, "6.weight": 768}
IMAGES = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = [(IMAGES, torch.arange(48) % 4)]
IMAGE = IMAGES[:1]


def count(masks):
    return sum(int(kept.sum()) for kept in masks.values())


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "force"])
@pytest.mark.parametrize("keep_ratio", [0.5, 0.1])
def test_exactly_the_share_of_all_convolutions_and_linear_layers_is_kept(name, keep_ratio):
    net = small_net()
    state = copy.deepcopy(net.state_dict())
    masks = weight_masks(net, name, keep_ratio, DATA, example_inputs=IMAGE)
    assert {key: kept.numel() for key, kept in masks.items()} == WEIGHTS
    assert count(masks) == round(1704 * keep_ratio)
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())


def test_snip_keeps_the_largest_products_of_all_layers_together():
    net = small_net()
    net.train()
    F.cross_entropy(net(IMAGES), DATA[0][1]).backward()
    products = {name: (w * w.grad).abs() for name, w in net.named_parameters() if name in WEIGHTS}
    least = torch.cat([product.flatten() for product in products.values()]).sort().values[-170]
    masks = weight_masks(small_net(), "snip", 0.1, DATA)
    for name, kept in masks.items():
        assert torch.equal(kept, products[name] >= least)


def test_inverted_choice_is_the_other_end():
    masks, others = (weight_masks(small_net(), "snip", 0.4, DATA, invert=invert) for invert in (False, True))
    assert count(others) == count(masks)
    assert overlap(masks, others) == 0


def test_images_matter_less_than_weights():
    """The overlap of two choices beside that of two initialisations."""
    masks = weight_masks(small_net(), "snip", 0.1, DATA)
    again = weight_masks(small_net(), "snip", 0.1, [(IMAGES[:24], DATA[0][1][:24])])
    other = weight_masks(small_net(1), "snip", 0.1, DATA)
    assert overlap(masks, masks) == 1
    assert overlap(masks, again) > 2 * overlap(masks, other)


def test_protected_layers_do_not_count():
    masks = weight_masks(small_net(), "snip", 0.5, DATA, protect=["0.*", "6.weight"])
    assert list(masks) == ["3.weight"]
    assert count(masks) == 432


def small_vits(spread):
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
                                    image_size=16, patch_size=8, num_labels=4, initializer_range=spread)  # fmt: skip
    yield transformers.ViTForImageClassification(config)
    sizes = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "mlp_ratio": 2,
        "num_classes": 4,
    }
    yield timm.create_model("vit_tiny_patch16_224", **sizes)


@pytest.mark.parametrize("rule", ["snip", Grasp(), Synflow(steps=5), Force(steps=5)])
def test_transformers_are_masked(rule):
    torch.manual_seed(0)
    for model in small_vits(spread=0.2):
        images = torch.randn(8, 3, 16, 16)
        masks = weight_masks(model, rule, 0.3, [(images, torch.arange(8) % 4)])
        total = sum(kept.numel() for kept in masks.values())
        # Patches, and of two blocks queries, keys, values and outputs, and two layers of the MLP; the classifier.
        assert total == 3 * 64 * 24 + 2 * (4 * 24 * 24 + 2 * 24 * 48) + 24 * 4
        assert count(masks) == round(0.3 * total)
        add_weight_masks(model, masks)
        output = model.eval()(images)
        fold_weight_masks(model)
        assert torch.equal(logits_of(model(images)), logits_of(output))


def test_transformers_can_do_without_queries_and_keys():
    """Before training they hardly matter, where all weights are small."""
    torch.manual_seed(0)
    model, data = next(small_vits(spread=0.02)), [(torch.randn(8, 3, 16, 16), torch.arange(8) % 4)]
    with pytest.raises(PlanError, match=r"nothing is left of 'vit\.layers\.0\.attention\.q_proj.*`allow_empty`"):
        weight_masks(model, "snip", 0.3, data)
    masks = weight_masks(model, "snip", 0.3, data, allow_empty=True)
    assert {name.split(".")[-2] for name, kept in masks.items() if not kept.any()} == {"q_proj", "k_proj"}
    add_weight_masks(model, masks)
    assert model(data[0][0]).logits.isfinite().all()


def test_layers_that_would_be_empty_are_an_error():
    masks = {"first.weight": torch.ones(3, 2, dtype=torch.bool), "last.weight": torch.zeros(1, 14, dtype=torch.bool)}
    with pytest.raises(PlanError, match=r"`keep_ratio` of 0\.3 nothing is left of 'last\.weight' \(of 14\); raise it"):
        require_no_empty_layer(masks)


def train(net, optimizer, num_steps=6):
    net.train()
    for _ in range(num_steps):
        optimizer.zero_grad()
        F.cross_entropy(net(IMAGES), DATA[0][1]).backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("made_before", [True, False])
def test_masked_weights_are_zero_and_stay_so_while_others_learn(optimizer, made_before):
    net = small_net()
    masks = weight_masks(net, "snip", 0.2, DATA)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    made = OPTIMIZERS[optimizer](net.parameters()) if made_before else None
    add_weight_masks(net, masks)
    train(net, made or OPTIMIZERS[optimizer](net.parameters()))
    net.eval()
    output = net(IMAGES)
    fold_weight_masks(net)
    assert set(net.state_dict()) == set(small_net().state_dict())
    torch.testing.assert_close(net(IMAGES), output, rtol=0, atol=0)
    weights = dict(net.named_parameters())
    for name, kept in masks.items():
        assert not weights[name][~kept].any()
        assert (weights[name][kept] != before[name][kept]).float().mean() > 0.9


def test_masks_apply_at_once_and_survive_saving_and_copying():
    net, other = small_net(), small_net(1)
    masks = weight_masks(net, "snip", 0.2, DATA)
    for model in (net, other):
        add_weight_masks(model, masks)
        assert int(model[3].weight.count_nonzero()) == int(masks["3.weight"].sum())
    other.load_state_dict(net.state_dict())
    assert torch.equal(copy.deepcopy(net).eval()(IMAGES), other.eval()(IMAGES))
    assert torch.equal(other[3].parametrizations.weight[0].kept, masks["3.weight"])


def test_masks_do_not_share_memory_with_what_they_were_made_from():
    net = small_net()
    masks = weight_masks(net, "snip", 0.2, DATA)
    add_weight_masks(net, masks)
    masks["0.weight"].fill_(False)
    assert net[0].weight.any()
    assert sum(isinstance(module, MaskOnWeight) for module in net.modules()) == 3


def test_masks_of_another_model_and_second_masks_are_errors():
    net = small_net()
    masks = weight_masks(net, "snip", 0.2, DATA)
    with pytest.raises(PlanError, match=r"'0\.weight' is masked as \(72,\) and has \(8, 1, 3, 3\)"):
        add_weight_masks(net, {"0.weight": masks["0.weight"].flatten()})
    with pytest.raises(PlanError, match=r"'7\.weight' is masked"):
        add_weight_masks(net, {"7.weight": masks["0.weight"]})
    assert net[0].weight.all()
    add_weight_masks(net, masks)
    with pytest.raises(PlanError, match="no plain weight of that name"):
        add_weight_masks(net, masks)
    fold_weight_masks(net)
    with pytest.raises(PlanError, match="no masks on weights to fold"):
        fold_weight_masks(net)
    with pytest.raises(PlanError, match="of the same weights"):
        overlap(masks, {"0.weight": masks["0.weight"]})


def test_choices_that_make_no_sense_are_errors():
    with pytest.raises(CriterionError, match=r"as snip, grasp, synflow, force do, got 'magnitude'"):
        weight_masks(small_net(), "magnitude", 0.5)
    for keep_ratio in (0, 1.2, 1e-5):
        with pytest.raises(PlanError, match="`keep_ratio` must keep at least one of 1,704"):
            weight_masks(small_net(), "snip", keep_ratio, DATA)
    with pytest.raises(PlanError, match="no weight to mask"):
        weight_masks(small_net(), "snip", 0.5, DATA, protect=["*"])
    with pytest.raises(CriterionError, match="must look at data"):
        weight_masks(small_net(), criterion("snip"), 0.5)


def test_shuffled_masks_keep_as_many_of_every_layer():
    masks = weight_masks(small_net(), "snip", 0.2, DATA)
    first, again, second = shuffled(masks, 1), shuffled(masks, 1), shuffled(masks, 2)
    assert layer_keep_ratios(first) == layer_keep_ratios(masks)
    assert overlap(first, again) == 1
    # Two independent draws of a fifth overlap by a ninth, layers of other shares by other numbers.
    assert overlap(first, second) < 0.35
    assert overlap(first, masks) < 0.35


def test_redrawn_weights_are_the_same_numbers_in_other_places():
    net, dense = small_net(), small_net()
    redraw_weights(net, ["0.weight", "3.weight"], seed=1)
    for name, weight in net.named_parameters():
        before = dense.get_parameter(name)
        if name in ("0.weight", "3.weight"):
            assert torch.equal(weight.flatten().sort().values, before.flatten().sort().values)
            assert (weight == before).float().mean() < 0.2
        else:
            assert torch.equal(weight, before)
    again = small_net()
    redraw_weights(again, ["0.weight", "3.weight"], seed=1)
    assert torch.equal(again[3].weight, net[3].weight)
    masks, others = weight_masks(net, "snip", 0.1, DATA), weight_masks(dense, "snip", 0.1, DATA)
    assert overlap(masks, others) < 0.3


def chain(*sizes, num_classes=10):
    layers = [nn.Conv2d(size, size, 1, bias=False) for size in sizes]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, num_classes, bias=False))


def test_smart_ratios_by_hand():
    # Four convolutions of 400 weights and 200 of a linear layer, of which 60 are kept: 1800 * 0.2 - 60 = 300.
    net = chain(20, 20, 20, 20)
    masks = smart_ratio_masks(net, 0.2)
    # 4^2 + 4, 3^2 + 3, 2^2 + 2, 1 + 1: of 40.
    assert [int(kept.sum()) for kept in masks.values()] == [150, 90, 45, 15, 60]
    # 20, 12 / 4, 6 / 9, 2 / 16
    vgg = [int(kept.sum()) for kept in smart_ratio_masks(net, 0.2, shape="vgg").values()]
    total = 20 + 3 + 6 / 9 + 2 / 16
    assert vgg == pytest.approx([300 * 20 / total, 300 * 3 / total, 300 * 6 / 9 / total, 300 / 8 / total, 60], abs=1)
    assert sum(vgg) == 360
    assert overlap(masks, smart_ratio_masks(net, 0.2, seed=1)) < 0.5


def test_smart_ratios_hand_on_what_does_not_fit():
    # 1800 * 0.5 - 60 = 840: 420, of which 20 go on to 252, then 126 and 42.
    assert [int(kept.sum()) for kept in smart_ratio_masks(chain(20, 20, 20, 20), 0.5).values()] == [
        400,
        272,
        126,
        42,
        60,
    ]
    almost = smart_ratio_masks(chain(20, 20, 20, 20), 0.9, linear_keep_ratio=0.9)
    assert [int(kept.sum()) for kept in almost.values()] == [400, 400, 400, 240, 180]


def test_smart_ratios_of_a_real_network_are_exact_and_fall():
    model = timm.create_model("resnet18", num_classes=10)
    masks = smart_ratio_masks(model, 0.02)
    total = sum(kept.numel() for kept in masks.values())
    assert count(masks) == round(0.02 * total)
    ratios = [ratio for name, ratio in layer_keep_ratios(masks).items() if name != "fc.weight"]
    assert ratios == sorted(ratios, reverse=True)
    assert layer_keep_ratios(masks)["fc.weight"] == pytest.approx(0.3, abs=1e-3)


def test_smart_ratios_that_do_not_fit_are_errors():
    with pytest.raises(PlanError, match="leave -42; change one"):
        smart_ratio_masks(chain(20, 20, 20, 20), 0.01)
    with pytest.raises(PlanError, match="all of 0 weights of convolutions"):
        smart_ratio_masks(nn.Sequential(nn.Linear(4, 4)), 0.5)
    with pytest.raises(PlanError, match="must be one of resnet, vgg, got 'vit'"):
        smart_ratio_masks(chain(20), 0.5, shape="vit")
    with pytest.raises(PlanError, match=r"nothing is left of '3\.weight'"):
        smart_ratio_masks(chain(20, 20, 20, 20), 0.037)
