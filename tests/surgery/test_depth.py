"""An axis cut to nothing takes its branch with it, a block whose branches are gone goes as a whole."""

import copy

import pytest
import timm
import torch
import transformers
from nets import network, of_order_one
from torch import nn

from hf_prune.allocate.plan import Plan
from hf_prune.analyse.graph import AxisGraph
from hf_prune.errors import PlanError, SurgeryError
from hf_prune.measure.token_cost import count_macs
from hf_prune.pipeline import analyze, apply_plan
from hf_prune.surgery.constant import Constant

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def vit() -> nn.Module:
    return of_order_one(timm.models.VisionTransformer(**VIT))


def hf_vit() -> nn.Module:
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=48,
                                    image_size=32, patch_size=8, num_labels=5)  # fmt: skip
    return of_order_one(transformers.ViTForImageClassification(config))


def logits(model: nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    out = model(images)
    return out if isinstance(out, torch.Tensor) else out.logits


def remove(model: nn.Module, *modules: str) -> tuple[AxisGraph, nn.Module]:
    """Remove modules; return the analysis and a dense copy."""
    dense, graph = copy.deepcopy(model), analyze(model, IMAGES[:1])
    record = apply_plan(model, Plan.removing(graph, *modules), graph)
    assert record.difference is not None
    assert record.params[1] == sum(p.numel() for p in model.parameters())
    assert record.macs[1] == count_macs(lambda: model(IMAGES[:1])) < record.macs[0]
    return graph, dense


@pytest.mark.parametrize("model", [vit(), hf_vit()], ids=["timm", "transformers"])
@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_a_branch_becomes_its_bias(model, part):
    model = copy.deepcopy(model)
    names = [name for name, axis in analyze(model, IMAGES[:1]).axes.items()
             if axis.kind == {"mlp": "mlp", "attention": "heads"}[part]]  # fmt: skip
    _, dense = remove(model, names[1].rpartition(".")[0])
    (path,) = [path for path, module in model.named_modules() if isinstance(module, Constant)]
    block = path.rpartition(".")[0]
    last = [m for n, m in dense.get_submodule(path).named_modules() if isinstance(m, nn.Linear)][-1]
    last.weight.data.zero_()
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.get_submodule(path).bias.flatten(), last.bias)
    norms = [module for module in dense.get_submodule(block).modules() if isinstance(module, nn.LayerNorm)]
    left = [module for module in model.get_submodule(block).modules() if isinstance(module, nn.LayerNorm)]
    assert len(left) == len(norms) - 1


def test_a_block_goes_as_a_whole_and_images_of_other_batches_still_fit():
    model = vit()
    _, dense = remove(model, "blocks.1")
    assert isinstance(model.blocks[1], Constant)
    assert model.blocks[1].adds
    dense.blocks[1].attn.proj.weight.data.zero_()
    dense.blocks[1].mlp.fc2.weight.data.zero_()
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet18", "mobilenetv3_small_050"])
def test_published_architectures_lose_a_block_and_units_in_one_plan(name):
    sizes = {"img_size": 32, "window_size": 4} if "swin" in name else {}
    model = of_order_one(timm.create_model(name, num_classes=5, **sizes))
    block = {"swin": "layers.2.blocks.1", "conv": "stages.2.blocks.1", "resn": "layer2.1", "mobi": "blocks.2.1"}[
        name[:4]
    ]
    graph = analyze(model, IMAGES[:1])
    whole = Plan.removing(graph, block)
    others = {
        n: range(0, a.size, 2) for n, a in graph.axes.items() if a.kind in ("mlp", "heads") and n not in whole.kept
    }
    others |= {n: range(0, a.size, 2) for n, a in graph.axes.items() if n in ("layer1.0.conv1.channels",)}
    both = Plan({**whole.kept, **Plan.of(graph, others).kept}, {**whole.sizes, **Plan.of(graph, others).sizes})
    record = apply_plan(model, both, graph)
    assert record.params[1] == sum(p.numel() for p in model.parameters()) < record.params[0]
    assert record.difference is not None
    inside = model.get_submodule(block)
    assert not [name for name, p in inside.named_parameters() if name.endswith("weight") and p.ndim > 1]
    model.train()
    logits(model).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert Plan.from_json(both.to_json()) == both


def test_an_axis_without_a_branch_of_its_own_keeps_a_unit_and_the_model_stays():
    model = network(["conv"])
    graph = analyze(model, torch.randn(1, 3, 8, 8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    with pytest.raises(SurgeryError, match="keep one unit or more"):
        apply_plan(model, Plan.of(graph, {next(iter(graph.axes)): []}), graph)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_cannot_be_named_is_said():
    graph = analyze(vit(), IMAGES[:1])
    with pytest.raises(PlanError, match=r"blocks\.7.*did you mean"):
        Plan.removing(graph, "blocks.7")


def test_a_failure_after_the_branches_puts_them_back(monkeypatch):
    model = vit()
    graph = analyze(model, IMAGES[:1])
    modules, expected = dict(model.named_modules()), logits(model)
    monkeypatch.setattr("hf_prune.pipeline.require_equal", lambda *_: (_ for _ in ()).throw(SurgeryError("differs")))
    plan = Plan.removing(graph, "blocks.1")
    more = Plan.of(graph, {"blocks.0.mlp.hidden": range(9)})
    with pytest.raises(SurgeryError, match="differs"):
        apply_plan(model, Plan({**plan.kept, **more.kept}, {**plan.sizes, **more.sizes}), graph)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), expected)
