"""A base in a repository: what is downloaded of it, when, and with which options."""

import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi

from em_stable_diffusion import EMLoRAPipeline, train_lora
from em_stable_diffusion.em_prompts import EMPrompts
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
