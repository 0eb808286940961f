"""Publishing: what a repository holds, what it refuses, and what faults on the way leave behind."""

import errno
import json
import os
import resource
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file

from em_commands.training import read_push_flags, train_and_publish
from em_diffusion import PRESETS, EMLatentDiffusionPipeline
from em_generation.families import find_family
from em_generation.generate import GenerationConfig, generate_images
from em_generation.loading import load_pipeline, read_model
from em_hub.publish import PublishConfig, hide_paths, publish_run
from support.models import MAKERS, draw, make_ldm, make_stylegan


def make_run(folder, family="ldm", seed=0, data="synthetic"):
    """A finished run's folder, as the trainings leave it."""
    MAKERS[family](seed).save_pretrained(folder / "pipeline")
    summary = {
        "name": "set",
        "source": data,
        "num_micrographs": 4,
        "num_held_out_micrographs": 1,
        "num_train_tiles": 12,
    }
    summary |= {
        "num_held_out_tiles": 4,
        "split": "micrograph",
        "symmetries": "paper",
        "bits": 8,
        "intensity": "auto",
    }
    summary |= {
        "held_out": ["patient-7.tif"],
        "ignored": [],
        "notices": [],
        "specimens": ["secret"],
        "split_hash": "12ab",
    }
    config = {
        "data": data,
        "out": str(folder),
        "tiles": {"resolution": 16, "cache_dir": str(folder)},
        "seed": 3,
    }
    run = {
        "name": folder.name,
        "family": family,
        "train_seconds": 61.5,
        "num_images_seen": 1234,
        "data": summary,
    }
    run |= {"train_seconds_by_stage": {"autoencoder": 20.5, "denoiser": 41.0}, "config": config}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "my-run")


def publish(run, repo="you/em-ldm", **options):
    return publish_run(
        PublishConfig(str(run), repo, **({"num_samples": 2} | options)), say=lambda text: None
    )


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts


@pytest.mark.parametrize("family", MAKERS)
def test_a_dry_run_writes_all_that_a_stranger_needs(family, tmp_path):
    run = make_run(tmp_path / "my-run", family, data=str(tmp_path / "private"))
    out = tmp_path / "repository"
    assert publish(run, dry_run=str(out)) == str(out)
    pipeline = MAKERS[family]()
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            full = load_file(out / name / "diffusion_pytorch_model.safetensors")
            narrow = load_file(out / name / "diffusion_pytorch_model.bf16.safetensors")
            assert full.keys() == narrow.keys()
            for key, tensor in full.items():
                exact = key == "quantize.embedding.weight" or not tensor.is_floating_point()
                torch.testing.assert_close(
                    narrow[key], tensor if exact else tensor.to(torch.bfloat16), rtol=0, atol=0
                )
    levels = np.concatenate(list(np.round(draw(pipeline, 0, 1) * 255)[..., 0]), axis=1)
    picture = np.asarray(Image.open(out / "samples.png"), dtype=int)
    assert picture.shape[1] == 16 * 34  # enlarged
    picture = picture[8::16, 8::16]
    picture = np.delete(picture, [16, 17], axis=1)  # the gap
    assert (
        np.abs(picture - levels).max() <= 1
    )  # the call that the card shows draws the picture that it shows
    record = json.loads((out / "run.json").read_text())
    assert record["num_images_seen"] == 1234
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    published = "".join(
        path.read_text(errors="replace")
        for path in out.rglob("*")
        if path.suffix in (".json", ".md")
    )
    for secret in (str(tmp_path), "private", "patient", "secret"):
        assert secret not in published
    ModelCard.load(out / "README.md")
    with pytest.raises(ValueError, match="not empty"):
        publish(run, dry_run=str(out))


def test_the_narrow_variant_draws_what_the_whole_model_draws_in_that_precision(tmp_path, run):
    out = tmp_path / "repository"
    publish(run, dry_run=str(out), num_samples=0)
    narrow = EMLatentDiffusionPipeline.from_pretrained(out, variant="bf16", dtype=torch.bfloat16)
    whole = EMLatentDiffusionPipeline.from_pretrained(out, dtype=torch.bfloat16)
    np.testing.assert_array_equal(draw(narrow, 0, 1), draw(whole, 0, 1))
    assert not (out / "samples.png").exists()


