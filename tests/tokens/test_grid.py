"""Models whose later parts read a full grid of tokens: backbones, maps of features, PiT."""

import copy

import pytest
import timm
import torch
import transformers
from tiny_models import build_dense, pixel_batch, set_thresholds
from torch import nn

import hf_prune
from hf_prune.errors import ManifestError, UnsupportedModelError
from hf_prune.measure.token_cost import macs_cost
from hf_prune.tokens.attach import add_token_pruning, token_pruning_of
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.site import find_site, logits_of

METHODS = ("spvit", "evit", "tome")


def varied(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.15)
    return model.eval()


def backbone():
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=6, num_attention_heads=4, mlp_ratio=2, image_size=32, patch_size=4,
        out_features=["stage2", "stage4", "stage6"], reshape_hidden_states=True,
    )  # fmt: skip
    return varied(transformers.Dinov2Backbone(config))


def pit():
    # Grids of 49, 16 and 4 patches.
    return varied(timm.create_model("pit_ti_224", img_size=64, base_dims=[16, 16, 16], heads=[2, 2, 4], num_classes=7))


def settings(method="spvit", **changes):
    given = {"before_blocks": (2, 4), "keep_ratios": (0.625, 0.375), "num_heads": 4, "method": method}
    return TokenPruningConfig(**{**given, **changes})


def prune(model, config, pixels=None):
    torch.manual_seed(1)
    pruning = add_token_pruning(model, config)
    with torch.no_grad():
        for parameter in pruning.parameters():
            parameter.normal_(0, 0.5)
    if config.method == "spvit" and pixels is None:
        set_thresholds(model, pruning)
    return pruning


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_backbone_returns_whole_maps(method):
    model, pixels = backbone(), pixel_batch(4)
    dense = model(pixels).feature_maps
    pruning = prune(model, settings(method))
    maps = model(pixels).feature_maps
    assert [tuple(each.shape) for each in maps] == [(4, 48, 8, 8)] * 3
    torch.testing.assert_close(maps[0], dense[0])  # before the first reduction
    record = pruning.take_records()[0]
    alone = torch.cat([model(image[None]).feature_maps[2] for image in pixels])
    torch.testing.assert_close(maps[2], alone, atol=1e-4, rtol=0)
    assert (maps[2] - dense[2]).abs().max() > 1e-3
    assert 0 < record.keep.mean() < 1


@torch.no_grad()
def test_dropped_patches_keep_their_last_features():
    model, pixels = backbone(), pixel_batch(3)
    pruning = prune(model, settings("evit", before_blocks=(2,), keep_ratios=(0.5,)))
    hidden = model(pixels, output_hidden_states=True).hidden_states
    keep = pruning.take_records()[0].keep.bool()
    before, after = hidden[2][:, 1:], hidden[6][:, 1:]
    assert torch.equal(before[~keep], after[~keep])
    assert (before[keep] - after[keep]).abs().amax(1).min() > 0


