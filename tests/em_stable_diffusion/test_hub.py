"""A base in a repository: what is downloaded of it, when, and with which options."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from em_stable_diffusion import EMLoRAPipeline, train, train_lora
from em_stable_diffusion.base_source import find_base
from em_stable_diffusion.bases import open_base
from em_stable_diffusion.em_adapters import EMAdapters
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


def narrow_weights(folder, out, parts=None):
    """Copy a base; its weights, or those of some parts, as fp16 files alone."""
    shutil.copytree(folder, out)
    for path in sorted(out.glob("*/*.safetensors")):
        if parts is None or path.parent.name in parts:
            weights = {name: each.half() for name, each in load_file(path).items()}
            save_file(weights, path.with_name(f"{path.stem}.fp16.safetensors"), {"format": "pt"})
            path.unlink()
    return out


@pytest.mark.parametrize("kind", MAKERS)
def test_a_base_that_is_there_in_16_bits_alone(
    base_folders, make_config, hub, hub_machine, tmp_path, capsys, kind
):
    """Its files are found; training and drawing compute in float32."""
    folder = narrow_weights(base_folders[kind], tmp_path / "base")
    push(folder, "lab/base")
    config = make_config(tmp_path / "run", kind, num_images=4, sample_every=0)
    run = train_lora(replace(config, base="lab/base"))
    assert "(fp16 files: there are no others)" in capsys.readouterr().out
    hub_machine(hub, cache=tmp_path / "second")
    pipeline = EMLoRAPipeline.from_pretrained(run / "pipeline")
    assert pipeline.denoiser.dtype == pipeline.vae.dtype == torch.float32
    base = open_base(find_base(str(folder)))
    for mine, part in ((pipeline.vae, "vae"), (base.load_denoiser(), base.model.denoiser)):
        weights = load_file(next((folder / part).glob("*.fp16.safetensors")))
        for name, value in mine.state_dict().items():
            assert value.dtype != torch.float16
            assert torch.equal(value, weights[name].to(value.dtype)), name
    exact = open_base(find_base(str(base_folders[kind]))).encode_prompts(["dots"])
    torch.testing.assert_close(base.encode_prompts(["dots"]), exact, rtol=0.02, atol=0.02)


def test_plain_weights_are_preferred(base_folders, hub, tmp_path):
    """The fp16 copy of a part that has plain weights is not even downloaded."""
    folder = narrow_weights(base_folders["stable-diffusion"], tmp_path / "base", ("unet", "vae"))
    shutil.copytree(base_folders["stable-diffusion"] / "vae", folder / "vae", dirs_exist_ok=True)
    push(folder, "lab/base")
    since = len(hub.requests)
    assert find_base("lab/base").find_variants() == {"unet": "fp16"}
    weights = {file for file in list_fetched(hub, since) if file.endswith(".safetensors")}
    name = "diffusion_pytorch_model"
    assert weights == {f"unet/{name}.fp16.safetensors", f"vae/{name}.safetensors"}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_without_safetensors_is_refused_before_the_training(
    base_folders, make_config, tmp_path, monkeypatch, part
):
    """Pickled weights are not read."""

    def refuse(*_, **__):
        raise AssertionError("the training began")

    monkeypatch.setattr(train, "encode_both_sides", refuse)
    folder = tmp_path / "base"
    shutil.copytree(base_folders["stable-diffusion"], folder)
    (path,) = (folder / part).glob("*.safetensors")
    path.rename(path.with_suffix(".bin"))
    config = replace(make_config(tmp_path / "run"), base=str(folder))
    with pytest.raises(ValueError, match=f"holds no weights of its {part} as safetensors"):
        train_lora(config)


def test_an_unknown_variant_is_refused(runs):
    """It is a part of the name of a file."""
    config = EMLoRAPipeline.from_pretrained(runs["stable-diffusion"] / "pipeline").adapters.config
    with pytest.raises(ValueError, match=r"A variant is '\.\./x'; known are fp16, bf16"):
        EMAdapters(config.base, config.layers, variants={"unet": "../x"})


def test_a_model_in_16_bits_keeps_small_changes(base_folders, make_config, hub, tmp_path):
    """The base comes in bfloat16, and the changes are below the rounding of its weights."""
    push(base_folders["stable-diffusion"], "lab/base")
    config = make_config(tmp_path / "run", num_images=4, sample_every=0, learning_rate=1e-4)
    run = train_lora(replace(config, base="lab/base"))
    exact = EMLoRAPipeline.from_pretrained(run / "pipeline")
    narrow = EMLoRAPipeline.from_pretrained(run / "pipeline", dtype=torch.bfloat16)
    assert narrow.denoiser.dtype == narrow.vae.dtype == torch.bfloat16
    for name, pair in exact.adapters.pairs():
        change = (pair.lora_B.weight @ pair.lora_A.weight).detach()
        assert change.abs().max() > 0
        assert type(exact.denoiser.get_submodule(name)) is torch.nn.Linear
        layer = narrow.denoiser.get_submodule(name)
        x = torch.eye(change.shape[1], dtype=torch.bfloat16)
        found = torch.nn.functional.linear(x, layer.lora_A) @ layer.weight[:, len(x) :].T
        torch.testing.assert_close(found.float(), change.T, rtol=0.05, atol=1e-6)
