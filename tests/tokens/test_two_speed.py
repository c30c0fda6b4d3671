"""Two-speed FFNs of window transformers: equal where all is kept, cheaper where not, saved and loaded as any model."""

import copy
import json
import pickle

import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build_dense
from torch import nn

import hf_prune
from hf_prune.errors import DataError, HfPruneError, ManifestError, ModelLoadError, UnsupportedModelError
from hf_prune.measure.token_cost import count_macs
from hf_prune.publish.manifest import Manifest
from hf_prune.tokens.constraint import keep_constraint
from hf_prune.tokens.reducers.decide import GumbelNoise
from hf_prune.tokens.site import logits_of
from hf_prune.tokens.two_speed import add_two_speed, two_speed_of
from hf_prune.tokens.two_speed_config import TwoSpeedConfig
from hf_prune.tokens.two_speed_fit import fit_two_speed
from hf_prune.tokens.two_speed_site import find_window_site

DEPTHS, DIM, SIZE, NUM_CLASSES = (1, 3, 2), 16, 64, 5
# Two selectors on the second grid of 8 x 8 tokens, one on the third of 4 x 4.
SETTINGS = TwoSpeedConfig(before_blocks=(1, 3, 4), keep_ratios=(0.75, 0.25, 0.5))
TOKENS = {1: 64, 2: 64, 3: 64, 4: 16, 5: 16}
KEPT = {1: 48, 2: 48, 3: 16, 4: 8, 5: 8}
_TIMM = {
    "img_size": SIZE,
    "embed_dim": DIM,
    "depths": DEPTHS,
    "num_heads": (2, 2, 4),
    "window_size": 4,
    "num_classes": NUM_CLASSES,
}
_HF = {
    "image_size": SIZE,
    "embed_dim": DIM,
    "depths": list(DEPTHS),
    "num_heads": [2, 2, 4],
    "window_size": 4,
    "num_labels": NUM_CLASSES,
}
KINDS = {
    "swin": lambda **other: transformers.SwinForImageClassification(transformers.SwinConfig(**{**_HF, **other})),
    "swinv2": lambda **other: transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**{**_HF, **other})),
    "timm-swin": lambda **other: timm.create_model("swin_tiny_patch4_window7_224", **{**_TIMM, **other}),
    "timm-swinv2": lambda **other: timm.create_model("swinv2_tiny_window8_256", **{**_TIMM, **other}),
}
PIXELS = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def build(kind: str, **other) -> nn.Module:
    """Build a dense model in which every part counts."""
    torch.manual_seed(0)
    model = KINDS[kind](**other)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.15)
    return model.eval()