@pytest.mark.parametrize("family", MAKERS)
def test_a_published_run_is_loaded_generated_from_and_published_again(
    family, tmp_path, hub, monkeypatch
):
    run = make_run(tmp_path / "my-run", family)
    assert (
        publish(run, "em-model", private=True) == f"{hub.url}/you/em-model"
    )  # one's own name is filled in
    assert hub.repos["models", "you/em-model"].private
    files = hub.files("you/em-model")
    assert {"README.md", "samples.png", "run.json", "model_index.json"} < set(files)
    pipeline = load_pipeline("you/em-model")
    assert type(pipeline).__module__.startswith(("em_diffusion.", "em_stylegan."))
    np.testing.assert_array_equal(draw(pipeline, 0, 1), draw(MAKERS[family](), 0, 1))
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.py"))  # no code was even downloaded
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*bf16*"))
    info = read_model("you/em-model")
    assert (info.name, info.family.name, info.num_images_seen, info.config["data"]) == (
        "my-run",
        family,
        1234,
        "synthetic",
    )
    assert read_model("you/em-model").weights_sha256 == read_model(str(run)).weights_sha256

    cls = find_family(family).import_pipeline()
    owned = cls.from_pretrained("you/em-model")
    np.testing.assert_array_equal(draw(owned, 5), draw(pipeline, 5))
    narrow = cls.from_pretrained("you/em-model", variant="bf16", dtype=torch.bfloat16)
    np.testing.assert_allclose(draw(narrow, 5), draw(pipeline, 5), atol=0.1)

    before = hub.repos["models", "you/em-model"].branches["main"]
    publish(run, "em-model", num_samples=0)  # nothing but the card is new
    after = hub.repos["models", "you/em-model"].branches["main"]
    assert after != before
    make_run(run, family, seed=1)
    publish(run, "em-model")
    assert not np.array_equal(draw(load_pipeline("you/em-model"), 0), draw(pipeline, 0))
    pinned = load_pipeline(f"you/em-model@{before}")
    np.testing.assert_array_equal(draw(pinned, 0), draw(pipeline, 0))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # all of it was downloaded once
    num_requests = len(hub.requests)
    config = GenerationConfig("you/em-model", str(tmp_path / "images"), 3, precision="no")
    record = generate_images(config)
    assert record["settings"]["weights_sha256"] == read_model(str(run)).weights_sha256
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    assert len(hub.requests) == num_requests
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids the network"):
        load_pipeline("you/another")


def test_parts_load_by_stock_classes_and_at_a_revision(run, hub):
    from diffusers import DDIMScheduler, VQModel

    publish(run, revision="v1", num_samples=0)
    assert "model_index.json" not in hub.files("you/em-ldm")
    vqvae = VQModel.from_pretrained("you/em-ldm", subfolder="vqvae", revision="v1")
    expected = make_ldm().vqvae
    for key, tensor in expected.state_dict().items():
        assert torch.equal(vqvae.state_dict()[key], tensor)
    scheduler = DDIMScheduler.from_pretrained("you/em-ldm", subfolder="scheduler", revision="v1")
    assert not scheduler.config.clip_sample
    np.testing.assert_array_equal(draw(load_pipeline("you/em-ldm@v1"), 0), draw(make_ldm(), 0))
    with pytest.raises(ValueError, match="you/em-ldm@v2: there is no such revision"):
        load_pipeline("you/em-ldm@v2")


def test_a_run_of_another_kind_or_anothers_name_is_refused(run, tmp_path, hub):
    publish(run, num_samples=0)
    gan = make_run(tmp_path / "gan", "stylegan")
    with pytest.raises(
        ValueError, match="you/em-ldm holds a EMLatentDiffusionPipeline, not a EMStyleGANPipeline"
    ):
        publish(gan)
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo("you/notes")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id="you/notes")
    with pytest.raises(
        ValueError, match=r"you/notes holds something else \(\.gitattributes, notes\.txt\)"
    ):
        publish(run, "you/notes")
    with pytest.raises(
        ValueError, match="belongs to other, but the token to you, which may write to lab, you"
    ):
        publish(run, "other/em-ldm")
    with pytest.raises(ValueError, match="public already"):
        publish(run, private=True)
    with pytest.raises(ValueError, match="no finished model"):
        publish(tmp_path)
    with pytest.raises(ValueError, match="not a licence's name"):
        publish(run, license="My Licence")


