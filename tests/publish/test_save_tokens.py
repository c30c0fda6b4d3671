"""Every token method, saved and loaded by every way there is: the same logits."""

import json

import pytest
import timm
import torch
import transformers
from tiny_models import build_dense, pixel_batch

import hf_prune
from hf_prune.tokens.attach import add_token_pruning, token_pruning_of
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.rate_search import search_rates
from hf_prune.tokens.reducers.registry import REDUCERS, reducer_class
from hf_prune.tokens.site import logits_of

PIXELS = pixel_batch(4)


@torch.no_grad()
def logits(model):
    return logits_of(model.eval()(PIXELS))


def reduced(kind, method):
    model = build_dense(kind)
    merged = {"merge_ratios": (0.125, 0.0625)} if method == "diffrate" else {}
    settings = TokenPruningConfig(
        method=method,
        before_blocks=(2, 4),
        keep_ratios=(0.625, 0.375),
        num_heads=4,
        proportional=kind == "vit",
        **merged,
    )
    torch.manual_seed(1)
    pruning = add_token_pruning(model, settings)
    with torch.no_grad():
        for parameter in pruning.parameters():
            parameter.normal_(0, 0.5)
    return model


@pytest.mark.parametrize("method", REDUCERS)
@pytest.mark.parametrize("kind", ["vit", "timm-vit"])
def test_a_round_trip_keeps_settings_and_logits(kind, method, tmp_path):
    model = reduced(kind, method)
    expected, settings = logits(model), token_pruning_of(model).settings
    assert not torch.equal(expected, logits(build_dense(kind)))
    hf_prune.save(model, tmp_path)
    if kind == "vit":
        by_library = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    else:
        by_library = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for loaded in (hf_prune.load(tmp_path), by_library):
        assert type(loaded) is type(model)
        assert token_pruning_of(loaded).settings == settings
        assert torch.equal(logits(loaded), expected)
    keys = {name for name in model.state_dict() if "token_pruning" in name}
    assert bool(keys) == reducer_class(method).learned


def test_a_schedule_that_was_learned_survives(tmp_path):
    model = build_dense("vit")
    settings = search_rates(model, [PIXELS], target_macs=0.6, before_blocks=(1, 3), num_steps=1)
    add_token_pruning(model, settings)
    hf_prune.save(model, tmp_path / "out")
    held = json.loads((tmp_path / "out" / "config.json").read_text())["hf_prune"]["tokens"]
    assert (held["method"], tuple(held["merge_ratios"])) == ("diffrate", settings.merge_ratios)
    loaded = hf_prune.load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
