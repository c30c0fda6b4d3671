"""What every reducer must do, in every kind of model."""

import pytest
import torch
from tiny_models import KINDS, NUM_PATCHES, build_dense, pixel_batch, set_thresholds

from hf_prune.errors import ManifestError, UnsupportedModelError
from hf_prune.tokens.attach import add_token_pruning, token_pruning_of
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.reducers.base import Merger
from hf_prune.tokens.reducers.registry import REDUCERS, reducer_class
from hf_prune.tokens.site import find_site, logits_of

RATIOS = (0.625, 0.375)
SELECTORS = [name for name in REDUCERS if not issubclass(reducer_class(name), Merger)]
MERGERS = [name for name in REDUCERS if issubclass(reducer_class(name), Merger)]


def settings_for(method, **changes):
    merged = {"merge_ratios": (0.125, 0.125)} if method == "diffrate" else {}
    return TokenPruningConfig(
        **{"before_blocks": (2, 4), "keep_ratios": RATIOS, "num_heads": 4, "method": method, **merged, **changes}
    )


def reduced(model, method, **changes):
    torch.manual_seed(1)
    pruning = add_token_pruning(model, settings_for(method, **changes))
    with torch.no_grad():
        for parameter in pruning.parameters():
            parameter.normal_(0, 0.5)
    if method == "spvit":
        set_thresholds(model, pruning)
    return pruning


@torch.no_grad()
def run(model, pixels):
    logits = logits_of(model(pixels))
    return logits, [record.keep for record in token_pruning_of(model).take_records()]


@pytest.mark.parametrize("method", REDUCERS)
@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_met_and_an_image_alone_gives_what_it_gives_in_a_batch(kind, method):
    model = build_dense(kind)
    pixels = pixel_batch(5)
    with torch.no_grad():
        expected = logits_of(model(pixels))
    reduced(model, method)
    together, keep = run(model, pixels)
    alone = torch.cat([run(model, image[None])[0] for image in pixels])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert torch.isfinite(together).all()
    assert (together - expected).abs().max() > 2e-4
    assert bool((keep[1] <= keep[0]).all())
    if method != "spvit":
        for mask, ratio in zip(keep, RATIOS, strict=True):
            assert mask.sum(1).tolist() == [ratio * NUM_PATCHES] * 5


@pytest.mark.parametrize("method", SELECTORS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_runtime_gives_the_same_logits_for_the_same_decisions(kind, method):
    model, pixels = build_dense(kind), pixel_batch(6)
    pruning = reduced(model, method)
    found = {}
    for runtime in ("masked", "gathered", "packed") if method == "spvit" else ("masked", "gathered", "topk"):
        pruning.runtime = runtime
        found[runtime] = run(model, pixels)
    logits, keep = found.pop("masked")
    for others, masks in found.values():
        assert all(torch.equal(first, second) for first, second in zip(keep, masks, strict=True))
        torch.testing.assert_close(logits, others, atol=1e-4, rtol=0)


def test_fixed_counts_of_an_adaptive_method_keep_its_best():
    model, pixels = build_dense("vit"), pixel_batch(1)
    pruning = reduced(model, "spvit")
    pruning.runtime = "topk"
    logits, keep = run(model, pixels)
    assert [int(mask.sum()) for mask in keep] == [ratio * NUM_PATCHES for ratio in RATIOS]
    # The thresholds at which the method would by itself keep as many of this one image.
    pruning.runtime = "masked"
    for stage, ratio in enumerate(RATIOS):
        with torch.no_grad():
            model(pixels)
        record = pruning.take_records()[stage]
        ranked = record.margin[record.candidates > 0].sort(descending=True).values
        number = int(ratio * NUM_PATCHES)
        pruning.selectors[str(record.before_block)].keep_threshold.fill_((ranked[number - 1] + ranked[number]) / 2)
    by_threshold, same = run(model, pixels)
    assert all(torch.equal(first, second) for first, second in zip(keep, same, strict=True))
    torch.testing.assert_close(logits, by_threshold, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["vit", "timm-vit"])
@pytest.mark.parametrize("method", [name for name in REDUCERS if reducer_class(name).reads == "attention"])
def test_attention_written_out_is_read_like_fused_attention(kind, method):
    pixels, found = pixel_batch(4), []
    for fused in (True, False):
        model = build_dense(kind)
        if kind == "vit":
            model.set_attn_implementation("sdpa" if fused else "eager")
        else:
            for block in model.blocks:
                block.attn.fused_attn = fused
        reduced(model, method)
        found.append(run(model, pixels))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=0)
    assert all(torch.equal(first, second) for first, second in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("method", MERGERS)
def test_sizes_count_all_patches_that_are_not_dropped(method):
    model = build_dense("vit")
    pruning = reduced(model, method)
    with torch.no_grad():
        model(pixel_batch(3))
    tokens = pruning.last_run.latest
    source, size = tokens.source, tokens.size
    for image in range(3):
        standing = source[image][source[image] >= 0]
        assert torch.equal(standing.bincount(minlength=size.shape[1]).float(), size[image])
        # Each slot stands for the patch whose place it has.
        assert torch.equal(source[image][tokens.index[image]], torch.arange(size.shape[1]))
    dropped = 0.375 * NUM_PATCHES if method == "diffrate" else 0
    assert (source < 0).sum(1).tolist() == [dropped] * 3


@pytest.mark.parametrize("method", MERGERS)
def test_merged_tokens_cannot_be_masked(method):
    model = build_dense("vit")
    reduced(model, method).runtime = "masked"
    with pytest.raises(UnsupportedModelError, match="cannot be masked"):
        run(model, pixel_batch(2))


def test_one_merge_takes_away_half_at_most():
    model = build_dense("vit")
    reduced(model, "tome", keep_ratios=(0.9, 0.3))
    with pytest.raises(UnsupportedModelError, match="50% of the tokens at most"):
        run(model, pixel_batch(2))


@pytest.mark.parametrize("method", REDUCERS)
def test_training_reaches_every_parameter(method):
    model = build_dense("vit")
    reduced(model, method)
    model.train()
    logits_of(model(pixel_batch(6))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize("method", [name for name in REDUCERS if not reducer_class(name).learned])
def test_methods_without_parameters_shorten_training_too(method):
    model = build_dense("vit")
    reduced(model, method)
    assert not any("token_pruning" in key for key in model.state_dict())
    lengths = []
    find_site(model).blocks[5].register_forward_pre_hook(lambda _m, args: lengths.append(args[0].shape[1]))
    model.train()
    model(pixel_batch(2))
    packages = 1 if method == "evit" else 0
    assert lengths == [1 + RATIOS[1] * NUM_PATCHES + packages]


def test_random_is_random_while_training_only():
    model = build_dense("vit")
    reduced(model, "random")
    pixels = pixel_batch(3)
    _, first = run(model, pixels)
    _, second = run(model, pixels)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[0][0], first[0][1])
    assert not torch.equal(first[0][0][:32], first[0][0][32:])
    model.train()
    _, first = run(model, pixels)
    _, second = run(model, pixels)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0][0], first[0][1])


def test_methods_that_read_attention_need_a_block_before():
    with pytest.raises(ManifestError, match="start at 1"):
        settings_for("tome", before_blocks=(0, 4))


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(ManifestError, match="did you mean tome"):
        settings_for("tomee")
