import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from hf_prune.errors import HfPruneError
from hf_prune.publish.hub import push_folder

SENT = {
    "config.json": b'{"model_type": "vit"}',
    "model.safetensors": bytes(range(256)) * 400,
    "report.json": b"{}\n",
    "README.md": b"---\nlicense: mit\n---\n\n# pruned\n",
    "figures/tokens.png": b"\x89PNG" + bytes(1000),
}
KEPT_HOME = ("checkpoints/step_1/model.safetensors", "checkpoint-5/optimizer.bin", ".report.json.tmp", ".env")


@pytest.fixture
def folder(tmp_path):
    for name, data in {**SENT, **dict.fromkeys(KEPT_HOME, b"secret")}.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "out"


def files(commit):
    return {name: data for name, data in commit.files.items() if name != ".gitattributes"}


def test_pushed_folder_arrives_whole_in_one_commit_without_checkpoints(hub, folder):
    url = push_folder(folder, "me/pruned", commit_message="First")
    (commit,) = hub.commits("me/pruned")
    assert files(commit) == SENT
    assert (commit.message, url) == ("First", f"{hub.url}/me/pruned/commit/{commit.oid}")


def test_downloads_equal_what_was_pushed(hub, folder, tmp_path):
    push_folder(folder, "me/pruned")
    copy = Path(huggingface_hub.snapshot_download("me/pruned", cache_dir=tmp_path / "cache"))
    assert {name: (copy / name).read_bytes() for name in SENT} == SENT
    single = huggingface_hub.hf_hub_download("me/pruned", "model.safetensors", local_dir=tmp_path / "one")
    assert Path(single).read_bytes() == SENT["model.safetensors"]


def test_second_push_commits_only_what_changed(hub, folder):
    push_folder(folder, "me/pruned")
    uploads = [path for method, path in hub.requests if method == "PUT"]
    (folder / "report.json").write_bytes(b'{"seed": 1}\n')
    push_folder(folder, "me/pruned")
    first, second = hub.commits("me/pruned")
    assert files(second) == {**SENT, "report.json": b'{"seed": 1}\n'}
    assert second.parent == first.oid
    assert [path for method, path in hub.requests if method == "PUT"] == uploads


def test_revision_becomes_a_branch_and_private_is_passed_on(hub, folder):
    push_folder(folder, "me/pruned", revision="half", private=True)
    assert hub.repos["me/pruned"].private
    assert not hub.commits("me/pruned")
    assert files(hub.commits("me/pruned", "half")[0]) == SENT


def test_environment_alone_sends_another_process_to_the_server(hub, folder, tmp_path):
    code = "import sys; from hf_prune.publish.hub import push_folder; push_folder(sys.argv[1], 'pruned')"
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=True, timeout=120)
    assert files(hub.commits("me/pruned")[0]) == SENT


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_folder_without_a_model_is_refused_before_any_request(hub, folder, missing):
    (folder / missing).unlink()
    with pytest.raises(HfPruneError, match=r"must hold config\.json and a \.safetensors"):
        push_folder(folder, "me/pruned")
    assert not hub.requests


def test_missing_folder_is_refused_before_any_request(hub, tmp_path):
    with pytest.raises(HfPruneError, match="no files"):
        push_folder(tmp_path / "nowhere", "me/pruned")
    assert not hub.requests


def test_refused_token_says_how_to_log_in(hub, folder):
    with pytest.raises(HfPruneError, match="hf auth login") as caught:
        push_folder(folder, "me/pruned", token="hf_wrong")
    assert isinstance(caught.value.__cause__, huggingface_hub.errors.HfHubHTTPError)
    assert not hub.repos


@pytest.mark.parametrize(("status", "advice"), [(403, "write permission"), (500, "status 500; try again")])
def test_failure_before_the_commit_leaves_no_commit(hub, folder, status, advice):
    hub.fail("commit", status)
    with pytest.raises(HfPruneError, match=advice):
        push_folder(folder, "me/pruned")
    assert hub.commits("me/pruned") == []


def test_pull_request_that_is_not_there_names_the_revision(hub, folder):
    with pytest.raises(HfPruneError, match="check `repo_id` and `revision`"):
        push_folder(folder, "me/pruned", revision="refs/pr/7")


def test_malformed_repository_id_shows_the_form(hub, folder):
    with pytest.raises(HfPruneError, match="must look like 'owner/name'"):
        push_folder(folder, "me/pru ned")
    assert not hub.requests


def test_unreachable_server_and_offline_mode_say_what_to_check(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HfPruneError, match="HF_ENDPOINT"):
        push_folder(folder, "me/pruned")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HfPruneError, match="unset HF_HUB_OFFLINE"):
        push_folder(folder, "me/pruned")