def give_two_speeds(model: nn.Module, settings: TwoSpeedConfig = SETTINGS):
    """Add two speeds with selectors and cheap FFNs that do something."""
    two_speed = add_two_speed(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in two_speed.parameters():
            parameter.normal_(0, 0.3)
    return two_speed


@torch.no_grad()
def answer(model: nn.Module, pixels: torch.Tensor = PIXELS) -> torch.Tensor:
    return logits_of(model(pixels))


def train_without_chance(model: nn.Module) -> None:
    """Training mode without dropped paths and without noise."""
    model.train()
    two_speed_of(model).noise = None
    for module in model.modules():
        if "DropPath" in type(module).__name__:
            module.eval()


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def test_all_kept_is_the_dense_model_to_the_bit(kind):
    model = build(kind)
    expected = answer(model)
    give_two_speeds(model, TwoSpeedConfig(before_blocks=(1, 3, 4), keep_ratios=(1.0, 1.0, 1)))
    assert torch.equal(answer(model), expected)
    train_without_chance(model)
    assert torch.equal(answer(model), expected)
    assert expected.abs().mean() > 0.1  # or equality would prove nothing


def test_the_model_keeps_its_class_and_every_key(kind):
    model = build(kind)
    before, kind_before = set(model.state_dict()), type(model)
    give_two_speeds(model)
    assert type(model) is kind_before
    added = set(model.state_dict()) - before
    assert before < set(model.state_dict())
    assert all("two_speed." in key for key in added)
    assert {key.partition("cheap.")[2][0] for key in added if "cheap." in key} == {"1", "2", "3", "4", "5"}


def test_by_default_selectors_sit_behind_every_patch_merging(kind):
    two_speed = add_two_speed(build(kind), TwoSpeedConfig(keep_ratios=(0.7, 0.5)))
    assert two_speed.settings.before_blocks == (1, 4)


def test_mixing_and_gathering_agree(kind):
    model = build(kind)
    dense = answer(model)
    give_two_speeds(model)
    gathered, decided = answer(model), two_speed_of(model).take_records()
    train_without_chance(model)
    mixed = logits_of(model(PIXELS)).detach()
    for one, other in zip(decided, two_speed_of(model).take_records(), strict=True):
        assert torch.equal(one.keep, other.keep)
    torch.testing.assert_close(gathered, mixed, atol=1e-5, rtol=1e-5)
    assert (gathered - dense).abs().max() > 1e-2


def test_every_image_keeps_as_many_and_the_cheap_side_is_for_good():
    model = build("timm-swin")
    give_two_speeds(model)
    answer(model)
    first, second, third = two_speed_of(model).take_records()
    assert [record.before_block for record in (first, second, third)] == [1, 3, 4]
    for record in (first, second, third):
        block = record.before_block
        assert record.keep.shape == (3, TOKENS[block])
        assert record.keep.sum(1).tolist() == [KEPT[block]] * 3
    assert bool((second.keep <= first.keep).all())
    best = first.margin.topk(KEPT[1], dim=1).indices
    assert torch.equal(first.keep, torch.zeros_like(first.keep).scatter(1, best, 1.0))
    assert not torch.equal(first.keep[0], first.keep[1])  # which ones depends on the image


def test_only_kept_rows_reach_the_whole_ffn(kind):
    model, shapes = build(kind), {}
    give_two_speeds(model)
    for number, place in enumerate(find_window_site(model).blocks):
        place.entry.register_forward_pre_hook(
            lambda _m, args, number=number: shapes.update({number: tuple(args[0].shape[:-1])})
        )
    answer(model)
    assert shapes == {0: (3, 256), **{block: (3 * kept,) for block, kept in KEPT.items()}}


def test_a_token_gets_what_its_own_ffn_says():
    model, seen = build("timm-swin"), {}
    two_speed = give_two_speeds(model)
    place = find_window_site(model).blocks[2]
    dense_ffn = copy.deepcopy(place.entry)
    dense_ffn._forward_hooks.clear()
    dense_ffn._forward_pre_hooks.clear()
    place.block.norm2.register_forward_hook(lambda _m, _a, output: seen.update(read=output))
    place.entry.register_forward_hook(lambda _m, _a, output: seen.update(said=output))
    answer(model)
    keep = two_speed.take_records()[0].keep.bool()
    with torch.no_grad():
        torch.testing.assert_close(seen["said"][keep], dense_ffn(seen["read"][keep]))
        torch.testing.assert_close(seen["said"][~keep], two_speed.cheap["2"](seen["read"][~keep]))


@pytest.mark.parametrize("kind", ["swin", "timm-swin"], indirect=True)
def test_macs_fall_as_predicted(kind):
    model = build(kind)
    dense = count_macs(lambda: model(PIXELS[:1]))
    give_two_speeds(model)
    predicted = dense
    for block, tokens in TOKENS.items():
        width = DIM * (2 if block < 4 else 4)
        predicted -= (tokens - KEPT[block]) * (8 * width**2 - width**2)
        if block in SETTINGS.before_blocks:
            # Embedding, three scoring layers, and the mean of what is alive.
            predicted += tokens * (width**2 + width**2 // 2 + width**2 // 8 + width // 2) + tokens * width // 2
    assert count_macs(lambda: model(PIXELS[:1])) == predicted < dense
    assert hf_prune.measure(model, PIXELS[:1], repeats=1).macs == predicted


def test_gradients_reach_selectors_cheap_and_whole_ffns(kind):
    model = build(kind)
    two_speed = add_two_speed(model, SETTINGS)
    with torch.no_grad():
        for parameter in two_speed.cheap.parameters():
            parameter.normal_(0, 0.3)
    model.train()
    logits_of(model(PIXELS)).square().sum().backward()
    whole = [module for place in find_window_site(model).blocks for module in (place.entry, place.exit)]
    for module in (two_speed, *whole):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().sum()) > 0, name


def test_cheap_ffns_that_start_silent_learn():
    model = build("timm-swin")
    two_speed = add_two_speed(model, SETTINGS)
    model.train()
    logits_of(model(PIXELS)).square().sum().backward()
    assert all(float(layer.weight.grad.abs().sum()) > 0 for layer in two_speed.cheap.values())


def test_a_keep_constraint_is_met_by_training():
    model = build("timm-swin")
    two_speed = add_two_speed(model, TwoSpeedConfig(before_blocks=(1, 4), keep_ratios=(0.8, 0.8)))
    constraint, reached = keep_constraint((0.3, 0.6)), torch.zeros(2)
    optimizer = torch.optim.Adam(two_speed.selectors.parameters(), lr=5e-3)
    model.train()
    for step in range(40):
        two_speed.noise = GumbelNoise(seed=0, step=step)
        model(PIXELS)
        reached = torch.stack([record.keep.mean() for record in two_speed.take_records()])
        optimizer.zero_grad()
        constraint.loss(reached).backward()
        optimizer.step()
    assert reached.detach().tolist() == pytest.approx([0.3, 0.6], abs=0.12)


@pytest.mark.parametrize("kind", ["swin", "timm-swin"], indirect=True)
def test_activation_checkpointing_gives_the_same_gradients(kind):
    model, gradients = build(kind), []
    give_two_speeds(model)
    train_without_chance(model)
    two_speed_of(model).noise = GumbelNoise(seed=0)
    for checkpointing in (False, True):
        if checkpointing and kind == "swin":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        elif checkpointing:
            timm.layers.set_reentrant_ckpt(False)
            model.set_grad_checkpointing()
        model.zero_grad()
        logits = logits_of(model(PIXELS))
        keep = torch.stack([record.keep.mean() for record in two_speed_of(model).take_records()])
        (logits.square().sum() + keep.sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in two_speed_of(model).parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_records_need_a_forward_pass_and_gradients():
    model = build("timm-swin")
    two_speed = give_two_speeds(model)
    with pytest.raises(HfPruneError, match="run the model once"):
        two_speed.take_records()
    model.requires_grad_(False).train()
    model(PIXELS)
    with pytest.raises(HfPruneError, match="use_reentrant=False"):
        two_speed.take_records()


def test_a_copy_has_its_own_selectors_even_in_the_middle_of_training(kind):
    model = build(kind)
    give_two_speeds(model)
    model.train()
    model(PIXELS)  # leaves decisions with gradients behind, which cannot be copied
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model))).eval()
    expected = answer(model.eval())
    with torch.no_grad():
        for parameter in two_speed_of(twin).parameters():
            parameter.neg_()
    assert not torch.equal(answer(twin), expected)
    assert torch.equal(answer(model), expected)


