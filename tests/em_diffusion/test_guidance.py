"""Guidance by a weaker U-Net: the pipeline, the snapshot that training keeps, and the command."""

import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler

from em_diffusion import PRESETS, EMLatentDiffusionPipeline, choose_guidance, train_ldm
from em_diffusion.choose_guidance import GuidanceConfig, format_scales
from em_diffusion.denoiser import load_denoiser
from em_diffusion.drawing import LDMDrawer
from em_diffusion.family import LDMOptions, list_controls
from em_diffusion.weights import hash_weights
from em_training import config_to_json
from support.models import make_ldm


@pytest.fixture
def pipe():
    """A tiny pipeline whose guide is another U-Net of the same shape; it has no grain."""
    pipe = make_ldm()
    pipe.grain = None
    pipe.register_to_config(guidance_scale=1.0)
    return pipe


def denoise(pipe, **options):
    return pipe.denoise(2, [torch.Generator().manual_seed(seed) for seed in (3, 4)], **options)


class Mixture(torch.nn.Module):
    """The guided prediction as one U-Net, by its definition."""

    def __init__(self, unet, guide, scale):
        super().__init__()
        self.unet, self.guide, self.scale = unet, guide, scale
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, latents, timestep):
        main, guide = (m(latents, timestep).sample for m in (self.unet, self.guide))
        return mock.Mock(sample=(1 - self.scale) * guide + self.scale * main)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, HeunDiscreteScheduler])
