"""A pruned model goes to a Hub and comes back by the native calls, also when the line is bad."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import transformers
from huggingface_hub.errors import HTTPError
from pruned_models import IMAGES, answer, cut, hf_vit, timm_model

import hf_prune
from hf_prune.errors import HfPruneError, ModelLoadError

LOAD = """
import sys, torch, hf_prune
if sys.argv[1] == "transformers":
    from transformers import AutoModelForImageClassification
    model = AutoModelForImageClassification.from_pretrained(sys.argv[2], revision=sys.argv[5])
elif sys.argv[1] == "pipeline":
    from transformers import pipeline
    model = pipeline("image-classification", model=sys.argv[2], revision=sys.argv[5]).model
else:
    import timm
    model = timm.create_model(f"hf-hub:{sys.argv[2]}@{sys.argv[5]}", pretrained=True)
out = model.eval()(torch.load(sys.argv[3]))
torch.save(getattr(out, "logits", out), sys.argv[4])
"""


class Elsewhere:
    """Another process with a cache of its own that knows the loopback Hub alone."""

    def __init__(self, hub, folder):
        self.hub, self.folder = hub, folder
        torch.save(IMAGES, folder / "images.pt")

    def run(self, library, repo_id, revision="main", **environment):
        files = [str(self.folder / name) for name in ("images.pt", "answer.pt")]
        variables = {**os.environ, **self.hub.environment(self.folder / "home"), **environment}
        command = [sys.executable, "-c", LOAD, library, repo_id, *files, revision]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)

    def answer(self, *arguments, **environment):
        done = self.run(*arguments, **environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return torch.load(self.folder / "answer.pt")


@pytest.fixture
def elsewhere(hub, tmp_path):
    return Elsewhere(hub, tmp_path)


@pytest.fixture
def processor():
    return transformers.ViTImageProcessor(size={"height": 32, "width": 32})


def test_transformers_load_from_the_hub_and_then_from_the_cache(hub, elsewhere, processor):
    model = cut(hf_vit())
    url = hf_prune.push_to_hub(model, "me/small-vit", processor=processor, license_name="mit")
    (commit,) = hub.commits("me/small-vit")
    assert url.endswith(commit.oid)
    names = set(commit.files) - {".gitattributes"}
    model_files = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert names == model_files | {"pruning_history.json", "README.md", "figures/widths.png"}
    for library in ("pipeline", "transformers"):
        assert torch.equal(elsewhere.answer(library, "me/small-vit", commit.oid), answer(model))
    asked = len(hub.requests)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    assert torch.equal(elsewhere.answer("transformers", "me/small-vit", commit.oid, **offline), answer(model))
    assert len(hub.requests) == asked


def test_timm_loads_from_the_hub(hub, elsewhere):
    model = cut(timm_model("resnet18"))
    hf_prune.push_to_hub(model, "me/small-resnet", revision="half")
    assert not hub.commits("me/small-resnet")
    assert torch.equal(elsewhere.answer("timm", "me/small-resnet", "half"), answer(model))


def test_timm_pushes_by_itself(hub, elsewhere):
    model = cut(timm_model("mobilenetv3_small_050"))
    timm.models.push_to_hf_hub(model, "me/by-timm")
    assert torch.equal(elsewhere.answer("timm", "me/by-timm", "main"), answer(model))


def test_the_card_is_by_the_rules_and_its_snippet_works(hub, elsewhere, tmp_path, processor):
    model = cut(hf_vit())
    model.config._name_or_path = "google/vit-small"
    model.config.hf_prune["base_model"] = "google/vit-small"
    found = hf_prune.compare(hf_vit(), model, batch_sizes=(1, 2))
    hf_prune.push_to_hub(model, "me/small-vit", processor=processor, measurements=found, license_name="apache-2.0")
    page = hub.commits("me/small-vit")[0].files["README.md"].decode()
    card = huggingface_hub.ModelCard(page)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["base_model"] == "google/vit-small"
    assert data["base_model_relation"] == "finetune"
    assert data["pipeline_tag"] == "image-classification"
    assert data["license"] == "apache-2.0"
    assert "import hf_prune" in card.text.split("\n\n")[1]
    params = sum(p.numel() for p in model.parameters())
    assert f"{params:,}" in page
    assert "ms per batch of 2" in page
    assert "Accuracy: not measured" in page
    snippet = page.split("```python\n")[1].split("```")[0]
    code = snippet + f"\nimport torch; torch.save(model(torch.load({str(tmp_path / 'images.pt')!r})).logits, 'out.pt')"
    variables = {**os.environ, **hub.environment(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], env=variables, cwd=tmp_path, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), answer(model))


@pytest.mark.parametrize("fault", ["500", "cut", "etag"])
def test_a_bad_line_while_loading_is_an_error_and_the_next_try_succeeds(fault, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the retries of huggingface_hub
    model = cut(hf_vit())
    repo_id = f"me/{fault}"  # commits are remembered by that name
    hf_prune.push_to_hub(model, repo_id)

    def load():
        return transformers.ViTForImageClassification.from_pretrained(repo_id, cache_dir=tmp_path)

    {"500": lambda: hub.fail("resolve", 500), "cut": hub.cut_downloads, "etag": hub.lie_about_etags}[fault]()
    if fault == "etag":  # a tag names a file, no more: what counts is what is in it
        assert torch.equal(answer(load()), answer(model))
    else:
        with pytest.raises((OSError, HTTPError)):
            load()
    hub.behave()
    assert torch.equal(answer(load()), answer(model))


@pytest.mark.parametrize("route", ["create", "preupload", "batch", "upload", "commit"])
def test_a_push_that_fails_anywhere_publishes_nothing_and_can_be_repeated(route, hub):
    model = cut(hf_vit())
    hub.fail(route, 403)
    with pytest.raises(HfPruneError, match="could not be pushed"):
        hf_prune.push_to_hub(model, "me/small-vit")
    assert "me/small-vit" not in hub.repos or not hub.commits("me/small-vit")
    hub.behave()
    hf_prune.push_to_hub(model, "me/small-vit")
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.commits("me/small-vit")[0].files)


def test_a_connection_that_breaks_in_mid_upload(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the retries of huggingface_hub
    model = cut(hf_vit())
    hub.cut_uploads()
    with pytest.raises(HfPruneError, match="could not be pushed"):
        hf_prune.push_to_hub(model, "me/small-vit")
    assert not hub.commits("me/small-vit")
    hub.behave()
    hf_prune.push_to_hub(model, "me/small-vit")
    assert len(hub.commits("me/small-vit")) == 1


def test_what_is_not_there_is_said(hub, tmp_path):
    with pytest.raises(ModelLoadError, match="must be a local folder or a model on the Hub"):
        hf_prune.load("me/nothing")
    with pytest.raises(HfPruneError, match="must be pruned"):
        hf_prune.push_to_hub(hf_vit(), "me/dense")
    assert not hub.repos


def test_the_history_travels(hub, tmp_path):
    model = cut(hf_vit())
    hf_prune.push_to_hub(model, "me/small-vit")
    copy = Path(huggingface_hub.snapshot_download("me/small-vit", cache_dir=tmp_path / "cache"))
    history = json.loads((copy / "pruning_history.json").read_text())
    assert history == json.loads(json.dumps(hf_prune.manifest(hf_prune.load(copy))["history"]))
    assert history[0]["params"][1] == sum(p.numel() for p in model.parameters())
