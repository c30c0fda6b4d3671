"""What the analysis learns of a model's code is used by every later cut."""

import timm
import torch

from hf_prune.allocate.plan import Plan
from hf_prune.pipeline import analyze, apply_plan
from hf_prune.surgery import repair

IMAGE = torch.zeros(1, 3, 32, 32)


def small_vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()


def test_the_numbers_a_forward_holds_are_known_after_the_analysis():
    graph = analyze(small_vit(), IMAGE)
    held = graph.held.attributes
    assert [graph.describe(dim) for dim in held["blocks.1.attn"]["num_heads"].dims] == ["blocks.1.attn.heads"]


def test_a_cut_after_the_analysis_replays_once(monkeypatch):
    model, replays = small_vit(), []
    graph = analyze(model, IMAGE)
    replay = repair.first_mismatch
    monkeypatch.setattr(repair, "first_mismatch", lambda *given: replays.append(1) or replay(*given))
    # Two axes that shrink to one size: what the numbers mean cannot be told from this cut alone.
    kept = {"blocks.0.attn.heads": [0, 2], "blocks.1.attn.heads": [1], "blocks.0.mlp.hidden": range(192)}
    known = graph.held.copy()
    record = apply_plan(model, Plan.of(graph, kept), graph)
    assert len(replays) == 1
    assert graph.held == known
    assert record.repairs.attributes["blocks.0.attn"]["num_heads"] == 2
    assert (model.blocks[0].attn.num_heads, model.blocks[1].attn.num_heads) == (2, 1)
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
