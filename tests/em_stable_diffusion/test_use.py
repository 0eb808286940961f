"""A tuned model in diffusers, in every command, and in the hands of a stranger."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import HfApi

from em_commands import generate as command
from em_generation import demo
from em_generation.evaluate import EvaluationConfig, evaluate_runs
from em_generation.generate import generate_images
from em_generation.loading import read_model
from em_generation.reproduce import list_training
from em_hub.publish import PublishConfig, publish_run
from em_stable_diffusion import EMLoRAPipeline, train_lora
from em_stable_diffusion.em_base_models import BASE_MODELS
from em_stable_diffusion.family import LoRAOptions
from support.hub_server import make_environment
from support.tiny_bases import MAKERS


def draw(pipeline, *seeds, **options):
    """Images [B, H, W, 1] in [0, 1], each of a generator of its own."""
    pipeline.set_progress_bar_config(disable=True)
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(len(seeds), generator=rngs, output_type="np", **options).images


def draw_by_diffusers(base, lora, kind, **options):
    """The same images by diffusers alone: base, text encoder and LoRA file; grey as a mean."""
    pipeline = BASE_MODELS[kind].pipeline_class.from_pretrained(base, safety_checker=None)
    pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt=["an electron micrograph"] * 2,
        height=32,
        width=32,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        output_type="np",
        **options,
    ).images
    return images.mean(axis=-1, keepdims=True)


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_plain_diffusers_draws_the_same_images(runs, base_folders, kind, scale):
    own = EMLoRAPipeline.from_pretrained(runs[kind] / "pipeline")
    expected = draw_by_diffusers(
        base_folders[kind], runs[kind] / "pipeline", kind, guidance_scale=scale
    )
    images = draw(own, 0, 1, guidance_scale=scale)
    np.testing.assert_allclose(images, expected, atol=1e-4)
    assert np.abs(images[0] - images[1]).max() > 0.01


def test_a_pipeline_of_the_same_components_is_the_same(runs, kind, tmp_path):
    pipeline = EMLoRAPipeline.from_pretrained(runs[kind] / "pipeline")
    images = draw(pipeline, 0, 1)
    again = EMLoRAPipeline(**pipeline.components)
    assert again.config.resolution == pipeline.config.resolution == 32
    np.testing.assert_array_equal(draw(again, 0, 1), images)
    pipeline.save_pretrained(tmp_path)
    np.testing.assert_array_equal(draw(EMLoRAPipeline.from_pretrained(tmp_path), 0, 1), images)
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        pipeline(2, generator=[torch.Generator()])
    with pytest.raises(ValueError, match="This model has no classes"):
        pipeline(class_labels=0)


def test_grey_is_the_mean_and_colour_is_measured(runs, kind, monkeypatch):
    pipeline = EMLoRAPipeline.from_pretrained(runs[kind] / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    colours = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    stock = BASE_MODELS[kind].pipeline_class
    result = type("Output", (), {"images": colours})
    monkeypatch.setattr(stock, "__call__", lambda *_, **__: result)
    grey, colourfulness = pipeline.draw(2)
    torch.testing.assert_close(grey / 2 + 0.5, colours.mean(1, keepdim=True))
    deviations = (colours - colours.mean(1, keepdim=True)).abs()
    torch.testing.assert_close(colourfulness, 255 * deviations.mean((1, 2, 3)))
    result.images = colours * float("nan")
    with pytest.raises(ValueError, match="An image is not finite"):
        pipeline.draw(2)


def test_images_by_number(runs, kind):
    """Image i depends on the seed and on i alone; colourfulness is said once."""
    model, lines = read_model(str(runs[kind])), []
    options = LoRAOptions(num_inference_steps=2)
    drawer = model.start(model.load(), options, seed=3, batch_size=4, say=lines.append)
    images = drawer.draw([0, 1, 2, 3])
    assert images.shape == (4, 1, 32, 32)
    torch.testing.assert_close(drawer.draw([2, 1]), images[[2, 1]], rtol=1e-3, atol=1e-4)
    assert [line.startswith("colourfulness: ") for line in lines] == [True]
    assert drawer.describe()["num_inference_steps"] == 2
    other = model.start(model.load(), options, seed=4, batch_size=4, say=lines.append)
    assert (other.draw([0]) - images[0]).abs().max() > 0.01
    assert (model.family.name, model.kind) == ("lora", kind)


def test_generate_evaluate_and_the_demo_know_it(runs, tmp_path, capsys):
    run = runs["stable-diffusion"]
    words = ["--model", str(run), "--out", str(tmp_path / "images"), "--num-images", "5"]
    config, model = command.parse([*words, "--num-inference-steps", "2"])
    assert generate_images(config, model)["settings"]["num_inference_steps"] == 2
    assert len(list((tmp_path / "images").rglob("*.png"))) == 5
    config = EvaluationConfig(
        models=(str(run),),
        out=str(tmp_path / "report"),
        num_images=8,
        levels=("reconstruction",),
        microscopy=False,
        memorisation=False,
        sampling=("num_inference_steps=1",),
    )
    evaluate_runs(config)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["models"][0]["name"] == "Stable Diffusion LoRA"
    assert "held_out_loss" in report["models"][0]["curves"]["lora"][-1]
    assert [level["kind"] for level in report["levels"]] == ["reconstruction"]
    (words,) = list_training(read_model(str(run)))
    assert words.startswith("python train_lora.py")
    shown = demo.load_demo_model(str(run))
    assert [control.name for control in shown.controls] == ["num_inference_steps", "guidance_scale"]
    assert demo.draw(shown, 3, 2).images.shape == (2, 1, 32, 32)


def push(folder, repo):
    api = HfApi()
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)
    return api.model_info(repo).sha


LICENSES = {"stable-diffusion": "creativeml-openrail-m", "flux2-klein": "apache-2.0"}


def test_a_card_says_base_prompt_and_licence(runs, kind, tmp_path):
    config = PublishConfig(
        str(runs[kind]), "you/em-lora", dry_run=str(tmp_path / "r"), num_samples=2
    )
    out = Path(publish_run(config, say=lambda text: None))
    card = (out / "README.md").read_text()
    assert f"{BASE_MODELS[kind].title}'s class of text-to-image model" in card
    assert "The base is in this repository" in card
    assert 'All images have the prompt "an electron micrograph".' in card
    assert f"(licence: {LICENSES[kind]}" in card  # of the base itself, not of its class
    assert re.search(r"differed from their mean by [\d.]+ of 255 grey levels", card)
    assert f"Started from {kind}'s base (tuned by LoRA) (licence: " in card
    assert 'pipe.load_lora_weights("you/em-lora")' in card
    config = json.loads((out / "run.json").read_text())["config"]
    assert config["base"] == kind  # without its path
    assert (out / "denoiser" / "diffusion_pytorch_model.bf16.safetensors").exists()


STRANGER = """
import importlib.util, sys
sys.path += PACKAGES
assert not importlib.util.find_spec("em_stable_diffusion")
sys.modules["peft"] = None  # drawing needs none
import numpy as np, torch
from diffusers import DiffusionPipeline

