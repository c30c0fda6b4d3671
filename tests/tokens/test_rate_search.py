"""Learning what each block drops and merges: exact, on target, and better than the same share everywhere."""

import copy
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_models import NUM_PATCHES, build_dense, pixel_batch

from hf_prune.errors import BudgetError, DataError, UnsupportedModelError
from hf_prune.measure.token_cost import count_macs
from hf_prune.tokens.attach import add_token_pruning
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.rate_search import ScheduleCost, search_rates, settings_of
from hf_prune.tokens.rates import Rates, try_rates
from hf_prune.tokens.schedule import keep_ratios_for
from hf_prune.tokens.site import logits_of

PIXELS = pixel_batch(6, seed=5)


def searching(model, before_blocks=(1, 2, 4), *, uneven=True):
    """Return a copy of a model that tries rates, and the rates."""
    torch.manual_seed(3)
    rates = Rates(len(before_blocks), NUM_PATCHES, 16, start_share=0.85)
    if uneven:
        with torch.no_grad():
            for parameter in rates.parameters():
                parameter.add_(torch.randn_like(parameter))
    student = copy.deepcopy(model).requires_grad_(False)
    settings = TokenPruningConfig(
        method="diffrate", before_blocks=before_blocks, keep_ratios=(1.0,) * len(before_blocks)
    )
    pruning = add_token_pruning(student, settings)
    try_rates(pruning, rates)
    return student, pruning, rates


def divergence(model, settings, pixels):
    student = copy.deepcopy(model)
    add_token_pruning(student, settings)
    with torch.no_grad():
        taught, said = (logits_of(one(pixels)).log_softmax(-1) for one in (model, student))
    return F.kl_div(said, taught, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("kind", ["vit", "deit-distilled", "dinov2-registers", "siglip", "timm-vit", "timm-siglip-map"])
def test_the_hard_search_pass_gives_the_logits_of_the_static_reducer(kind):
    model = build_dense(kind)
    student, pruning, rates = searching(model)
    cost = ScheduleCost.of(model, PIXELS[:1], (1, 2, 4))
    settings = settings_of(rates.counts(), cost)
    assert len(settings.before_blocks) == 3
    assert min(settings.merge_ratios) > 0
    static = copy.deepcopy(model)
    add_token_pruning(static, settings)
    with torch.no_grad():
        dense, expected, found = (logits_of(one(PIXELS)) for one in (model, static, student))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - dense).abs().max() > 1e-2
    # While learning, hidden tokens weigh a millionth.
    pruning.train()
    torch.testing.assert_close(logits_of(student(PIXELS)), expected, atol=2e-2, rtol=0)
    # And what the schedule costs is what the static model computes.
    assert cost.of_settings(settings) == count_macs(lambda: static(PIXELS[:1]))


@pytest.mark.parametrize("kind", ["vit", "timm-siglip-gap"])
def test_gradients_reach_every_rate(kind):
    student, pruning, rates = searching(build_dense(kind), uneven=False)
    pruning.train()
    logits_of(student(PIXELS)).square().sum().backward()
    for name, parameter in rates.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad.abs().sum(1) > 0).all(), name


def test_the_power_meets_the_target_and_its_gradient_keeps_it():
    cost = ScheduleCost.of(build_dense("vit"), PIXELS[:1], (1, 2, 4))
    rates, target = Rates(3, NUM_PATCHES, 16, start_share=0.8), 0.6 * cost.parts.dense
    for _ in range(4):
        rates.meet(cost.of_counts, target)
    counts = rates.counts()
    assert cost.of_counts(counts).item() == pytest.approx(target, rel=1e-4)
    # What one block gets others pay: the MACs do not move, whatever softmax does.
    for gradient in torch.autograd.grad(cost.of_counts(counts) / target, list(rates.parameters())):
        assert gradient.abs().max() < 1e-5