def test_the_prediction_is_guided(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    guided = denoise(pipe, guidance_scale=2.5)
    assert not torch.allclose(guided, denoise(pipe), atol=1e-2)
    with mock.patch.object(pipe, "unet", Mixture(pipe.unet, pipe.guide, 2.5)):
        torch.testing.assert_close(guided, denoise(pipe), atol=1e-4, rtol=1e-4)


def test_scale_1_does_not_call_the_guide(pipe):
    with mock.patch.object(pipe.guide, "forward", side_effect=AssertionError):
        guided = denoise(pipe, guidance_scale=1)
    pipe.guide = None
    assert torch.equal(guided, denoise(pipe))


@pytest.mark.parametrize(
    ("start", "stop", "num_calls"), [(0, 1, 8), (0.25, 0.75, 4), (0.5, 0.5, 0)]
)
def test_only_the_steps_of_the_interval_are_guided(pipe, start, stop, num_calls):
    with mock.patch.object(pipe.guide, "forward", wraps=pipe.guide.forward) as forward:
        options = {"guidance_start": start, "guidance_stop": stop}
        denoise(pipe, num_inference_steps=8, guidance_scale=2, **options)
    assert forward.call_count == num_calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale` is nan"),
        ({"guidance_start": 0.6, "guidance_stop": 0.5}, "rising fractions"),
        ({"guidance_stop": 1.5}, "rising fractions"),
    ],
)
def test_impossible_guidance_is_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        denoise(pipe, **options)


def test_guidance_without_a_guide_is_refused(pipe):
    pipe.guide = None
    with pytest.raises(ValueError, match="has no guide"):
        denoise(pipe, guidance_scale=2)
    with pytest.raises(ValueError, match=r"--guidance-scale is 2.*choose_guidance RUN"):
        LDMDrawer(pipe, LDMOptions(guidance_scale=2.0), say=print)


def test_guide_and_scale_are_saved(pipe, tmp_path):
    pipe.register_to_config(guidance_scale=2.0, guidance_stop=0.5)
    expected = denoise(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.config.guidance_scale, loaded.config.guidance_stop) == (2.0, 0.5)
    assert torch.equal(denoise(loaded), expected)
    assert not torch.allclose(denoise(loaded, guidance_scale=1), expected)


def test_a_pipeline_of_before_has_no_guide(pipe, tmp_path):
    pipe.guide = None
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    for name in ("guide", "guidance_scale", "guidance_start", "guidance_stop"):
        index.pop(name)
    path.write_text(json.dumps(index))
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.guide is None
    assert torch.equal(denoise(loaded), denoise(pipe))


def test_a_guided_image_depends_on_its_number_alone(pipe):
    options = LDMOptions(guidance_scale=2.0, guidance_stop=0.75)
    drawer = LDMDrawer(pipe, options, seed=5, batch_size=3, say=print)
    together = drawer.draw([0, 1, 2])
    assert torch.equal(together[1:2], drawer.draw([1]))
    assert drawer.describe()["guidance_scale"] == 2.0
    assert drawer.describe()["guidance_stop"] == 0.75
    assert "guidance_scale" not in LDMDrawer(pipe, LDMOptions(), say=print).describe()


def test_the_demo_offers_guidance_where_there_is_a_guide(pipe):
    assert "guidance_scale" in [control.name for control in list_controls(pipe)]
    pipe.guide = None
    assert "guidance_scale" not in [control.name for control in list_controls(pipe)]


def make_config(out, **denoiser):
    """The test preset at a constant learning rate."""
    config = PRESETS["test"]()
    denoiser = dataclasses.replace(config.denoiser, learning_rate_decay="constant", **denoiser)
    return dataclasses.replace(config, out=str(out), precision="no", denoiser=denoiser)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of 64 images, with a guide after 16."""
    out = tmp_path_factory.mktemp("guidance") / "ldm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out.parent / "cache"))
        yield train_ldm(make_config(out))


def test_the_guide_is_the_average_of_that_moment(run, tmp_path):
    short = train_ldm(make_config(tmp_path / "ldm", num_images=16, guide_images=0))
    guide = load_denoiser(run / "denoiser" / "guide")
    assert hash_weights(guide) == hash_weights(load_denoiser(short / "denoiser" / "unet"))
    assert not (short / "denoiser" / "guide").exists()
    pipe = EMLatentDiffusionPipeline.from_pretrained(run / "pipeline")
    assert pipe.guide is None


def test_the_scale_is_chosen_and_stored(run, tmp_path, capsys):
    saved = json.loads((run / "config.json").read_text())
    saved["tiles"]["cache_dir"] = str(tmp_path / "elsewhere")  # a run of others names no folder
    (run / "config.json").write_text(json.dumps(saved))
    config = GuidanceConfig(run=str(run), scales=(1.0, 2.0), num_images=24, batch_size=8)
    result = choose_guidance.choose_guidance(config)
    distances = {each["scale"]: each["frechet_distance"]["value"] for each in result["scales"]}
    best = min(distances, key=distances.get)
    pipe = EMLatentDiffusionPipeline.from_pretrained(run / "pipeline")
    assert pipe.config.guidance_scale == result["guidance_scale"] == best
    assert (pipe.guide is None) == (best == 1)
    assert json.loads((run / "guidance.json").read_text()) == result
    assert (run / "guidance.png").stat().st_size > 5000
    assert not (tmp_path / "elsewhere").exists()
    assert f"{run / 'pipeline'} now" in capsys.readouterr().out
    with mock.patch.object(choose_guidance, "generate", side_effect=AssertionError):
        again = choose_guidance.choose_guidance(config)
    assert again["scales"] == result["scales"]


def test_the_images_of_a_scale_differ_in_guidance_alone(run):
    pipe = EMLatentDiffusionPipeline.from_pretrained(run / "pipeline")
    pipe.guide = load_denoiser(run / "denoiser" / "guide")
    pipe.set_progress_bar_config(disable=True)
    config = GuidanceConfig(run=str(run), batch_size=4)
    plain, guided = (choose_guidance.generate(pipe, scale, 6, config) for scale in (1, 3))
    assert plain.levels.shape == guided.levels.shape == (6, 1, 32, 32)
    assert not np.array_equal(plain.levels, guided.levels)
    assert np.array_equal(choose_guidance.generate(pipe, 3, 6, config).levels, guided.levels)


def test_runs_without_a_guide_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        choose_guidance.choose_guidance(GuidanceConfig(run=str(tmp_path)))
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text(config_to_json(make_config(tmp_path)))
    with pytest.raises(ValueError, match=r"kept no guide.*--denoiser\.guide-images"):
        choose_guidance.choose_guidance(GuidanceConfig(run=str(tmp_path)))
    with pytest.raises(ValueError, match="--scales"):
        GuidanceConfig(run=str(run), scales=(float("nan"),))


def test_the_table_marks_the_smallest_distance():
    def interval(value):
        return {"value": value, "low": value - 10, "high": value + 10}

    scales = [
        {"scale": 1.0, "frechet_distance": interval(138.0), "recall": interval(0.21)},
        {"scale": 2.0, "frechet_distance": interval(112.0), "recall": interval(0.32)},
    ]
    lines = format_scales(scales, 2.0).splitlines()
    assert lines[-1].split()[:5] == ["2", "112", "(102", "to", "122)"]
    assert lines[-1].endswith("smallest distance")
    assert "smallest" not in lines[-2]
