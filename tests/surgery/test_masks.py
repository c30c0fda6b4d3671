import copy

import pytest
import torch
import transformers
from nets import network, of_order_one
from torch.func import functional_call

from hf_prune.allocate.budget import Budget, cost_of
from hf_prune.analyse.cost import Cost
from hf_prune.errors import PlanError
from hf_prune.pipeline import analyze, apply_plan
from hf_prune.surgery.gates import add_gates
from hf_prune.surgery.masks import add_masks, masked_weights, plan_of_masks, remove_masks, zero_masked
from hf_prune.surgery.norm_scaling import add_norm_scales, fold_norm_scales

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
UNIT, GENTLE, LOUD = 2, 0.37, 1e6


def plain_chain():
    """Producer `0.0`, consumer `1.0`, each followed by a batch norm."""
    model = network(["conv", "wide conv"]).double().train()
    return model, analyze(copy.deepcopy(model).float(), IMAGE[:1]), IMAGE.double()


def mask_one(model, graph, mode, axis="0.0.channels"):
    masks = add_masks(model, graph, mode=mode)
    masks[axis].importance.fill_(1.0)[UNIT] = 0.0
    assert masks[axis].keep_best(graph.axes[axis].size - 1) == (0, 1)
    return masks


def vit():
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                                    image_size=8, patch_size=4, num_labels=5,
                                    initializer_range=0.3)  # fmt: skip
    torch.manual_seed(0)
    return of_order_one(transformers.ViTForImageClassification(config))


def random_masks(model, graph, seed=0):
    """Mask about half of every axis that is cut to equality."""
    masks = add_masks(model, graph, [name for name, axis in graph.axes.items() if axis.inexact is None])
    generator = torch.Generator().manual_seed(seed)
    for mask in masks.values():
        mask.importance.copy_(torch.rand(len(mask.kept), generator=generator))
        mask.keep_best(max(1, len(mask.kept) // 2))
    return masks


@pytest.mark.parametrize("mode", ["soft", "hard", "permanent"])
def test_a_masked_unit_is_silent_and_learns_in_the_soft_mode_alone(mode):
    model, graph, image = plain_chain()
    mask_one(model, graph, mode)
    before = model(image)
    consumer = model[1][0].parametrizations.weight.original
    with torch.no_grad():
        consumer[:, UNIT] = LOUD
    after = model(image)
    assert torch.equal(after, before)
    after.square().sum().backward()
    assert bool(consumer.grad[:, UNIT].any()) == (mode == "soft")
    assert consumer.grad[:, UNIT + 1].any()
    producer = model[0][0].weight.grad
    assert not producer[UNIT].any()
    assert producer[UNIT + 1].any()


def test_the_soft_gradient_is_that_of_reading_the_unit_again():
    model, graph, image = plain_chain()
    plain = copy.deepcopy(model)
    mask_one(model, graph, "soft")
    model(image).square().sum().backward()
    silent = plain[1][0].weight.detach().clone()
    silent[:, UNIT] = 0
    again = torch.zeros_like(silent[:, UNIT], requires_grad=True)
    weight = torch.cat([silent[:, :UNIT], again[:, None], silent[:, UNIT + 1 :]], dim=1)
    functional_call(plain, {"1.0.weight": weight}, (image,)).square().sum().backward()
    assert again.grad.abs().max() > 0
    found = model[1][0].parametrizations.weight.original.grad[:, UNIT]
    torch.testing.assert_close(found, again.grad, rtol=1e-6, atol=1e-9)


def test_permanent_masks_only_shrink_and_zero_what_they_cover():
    model, graph, _ = plain_chain()
    mask = mask_one(model, graph, "permanent")["0.0.channels"]
    zero_masked(model)
    assert not model[1][0].parametrizations.weight.original[:, UNIT].any()
    mask.importance.zero_()[UNIT] = 9.0
    assert mask.keep_best(8) == (0, 0)
    assert mask.keep_best(5) == (0, 2)
    assert not mask.kept[UNIT]
    soft = add_masks(plain_chain()[0], graph)["0.0.channels"]
    soft.importance.zero_()[UNIT] = 9.0
    soft.kept[UNIT] = 0
    assert soft.keep_best(5) == (1, 3)
    assert soft.kept[UNIT]


@pytest.mark.parametrize("names", [["conv", "depthwise", "residual"], ["dense", "branches", "squeeze"], "vit"])
def test_the_cut_model_equals_the_masked_one_and_costs_what_was_predicted(names):
    model = vit() if names == "vit" else network(names, flatten=True)
    graph = analyze(model, IMAGE[:1])
    dense = model(IMAGE)
    masks = random_masks(model, graph)
    assert {graph.axes[name].kind for name in masks} >= ({"heads", "mlp"} if names == "vit" else {"channels"})
    masked = model(IMAGE)
    plan, sizes = plan_of_masks(graph, masks), {name: mask.num_kept for name, mask in masks.items()}
    predicted = {q: cost_of(graph, Budget(**{q: 0.9}))[0](sizes) for q in ("params", "macs")}
    remove_masks(model)
    apply_plan(model, plan, graph)
    dense, masked, cut = (getattr(out, "logits", out) for out in (dense, masked, model(IMAGE)))
    assert (masked - dense).abs().max() > 1e-2
    assert (masked - cut).abs().max() <= 1e-4 * masked.abs().max().clamp_min(1)
    assert sum(p.numel() for p in model.parameters()) == predicted["params"]
    assert Cost.of(analyze(model, IMAGE[:1])).macs({}) == predicted["macs"]


def test_masks_are_saved_with_the_model_and_leave_it_as_it_was():
    model = network(["conv", "residual"])
    keys, before = set(model.state_dict()), copy.deepcopy(model.state_dict())
    graph = analyze(model, IMAGE[:1])
    masks = random_masks(model, graph)
    masked = model(IMAGE)
    again = network(["conv", "residual"])
    others = add_masks(again, graph, masks)
    assert not torch.allclose(again(IMAGE), masked)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IMAGE), masked)
    assert all(torch.equal(others[name].importance, mask.importance) for name, mask in masks.items())
    remove_masks(model)
    assert set(model.state_dict()) == keys
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_widths_at_which_queries_meet_keys_get_no_mask():
    model = vit()
    graph = analyze(model)
    masks = add_masks(model, graph)
    assert {name for name in graph.axes if name not in masks} == {n for n, a in graph.axes.items() if not a.can_gate}
    assert any(not axis.can_gate for axis in graph.axes.values())
    # One weight under two masks: heads, and widths of values.
    assert any(len(weight.readers) > 1 for weight in masked_weights(model))