def test_what_is_checked_is_the_branch_that_is_written_to(run, tmp_path, hub):
    from huggingface_hub import HfApi

    api = HfApi()
    gan = make_run(tmp_path / "gan", "stylegan")
    publish(run, num_samples=0)
    with pytest.raises(
        ValueError, match="you/em-ldm holds a EMLatentDiffusionPipeline, not a EMStyleGANPipeline"
    ):
        publish(gan, revision="new", num_samples=0)  # it would start from main
    assert list(hub.repos["models", "you/em-ldm"].branches) == ["main"]

    api.create_branch("you/em-ldm", branch="gan")
    api.delete_files(
        "you/em-ldm",
        [path for path in hub.files("you/em-ldm") if path != ".gitattributes"],
        revision="gan",
    )
    publish(gan, revision="gan", num_samples=0)
    publish(gan, revision="gan", num_samples=0)  # main holds an LDM, this branch does not
    np.testing.assert_array_equal(
        draw(load_pipeline("you/em-ldm@gan"), 0), draw(make_stylegan(), 0)
    )
    np.testing.assert_array_equal(draw(load_pipeline("you/em-ldm"), 0), draw(make_ldm(), 0))
    with pytest.raises(
        ValueError,
        match="you/em-ldm@gan holds a EMStyleGANPipeline, not a EMLatentDiffusionPipeline",
    ):
        publish(run, revision="gan", num_samples=0)

    api.upload_file(
        path_or_fileobj=b"x",
        path_in_repo="unet/old.safetensors",
        repo_id="you/em-ldm",
        revision="main",
    )
    publish(
        run, revision="v1", num_samples=0
    )  # a new branch has what main has, less what is replaced
    assert "unet/old.safetensors" in hub.files("you/em-ldm")
    assert "unet/old.safetensors" not in hub.files("you/em-ldm", "v1")


def test_what_no_longer_belongs_goes_and_what_others_added_stays(run, hub):
    from huggingface_hub import HfApi

    publish(run, num_samples=0)
    for path in ("unet/old-00001.safetensors", "pipeline_old.py", "figures/mine.png"):
        HfApi().upload_file(path_or_fileobj=path.encode(), path_in_repo=path, repo_id="you/em-ldm")
    publish(run)
    files = hub.files("you/em-ldm")
    assert "figures/mine.png" in files
    assert not {"unet/old-00001.safetensors", "pipeline_old.py"} & set(files)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "no token for"),
        ("read-token", "The token of you may only read"),
        ("wrong", "the Hub does not know the token"),
    ],
)
def test_a_token_that_will_not_do(run, hub, hub_machine, token, message):
    hub_machine(hub, token)
    with pytest.raises(ValueError, match=message) as raised:
        publish(run)
    assert "\n" not in str(raised.value)
    assert not hub.repos


def test_no_network(run, hub, monkeypatch):
    hub.__exit__()
    with pytest.raises(ValueError, match="no connection to") as raised:
        publish(run)
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(hub.http, "shutdown", lambda: None)


