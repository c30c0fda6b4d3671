"""A structure survives JSON; what strangers write either fits the dense skeleton or is refused."""

import copy
import json
import random

import pytest
import torch
from pruned_models import cut, hf_vit, timm_model

import hf_prune
from hf_prune.errors import HfPruneError, ManifestError
from hf_prune.publish.manifest import Manifest
from hf_prune.publish.skeleton import build
from hf_prune.publish.structure_json import from_json, to_json
from hf_prune.surgery.structure import structure_of

NUM_HOSTILE = 10_000


def names_of(model):
    return {name: name for name, _ in (*model.named_parameters(), *model.named_buffers())}


def skeleton(model):
    return model.to("meta")


@pytest.fixture(scope="module")
def swin_like():
    """A pruned model with attributes, corrected calls, removed modules and feature maps, and its dense skeleton."""
    dense = timm_model("beit_base_patch16_224")
    model = cut(copy.deepcopy(dense), removing=("blocks.0.mlp",))
    assert structure_of(model).calls or structure_of(model).attributes
    return model, skeleton(dense)


def test_a_structure_survives_json(swin_like):
    model, dense = swin_like
    gone = {removed.tensor: removed.tensor for removed in structure_of(model).removed.values()}
    data = json.loads(json.dumps(to_json(model, names_of(model) | gone)))
    assert from_json(data, dense, names_of(dense), whole=True) == structure_of(model)


def spoil(data, random_):
    """Change one thing somewhere in nested data."""
    data = copy.deepcopy(data)
    spots = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            spots.append((node, key))
            walk(node[key])

    walk(data)
    node, key = random_.choice(spots)
    values = [0, 1, 2, -1, 3, 2**31, 10**30, -(10**30), 0.5, float("nan"), float("inf"), True, None, "", "../../etc/x",
              "__class__", "forward", "_parameters", [], {}, [[]], [10**9] * 3, {"near": 1}, "a" * 1000]  # fmt: skip
    match random_.randrange(6):
        case 0 | 1 | 2:
            node[key] = random_.choice(values)
        case 3:
            del node[key]
        case 4 if isinstance(node, dict):
            node[random_.choice(["training", "__dict__", "weight", "num_heads", "_modules", "x"])] = node.pop(key)
        case _:
            other, there = random_.choice(spots)
            node[key] = copy.deepcopy(other[there])
    return data


def facts(model):
    return {(path, name): value for path, module in model.named_modules() for name, value in vars(module).items()
            if not isinstance(value, dict | set | type(None))}  # fmt: skip


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_hostile_manifests_are_refused_or_harmless(library, swin_like):
    if library == "timm":
        model, dense = swin_like
        names = names_of(dense)
        manifest = hf_prune.publish.describe.manifest_of(model).to_dict()
    else:
        from hf_prune.publish.transformers_hook import checkpoint_names

        dense = hf_vit()
        names = checkpoint_names(dense)
        manifest = cut(copy.deepcopy(dense)).config.hf_prune
        dense = skeleton(dense)
    before, refused = facts(dense), 0
    shapes = {name: p.shape for name, p in dense.named_parameters()}
    random_ = random.Random(0)
    for number in range(NUM_HOSTILE // 2):
        spoilt = manifest
        for _ in range(1 + number % 3):
            spoilt = spoil(spoilt, random_)
        try:
            parsed = Manifest.from_dict(spoilt)
            if parsed.structure is not None:
                structure = from_json(parsed.structure, dense, names, whole=True)
        except HfPruneError:
            refused += 1
            continue
        if parsed.structure is None or number % 10:
            continue
        built = copy.deepcopy(dense)
        build(built, parsed, names, whole=True)
        for name, parameter in built.named_parameters():
            assert name not in shapes or all(n <= m for n, m in zip(parameter.shape, shapes[name], strict=True))
        for (path, name), value in facts(built).items():
            if (path, name) in before and value != before[path, name] and not name.startswith("_"):
                assert type(value) is type(before[path, name]), (path, name)
                known = structure.attributes.get(path, {})
                assert name in known or name == "feature_info" or isinstance(value, int | tuple), (path, name)
    assert refused > NUM_HOSTILE // 4


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("tensors", {"blocks.0.norm1.weight": [99]}, "must have lengths from 1 to"),
        ("tensors", {"blocks.0.norm1.weight": [0]}, "must have lengths from 1 to"),
        ("tensors", {"blocks.7.norm1.weight": [4]}, "must have the tensor"),
        ("attributes", [{"near": "blocks.0.norm1.weight", "up": 9, "down": "", "set": {}}], "must not lead out"),
        ("attributes", [{"near": "blocks.0.attn.proj.weight", "up": 1, "down": "", "set": {"forward": 1}}],
         "must have sizes under that name"),
        ("attributes", [{"near": "blocks.0.attn.proj.weight", "up": 1, "down": "", "set": {"training": 1}}],
         "must have sizes under that name"),
        ("removed", [{"near": "blocks.0.norm1.weight", "up": 0, "down": "", "constant": {
            "shape": [10**9], "adds": False, "like": [], "num_returned": 0}}], "from 1 to"),
        ("calls", [{"near": "blocks.0.norm1.weight", "up": 1, "down": "", "numbers": {"0": {"0": float("nan")}}}],
         "must be given sizes and scales"),
        ("features", [0], "list of channels"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(part, value, message, swin_like):
    dense = swin_like[1]
    data = {"tensors": {}, "attributes": [], "calls": [], "removed": [], "features": None, "factors": {}, "parts": []}
    with pytest.raises(ManifestError, match=message):
        from_json(data | {part: value}, dense, names_of(dense), whole=True)


def test_a_manifest_of_another_model_is_refused(swin_like, tmp_path):
    model, _ = swin_like
    hf_prune.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["base"] = "vit_tiny_patch16_224"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ManifestError, match="the model must have the"):
        hf_prune.load(tmp_path)
    assert torch.get_default_device().type == "cpu"
