"""Guidance by a weaker U-Net: the pipeline, the snapshot that training keeps, and the command."""

import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import PipelineCallback

from em_diffusion import PRESETS, EMLatentDiffusionPipeline, choose_guidance, train_ldm
from em_diffusion.choose_guidance import GuidanceConfig, format_scales
from em_diffusion.denoiser import load_denoiser
from em_diffusion.drawing import LDMDrawer
from em_diffusion.family import LDMOptions, list_controls
from em_diffusion.samplers import SAMPLERS, create_sampler, list_samplers
from em_generation.sampling import draw_images
from em_training import config_to_json
from em_training.weights import hash_weights
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


DIFFUSION, FLOW = DDIMScheduler(clip_sample=False), FlowMatchEulerDiscreteScheduler()
CASES = [(base, name) for base in (DIFFUSION, FLOW) for name in list_samplers(base)]


@pytest.mark.parametrize(
    ("base", "sampler"), CASES, ids=[f"{type(base).__name__[:4]} {name}" for base, name in CASES]
)
def test_the_prediction_is_guided_with_every_sampler(pipe, base, sampler):
    assert {name for _, name in CASES} == set(SAMPLERS)
    pipe.scheduler = create_sampler(sampler, base)
    guided = denoise(pipe, guidance_scale=2.5)
    assert not torch.allclose(guided, denoise(pipe), atol=1e-2)
    assert torch.equal(denoise(pipe, guidance_scale=2.5), guided)
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


def test_bfloat16_is_near_float32(pipe):
    """The difference of the two predictions, which the scale multiplies, is taken in float32."""
    exact = denoise(pipe, num_inference_steps=8, guidance_scale=2)
    pipe.to(torch.bfloat16)
    assert pipe.guide.dtype == torch.bfloat16
    narrow = denoise(pipe, num_inference_steps=8, guidance_scale=2)
    assert narrow.dtype == torch.float32
    assert (exact - narrow).abs().mean() < 0.2 * (exact - exact.flip(0)).abs().mean()


def test_offloaded_models_are_guided(pipe):
    """On the CPU as the device: the hooks are the accelerator's, the journey is none."""
    options = {"guidance_scale": 2, "output_type": "np"}
    expected = pipe(2, [torch.Generator().manual_seed(seed) for seed in (3, 4)], **options).images
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the first call takes the hooks off and puts them on again
        hook = pipe.guide._hf_hook
        with mock.patch.object(hook, "pre_forward", wraps=hook.pre_forward) as bring:
            rngs = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
            np.testing.assert_allclose(pipe(2, rngs, **options).images, expected, atol=1e-6)
        assert bring.call_count == pipe.num_timesteps