def test_masks_compile():
    model = network(["conv", "residual"])
    graph = analyze(model, IMAGE[:1])
    masks = random_masks(model, graph)
    for scale in add_norm_scales(model, graph, masks).values():
        scale.follow()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_masked_is_refused():
    model = network(["conv"])
    graph = analyze(model, IMAGE[:1])
    with pytest.raises(PlanError, match=r"there is no '0\.0\.channel'; did you mean 0\.0\.channels"):
        add_masks(model, graph, ["0.0.channel"])
    with pytest.raises(PlanError, match="`mode` of masks must be one of soft, hard, permanent, got 'firm'"):
        add_masks(model, graph, mode="firm")
    with pytest.raises(PlanError, match="no masks"):
        remove_masks(model)
    add_masks(model, graph)
    with pytest.raises(PlanError, match="already"):
        add_gates(model, graph)


def scaled_chain(by_importance=False):
    model, graph, image = plain_chain()
    masks = mask_one(model, graph, "soft")
    scales = add_norm_scales(model, graph, masks)
    masks["0.0.channels"].importance.copy_(torch.arange(8.0))
    for scale in scales.values():
        scale.follow(by_importance=by_importance)
    return model, scales, image


@pytest.mark.parametrize(("by_importance", "share"), [(False, 7 / 8), (True, 26 / 28)])
def test_norms_behind_masked_readers_shrink_by_what_is_read(by_importance, share):
    model, scales, _ = scaled_chain(by_importance)
    # The norm of the first layer, which reads the image, is left alone.
    assert set(scales) == {"1.1", "2.1"}
    norm = model[1][1]
    torch.testing.assert_close(norm.weight, share * norm.parametrizations.weight.original, rtol=1e-6, atol=0)
    assert scales["2.1"].scale == 1


def test_a_step_moves_a_scaled_norm_by_the_gradient_of_what_the_model_sees():
    model, _, image = scaled_chain()
    norm = model[1][1]
    seen = norm.weight.detach().clone()
    stand_in = seen.clone().requires_grad_()
    weights = {"1.0.weight": model[1][0].weight.detach(), "1.1.weight": stand_in}
    functional_call(plain_chain()[0], weights, (image,)).square().sum().backward()
    model(image).square().sum().backward()
    torch.optim.SGD([norm.parametrizations.weight.original], lr=GENTLE).step()
    torch.testing.assert_close(norm.weight - seen, -GENTLE * stand_in.grad, rtol=1e-6, atol=1e-9)


def test_a_norm_whose_layer_reads_nothing_is_closed_and_does_not_learn():
    model, scales, image = scaled_chain()
    scales["1.1"].scale.zero_()
    model(image).square().sum().backward()
    assert not model[1][1].parametrizations.weight.original.grad.any()
    assert not model[1][1].weight.any()


def test_folding_norm_scales_changes_nothing():
    model, _, image = scaled_chain()
    model.eval()
    expected = model(image)
    fold_norm_scales(model)
    torch.testing.assert_close(model(image), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for weight in list(masked_weights(model)):
            weight.original.copy_(weight.seen())
    remove_masks(model)
    assert set(model.state_dict()) == set(plain_chain()[0].state_dict())
    torch.testing.assert_close(model(image), expected, rtol=1e-12, atol=1e-12)
