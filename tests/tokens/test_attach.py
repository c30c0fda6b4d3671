import copy
import pickle

import pytest
import timm
import torch
import transformers
from tiny_models import DEPTH, NUM_PATCHES, PREFIX_TOKENS, build_dense, build_pruned, pixel_batch
from torch import nn

from hf_prune.errors import HfPruneError, ManifestError, UnsupportedModelError
from hf_prune.tokens.attach import add_token_pruning, token_pruning_of
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.reducers.decide import GumbelNoise
from hf_prune.tokens.site import find_site, logits_of

SETTINGS = TokenPruningConfig(before_blocks=(2, 4), keep_ratios=(0.65, 0.3), num_heads=4)


@torch.no_grad()
def run(model: nn.Module, pixels: torch.Tensor):
    logits = logits_of(model(pixels))
    return logits, [record.keep for record in token_pruning_of(model).take_records()]


def test_no_dense_checkpoint_key_changes_and_the_class_stays(dense):
    before, kind_before = set(dense.state_dict()), type(dense)
    build_pruned(dense)
    added = set(dense.state_dict()) - before
    assert before <= set(dense.state_dict())
    assert type(dense) is kind_before
    assert added
    assert all("token_pruning." in key for key in added)


def test_prefix_tokens_are_counted_from_the_model(dense, kind):
    assert find_site(dense).num_prefix_tokens == PREFIX_TOKENS[kind]


def test_nothing_dropped_gives_the_dense_logits(dense):
    pixels = pixel_batch(4)
    with torch.no_grad():
        expected = logits_of(dense(pixels))
    pruning = build_pruned(dense)
    for selector in pruning.selectors.values():
        selector.keep_threshold.fill_(-1e9)
    for runtime in ("gathered", "masked", "packed"):
        pruning.runtime = runtime
        logits, keep = run(dense, pixels)
        assert all(bool((mask == 1).all()) for mask in keep)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert expected.abs().mean() > 0.1  # or equality would prove nothing


@pytest.mark.parametrize("runtime", ["gathered", "packed"])
def test_masked_and_removed_tokens_give_the_same_logits(dense, runtime):
    pixels = pixel_batch(20)
    with torch.no_grad():
        expected = logits_of(dense(pixels))
    pruning = build_pruned(dense)
    pruning.runtime = "masked"
    masked, masked_keep = run(dense, pixels)
    pruning.runtime = runtime
    removed, removed_keep = run(dense, pixels)
    for first, second in zip(masked_keep, removed_keep, strict=True):
        assert torch.equal(first, second)
    torch.testing.assert_close(masked, removed, atol=1e-4, rtol=0)
    assert (masked - expected).abs().max() > 1e-2  # dropping tokens does change the output


def test_a_batch_of_32_equals_32_batches_of_one(dense):
    build_pruned(dense)
    pixels = pixel_batch(32)
    together, keep = run(dense, pixels)
    alone = torch.cat([run(dense, image[None])[0] for image in pixels])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert len(set(keep[0].sum(1).tolist())) > 3  # counts differ between images


def test_a_dropped_token_never_returns(dense):
    build_pruned(dense)
    _, keep = run(dense, pixel_batch(16))
    assert keep[0].shape == (16, NUM_PATCHES)
    assert bool((keep[1] <= keep[0]).all())
    assert 0 < keep[1].sum() < keep[0].sum() < keep[0].numel()
    dense.train()
    dense(pixel_batch(16))
    first, second = (record.keep for record in token_pruning_of(dense).take_records())
    assert bool((second <= first).all())


def test_everything_may_be_dropped_but_prefix_and_package(dense):
    pruning = build_pruned(dense)
    for selector in pruning.selectors.values():
        selector.keep_threshold.fill_(1e9)
    removed, keep = run(dense, pixel_batch(3))
    pruning.runtime = "masked"
    masked, _ = run(dense, pixel_batch(3))
    assert float(keep[0].sum()) == 0
    assert torch.isfinite(removed).all()
    torch.testing.assert_close(masked, removed, atol=1e-4, rtol=0)


