"""The stand-in itself, by what the real client makes of it: a test over it is worth what it is."""

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from support import hub_server


def make_folder(path, **contents):
    for name, content in {
        "config.json": b"{}",
        "sub/weights.safetensors": bytes(range(256)) * 1200,
        **contents,
    }.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("chunk_size", [None, 100_000])
def test_what_was_uploaded_comes_back(tmp_path, hub_machine, chunk_size):
    folder = make_folder(tmp_path / "folder")
    with hub_server.HubServer(chunk_size) as hub:
        hub_machine(hub)
        api = HfApi()
        assert str(api.create_repo("you/thing", private=True)) == f"{hub.url}/you/thing"
        first = api.upload_folder(repo_id="you/thing", folder_path=folder).oid
        num_puts = sum(method == "PUT" for method, _, _ in hub.requests)
        assert num_puts == (1 if chunk_size is None else 4)
        snapshot = Path(snapshot_download("you/thing"))
        assert snapshot.name == first == api.model_info("you/thing").sha
        for name in ("config.json", "sub/weights.safetensors"):
            assert (snapshot / name).read_bytes() == (folder / name).read_bytes()
        sizes = {
            sibling.rfilename: sibling.size
            for sibling in api.model_info("you/thing", files_metadata=True).siblings
        }
        assert sizes["sub/weights.safetensors"] == 256 * 1200
        (info,) = api.get_paths_info("you/thing", ["sub/weights.safetensors"])
        assert (
            info.lfs.sha256
            == hashlib.sha256((folder / "sub/weights.safetensors").read_bytes()).hexdigest()
        )
        tree = [each.path for each in api.list_repo_tree("you/thing")]
        assert tree == [".gitattributes", "config.json", "sub"]
        api.upload_folder(
            repo_id="you/thing", folder_path=folder
        )  # nothing new: no commit, no upload
        assert api.model_info("you/thing").sha == first
        assert sum(method == "PUT" for method, _, _ in hub.requests) == num_puts


def test_revisions_and_who_may_see(tmp_path, hub, hub_machine):
    api = HfApi()
    api.create_repo("you/thing", private=True)
    api.create_branch("you/thing", branch="old")
    api.upload_folder(repo_id="you/thing", folder_path=make_folder(tmp_path / "a"), revision="old")
    api.create_tag("you/thing", tag="v1", revision="old")
    api.upload_folder(
        repo_id="you/thing", folder_path=make_folder(tmp_path / "b", **{"config.json": b"[]"})
    )
    assert {branch.name for branch in api.list_repo_refs("you/thing").branches} == {"main", "old"}
    assert Path(hf_hub_download("you/thing", "config.json", revision="v1")).read_bytes() == b"{}"
    assert Path(hf_hub_download("you/thing", "config.json")).read_bytes() == b"[]"
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("you/thing", "nothing.json")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("you/thing", revision="v2")
    assert api.whoami()["name"] == "you"
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token="other-token").model_info("you/thing")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("you/thing")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token="read-token").upload_folder(repo_id="you/thing", folder_path=tmp_path / "a")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="wrong").whoami()


def test_an_interrupted_download_is_taken_up_in_its_middle(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    api = HfApi()
    api.create_repo("you/thing")
    folder = make_folder(tmp_path / "a")
    api.upload_folder(repo_id="you/thing", folder_path=folder)
    fault = hub.fail("GET", "/lfs-storage/", cut_after=100_000)
    path = Path(hf_hub_download("you/thing", "sub/weights.safetensors"))
    assert fault.times == 0
    assert path.read_bytes() == (folder / "sub/weights.safetensors").read_bytes()
