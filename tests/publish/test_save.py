import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import build_dense, build_pruned, pixel_batch

import hf_prune
from hf_prune.errors import HfPruneError, ManifestError, ModelLoadError, UnsupportedModelError
from hf_prune.tokens.attach import token_pruning_of
from hf_prune.tokens.site import logits_of

LOAD = """
import sys, torch, hf_prune
from hf_prune.tokens.site import logits_of
model = hf_prune.load(sys.argv[1])
with torch.no_grad():
    torch.save((type(model).__name__, logits_of(model(torch.load(sys.argv[2])))), sys.argv[3])
"""


@torch.no_grad()
def logits(model, pixels):
    return logits_of(model(pixels))


def test_a_saved_model_comes_back_with_its_class_and_logits(dense, tmp_path):
    build_pruned(dense)
    hf_prune.save(dense, tmp_path / "out")
    loaded = hf_prune.load(tmp_path / "out")
    assert type(loaded) is type(dense)
    assert not loaded.training
    assert token_pruning_of(loaded).settings == token_pruning_of(dense).settings
    pixels = pixel_batch(5)
    assert torch.equal(logits(loaded, pixels), logits(dense, pixels))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("kind", ["deit", "timm-vit"], indirect=True)
def test_a_fresh_process_gives_the_same_logits(dense, tmp_path):
    build_pruned(dense)
    hf_prune.save(dense, tmp_path / "out")
    torch.save(pixel_batch(3), tmp_path / "pixels.pt")
    command = [sys.executable, "-c", LOAD, *(str(tmp_path / name) for name in ("out", "pixels.pt", "logits.pt"))]
    subprocess.run(command, check=True, capture_output=True)
    name, found = torch.load(tmp_path / "logits.pt")
    assert name == type(dense).__name__
    assert torch.equal(found, logits(dense, pixel_batch(3)))


def test_the_manifest_names_what_the_checkpoint_holds(vit, tmp_path):
    build_pruned(vit)
    hf_prune.save(vit, tmp_path, base_model="owner/dense")
    manifest = json.loads((tmp_path / "config.json").read_text())["hf_prune"]
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert any(key.startswith(manifest["tokens"]["blocks"] + ".5.") for key in keys)
    assert manifest["tokens"]["selectors"] + ".selectors.2.keep_threshold" in keys
    assert manifest["base_model"] == "owner/dense"
    assert manifest["created_with"]["transformers"] == transformers.__version__


def test_sharded_weights_load(vit, tmp_path):
    build_pruned(vit)
    hf_prune.save(vit, tmp_path / "whole")
    vit.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    (tmp_path / "shards" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded = hf_prune.load(tmp_path / "shards")
    assert torch.equal(logits(loaded, pixel_batch(2)), logits(vit, pixel_batch(2)))


def test_dense_models_still_load_after_the_hook_is_installed(vit, tmp_path):
    vit.save_pretrained(tmp_path / "dense")
    pruned = build_dense("vit")
    build_pruned(pruned)
    hf_prune.save(pruned, tmp_path / "pruned")
    hf_prune.load(tmp_path / "pruned")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again, pixel_batch(2)), logits(vit, pixel_batch(2)))


def test_saving_over_an_older_model_replaces_it_and_leaves_other_files(vit, tmp_path):
    build_pruned(vit)
    hf_prune.save(vit, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    token_pruning_of(vit).selectors["2"].keep_threshold.add_(1)
    hf_prune.save(vit, tmp_path)
    loaded = hf_prune.load(tmp_path)
    assert torch.equal(logits(loaded, pixel_batch(2)), logits(vit, pixel_batch(2)))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_model_that_was_there(vit, tmp_path, monkeypatch):
    build_pruned(vit)
    hf_prune.save(vit, tmp_path)
    expected = logits(vit, pixel_batch(2))

    def full_disk(self, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        hf_prune.save(vit, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(logits(hf_prune.load(tmp_path), pixel_batch(2)), expected)


def test_a_dense_model_is_not_saved(vit, tmp_path):
    with pytest.raises(UnsupportedModelError, match="must be pruned by hf_prune"):
        hf_prune.save(vit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def saved(vit, tmp_path):
    build_pruned(vit)
    return hf_prune.save(vit, tmp_path / "out")


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.pop("hf_prune"), ManifestError, "no `hf_prune` manifest"),
        (lambda c: c["hf_prune"]["tokens"].update(before_blocks=[2, 99]), ManifestError, "different models"),
        (lambda c: c["hf_prune"]["tokens"].update(num_heads=5), HfPruneError, "divides the width"),
        (lambda c: c["hf_prune"]["tokens"].update(num_heads=2), ModelLoadError, "do not fit"),
        (lambda c: c.update(architectures=["os"]), ModelLoadError, "must name a transformers model"),
        (lambda c: c.update(architectures=None), ModelLoadError, "must name a transformers model"),
        (lambda c: c.update(hidden_size=96), ModelLoadError, "do not fit"),
    ],
)
def test_configs_that_lie_are_refused(saved, change, error, message):
    edit_config(saved, change)
    with pytest.raises(error, match=message):
        hf_prune.load(saved)


def test_broken_folders_are_refused(saved, tmp_path):
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        hf_prune.load(tmp_path / "nowhere")
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:9], b"", b"\xff" * 100):
        weights.write_bytes(broken)
        with pytest.raises(ModelLoadError):
            hf_prune.load(saved)
    (saved / "config.json").write_text("[1]")
    with pytest.raises(ModelLoadError, match="JSON object"):
        hf_prune.load(saved)


def test_missing_and_surplus_tensors_are_refused(saved):
    weights = saved / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if "classifier" not in name}, weights, {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"missing .*classifier"):
        hf_prune.load(saved)
    save_file({**tensors, "extra.weight": torch.zeros(2)}, weights, {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"unexpected .*extra\.weight"):
        hf_prune.load(saved)
