"""A model with fewer heads, neurons and tokens: one manifest, one card, and the same answers, also in eight bits."""

import json

import pytest
import timm
import torch
import transformers
from tiny_models import build_dense, pixel_batch, set_thresholds

import hf_prune
from hf_prune import TokenPruningConfig
from hf_prune.allocate.joint_plan import JointPlan
from hf_prune.errors import UnsupportedModelError
from hf_prune.joint import apply_joint
from hf_prune.tokens.attach import token_pruning_of
from hf_prune.tokens.site import logits_of

PIXELS = pixel_batch(6)


@torch.no_grad()
def answer(model):
    return logits_of(model.eval()(PIXELS))


def jointly_pruned(kind, method="spvit", keep=(0.6, 0.3)):
    """Return a model with every second neuron, all but one head of some blocks, and reducers."""
    model = build_dense(kind)
    graph = hf_prune.analyze(model, PIXELS[:1])
    kept = {name: range(number % 2, axis.size, 2) for number, (name, axis) in enumerate(graph.axes.items())
            if axis.kind == "mlp" or (axis.kind == "heads" and number % 3 == 0 and ".0." not in name)}  # fmt: skip
    kept = {name: units for name, units in kept.items() if any(part in name for part in ("layers.", "blocks."))}
    plan = hf_prune.Plan.of(graph, kept)
    tokens = TokenPruningConfig(before_blocks=(2, 4), keep_ratios=keep, num_heads=4, method=method)
    joint = JointPlan(plan, tokens, "macs", 1.0, 1.0, 2.0)
    torch.manual_seed(1)
    apply_joint(model, joint, graph)
    if method == "spvit":
        pruning = token_pruning_of(model)
        with torch.no_grad():
            for parameter in pruning.parameters():
                parameter.normal_(0, 0.5)
        set_thresholds(model, pruning)
    return model


@pytest.mark.parametrize(
    ("kind", "method"),
    [("vit", "spvit"), ("vit", "evit"), ("dinov2-registers", "tome"), ("timm-vit", "spvit"), ("timm-vit", "evit"),
     ("timm-eva02", "tome")],
)  # fmt: skip
def test_every_road_back_gives_equal_logits(kind, method, tmp_path):
    model = jointly_pruned(kind, method)
    expected = answer(model)
    hf_prune.save(model, tmp_path / "ours")
    loaded = [hf_prune.load(tmp_path / "ours")]
    if kind.startswith("timm"):
        loaded.append(timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True))
        timm.models.save_for_hf(model, tmp_path / "timm")
        loaded.append(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True))
    else:
        model.save_pretrained(tmp_path / "theirs")
        auto = transformers.AutoModelForImageClassification
        loaded += [auto.from_pretrained(tmp_path / name) for name in ("ours", "theirs")]
    for again in loaded:
        assert type(again) is type(model)
        assert token_pruning_of(again).settings == token_pruning_of(model).settings
        assert torch.equal(answer(again), expected)
    dense = build_dense(kind)
    assert not torch.equal(answer(dense), expected)


def test_one_manifest_and_one_history_hold_both(tmp_path):
    model = jointly_pruned("vit", "evit")
    hf_prune.save(model, tmp_path)
    manifest = json.loads((tmp_path / "config.json").read_text())["hf_prune"]
    assert manifest["structure"]["tensors"]
    assert manifest["tokens"]["method"] == "evit"
    cut, tokens = json.loads((tmp_path / "pruning_history.json").read_text())
    assert cut["plan"]["kept"]
    assert "tokens" not in cut
    assert tokens["tokens"]["before_blocks"] == [2, 4]
    assert cut["macs"][1] == tokens["macs"][0] > tokens["macs"][1]
    assert hf_prune.manifest(hf_prune.load(tmp_path))["history"] == [cut, tokens]


def test_one_card_says_both(tmp_path):
    model = jointly_pruned("vit", "evit")
    hf_prune.save(model, tmp_path)
    card = hf_prune.write_card(tmp_path).read_text()
    assert "fewer heads, neurons or channels and fewer patch tokens" in card
    assert "EViT (Liang et al." in card
    assert "60%, 30% of the patches" in card
    assert "structured-pruning" in card
    assert "token-pruning" in card
    before, after = (json.loads((tmp_path / "pruning_history.json").read_text())[n]["macs"] for n in (0, 1))
    assert f"| {before[0]:,} | {after[1]:,} |" in card
    assert (tmp_path / "figures" / "widths.png").is_file()


def test_tokens_alone_have_a_card_too_and_no_widths(tmp_path):
    model = build_dense("vit")
    settings = TokenPruningConfig(before_blocks=(2,), keep_ratios=(0.5,), method="tome")
    hf_prune.add_token_pruning(model, settings)
    hf_prune.save(model, tmp_path)
    card = hf_prune.write_card(tmp_path).read_text()
    assert "with fewer patch tokens" in card
    assert "ToMe (Bolya et al." in card
    assert "gone for good" not in card
    assert not (tmp_path / "figures").exists()


@pytest.fixture
def int8():
    quantization = pytest.importorskip("torchao.quantization")
    return quantization.Int8DynamicActivationInt8WeightConfig()


def test_int8_by_transformers_comes_and_goes(int8, tmp_path):
    model = jointly_pruned("vit", "spvit")
    hf_prune.save(model, tmp_path / "float")
    auto = transformers.AutoModelForImageClassification
    small = auto.from_pretrained(tmp_path / "float", quantization_config=transformers.TorchAoConfig(int8))
    assert any("Int8" in type(parameter).__name__ for parameter in small.parameters())
    # Selectors are quantised, too, and may decide otherwise on a token.
    difference = (answer(small) - answer(model)).norm() / answer(model).norm()
    assert 0 < difference < 0.1
    for save in (lambda: small.save_pretrained(tmp_path / "int8"), lambda: hf_prune.save(small, tmp_path / "int8")):
        save()
        assert torch.equal(answer(auto.from_pretrained(tmp_path / "int8")), answer(small))
        assert torch.equal(answer(hf_prune.load(tmp_path / "int8")), answer(small))
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "int8")]
    assert sizes[1] < 0.6 * sizes[0]  # norms, embeddings and biases stay, and are much of a model of width 48


def test_int8_in_place_for_timm_is_for_running_not_for_saving(int8, tmp_path):
    from torchao.quantization import quantize_

    model = jointly_pruned("timm-vit", "evit")
    expected = answer(model)
    quantize_(model, int8)
    difference = (answer(model) - expected).norm() / expected.norm()
    assert 0 < difference < 0.05
    with pytest.raises(UnsupportedModelError, match="save the model before"):
        hf_prune.save(model, tmp_path / "int8")
    assert not (tmp_path / "int8").exists()
