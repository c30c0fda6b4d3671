import torch

from hf_prune.tokens.tokenset import HIDDEN_WEIGHT, TokenSet, compact, fill_dropped, hide_keys


def attention_with_policy(scores, policy, eps):
    """DynamicViT's masked softmax, written out: exp-multiply with ones on the diagonal."""
    size = policy.shape[1]
    gate = policy[:, None, None, :] + (1 - policy[:, None, None, :]) * torch.eye(size)
    weight = (scores - scores.amax(-1, keepdim=True)).exp() * gate
    return (weight + eps / size) / (weight.sum(-1, keepdim=True) + eps)


def test_training_attention_and_its_gradient_are_those_of_the_exp_multiply_form():
    torch.manual_seed(0)
    scores, value = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 4)
    policy = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0, 0.0]])
    results = []
    for form in ("ours", "published"):
        p = policy.clone().requires_grad_()
        if form == "ours":
            attention = (scores + hide_keys(p, training=True, see_self=True)).softmax(-1)
        else:
            attention = attention_with_policy(scores, p, eps=1e-6)
        (gradient,) = torch.autograd.grad((attention @ value).square().sum(), p)
        results.append((attention.detach(), gradient))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-3, rtol=1e-3)


def test_hidden_keys_get_no_weight_at_inference_and_nothing_is_added_if_none_is_hidden():
    policy = torch.tensor([[1.0, 0.0, 1.0]])
    bias = hide_keys(policy, training=False)
    attention = (torch.randn(1, 2, 3, 3) + bias).softmax(-1)
    assert (attention[..., 1] == 0).all()
    assert hide_keys(torch.ones(1, 3), training=False) is None
    assert 0 < HIDDEN_WEIGHT < 1e-4


def test_compacting_keeps_order_positions_and_the_grid():
    patches = torch.arange(10.0).view(2, 5, 1)
    alive = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    before = TokenSet(5, alive, torch.zeros(2, 1))
    kept, after = compact(patches, before)
    assert kept[..., 0].tolist()[0] == [1.0, 3.0, 4.0]
    assert kept[1, 0, 0] == 5.0
    assert after.alive.tolist() == [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    assert torch.equal(after.grid_mask(), before.grid_mask())
    again, last = compact(
        kept, TokenSet(5, after.alive * torch.tensor([1.0, 0.0, 1.0]), torch.zeros(2, 1), after.index)
    )
    assert again[0, :, 0].tolist() == [1.0, 4.0]
    assert last.grid_mask().tolist() == [[0.0, 1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0]]


def test_one_full_image_does_not_stop_the_others_from_moving_to_the_front():
    alive = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    kept, after = compact(torch.arange(6.0).view(2, 3, 1), TokenSet(3, alive, torch.zeros(2, 1)))
    assert after.alive[1].tolist() == [1.0, 0.0, 0.0]
    assert kept[1, 0, 0] == 5.0


def test_filling_makes_any_mean_and_maximum_those_of_the_kept_tokens():
    torch.manual_seed(0)
    sequence = torch.randn(1, 6, 3)  # one prefix token, four patches, one package
    tokens = TokenSet(4, torch.tensor([[1.0, 0.0, 1.0, 0.0]]), torch.ones(1, 1))
    filled = fill_dropped(sequence, tokens, 1, with_prefix=False)
    kept = sequence[:, [1, 3, 5]]
    torch.testing.assert_close(filled[:, 1:].mean(1), kept.mean(1))
    torch.testing.assert_close(filled[:, 1:].amax(1), kept.amax(1))
    torch.testing.assert_close(filled[:, 0], sequence[:, 0])
    with_prefix = fill_dropped(sequence, tokens, 1, with_prefix=True)
    torch.testing.assert_close(with_prefix.mean(1), sequence[:, [0, 1, 3, 5]].mean(1))
