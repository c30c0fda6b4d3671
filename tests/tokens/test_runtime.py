"""Training with dropped tokens that leave, beside training with dropped tokens that are masked."""

import pytest
import torch
from tiny_models import build_dense, pixel_batch

from hf_prune.tokens import tokenset
from hf_prune.tokens.attach import add_token_pruning, token_pruning_of
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.reducers import base
from hf_prune.tokens.reducers.decide import GumbelNoise, sample_keep
from hf_prune.tokens.site import find_site, logits_of

SETTINGS = {"before_blocks": (2, 4), "keep_ratios": (0.65, 0.3), "num_heads": 4}


def only_kept_learn(logits, noise):
    """Sample as always, but let no gradient reach a decision to drop, which removal cannot know."""
    decision = sample_keep(logits, noise)
    kept = decision.detach()
    return decision * kept + kept.new_zeros(()) * (1 - kept)


@pytest.mark.parametrize("method", ["spvit", "dynamicvit"])
@pytest.mark.parametrize("kind", ["vit", "dinov2-registers", "siglip", "timm-vit", "timm-eva02", "timm-siglip-map"])
@pytest.mark.parametrize("runtime", ["gathered", "packed"])
def test_what_remains_gets_the_gradients_of_masked_training(kind, method, runtime, monkeypatch):
    monkeypatch.setattr(base, "sample_keep", only_kept_learn)
    monkeypatch.setattr(tokenset, "HIDDEN_WEIGHT", 1e-12)
    model = build_dense(kind)
    torch.manual_seed(1)
    pruning = add_token_pruning(model, TokenPruningConfig(**SETTINGS, method=method))
    with torch.no_grad():
        for parameter in pruning.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.train()
    pixels, found = pixel_batch(20), []
    for current in ("masked", runtime):
        pruning.runtime = current
        pruning.noise = GumbelNoise(seed=5)
        model.zero_grad()
        logits = logits_of(model(pixels))
        keep = [record.keep for record in token_pruning_of(model).take_records()]
        (logits.square().sum() + sum(mask.mean() for mask in keep)).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((logits, keep, gradients))
    (masked, masked_keep, expected), (removed, removed_keep, gradients) = found
    assert all(torch.equal(first, second) for first, second in zip(masked_keep, removed_keep, strict=True))
    assert len(set(masked_keep[1].sum(1).tolist())) > 3
    torch.testing.assert_close(masked, removed, atol=2e-4, rtol=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        # Key biases have no gradient but rounding: a softmax does not feel them.
        scale = max(float(gradient.abs().max()), 1e-5 * largest)
        assert float((gradient - gradients[name]).abs().max()) < 2e-3 * scale, name
    selectors = [gradient for name, gradient in expected.items() if "token_pruning" in name]
    assert min(float(gradient.abs().max()) for gradient in selectors) > 0


def test_tokens_leave_while_training_when_told():
    model = build_dense("vit")
    pruning = add_token_pruning(model, TokenPruningConfig(**SETTINGS))
    lengths = []
    find_site(model).blocks[5].register_forward_pre_hook(lambda _m, args: lengths.append(args[0].shape[1]))
    model.train()
    model(pixel_batch(4))
    pruning.removes_in_training = True
    model(pixel_batch(4))
    assert lengths[0] == 1 + 64 + 1
    assert lengths[1] < 1 + 64
