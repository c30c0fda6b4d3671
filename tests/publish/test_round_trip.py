"""Pruned models come back by the native calls of their libraries, to the bit."""

import json
import subprocess
import sys

import pytest
import timm
import torch
import transformers
from pruned_models import IMAGES, TIMM, VIT, answer, cut, hf_vit, matter, timm_model
from torch import nn

import hf_prune
from hf_prune.errors import ManifestError, ModelLoadError, UnsupportedModelError
from hf_prune.surgery.constant import Constant
from hf_prune.surgery.structure import structure_of


def test_transformers_save_and_load_as_always(tmp_path):
    model = cut(hf_vit())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is transformers.ViTForImageClassification
    assert torch.equal(answer(loaded), answer(model))
    headless = transformers.AutoModel.from_pretrained(tmp_path)  # has a pooler that the classifier has not
    assert torch.equal(answer(headless), answer(model.vit))
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(answer(again), answer(model))
    first, second = (json.loads((tmp_path / n / "config.json").read_text())["hf_prune"] for n in ("", "again"))
    assert first == second


def test_shards_dtypes_device_maps_and_new_heads(tmp_path):
    model = cut(hf_vit())
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    kind = transformers.AutoModelForImageClassification
    assert torch.equal(answer(kind.from_pretrained(tmp_path, device_map="cpu")), answer(model))
    half = kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert answer(half, IMAGES.bfloat16()).shape == (3, 5)
    other = kind.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert answer(other).shape == (3, 9)
    built = kind.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert [tuple(p.shape) for p in built.parameters()] == [tuple(p.shape) for p in model.parameters()]


def test_a_pipeline_finds_its_way(tmp_path):
    model = cut(hf_vit())
    hf_prune.save(model, tmp_path, processor=transformers.ViTImageProcessor(size={"height": 32, "width": 32}))
    classify = transformers.pipeline("image-classification", model=str(tmp_path))
    from PIL import Image

    assert len(classify(Image.new("RGB", (40, 40)), top_k=5)) == 5


def test_a_pruned_backbone_inside_a_larger_model(tmp_path):
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4,
        out_features=["stage1", "stage2"],
    )  # fmt: skip
    backbone = matter(transformers.SwinBackbone(config))
    graph = hf_prune.analyze(backbone, torch.zeros(1, 3, 64, 64))
    mlps = {name: range(axis.size // 2) for name, axis in graph.axes.items() if axis.kind in ("mlp", "heads")}
    hf_prune.apply_plan(backbone, hf_prune.Plan.of(graph, mlps), graph)
    whole = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=backbone.config, hidden_size=16, num_labels=4, pool_scales=[1, 2],
                                   use_auxiliary_head=False)
    ).eval()  # fmt: skip
    whole.backbone.load_state_dict(backbone.state_dict())
    whole.save_pretrained(tmp_path)
    loaded = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(answer(loaded, images), answer(whole, images))
    shapes = {tuple(p.shape) for p in loaded.backbone.parameters()}
    assert shapes == {tuple(p.shape) for p in backbone.parameters()}


@pytest.mark.parametrize("name", TIMM)
def test_timm_loads_from_a_folder(name, tmp_path):
    model = cut(timm_model(name))
    hf_prune.save(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert type(loaded) is type(model)
    assert torch.equal(answer(loaded), answer(model))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert answer(other).shape == (3, 3)
    assert torch.equal(answer(hf_prune.load(tmp_path)), answer(model))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "hf_prune"
    assert "num_classes" not in config["model_args"]  # its wrapper in transformers gives that itself


def test_timm_saves_what_it_loaded_and_transformers_wraps_it(tmp_path):
    model = cut(timm_model("resnet18"))
    timm.models.save_for_hf(model, tmp_path / "by-timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'by-timm'}", pretrained=True)
    assert torch.equal(answer(again), answer(model))
    hf_prune.save(again, tmp_path / "ours")
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    assert type(wrapped).__name__ == "TimmWrapperForImageClassification"
    assert torch.equal(answer(wrapped), answer(model))


def test_feature_maps_have_the_channels_that_timm_announces(tmp_path):
    hf_prune.save(cut(timm_model("resnet18")), tmp_path)
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True)
    maps = features(torch.randn(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert max(features.feature_info.channels()) < 512


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))).mean((2, 3)))