def test_an_upload_cut_in_its_middle_leaves_nothing_half_and_goes_on(run, hub):
    publish(run, num_samples=0)
    before = hub.files("you/em-ldm")
    make_run(run, seed=1)
    fault = hub.fail("PUT", "/lfs-storage/", cut_after=2000, times=1000, skip=2)
    with pytest.raises(ValueError, match="what arrived is kept") as raised:
        publish(run)
    assert "\n" not in str(raised.value)
    assert hub.files("you/em-ldm") == before  # the repository is as it was
    fault.times = 0
    arrived = set(hub.blobs)
    num_requests = len(hub.requests)
    publish(run)
    sent = [
        path.rsplit("/", 1)[1] for method, path, _ in hub.requests[num_requests:] if method == "PUT"
    ]
    assert sent
    assert not arrived & set(sent)  # what arrived was not sent again
    np.testing.assert_array_equal(draw(load_pipeline("you/em-ldm"), 0), draw(make_ldm(1), 0))


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/commit/", 500, r"the Hub has a fault of its own \(500\)"),
        ("POST", "/preupload/", 429, r"the Hub asks to wait 7 seconds \(429"),
        ("PUT", "/lfs-storage/", 503, r"a fault of its own \(503\)"),
        ("POST", "/api/repos/create", 429, "asks to wait"),
    ],
)
def test_a_busy_hub(tmp_path, hub, method, path, status, message):
    run = make_run(tmp_path / "gan", "stylegan")
    hub.fail(method, path, status=status, times=100, headers={"Retry-After": "7"})
    with pytest.raises(ValueError, match=message) as raised:
        publish(run, num_samples=0)
    assert "\n" not in str(raised.value)
    assert "model_index.json" not in (hub.files("you/em-ldm") if hub.repos else {})
    hub.faults.clear()
    hub.fail("PUT", "/lfs-storage/", status=500)  # once: the client tries again by itself
    publish(run, num_samples=0)
    np.testing.assert_array_equal(draw(load_pipeline("you/em-ldm"), 0), draw(make_stylegan(), 0))


def test_a_tampered_file_is_named_removed_and_fetched_again(run, hub):
    publish(run, num_samples=0)
    hub.tamper("you/em-ldm", "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"^unet/diffusion_pytorch_model\.safetensors of you/em-ldm came with another "
        r"checksum",
    ):
        load_pipeline("you/em-ldm")
    hub.served.clear()
    np.testing.assert_array_equal(draw(load_pipeline("you/em-ldm"), 0), draw(make_ldm(), 0))


def test_a_disk_that_is_full_at_the_download(run, hub):
    """Where no file may grow above 20 kB: the cache keeps nothing broken, and the second try
    succeeds.
    """
    publish(run, num_samples=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            ValueError, match=r"a file may not grow so large .* Make room"
        ) as raised:
            load_pipeline("you/em-ldm")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(raised.value)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))
    np.testing.assert_array_equal(draw(load_pipeline("you/em-ldm"), 0), draw(make_ldm(), 0))


