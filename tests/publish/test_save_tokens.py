"""Every token method, saved and loaded by its own library."""

import subprocess
import sys

import pytest
import timm
import torch
import transformers
from tiny_models import build_dense, pixel_batch

import hf_prune
from hf_prune.tokens.attach import add_token_pruning, token_pruning_of
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.reducers.registry import REDUCERS
from hf_prune.tokens.site import logits_of

# In a process that has never seen the model.
LOAD = """
import sys, torch, hf_prune
kind, folder = sys.argv[1:]
if kind == "vit":
    from transformers import AutoModelForImageClassification
    model = AutoModelForImageClassification.from_pretrained(folder)
else:
    import timm
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
pixels, expected = torch.load(f"{folder}/case.pt")
with torch.no_grad():
    logits = model.eval()(pixels)
assert torch.equal(getattr(logits, "logits", logits), expected)
"""


def reduced(kind, method):
    model = build_dense(kind)
    torch.manual_seed(1)
    merged = {"merge_ratios": (0.125, 0.125)} if method == "diffrate" else {}
    settings = TokenPruningConfig(
        before_blocks=(2, 4), keep_ratios=(0.625, 0.375), num_heads=4, method=method, **merged
    )
    pruning = add_token_pruning(model, settings)
    with torch.no_grad():
        for parameter in pruning.parameters():
            parameter.normal_(0, 0.5)
    return model


@pytest.mark.parametrize("kind", ["vit", "timm-vit"])
@pytest.mark.parametrize("method", REDUCERS)
@torch.no_grad()
def test_every_method_comes_back(kind, method, tmp_path):
    model, pixels = reduced(kind, method), pixel_batch(4)
    expected = logits_of(model(pixels))
    hf_prune.save(model, tmp_path)
    again = hf_prune.load(tmp_path)
    assert type(again) is type(model)
    assert token_pruning_of(again).settings == token_pruning_of(model).settings
    assert torch.equal(logits_of(again(pixels)), expected)
    if kind == "vit":
        again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    else:
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(logits_of(again(pixels)), expected)


@pytest.mark.parametrize(("kind", "method"), [("vit", "tome"), ("timm-vit", "evit")])
@torch.no_grad()
def test_methods_without_parameters_come_back_elsewhere(kind, method, tmp_path):
    model, pixels = reduced(kind, method), pixel_batch(4)
    expected = logits_of(model(pixels))
    hf_prune.save(model, tmp_path)
    torch.save((pixels, expected), tmp_path / "case.pt")
    subprocess.run([sys.executable, "-c", LOAD, kind, str(tmp_path)], check=True)
