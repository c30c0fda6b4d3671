import pytest
import torch
import torch.nn.functional as F

from hf_prune.errors import UnsupportedModelError
from hf_prune.tokens.reducers.spvit import SoftTokenSelector


def released_state(num_heads: int, head_dim: int, *, shared: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """A selector as the released code stores it: the MLPs listed once a head."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator) * 0.5

    def head():
        half, quarter = head_dim // 2, head_dim // 4
        return {
            "in_conv.{}.0.weight": rand(head_dim),
            "in_conv.{}.0.bias": rand(head_dim),
            "in_conv.{}.1.weight": rand(head_dim, head_dim),
            "in_conv.{}.1.bias": rand(head_dim),
            "out_conv.{}.0.weight": rand(half, head_dim),
            "out_conv.{}.0.bias": rand(half),
            "out_conv.{}.2.weight": rand(quarter, half),
            "out_conv.{}.2.bias": rand(quarter),
            "out_conv.{}.4.weight": rand(2, quarter),
            "out_conv.{}.4.bias": rand(2),
        }

    state = {
        "s.senet.0.weight": rand(num_heads // 2, num_heads),
        "s.senet.0.bias": rand(num_heads // 2),
        "s.senet.2.weight": rand(num_heads, num_heads // 2),
        "s.senet.2.bias": rand(num_heads),
    }
    first = head()
    for index in range(num_heads):
        weights = first if shared else head()
        state |= {"s." + name.format(index): value for name, value in weights.items()}
    return state


def score_head_by_head(state, tokens, alive, num_heads):
    """The equations of the method sheet, one head after the other, with the released first MLP."""
    slices = tokens.chunk(num_heads, dim=-1)
    means = torch.stack([part.mean(-1) for part in slices], dim=-1)
    hidden = F.gelu(F.linear(means, state["s.senet.0.weight"], state["s.senet.0.bias"]))
    importance = torch.sigmoid(F.linear(hidden, state["s.senet.2.weight"], state["s.senet.2.bias"]))
    log_sum, probability_sum = 0, 0
    for head, part in enumerate(slices):

        def linear(x, name, head=head):
            return F.linear(x, state[f"s.{name.format(head)}.weight"], state[f"s.{name.format(head)}.bias"])

        norm = [state[f"s.in_conv.{head}.0.{kind}"] for kind in ("weight", "bias")]
        feature = F.gelu(linear(F.layer_norm(part, part.shape[-1:], *norm), "in_conv.{}.1"))
        local, shared = feature.chunk(2, dim=-1)
        context = (shared * alive[..., None]).sum(1, keepdim=True) / alive.sum(1)[:, None, None]
        x = torch.cat([local, context.expand_as(local)], dim=-1)
        scores = linear(
            F.gelu(linear(F.gelu(linear(x, "out_conv.{}.0")), "out_conv.{}.2")),
            "out_conv.{}.4",
        )
        weight = importance[..., head : head + 1]
        log_sum = log_sum + weight * scores.log_softmax(-1)
        probability_sum = probability_sum + weight * scores.softmax(-1)
    total = importance.sum(-1, keepdim=True)
    return log_sum / total, (probability_sum / total)[..., 0]


@pytest.mark.parametrize("shared", [True, False])
def test_a_released_checkpoint_gives_the_scores_of_its_equations(shared):
    num_heads, head_dim = 6, 16
    state = released_state(num_heads, head_dim, shared=shared)
    selector = SoftTokenSelector(num_heads * head_dim, num_heads, share_head_mlp=shared, paper_mlp1=False)
    selector.load_released_state(state, "s.")
    tokens = torch.randn(3, 10, num_heads * head_dim)
    alive = (torch.rand(3, 10) > 0.3).float()
    logits, keep_probability = selector(tokens, alive)
    expected_logits, expected_probability = score_head_by_head(state, tokens, alive, num_heads)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(keep_probability, expected_probability, atol=1e-5, rtol=1e-4)


def test_heads_that_differ_do_not_load_into_shared_weights():
    selector = SoftTokenSelector(24, 6, share_head_mlp=True, paper_mlp1=False)
    with pytest.raises(UnsupportedModelError, match="share_head_mlp=False"):
        selector.load_released_state(released_state(6, 4, shared=False), "s.")


def test_the_released_selector_of_deit_small_has_6930_parameters_a_head_mlp():
    """Less the scale and shift of its norm, which the next layer takes over."""
    shared = SoftTokenSelector(384, 6, share_head_mlp=True, paper_mlp1=False)
    separate = SoftTokenSelector(384, 6, share_head_mlp=False, paper_mlp1=False)

    def mlp(selector):
        return sum(p.numel() for name, p in selector.named_parameters() if "head_importance" not in name)

    assert mlp(shared) == 6930 - 2 * 64
    assert mlp(separate) == 6 * mlp(shared)


def test_the_paper_form_uses_one_feature_for_both_halves():
    selector = SoftTokenSelector(32, 2)
    assert selector.feature.weight.shape == (2, 8, 16)
    assert selector.score[0].weight.shape == (2, 8, 16)


def test_dropped_tokens_do_not_influence_the_scores_of_others():
    selector = SoftTokenSelector(32, 2)
    torch.nn.init.normal_(selector.feature.weight)
    tokens, alive = torch.randn(2, 6, 32), torch.ones(2, 6)
    alive[:, 4:] = 0
    other = tokens.clone()
    other[:, 4:] = torch.randn(2, 2, 32)
    torch.testing.assert_close(selector(tokens, alive).logits[:, :4], selector(other, alive).logits[:, :4])


def test_a_fresh_selector_keeps_about_the_share_it_is_told_to():
    selector = SoftTokenSelector(32, 2)
    selector.start_at_keep_probability(0.8)
    with torch.no_grad():
        probability = selector(torch.randn(4, 50, 32), torch.ones(4, 50)).logits.softmax(-1)[..., 0]
    assert probability.mean().item() == pytest.approx(0.8, abs=0.02)


def test_nothing_alive_gives_finite_scores():
    scores = SoftTokenSelector(32, 2)(torch.randn(1, 3, 32), torch.zeros(1, 3))
    assert torch.isfinite(scores.logits).all()


def test_autocast_does_not_lower_its_precision():
    selector, tokens = SoftTokenSelector(32, 2), torch.randn(1, 5, 32)
    expected = selector(tokens, torch.ones(1, 5)).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = selector(tokens, torch.ones(1, 5)).logits
    assert logits.dtype is torch.float32
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(("dim", "num_heads"), [(32, 5), (8, 4)])
def test_widths_that_do_not_split_are_refused(dim, num_heads):
    with pytest.raises(UnsupportedModelError, match="heads of 4 channels or more"):
        SoftTokenSelector(dim, num_heads)