def test_gradients_reach_every_parameter_of_the_selectors(dense):
    pruning = add_token_pruning(dense, SETTINGS)
    dense.train()
    logits_of(dense(pixel_batch(8))).square().sum().backward()
    for name, parameter in pruning.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_the_keep_decision_itself_has_a_gradient(vit):
    """A loss on the logits alone must move a token's own decision, dropped or kept."""
    add_token_pruning(vit, SETTINGS)
    vit.train()
    logits = logits_of(vit(pixel_batch(4)))
    record = token_pruning_of(vit).take_records()[0]
    (gradient,) = torch.autograd.grad(logits.square().sum(), record.keep)
    assert (gradient[record.keep == 0].abs() > 0).float().mean() > 0.9
    assert (gradient[record.keep == 1].abs() > 0).float().mean() > 0.9


@pytest.mark.parametrize("packages", ["single", "per_stage"])
def test_sequence_lengths_are_prefix_plus_kept_plus_packages(vit, packages):
    settings = TokenPruningConfig(before_blocks=(2, 4), keep_ratios=(0.65, 0.3), num_heads=4, packages=packages)
    build_pruned(vit, settings)
    lengths = []
    for block in find_site(vit).blocks.children():
        block.register_forward_pre_hook(lambda _m, args: lengths.append(args[0].shape[1]))
    _, keep = run(vit, pixel_batch(1))
    kept = [int(mask.sum()) for mask in keep]
    last = 2 if packages == "per_stage" else 1
    assert lengths == [1 + NUM_PATCHES] * 2 + [1 + kept[0] + 1] * 2 + [1 + kept[1] + last] * 2


def test_packed_blocks_see_no_padding(vit):
    pruning = build_pruned(vit)
    pruning.runtime = "packed"
    shapes = []
    find_site(vit).blocks[5].register_forward_pre_hook(lambda _m, args: shapes.append(tuple(args[0].shape[:2])))
    _, keep = run(vit, pixel_batch(12))
    assert len(set(keep[1].sum(1).tolist())) > 1
    assert shapes == [(1, int(keep[1].sum()) + 12 * 2)]  # class token and package beside the patches
    pruning.runtime = "auto"
    run(vit, pixel_batch(12))
    assert shapes[1][0] == 12  # too little to save in so small a model


def test_packing_is_refused_where_images_would_mix():
    model = build_dense("vit")
    model.set_attn_implementation("eager")
    pruning = build_pruned(model)
    automatic, _ = run(model, pixel_batch(6))
    assert torch.isfinite(automatic).all()
    pruning.runtime = "packed"
    with pytest.raises(UnsupportedModelError, match="scaled_dot_product_attention"):
        run(model, pixel_batch(6))


def test_a_copy_has_its_own_state_and_selectors(vit):
    build_pruned(vit)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(vit)))
    pixels = pixel_batch(3)
    expected, _ = run(vit, pixels)
    for selector in token_pruning_of(twin).selectors.values():
        selector.keep_threshold.fill_(1e9)
    changed, keep = run(twin, pixels)
    again, _ = run(vit, pixels)
    assert float(keep[0].sum()) == 0
    assert not torch.equal(changed, expected)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("kind", ["vit", "timm-vit", "timm-eva02"], indirect=True)