def test_half_precision_and_autocast_run():
    model = build("swin")
    give_two_speeds(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(answer(model)).all()
    model.to(torch.bfloat16)
    assert torch.isfinite(answer(model, PIXELS.bfloat16())).all()


def test_the_fit_is_the_least_squares_optimum(kind):
    model = build(kind)
    two_speed = add_two_speed(model, TwoSpeedConfig(before_blocks=(1, 3, 4), keep_ratios=(0.5, 0.25, 0.5)))
    assert all(not parameter.any() for parameter in two_speed.cheap.parameters())
    dense = build(kind)
    expected, silent = answer(dense), answer(model)
    read, said = [], []
    place = find_window_site(dense).blocks[2]
    place.entry.register_forward_pre_hook(lambda _m, args: read.append(args[0].flatten(0, 1)))
    place.exit.register_forward_hook(lambda _m, _a, output: said.append(output.flatten(0, 1)))
    answer(dense)
    explained = fit_two_speed(model, PIXELS.split(2))
    x, y = read[0].double(), said[0].double()
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    residual = y - ones @ torch.linalg.lstsq(ones, y).solution
    best = 1 - float(residual.square().sum() / (y - y.mean(0)).square().sum())
    assert explained.keys() == {1, 2, 3, 4, 5}
    assert best - 0.01 < explained[2] <= best
    assert (answer(model) - expected).abs().mean() < 0.8 * (silent - expected).abs().mean()
    with pytest.raises(HfPruneError, match="run the model once"):
        fit_leaves_no_records(model)


def fit_leaves_no_records(model: nn.Module) -> None:
    fit_two_speed(model, [PIXELS])
    two_speed_of(model).take_records()


def test_fitting_needs_images():
    model = build("timm-swin")
    two_speed = give_two_speeds(model)
    with pytest.raises(DataError, match="held none"):
        fit_two_speed(model, [])
    assert two_speed.settings == SETTINGS


@pytest.mark.parametrize("kind", ["swin", "timm-swin"], indirect=True)
def test_it_is_exported(kind):
    model, name = build(kind, depths=[1, 1], num_heads=[2, 2]), "pixel_values" if kind == "swin" else "x"
    give_two_speeds(model, TwoSpeedConfig(keep_ratios=(0.5,)))
    any_batch = {name: {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (), {name: PIXELS}, dynamic_shapes=any_batch)
    other = torch.cat([PIXELS.flip(0), PIXELS[:2]])
    torch.testing.assert_close(logits_of(program.module()(**{name: other})), answer(model, other), atol=1e-5, rtol=0)


def test_one_graph_is_compiled_for_all():
    model = build("timm-swin", depths=(1, 1), num_heads=(2, 2))
    give_two_speeds(model, TwoSpeedConfig(keep_ratios=(0.5,)))
    expected = answer(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(answer(compiled), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["swin", "swinv2"], indirect=True)
def test_transformers_load_it_as_always(kind, tmp_path):
    model = build(kind)
    give_two_speeds(model)
    hf_prune.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / folder)
        assert type(loaded) is type(model)
        assert two_speed_of(loaded).settings == SETTINGS
        assert torch.equal(answer(loaded), answer(model))
    assert torch.equal(answer(hf_prune.load(tmp_path / "ours")), answer(model))
    headless = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        states = [part(PIXELS).last_hidden_state for part in (headless, getattr(model, kind))]
    assert torch.equal(*states)


def test_a_backbone_gives_whole_maps_and_comes_back(tmp_path):
    config = transformers.SwinConfig(**_HF, out_features=["stage2", "stage3"])
    model = transformers.SwinBackbone(config).eval()
    give_two_speeds(model)
    hf_prune.save(model, tmp_path)
    loaded = transformers.SwinBackbone.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        maps, again = model(PIXELS).feature_maps, loaded(PIXELS).feature_maps
    assert [tuple(found.shape[2:]) for found in maps] == [(8, 8), (4, 4)]
    assert all(torch.equal(*pair) for pair in zip(maps, again, strict=True))


@pytest.mark.parametrize("kind", ["timm-swin", "timm-swinv2"], indirect=True)
def test_timm_loads_it_as_always(kind, tmp_path):
    model = build(kind)
    give_two_speeds(model)
    hf_prune.save(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(loaded) is type(model)
    assert torch.equal(answer(loaded), answer(model))
    assert torch.equal(answer(hf_prune.load(tmp_path)), answer(model))
    maps = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True)(PIXELS)
    assert [tuple(found.shape[1:3]) for found in maps] == [(16, 16), (8, 8), (4, 4)]


@pytest.mark.parametrize("kind", ["swin", "timm-swin"], indirect=True)
@pytest.mark.parametrize("first", ["cut", "two speeds"])
def test_two_speeds_and_a_cut_in_either_order(kind, first, tmp_path):
    model = build(kind)
    if first == "two speeds":
        give_two_speeds(model)
    graph = hf_prune.analyze(model, PIXELS[:1])
    kept = {name: range(axis.size // 2) for name, axis in graph.axes.items() if axis.kind in ("mlp", "heads")}
    hf_prune.apply_plan(model, hf_prune.Plan.of(graph, kept), graph)
    if first == "cut":
        give_two_speeds(model)
    hf_prune.save(model, tmp_path)
    loaded = hf_prune.load(tmp_path)
    assert torch.equal(answer(loaded), answer(model))
    whole = build(kind)
    give_two_speeds(whole)
    assert count_macs(lambda: loaded(PIXELS[:1])) < 0.8 * count_macs(lambda: whole(PIXELS[:1]))


def spoilt(tmp_path, kind: str, **changes) -> None:
    """Save a model, and change its manifest by hand."""
    model = build(kind)
    give_two_speeds(model)
    hf_prune.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    manifest = config["hf_prune"] if kind == "swin" else config["model_args"]["manifest"]
    manifest["tokens"].update(changes)
    (tmp_path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["swin", "timm-swin"], indirect=True)
@pytest.mark.parametrize(
    "changes",
    [
        {"before_blocks": None},
        {"before_blocks": [1, 3, 99]},
        {"before_blocks": [1, 3, 5]},
        {"before_blocks": [3, 1, 4]},
        {"keep_ratios": [0.25, 0.75, 0.5]},
        {"keep_ratios": [0.5, float("nan"), 0.5]},
        {"keep_ratios": "abc"},
        {"surprise": 1},
        {"method": "three_speed"},
        {"method": "dynamicvit"},
        {"selectors": "../../etc"},
        {"selectors": "swin.token_pruning"},
    ],
)
def test_hostile_manifests_are_refused(kind, changes, tmp_path):
    spoilt(tmp_path, kind, **changes)
    with pytest.raises((ManifestError, ModelLoadError)):
        hf_prune.load(tmp_path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*SETTINGS.to_dict(), "x"]), inner),
        max_leaves=12,
    )
)
def test_anything_else_is_a_manifest_error(data):
    for changed in (data, {"method": "two_speed", "before_blocks": [1], "keep_ratios": data}):
        try:
            settings = TwoSpeedConfig.from_dict(changed)
        except ManifestError:
            continue
        assert json.loads(json.dumps(settings.to_dict())) == changed