def test_any_module_comes_back_with_its_constructor(tmp_path):
    model = cut(Own().eval())
    with pytest.raises(UnsupportedModelError, match="give `constructor`"):
        hf_prune.save(model, tmp_path)
    hf_prune.save(model, tmp_path, constructor=Own)
    assert torch.equal(answer(hf_prune.load(tmp_path, constructor=Own)), answer(model))
    with pytest.raises(ModelLoadError, match="give `constructor`"):
        hf_prune.load(tmp_path)


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_removed_blocks_and_a_second_pruning(library, tmp_path):
    model = hf_vit() if library == "transformers" else timm_model("vit_tiny_patch16_224")
    blocks = "vit.layers" if library == "transformers" else "blocks"
    cut(model, removing=(f"{blocks}.0", f"{blocks}.1.mlp"))
    hf_prune.save(model, tmp_path / "once")
    loaded = hf_prune.load(tmp_path / "once")
    assert torch.equal(answer(loaded), answer(model))
    assert sum(isinstance(module, Constant) for module in loaded.modules()) == 2
    assert structure_of(loaded) == structure_of(model)
    cut(loaded)
    hf_prune.save(loaded, tmp_path / "twice")
    again = hf_prune.load(tmp_path / "twice")
    assert torch.equal(answer(again), answer(loaded))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())
    assert len(hf_prune.manifest(again)["history"]) == 2


def test_tokens_on_top_of_a_cut_model(tmp_path):
    from hf_prune import TokenPruningConfig, add_token_pruning

    model = hf_vit()
    graph = hf_prune.analyze(model)
    mlps = {name: range(axis.size // 3) for name, axis in graph.axes.items() if axis.kind == "mlp"}
    hf_prune.apply_plan(model, hf_prune.Plan.of(graph, mlps), graph)
    add_token_pruning(model, TokenPruningConfig(before_blocks=(1,), keep_ratios=(0.5,), num_heads=3))
    hf_prune.save(model, tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(answer(loaded), answer(model))


WITHOUT = "import sys, transformers; transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1])"


def test_without_hf_prune_it_fails_loudly(tmp_path):
    cut(hf_vit()).save_pretrained(tmp_path / "hf")
    hf_prune.save(cut(timm_model("resnet18")), tmp_path / "timm")
    done = subprocess.run([sys.executable, "-c", WITHOUT, tmp_path / "hf"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "mismatch" in done.stderr
    code = f"import timm; timm.create_model('local-dir:{tmp_path / 'timm'}', pretrained=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Unknown model (hf_prune)" in done.stderr


EVEN = """
import sys, torch
from transformers import AutoModelForImageClassification
assert "hf_prune" not in sys.modules
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_an_even_cut_loads_without_hf_prune(tmp_path):
    model = hf_vit()
    graph = hf_prune.analyze(model)
    mlps = {name: range(5, axis.size) for name, axis in graph.axes.items() if axis.kind == "mlp"}
    hf_prune.apply_plan(model, hf_prune.Plan.of(graph, mlps), graph)
    assert model.config.intermediate_size == 35
    hf_prune.save(model, tmp_path / "out")
    assert "hf_prune" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "without `hf_prune`" in hf_prune.write_card(tmp_path / "out").read_text()
    torch.save(IMAGES, tmp_path / "images.pt")
    files = [tmp_path / name for name in ("out", "images.pt", "answer.pt")]
    subprocess.run([sys.executable, "-c", EVEN, *files], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "answer.pt"), answer(model))
    loaded = hf_prune.load(tmp_path / "out")
    assert torch.equal(answer(loaded), answer(model))
    cut(loaded)
    hf_prune.save(loaded, tmp_path / "uneven")
    assert torch.equal(answer(hf_prune.load(tmp_path / "uneven")), answer(loaded))


def test_importing_costs_nothing_and_the_hooks_are_there_in_any_order(tmp_path):
    cut(hf_vit()).save_pretrained(tmp_path)
    light = "import sys, hf_prune; assert not {'torch', 'transformers', 'timm'} & set(sys.modules)"
    load = f"AutoModelForImageClassification.from_pretrained({str(tmp_path)!r})"
    first = f"{light}\nfrom transformers import AutoModelForImageClassification\n{load}"
    second = f"from transformers import AutoModelForImageClassification\nimport hf_prune\n{load}"
    for code in (first, second):
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_model_that_its_config_does_not_build_is_not_saved(tmp_path):
    model = cut(hf_vit())
    model.classifier = nn.Linear(model.classifier.in_features, 7)
    with pytest.raises(ManifestError, match=r"2 tensors differ: 'classifier\.bias'"):
        hf_prune.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_release_lays_the_model_out_anew(tmp_path):
    """As if it came from another transformers: attributes and calls are found out again from the shapes."""
    model = matter(transformers.SwinForImageClassification(transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5,
    )))  # fmt: skip
    cut(model)
    model.config.hf_prune["created_with"]["transformers"] = "5.1.0"
    model.config.hf_prune["structure"]["attributes"] = [{"nonsense": 1}]
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(transformers.AutoModel.from_pretrained(tmp_path)), answer(model.swin))
    loaded = transformers.SwinForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(answer(loaded), answer(model))


def test_the_config_of_a_vit_is_small():
    model = cut(hf_vit())
    assert len(json.dumps(model.config.hf_prune)) < 12_000
    assert VIT["hidden_size"] == model.config.hidden_size  # the dense one: the skeleton is built from it