def test_a_full_disk_while_the_repository_is_written(run, hub):
    """What the publisher's own disk cannot hold is never uploaded, and the next call succeeds."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            ValueError, match=r"The weights cannot be written to .*too large.*Make room"
        ) as raised:
            publish(run, num_samples=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(raised.value)
    assert not hub.repos
    publish(run, num_samples=0)
    np.testing.assert_array_equal(draw(load_pipeline("you/em-ldm"), 0), draw(make_ldm(), 0))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_left_is_said_and_leaves_no_half_of_a_file(run, hub, monkeypatch, error):
    """As the system says it in the middle of a download."""
    from huggingface_hub import file_download

    publish(run, num_samples=0)
    whole = file_download.http_get

    def fill(url, temp_file, *arguments, **options):
        if "lfs-storage" in url:
            temp_file.write(b"half")
            raise OSError(error, os.strerror(error), temp_file.name)
        return whole(url, temp_file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", fill)
        with pytest.raises(
            ValueError,
            match=r"downloading you/em-ldm: the (disk is full|quota is used up) .* set HF_HOME",
        ):
            load_pipeline("you/em-ldm")
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    np.testing.assert_array_equal(draw(load_pipeline("you/em-ldm"), 0), draw(make_ldm(), 0))


@pytest.mark.parametrize(
    ("method", "path", "options", "message"),
    [
        ("GET", "/api/models/", {"status": 500}, r"the Hub has a fault of its own \(500\)"),
        (
            "HEAD",
            "/resolve/",
            {"status": 429, "headers": {"Retry-After": "7"}},
            r"the Hub asks to wait 7 seconds \(429",
        ),
        ("GET", "/lfs-storage/", {"status": 503}, r"a fault of its own \(503\)"),
        ("GET", "/lfs-storage/", {"cut_after": 2000}, "what arrived is kept"),
    ],
)
def test_a_busy_hub_at_the_download(run, hub, method, path, options, message):
    publish(run, num_samples=0)
    hub.fail(method, path, times=1000, **options)
    with pytest.raises(ValueError, match=message) as raised:
        load_pipeline("you/em-ldm")
    assert "\n" not in str(raised.value)
    hub.faults.clear()
    np.testing.assert_array_equal(draw(load_pipeline("you/em-ldm"), 0), draw(make_ldm(), 0))


# ---------------------------------------------------------------- from the trainings


def push_flags(*argv):
    return read_push_flags(argv)[0]


def test_a_training_publishes_its_run(tmp_path, hub):
    trained = []
    config = SimpleNamespace(out=str(tmp_path / "gan"))

    def train():
        trained.append(make_run(tmp_path / "gan", "stylegan"))

    words = ["test", "--push-to-hub", "you/em-gan", "--seed", "1", "--private"]
    push, others = read_push_flags(words)
    assert others == ["test", "--seed", "1"]
    train_and_publish(push, config, train)
    assert hub.repos["models", "you/em-gan"].private
    np.testing.assert_array_equal(draw(load_pipeline("you/em-gan"), 0), draw(make_stylegan(), 0))
    os.environ.pop("HF_TOKEN")
    with pytest.raises(ValueError, match="no token"):
        train_and_publish(push_flags("--push-to-hub", "you/em-gan"), config, train)
    assert len(trained) == 1  # the token is tried before hours of training
    with pytest.raises(ValueError, match="--private needs"):
        train_and_publish(push_flags("--private"), config, train)


def test_a_run_that_stops_before_its_pipeline_is_not_to_be_pushed(hub):
    config = replace(PRESETS["test"](), last_stage="autoencoder")
    with pytest.raises(ValueError, match="--last-stage leaves this one unfinished"):
        train_and_publish(push_flags("--push-to-hub", "you/em-ldm"), config, pytest.fail)


def test_a_push_that_fails_after_the_training_says_how_to_go_on(tmp_path, hub):
    run = tmp_path / "gan"
    hub.fail("POST", "/api/repos/create", status=500, times=9)
    with pytest.raises(
        ValueError,
        match=r"finished and saved\. Publish it later with `python publish\.py \S+ you/em-gan`",
    ):
        train_and_publish(
            push_flags("--push-to-hub", "em-gan"),
            SimpleNamespace(out=str(run)),
            lambda: make_run(run, "stylegan"),
        )


def test_paths_of_this_machine_are_hidden(tmp_path):
    config = {
        "a": str(tmp_path / "x" / "weights.ckpt"),
        "b": ["../there/", "owner/name", "C:\\data\\set", "plain"],
    }
    config |= {"tiles": {"cache_dir": "anything", "num": 3}}
    hidden = {
        "a": "weights.ckpt",
        "b": ["there", "owner/name", "set", "plain"],
        "tiles": {"cache_dir": None, "num": 3},
    }
    assert hide_paths(config) == hidden


def test_evaluate_and_generate_name_revisions_too(run, hub):
    publish(run, num_samples=0)
    with pytest.raises(ValueError, match="it is not a Hub id"):
        load_pipeline("no-such-thing")
    config = replace(GenerationConfig("you/em-ldm@main", "out"), model="you/em-ldm@main")
    assert read_model(config.model).weights_sha256 == read_model(str(run)).weights_sha256


def test_a_run_of_preset_test_is_published_with_a_warning(run, tmp_path):
    content = json.loads((run / "run.json").read_text())
    note = "A run of preset test checks that the software works. Its images mean nothing."
    (run / "run.json").write_text(json.dumps(content | {"preset": "test", "note": note}))
    said = []
    config = PublishConfig(str(run), "you/m", num_samples=0, dry_run=str(tmp_path / "repository"))
    publish_run(config, say=said.append)
    assert f"Warning: {note}" in said
    record = json.loads((tmp_path / "repository" / "run.json").read_text())
    assert (record["preset"], record["note"]) == ("test", note)
