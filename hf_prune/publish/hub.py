"""From a finished folder to one commit on the Hub."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] (of httpx or httpx2, by its version)
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import filter_repo_objects
from torch import nn

from hf_prune.errors import HfPruneError
from hf_prune.publish.folder_card import write_card
from hf_prune.publish.save import save

# Checkpoints are for resuming a run, and hidden or temporary files are nobody's business.
LEFT_OUT = ["checkpoints/*", "checkpoint-*/*", ".*", "*/.*", "*.tmp", "*.lock", "*/__pycache__/*"]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model pruned by hf_prune",
) -> str:
    """Upload weights, config, report, pictures and card in one commit and return its URL.

    Files that the repository has and the folder has not stay where they are.

    Args:
        folder: Where the run saved its model.
        repo_id: "owner/name" on the Hub; created if there is none yet.
        token: Access token with write permission; None takes the one that is logged in.
        private: Who may see a repository created here; None follows the owner's default.
        revision: Branch to commit to, created if there is none yet; None is the main one.
        commit_message: First line of the commit.

    Raises:
        HfPruneError: If the folder holds no model (nothing is sent then), or the Hub refuses or is away.
    """
    operations = [CommitOperationAdd(name, Path(folder, name)) for name in _files(Path(folder))]
    api = HfApi(token=token, library_name="hf_prune")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # Not `upload_folder`: where hf_xet is installed that may split a folder over several commits.
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)
    except (HTTPError, OSError, ValueError, RuntimeError) as err:
        raise HfPruneError(f"'{folder}' could not be pushed to '{repo_id}': {_advice(err, api.endpoint)}") from err
    return commit.commit_url


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    processor: Any = None,
    measurements: Mapping[str, Any] | None = None,
    license_name: str | None = None,
    **settings: Any,
) -> str:
    """Save a pruned model, write its card, and push both in one commit; return the commit's URL.

    Args:
        model: Pruned, of transformers or of timm.
        repo_id: "owner/name" on the Hub; created if there is none yet.
        processor: Image processor to go along (transformers).
        measurements: What `hf_prune.compare` found, for the card.
        license_name: Licence of the dense weights, as the Hub calls it.
        settings: `token`, `private`, `revision`, `commit_message`; see `push_folder`.

    Raises:
        HfPruneError: If the model cannot be saved, or the Hub refuses or is away; nothing is sent in part.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = save(model, Path(temporary) / "model", processor=processor, measurements=measurements)
        write_card(folder, model_id=repo_id, license_name=license_name)
        return push_folder(folder, repo_id, **settings)


def _files(folder: Path) -> list[str]:
    """Return what to upload, as sorted paths inside the folder, after checking that it is a model."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names = sorted(filter_repo_objects(found, ignore_patterns=LEFT_OUT))
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise HfPruneError(
            "`folder` must hold config.json and a .safetensors file, got "
            f"{names or 'no files'} in '{folder}'; save the model there first"
        )
    return names


def _advice(err: Exception, endpoint: str) -> str:
    """Say in one clause what went wrong and what to do about it."""
    if isinstance(err, HFValidationError):
        return f"`repo_id` must look like 'owner/name'; choose another one ({err})"
    if isinstance(err, OfflineModeIsEnabled):
        return "offline mode is on; unset HF_HUB_OFFLINE and try again"
    if isinstance(err, HfHubHTTPError):
        status = err.response.status_code
        if status == 401:
            return "the Hub must know and trust the token; run `hf auth login`, or pass a valid `token`"
        if status == 403:
            return "the token must be allowed to write there; make one with write permission, or check the owner"
        if status == 404:
            return "there is no such repository or revision; check `repo_id` and `revision`"
        return f"{endpoint} answered with status {status}; try again later ({err})"
    if isinstance(err, HTTPError):
        return f"{endpoint} must be reachable; check the network and HF_ENDPOINT ({err})"
    return str(err)