def needs_tokens_in_block_2(kind):
    """Only block 2 mixes tokens, and the head listens: before it all are needed, behind it none."""
    model = build_dense(kind)
    is_timm = kind.startswith("timm")
    with torch.no_grad():
        for number, block in enumerate(model.blocks if is_timm else model.vit.layers):
            out = block.attn.proj if is_timm else block.attention.o_proj
            out.bias.zero_()
            out.weight.mul_(6.0 if number == 2 else 0.0)
        (model.norm if is_timm else model.vit.layernorm).weight.fill_(1.0)
        (model.head if is_timm else model.classifier).weight.mul_(3.0)
    return model


@pytest.mark.parametrize("kind", ["vit", "timm-vit"])
def test_tokens_stay_where_they_are_needed(kind):
    model = needs_tokens_in_block_2(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [pixel_batch(8, seed=seed) for seed in range(4)]
    settings = search_rates(model, batches, target_macs=0.62, num_steps=24, learning_rate=0.3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())

    static = copy.deepcopy(model)
    add_token_pruning(static, settings)
    macs, dense_macs = (count_macs(lambda one=one: one(PIXELS[:1])) for one in (static, model))
    assert macs == pytest.approx(0.62 * dense_macs, rel=0.01)

    cost = ScheduleCost.of(model, PIXELS[:1], range(1, 6))
    same = keep_ratios_for(cost.parts, macs, cost.before_blocks)
    uniform = TokenPruningConfig(
        method="diffrate",
        before_blocks=cost.before_blocks,
        keep_ratios=same,
        merge_ratios=tuple((more - fewer) / 2 for more, fewer in pairwise((1.0, *same))),
    )
    others = pixel_batch(64, seed=77)
    assert divergence(model, settings, others) < 0.5 * divergence(model, uniform, others)
    kept = dict(zip(settings.before_blocks, settings.keep_ratios, strict=True))
    needed = min([kept[block] for block in (1, 2) if block in kept], default=1.0)
    assert needed > same[1] + 0.05
    assert settings.keep_ratios[-1] < same[-1] - 0.05


def test_labels_are_learned_from_where_there_are_some():
    model, pixels = build_dense("vit"), pixel_batch(8)
    with torch.no_grad():
        said = logits_of(model(pixels)).argmax(-1)
    found = [
        search_rates(model, data, target_macs=0.7, before_blocks=(2, 4), num_steps=3, learning_rate=1.0)
        for data in ([pixels], [(pixels, said)], [{"pixel_values": pixels, "labels": said}])
    ]
    assert found[1] == found[2]
    assert set(found[0].before_blocks) <= {2, 4}
    unread = {"pixel_values": torch.cat([pixels, pixels[:1] * 9]), "labels": torch.cat([said, torch.tensor([-1])])}
    assert (
        search_rates(model, [unread], target_macs=0.7, before_blocks=(2, 4), num_steps=3, learning_rate=1.0) == found[1]
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [(0.05, "lowest reachable cost"), (1.0, "`target_macs` must be"), (1e12, "`target_macs` must be")],
)
def test_targets_out_of_reach_are_refused(target, message):
    with pytest.raises(BudgetError, match=message):
        search_rates(build_dense("vit"), [PIXELS], target_macs=target, before_blocks=(3,), num_steps=1)


def test_models_and_data_that_cannot_be_used_are_refused():
    with pytest.raises(UnsupportedModelError, match="plain vision transformer"):
        search_rates(timm.create_model("resnet18"), [PIXELS], target_macs=0.5)

    class NoAttention(torch.nn.Module):
        num_heads, fused_attn = 4, True

        def forward(self, x, **_kwargs):
            return x

    model = build_dense("timm-vit")
    for block in model.blocks:
        block.attn = NoAttention()
    with pytest.raises(UnsupportedModelError, match="reducing tokens by attention needs"):
        search_rates(model, [PIXELS], target_macs=0.5)
    with pytest.raises(DataError, match="gave none"):
        search_rates(build_dense("vit"), [], target_macs=0.5)
    with pytest.raises(DataError, match="got str"):
        search_rates(build_dense("vit"), ["pixels"], target_macs=0.5)