def test_diffusers_callbacks_find_the_number_of_steps(pipe):
    """A callback that ends the guidance after half of the steps, as diffusers' own cut theirs."""

    class Cutoff(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            seen.append(pipeline.num_timesteps)
            if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
                pipeline._interrupt = True
            return callback_kwargs

    for sampler, number in (("ddim", 6), ("heun", 11)):  # Heun's method steps twice, but once last
        seen: list[int] = []
        pipe.scheduler = create_sampler(sampler, DIFFUSION)
        cutoff = Cutoff(cutoff_step_ratio=0.5, cutoff_step_index=None)
        options = {"num_inference_steps": 6, "guidance_scale": 2}
        denoise(pipe, **options, callback_on_step_end=cutoff)
        assert seen == [number] * (number // 2 + 1)


@pytest.mark.parametrize("fails", [False, True], ids=["enough memory", "memory full"])
def test_guided_images_drawn_in_parts_are_the_same(pipe, fails):
    """Smaller batches, asked for or after a full memory, give the images of one large batch."""
    options = LDMOptions(guidance_scale=2.0, guidance_start=0.25, decode_batch_size=1)
    drawer = LDMDrawer(pipe, options, seed=5, batch_size=5, say=lambda line: None)
    whole = drawer.draw(list(range(5)))
    drawn, forward = {}, pipe.guide.forward

    def run_out_of_memory(latents, timestep):
        if fails and len(latents) > 16:
            raise torch.OutOfMemoryError("out of memory")
        return forward(latents, timestep)

    def write(numbers, images):
        drawn.update(zip(numbers, images, strict=True))
        return len(images)

    with mock.patch.object(pipe.guide, "forward", run_out_of_memory):
        size = draw_images(
            drawer, range(40), write, batch_size=40 if fails else 3, say=lambda line: None
        )
    assert size <= 20
    assert sorted(drawn) == list(range(40))
    torch.testing.assert_close(torch.stack([drawn[i] for i in range(5)]), whole, atol=1e-5, rtol=0)


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
    config = GuidanceConfig(
        run=str(run),
        scales=(1.0, 2.0),
        intervals=("0:1", "0.4:0.8"),
        num_images=24,
        batch_size=8,
    )
    result = choose_guidance.choose_guidance(config)
    names = ("scale", "start", "stop")
    distances = {
        tuple(each[name] for name in names): each["frechet_distance"]["value"]
        for each in result["scales"]
    }
    assert list(distances) == [(1, 0, 1), (2, 0, 1), (2, 0.4, 0.8)]
    assert len(set(distances.values())) == 3
    best = min(distances, key=distances.get)
    pipe = EMLatentDiffusionPipeline.from_pretrained(run / "pipeline")
    assert tuple(result[f"guidance_{name}"] for name in names) == best
    assert tuple(pipe.config[f"guidance_{name}"] for name in names) == best
    assert (pipe.guide is None) == (best[0] == 1)
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
    arms = [(1, 0, 1), (3, 0, 1), (3, 0.5, 1)]
    plain, guided, late = (choose_guidance.generate(pipe, arm, 6, config) for arm in arms)
    assert plain.levels.shape == guided.levels.shape == (6, 1, 32, 32)
    assert not np.array_equal(plain.levels, guided.levels)
    assert not np.array_equal(late.levels, guided.levels)
    assert np.array_equal(choose_guidance.generate(pipe, arms[1], 6, config).levels, guided.levels)


def test_runs_without_a_guide_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        choose_guidance.choose_guidance(GuidanceConfig(run=str(tmp_path)))
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text(config_to_json(make_config(tmp_path)))
    with pytest.raises(ValueError, match=r"kept no guide.*--denoiser\.guide-images"):
        choose_guidance.choose_guidance(GuidanceConfig(run=str(tmp_path)))
    with pytest.raises(ValueError, match="--scales"):
        GuidanceConfig(run=str(run), scales=(float("nan"),))


@pytest.mark.parametrize("text", ["0.5", "0.8:0.2", "0:1.5", "a:b", "0.5:0.5", "0:nan"])
def test_impossible_intervals_are_refused(text):
    with pytest.raises(ValueError, match=f"--intervals has {text}, but takes START:STOP"):
        GuidanceConfig(run="run", intervals=(text,))


def test_every_scale_is_tried_in_every_interval():
    config = GuidanceConfig(run="run", scales=(2, 1, 1.5), intervals=("0:1", "0.2:0.8"))
    assert config.list_arms() == [
        (1, 0, 1), (1.5, 0, 1), (1.5, 0.2, 0.8), (2, 0, 1), (2, 0.2, 0.8),
    ]  # fmt: skip
    assert GuidanceConfig(run="run", scales=(1, 2)).list_arms() == [(1, 0, 1), (2, 0, 1)]


def test_measurements_of_before_count_for_all_steps(tmp_path):
    content = {"protocol": {"seed": 0}, "scales": [{"scale": 2.0, "recall": {"value": 0.5}}]}
    (tmp_path / "guidance.json").write_text(json.dumps(content))
    path = tmp_path / "guidance.json"
    before = choose_guidance.read_measured(path, {"seed": 0})
    assert before == {(2, 0, 1): {"recall": {"value": 0.5}}}
    assert choose_guidance.read_measured(path, {"seed": 1}) == {}


def test_the_table_marks_the_smallest_distance(tmp_path):
    def interval(value):
        return {"value": value, "low": value - 10, "high": value + 10}

    tried = {
        (1.0, 0.0, 1.0): {"frechet_distance": interval(138.0), "recall": interval(0.21)},
        (2.0, 0.0, 1.0): {"frechet_distance": interval(120.0), "recall": interval(0.32)},
        (2.0, 0.2, 0.8): {"frechet_distance": interval(112.0), "recall": interval(0.35)},
    }
    lines = format_scales(tried, (2.0, 0.2, 0.8)).splitlines()
    assert lines[-1].split()[:6] == ["2", "0.2:0.8", "112", "(102", "to", "122)"]
    assert lines[-1].endswith("smallest distance")
    assert lines[-3].split()[:3] == ["1", "-", "138"]
    assert not any("smallest" in line for line in lines[:-1])
    choose_guidance.draw_scales(tried, (2.0, 0.2, 0.8), tmp_path / "guidance.png")
    assert (tmp_path / "guidance.png").stat().st_size > 5000
