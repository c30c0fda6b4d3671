"""The loopback Hub as a fixture."""

import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars

sys.path.append(str(Path(__file__).parents[1]))
from hub_server import TOKEN, HubServer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running Hub that this process talks to, also where the tests as a whole run offline."""
    disable_progress_bars()
    with HubServer() as server:
        # These are read from the environment when huggingface_hub is imported, which is long past.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
