from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from support import hub_server


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Equality to the bit holds on one thread, and tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture
def hub_machine(tmp_path, monkeypatch):
    """How a test gives this process a Hub, a private cache and a token of its own: call it with a
    server.
    """

    def use(server, token="write-token", cache=None):
        home = Path(cache or tmp_path / "hf")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        else:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        return home

    return use


@pytest.fixture
def hub(hub_machine):
    """The stand-in, used by this process."""
    with hub_server.HubServer() as server:
        hub_machine(server)
        yield server