def draw(repo, **options):
    pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True, **options)
    assert type(pipe).__module__.startswith("diffusers_modules.")
    pipe.set_progress_bar_config(disable=True)
    rngs = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe, pipe(2, generator=rngs, output_type="np").images

images = {}
pipe, images["main"] = draw("you/em-lora")
narrow, images["narrow"] = draw("you/em-lora", variant="bf16", torch_dtype=torch.bfloat16)
assert narrow.denoiser.dtype == narrow.vae.dtype == torch.bfloat16
pipe.push_to_hub("you/again")
_, images["again"] = draw("you/again")
np.savez("images.npz", **images)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_a_stranger_draws_the_owners_images(
    base_folders, make_config, hub, tmp_path, monkeypatch, kind
):
    """Over a real connection; the base comes from a repository of its own, at the commit of the
    training, even after that repository has changed.
    """
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    commit = push(base_folders[kind], "lab/base")
    config = replace(make_config(tmp_path / "run", kind, num_images=8), base="lab/base")
    run = train_lora(config)
    assert not (run / "pipeline" / "denoiser").exists()
    publish_run(PublishConfig(str(run), "you/em-lora", num_samples=2), say=lambda text: None)
    other = MAKERS[kind](tmp_path / "other", seed=1)
    assert push(other, "lab/base-2") != commit
    HfApi().upload_folder(repo_id="lab/base", folder_path=other)
    (run / "run.json").unlink()
    assert train_lora(config) == run  # ends again, with the base that it began with
    paths = hub.files("you/em-lora")
    assert not any(path.startswith(("denoiser/", "vae/")) for path in paths)
    card = hub.read("you/em-lora", "README.md").decode()
    assert f"(https://huggingface.co/lab/base) at the commit `{commit}`" in card
    assert "base_model: lab/base" in card
    expected = draw(EMLoRAPipeline.from_pretrained(run / "pipeline"), 0, 1)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", STRANGER.replace("PACKAGES", repr(packages))],
        cwd=tmp_path,
        env=make_environment(hub, tmp_path / "stranger", HF_TOKEN="write-token"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    images = np.load(tmp_path / "images.npz")
    for name in ("main", "again"):
        np.testing.assert_allclose(images[name], expected, atol=1e-6)
    assert np.abs(images["narrow"] - expected).max() < 0.1
    loaded = EMLoRAPipeline.from_pretrained("you/em-lora")
    np.testing.assert_allclose(draw(loaded, 0, 1), expected, atol=1e-6)
    by_diffusers = draw_by_diffusers(base_folders[kind], "you/em-lora", kind, guidance_scale=1.0)
    np.testing.assert_allclose(by_diffusers, expected, atol=1e-4)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained("you/em-lora")


def test_a_saved_model_names_no_folder_of_this_machine(runs, tmp_path):
    """A repository of others must not make this machine load a folder as its base."""
    pipeline = EMLoRAPipeline.from_pretrained(runs["stable-diffusion"] / "pipeline")
    for name in ("/etc/passwd", "../../other", None):
        pipeline.adapters.register_to_config(repository=name)
        with pytest.raises(ValueError, match="which is no repository on the Hub"):
            EMLoRAPipeline(pipeline.adapters, pipeline.prompts, pipeline.scheduler)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rank", 10**9, "rank is 1000000000, which is not possible"),
        ("rank", 5, "has the shape"),
        ("alpha", "large", 'alpha is "large", but must be of the type float'),
        ("layers", {"a": [2]}, "does not describe a EMAdapters"),
        ("layers", {"a.b": [4, 4]}, "lacks 2 of the weights"),
        ("base", "other", "base is 'other', but known are stable-diffusion, flux2-klein"),
    ],
)
def test_damaged_adapters_are_refused(runs, tmp_path, key, value, message):
    folder = tmp_path / "model"
    shutil.copytree(runs["stable-diffusion"] / "pipeline", folder)
    path = folder / "adapters" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_model(str(folder)).load()