@torch.no_grad()
def test_patches_that_were_merged_have_the_features_of_their_group():
    model, pixels = backbone(), pixel_batch(2)
    pruning = prune(model, settings("tome", before_blocks=(2,), keep_ratios=(0.625,)))
    after = model(pixels, output_hidden_states=True).hidden_states[6][:, 1:]
    tokens = pruning.last_run.latest
    for image in range(2):
        for slot in range(tokens.size.shape[1]):
            group = after[image][tokens.source[image] == slot]
            assert len(group) == tokens.size[image, slot]
            assert bool((group == group[0]).all())


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_grid_that_is_kept_changes_no_logits_of_the_class_token(method):
    pixels, found = pixel_batch(6), []
    for keep_grid in (False, True):
        model = build_dense("timm-vit")
        prune(model, settings(method, keep_grid=keep_grid))
        found.append(logits_of(model(pixels)))
        if keep_grid:
            maps = model.forward_intermediates(pixels, indices=[1, 5], intermediates_only=True)
            assert [tuple(each.shape) for each in maps] == [(6, 48, 8, 8)] * 2
            token_pruning_of(model).runtime = "packed" if method == "spvit" else "auto"
            torch.testing.assert_close(logits_of(model(pixels)), found[-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_the_gradient_goes_through_a_grid_that_is_kept():
    model = backbone()
    prune(model, settings())
    model.train()
    sum(each.square().sum() for each in model(pixel_batch(2)).feature_maps).backward()
    for name, parameter in token_pruning_of(model).named_parameters():
        assert float(parameter.grad.abs().sum()) > 0, name


def test_pit_has_a_grid_for_each_stage():
    model = pit()
    site = find_site(model)
    assert [stack.first for stack in site.stacks] == [0, 2, 8]
    assert [stack.dim for stack in site.stacks] == [32, 32, 64]
    assert site.depth == 12
    with pytest.raises(UnsupportedModelError, match="give `keep_ratios` instead"):
        macs_cost(model, pixel_batch(1), settings(num_heads=2))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_pit_is_pruned_in_every_stage(method):
    model = pit()
    pixels = nn.functional.interpolate(pixel_batch(6), size=(64, 64))
    dense = model(pixels)
    # Ratios start again from one on every grid.
    config = settings(method, before_blocks=(1, 4, 10), keep_ratios=(0.6, 0.5, 0.75), num_heads=2)
    pruning = prune(model, config, pixels)
    widths = []
    for stack in find_site(model).stacks:
        stack.blocks[1].register_forward_pre_hook(lambda _m, args: widths.append(args[0].shape[1]))
    together = model(pixels)
    keep = [record.keep for record in pruning.take_records()]
    assert [mask.shape[1] for mask in keep] == [49, 16, 4]
    alone = torch.cat([model(image[None]) for image in pixels])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (together - dense).abs().max() > 1e-4
    if method != "spvit":
        assert [int(mask[0].sum()) for mask in keep] == [29, 8, 3]
        assert widths[0] == 1 + 29 + (method == "evit")


@torch.no_grad()
def test_pit_without_drops_is_the_dense_model():
    model = pit()
    pixels = nn.functional.interpolate(pixel_batch(4), size=(64, 64))
    expected = copy.deepcopy(model)(pixels)
    config = settings(before_blocks=(0, 4, 10), keep_ratios=(0.9, 0.9, 0.9), num_heads=2)
    for selector in add_token_pruning(model, config).selectors.values():
        selector.keep_threshold.fill_(-1e9)
    torch.testing.assert_close(model(pixels), expected, atol=1e-5, rtol=0)


def test_attention_is_read_within_a_stage_only():
    with pytest.raises(ManifestError, match="none before block 2 on its grid"):
        add_token_pruning(pit(), settings("evit", before_blocks=(2,), keep_ratios=(0.5,), num_heads=2))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_backbones_and_pit_come_back(method, tmp_path):
    pixels = nn.functional.interpolate(pixel_batch(3), size=(64, 64))
    model = pit()
    prune(model, settings(method, before_blocks=(1, 4, 10), keep_ratios=(0.6, 0.5, 0.5), num_heads=2), pixels)
    hf_prune.save(model, tmp_path / "pit")
    assert torch.equal(hf_prune.load(tmp_path / "pit")(pixels), model(pixels))
    model = backbone()
    prune(model, settings(method))
    model.save_pretrained(tmp_path / "backbone")
    hf_prune.save(model, tmp_path / "backbone")
    again = transformers.Dinov2Backbone.from_pretrained(tmp_path / "backbone").eval()
    assert token_pruning_of(again).settings == token_pruning_of(model).settings
    for first, second in zip(again(pixel_batch(2)).feature_maps, model(pixel_batch(2)).feature_maps, strict=True):
        assert torch.equal(first, second)


@torch.no_grad()
def test_a_timm_model_with_a_kept_grid_comes_back_as_features(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=6, num_heads=4)
    varied(model)
    prune(model, settings("evit", keep_grid=True))
    hf_prune.save(model, tmp_path / "vit")
    features = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True, features_only=True).eval()
    expected = model.forward_intermediates(pixel_batch(2), intermediates_only=True, indices=3)
    for first, second in zip(features(pixel_batch(2)), expected, strict=True):
        torch.testing.assert_close(first, second)
