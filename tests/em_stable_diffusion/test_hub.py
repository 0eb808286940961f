"""A base in a repository: what is downloaded of it, when, and with which options."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi

from em_stable_diffusion import EMLoRAPipeline, train_lora
from em_stable_diffusion.em_prompts import EMPrompts
from support.hub_server import make_environment
from support.tiny_bases import MAKERS

TEXT_PARTS = ("text_encoder", "tokenizer")


def push(folder, repo, **options):
    """Upload a folder as a repository; return its commit."""
    HfApi().create_repo(repo, **options)
    HfApi().upload_folder(repo_id=repo, folder_path=folder)
    return HfApi().model_info(repo).sha


def list_fetched(hub, since=0):
    """The files that were downloaded since a request, by their paths in their repositories."""
    files = (
        path.partition("/resolve/")[2] for way, path, _ in hub.requests[since:] if way != "PUT"
    )
    return {file.partition("/")[2] for file in files if file}


def list_parts(files):
    """The parts of a pipeline that these files belong to."""
    return {file.partition("/")[0] for file in files if "/" in file}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_text_encoder_is_fetched_for_new_prompts_alone(
    base_folders, make_config, hub, hub_machine, tmp_path, kind
):
    """Not by a run that has its prompts, and not by who loads the trained model: each on a new
    machine, whose cache is empty.
    """
    push(base_folders[kind], "lab/base")
    config = replace(
        make_config(tmp_path / "run", kind, num_images=4, sample_every=0), base="lab/base"
    )
    run = train_lora(config)
    parts = {"scheduler", "vae", "unet" if kind == "stable-diffusion" else "transformer"}
    assert list_parts(list_fetched(hub)) == {*parts, *TEXT_PARTS}
    stored = EMPrompts.from_pretrained(run / "prompts").embeddings

    hub_machine(hub, cache=tmp_path / "second")
    since = len(hub.requests)
    (run / "run.json").unlink()
    train_lora(config)
    assert list_parts(list_fetched(hub, since)) == parts

    hub_machine(hub, cache=tmp_path / "third")
    since = len(hub.requests)
    pipeline = EMLoRAPipeline.from_pretrained(run / "pipeline")
    assert list_parts(list_fetched(hub, since)) == parts - {"scheduler"}
    assert torch.equal(pipeline.prompts.embeddings, stored)

    (run / "run.json").unlink()
    EMPrompts(["another prompt"], *stored.shape[1:]).save_pretrained(run / "prompts")
    since = len(hub.requests)
    train_lora(config)
    assert set(TEXT_PARTS) < list_parts(list_fetched(hub, since))
    assert torch.equal(EMPrompts.from_pretrained(run / "prompts").embeddings, stored)
    shutil.rmtree(tmp_path / "third")


LOADER = """
import importlib.util, sys
sys.path += PACKAGES
assert not importlib.util.find_spec("em_stable_diffusion")
from diffusers import DiffusionPipeline

options = {"trust_remote_code": True, "cache_dir": "elsewhere"}
pipe = DiffusionPipeline.from_pretrained("you/em-lora", token="write-token", **options)
assert type(pipe).__module__.startswith("diffusers_modules.")
print("loaded once", flush=True)
DiffusionPipeline.from_pretrained("you/em-lora", local_files_only=True, **options)
"""


def upload_private_model(base_folders, make_config, kind, out):
    """Train on a private base and upload the pipeline as a private repository."""
    push(base_folders[kind], "lab/base", private=True)
    config = make_config(out, kind, num_images=4, sample_every=0)
    run = train_lora(replace(config, base="lab/base"))
    push(run / "pipeline", "you/em-lora", private=True)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_base_is_downloaded_with_the_options_of_the_call(
    base_folders, make_config, hub, hub_machine, tmp_path, kind
):
    upload_private_model(base_folders, make_config, kind, tmp_path / "run")
    hub_machine(hub, token=None, cache=tmp_path / "default")
    cache = tmp_path / "elsewhere"
    with pytest.raises(OSError, match="private repository"):
        EMLoRAPipeline.from_pretrained("you/em-lora", cache_dir=cache)
    hub.repos["models", "you/em-lora"].private = False
    with pytest.raises(ValueError, match=r"lab/base at the commit \w+, was not .* give `token` if"):
        EMLoRAPipeline.from_pretrained("you/em-lora", cache_dir=cache)
    EMLoRAPipeline.from_pretrained("you/em-lora", cache_dir=cache, token="write-token")
    assert not (tmp_path / "default").exists()

    since = len(hub.requests)
    pipeline = EMLoRAPipeline.from_pretrained("you/em-lora", cache_dir=cache, local_files_only=True)
    assert len(hub.requests) == since
    with pytest.raises(ValueError, match=r"was not loaded .* give `token` if"):  # none is kept
        EMLoRAPipeline(pipeline.adapters, pipeline.prompts, pipeline.scheduler)
    shutil.rmtree(next(cache.glob("models--lab--base")))
    since = len(hub.requests)
    with pytest.raises(ValueError, match=r"was not loaded .* Leave `local_files_only` out"):
        EMLoRAPipeline.from_pretrained("you/em-lora", cache_dir=cache, local_files_only=True)
    assert len(hub.requests) == since


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_plain_diffusers_downloads_the_base_with_the_options_of_the_call(
    base_folders, make_config, hub, tmp_path, kind
):
    """By the code of the repository, without this package; the default cache stays empty.

    diffusers itself does not take `token` to the code of a private repository: this one is public.
    """
    upload_private_model(base_folders, make_config, kind, tmp_path / "run")
    hub.repos["models", "you/em-lora"].private = False
    packages = [path for path in sys.path if path.endswith("site-packages")]
    since = len(hub.requests)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", LOADER.replace("PACKAGES", repr(packages))],
        cwd=tmp_path,
        env=make_environment(hub, tmp_path / "stranger"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "loaded once\n", process.communicate()
    parts = {"adapters", "prompts", "scheduler", "vae"}
    parts |= {"unet" if kind == "stable-diffusion" else "transformer"}
    assert list_parts(list_fetched(hub, since)) == parts
    since = len(hub.requests)
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == 0, errors[-3000:]
    asked = {path for _, path, _ in hub.requests[since:] if "lab/base" in path}
    assert not asked  # diffusers asks for the published repository all the same
    assert not (tmp_path / "stranger" / "hub").exists()
    assert {path.name for path in (tmp_path / "elsewhere").glob("models--*")} == {
        "models--you--em-lora",
        "models--lab--base",
    }