def test_settings_survive_json_and_the_manifest():
    assert TwoSpeedConfig.from_dict(json.loads(json.dumps(SETTINGS.to_dict()))) == SETTINGS
    model = build("swin")
    give_two_speeds(model)
    manifest = hf_prune.manifest(model)
    assert manifest["tokens"]["selectors"] == "swin.two_speed"
    assert manifest["tokens"]["blocks"] == "swin.encoder.layers"
    manifest.pop("history")
    assert Manifest.from_dict(json.loads(json.dumps(manifest))).tokens == SETTINGS


def test_wrong_models_are_told_where_to_go():
    for model in (build_dense("vit"), build_dense("timm-vit"), timm.create_model("test_resnet"), nn.Linear(2, 2)):
        with pytest.raises(UnsupportedModelError, match=r"Swin.*use `add_token_pruning`"):
            add_two_speed(model, SETTINGS)
    with pytest.raises(UnsupportedModelError, match="add_two_speed"):
        two_speed_of(build("swin"))


def test_settings_that_do_not_fit_are_refused():
    model = build("timm-swin")
    for settings, message in (
        (TwoSpeedConfig(before_blocks=(1, 6), keep_ratios=(0.5, 0.5)), "before blocks 0 to 5"),
        (TwoSpeedConfig(before_blocks=(1, 2), keep_ratios=(0.5, 0.7)), "must not grow within a stage"),
        (TwoSpeedConfig(keep_ratios=(0.7, 0.5, 0.3)), "one value per selector"),
    ):
        with pytest.raises(ManifestError, match=message):
            add_two_speed(model, settings)
    assert not hasattr(model, "two_speed")
    add_two_speed(model, TwoSpeedConfig(before_blocks=(1, 4), keep_ratios=(0.5, 0.7)))  # another grid starts whole
    with pytest.raises(UnsupportedModelError, match="already"):
        add_two_speed(model, SETTINGS)