def test_activation_checkpointing_gives_the_same_gradients(dense, kind):
    add_token_pruning(dense, SETTINGS)
    dense.train()
    pixels, gradients = pixel_batch(4), []
    for checkpointing in (False, True):
        if checkpointing and kind == "vit":
            dense.gradient_checkpointing_enable({"use_reentrant": False})
        elif checkpointing:
            timm.layers.set_reentrant_ckpt(False)
            dense.set_grad_checkpointing()
        dense.zero_grad()
        logits = logits_of(dense(pixels))
        keep = torch.stack([record.keep.mean() for record in token_pruning_of(dense).take_records()])
        (logits.square().sum() + keep.sum()).backward()
        gradients.append([p.grad.clone() for p in token_pruning_of(dense).parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_decisions_without_gradient_are_refused_while_training(vit):
    add_token_pruning(vit, SETTINGS).requires_grad_(False)
    vit.requires_grad_(False).train()
    token_pruning_of(vit).noise = None
    vit(pixel_batch(2))
    with pytest.raises(HfPruneError, match="use_reentrant=False"):
        token_pruning_of(vit).take_records()


def test_training_noise_follows_its_step(vit):
    pruning = add_token_pruning(vit, SETTINGS)
    vit.train()
    seen = []
    for step in (0, 1, 0):
        pruning.noise = GumbelNoise(seed=3, step=step)
        vit(pixel_batch(4))
        seen.append(pruning.take_records()[0].keep.detach())
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_selectors_stay_in_float32_when_the_model_is_cast(vit):
    build_pruned(vit)
    vit.to(torch.bfloat16)
    assert {parameter.dtype for parameter in token_pruning_of(vit).parameters()} == {torch.float32}
    logits, _ = run(vit, pixel_batch(12).bfloat16())
    assert logits.dtype is torch.bfloat16
    assert torch.isfinite(logits).all()


def test_mixed_precision_trains(vit):
    add_token_pruning(vit, SETTINGS)
    vit.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(vit(pixel_batch(4)))
    logits.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in token_pruning_of(vit).parameters())


def test_forward_intermediates_of_timm_still_works():
    model = build_dense("timm-vit")
    build_pruned(model)
    final, intermediates = model.forward_intermediates(pixel_batch(1), indices=[0, 1], output_fmt="NLC")
    assert [tuple(x.shape) for x in intermediates] == [(1, NUM_PATCHES, 48)] * 2
    assert final.shape[1] < 1 + NUM_PATCHES


def test_hidden_states_of_transformers_shrink(vit):
    build_pruned(vit)
    lengths = [states.shape[1] for states in vit(pixel_batch(1), output_hidden_states=True).hidden_states]
    assert len(lengths) == DEPTH + 1
    assert lengths[0] == 1 + NUM_PATCHES > lengths[-1]
    assert lengths == sorted(lengths, reverse=True)


def test_models_of_other_kinds_are_refused_with_the_supported_ones():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
    for model in (transformers.ResNetForImageClassification(config), nn.Linear(2, 2), timm.create_model("test_resnet")):
        with pytest.raises(UnsupportedModelError, match=r"supported are ViT, DeiT"):
            add_token_pruning(model, SETTINGS)


def test_pruning_twice_or_behind_the_last_block_is_refused(vit):
    late = TokenPruningConfig(before_blocks=(2, DEPTH), keep_ratios=(0.65, 0.3), num_heads=4)
    with pytest.raises(ManifestError, match=f"before blocks 0 to {DEPTH - 1}"):
        add_token_pruning(vit, late)
    growing = TokenPruningConfig(before_blocks=(2, 4), keep_ratios=(0.4, 0.7), num_heads=4)
    with pytest.raises(ManifestError, match="must not grow"):
        add_token_pruning(vit, growing)
    add_token_pruning(vit, SETTINGS)
    with pytest.raises(UnsupportedModelError, match="already"):
        add_token_pruning(vit, SETTINGS)


def test_a_dense_model_has_no_selectors_to_return(vit):
    with pytest.raises(UnsupportedModelError, match="add_token_pruning"):
        token_pruning_of(vit)


def test_selectors_are_inserted_in_front_and_taken_out_again():
    model = build_dense("vit")
    pruning = add_token_pruning(model, SETTINGS)
    second = pruning.selectors["4"]
    pruning.insert_first(1)
    assert pruning.settings.before_blocks == (1, 2, 4)
    assert set(pruning.selectors) == {"1", "2", "4"}
    model.eval()
    assert len(run(model, pixel_batch(2))[1]) == 3
    with pytest.raises(ManifestError, match="where there are some"):
        pruning.keep_selectors((1, 3), (0.5, 0.3))
    pruning.keep_selectors((1, 4), (0.5, 0.3))
    assert pruning.settings.before_blocks == (1, 4)
    assert pruning.settings.keep_ratios == (0.5, 0.3)
    assert pruning.selectors["4"] is second
    assert len(run(model, pixel_batch(2))[1]) == 2
    assert not any(key.startswith("vit.encoder.token_pruning.selectors.2.") for key in model.state_dict())
    with pytest.raises(ManifestError):
        pruning.insert_first(3)
