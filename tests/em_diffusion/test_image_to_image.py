"""Image to image: where the denoising starts, for every sampler, size and form of an image."""

import math

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

from em_diffusion.em_schedulers import is_flow
from em_diffusion.samplers import create_sampler, list_samplers
from em_training.em_grey_images import to_pixels
from support.models import make_ldm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and numpy 2
FLOW = diffusers.FlowMatchEulerDiscreteScheduler


@pytest.fixture
def pipe():
    return make_ldm()


def rngs(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pictures(num, height=16, width=16, seed=0):
    return torch.rand(num, 1, height, width, generator=torch.Generator().manual_seed(seed))


def levels(scheduler, timestep):
    """Factors of latents and noise at a timestep, as the model was trained."""
    t = float(timestep)
    if is_flow(scheduler):
        return 1 - t / 1000, t / 1000
    abar = 1 / (1 + np.exp(-np.interp(t, range(1000), scheduler.alphas_cumprod.logit().numpy())))
    return math.sqrt(abar), math.sqrt(1 - abar)


class GaussianAnswer:
    """The best prediction for latents that are independent and normal: mean 0.7, deviation 0.4."""

    mean, std = 0.7, 0.4

    def __init__(self, scheduler):
        self.scheduler, self.seen = scheduler, []

    def __call__(self, x, timestep):
        a, b = levels(self.scheduler, timestep)
        self.seen.append((float(timestep), x))
        centred = (x - a * self.mean) / (a**2 * self.std**2 + b**2)
        noise, latents = b * centred, self.mean + a * self.std**2 * centred
        output = noise - latents if is_flow(self.scheduler) else noise
        return type("Output", (), {"sample": output.float()})


@pytest.mark.parametrize("flow", [False, True])
def test_every_sampler_starts_at_the_noise_of_its_step_and_solves_the_rest(pipe, flow):
    """Where the answer is known: x = a z + b n leads to mean + std (x - a mean) / deviation(x)."""
    base = FLOW(shift=1.0) if flow else pipe.scheduler
    image, noise = pictures(2), torch.randn(2, 2, 8, 8, generator=rngs(1)[0])
    encoded = pipe.normalise_latents(pipe.encode(image * 2 - 1))
    for name in list_samplers(base):
        pipe.scheduler = create_sampler(name, base)
        answer = pipe.unet.forward = GaussianAnswer(base)
        options = {"latents": noise, "num_inference_steps": 40, "guidance_scale": 1}
        found = pipe.denoise(2, rngs(0, 1), **options, image=image, strength=0.4)
        a, b = levels(base, answer.seen[0][0])
        start = a * encoded + b * noise
        assert (answer.seen[0][1] - start).abs().max() < 0.005, name  # rounded timesteps
        assert len({timestep for timestep, _ in answer.seen}) == 16, name
        if name in ("ddpm", "dpm-solver++-sde"):
            continue  # they add noise on the way
        spread = math.sqrt(a**2 * answer.std**2 + b**2)
        expected = answer.mean + answer.std * (start - a * answer.mean) / spread
        error = (pipe.normalise_latents(found) - expected).square().mean().sqrt() / answer.std
        assert error < 0.16, (name, float(error))


def test_other_schedulers_of_diffusers_start_there_too_or_refuse(pipe):
    """All that the pipeline accepts, by the same Gaussian answer."""
    base, image = pipe.scheduler, pictures(1)
    noise = torch.randn(1, 2, 8, 8, generator=rngs(1)[0])
    encoded = pipe.normalise_latents(pipe.encode(image * 2 - 1))
    num_accepted = 0
    for name in dir(diffusers):
        if not name.endswith("Scheduler") or "SDE" in name:  # those need torchsde
            continue
        try:
            pipe.scheduler = getattr(diffusers, name).from_config(base.config)
            pipe.unet.forward = GaussianAnswer(base)
            pipe.denoise(1, rngs(0), 12, latents=noise, guidance_scale=1)
        except Exception:
            continue  # not for such models, without an image either
        answer = pipe.unet.forward = GaussianAnswer(base)
        options = {"latents": noise, "guidance_scale": 1, "image": image, "strength": 0.5}
        if "PNDM" in name:
            with pytest.raises(ValueError, match="PNDMScheduler cannot start from an image"):
                pipe.denoise(1, rngs(0), 12, **options)
            continue
        pipe.denoise(1, rngs(0), 12, **options)
        a, b = levels(base, answer.seen[0][0])
        start = a * encoded + b * noise
        assert (answer.seen[0][1] - start).abs().max() < 0.02, name
        num_accepted += 1
    assert num_accepted > 10


@pytest.mark.parametrize("flow", [False, True])
def test_strength_goes_from_the_reconstruction_to_pure_noise(pipe, flow):
    pipe.scheduler = FLOW() if flow else pipe.scheduler
    image = pictures(2)
    options = {"num_inference_steps": 10, "image": image}
    kept = pipe.denoise(generator=rngs(0, 1), strength=0, **options)
    torch.testing.assert_close(kept, pipe.encode(image * 2 - 1))
    assert pipe.num_timesteps == 0
    pure = pipe.denoise(2, rngs(0, 1), 10)
    all_steps = pipe.denoise(generator=rngs(0, 1), strength=1, **options)
    assert (all_steps - pure).abs().mean() < 0.15 * (kept - pure).abs().mean()
    for strength, num_steps in ((0.01, 1), (0.3, 3), (0.31, 4), (0.57, 6), (0.7, 7), (1, 10)):
        pipe.denoise(generator=rngs(0, 1), strength=strength, **options)
        assert pipe.num_timesteps == num_steps, strength
    pipe.denoise(generator=rngs(0, 1), **options)
    assert pipe.num_timesteps == 5


@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
def test_an_image_depends_on_its_picture_and_generator_alone(pipe, size):
    images = pictures(3, *size)
    pipe.scheduler = create_sampler("ddpm", pipe.scheduler)
    options = {"num_inference_steps": 4, "output_type": "pt"}
    batch = pipe(generator=rngs(5, 6, 7), image=images, **options).images
    assert batch.shape == (3, 1, *size)
    swapped = pipe(generator=rngs(7, 5), image=images[[2, 0]], **options).images
    alone = pipe(generator=rngs(6), image=images[1:2], **options).images
    torch.testing.assert_close(batch[[2, 0]], swapped, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch[[1]], alone, rtol=1e-4, atol=1e-4)
    assert (batch[0] - batch[1]).abs().max() > 0.1
    variations = pipe(2, rngs(6, 7), image=images[1], **options).images
    torch.testing.assert_close(variations[:1], alone, rtol=1e-4, atol=1e-4)
    assert (variations[0] - variations[1]).abs().max() > 0.01


def test_large_images_are_encoded_in_windows(pipe):
    """Where all windows see the same, the latents are those of a tile; the centre, too."""
    flat = torch.full((1, 1, 16, 16), 0.3)
    tile = pipe.encode(flat)
    whole = pipe.encode(flat.repeat(1, 1, 2, 3))
    assert whole.shape == (1, 2, 16, 24)
    torch.testing.assert_close(whole[..., :4, :4], tile[..., :4, :4], rtol=1e-4, atol=1e-4)
    images = pictures(1, 32, 32) * 2 - 1
    difference = pipe.encode(images)[..., 4:12, 4:12] - pipe.encode(images[..., 8:24, 8:24])
    assert difference[..., 3:5, 3:5].abs().mean() < 0.3 * pipe.encode(images).std()
    again = pipe.encode(images, window_batch_size=2)
    torch.testing.assert_close(again, pipe.encode(images), rtol=1e-4, atol=1e-4)


def test_guidance_keeps_its_steps(pipe):
    """The interval of guidance is one of noise levels, so an image does not move it."""
    calls = []
    guide = pipe.guide.forward
    pipe.guide.forward = lambda x, t: calls.append(int(t)) or guide(x, t)
    options = {"guidance_scale": 2.0, "guidance_start": 0.5, "guidance_stop": 0.8}
    pipe.denoise(1, rngs(0), 10, **options)
    whole = calls.copy()
    calls.clear()
    pipe.denoise(1, rngs(0), 10, **options, image=pictures(1), strength=0.4)
    assert calls == [t for t in whole if t < 400]


def test_all_forms_of_an_image_are_one_image():
    grey = np.random.default_rng(0).integers(0, 256, (12, 16), np.uint8)
    expected = torch.from_numpy(grey / np.float32(127.5) - 1)[None, None]
    picture = PIL.Image.fromarray(grey)
    deep = grey.astype(np.uint16) * 257
    unit = grey / 255
    forms = [
        picture,
        picture.convert("RGB"),
        PIL.Image.fromarray(deep),
        PIL.Image.fromarray(deep.astype(np.int32)),
        grey,
        grey[..., None],
        deep,
        unit,
        unit[None, ..., None],
        unit[None],
        torch.from_numpy(grey),
        torch.from_numpy(unit)[None],
        torch.from_numpy(unit)[None, None].to(torch.bfloat16),
        [picture],
    ]
    for form in forms:
        atol = 0.02 if getattr(form, "dtype", None) == torch.bfloat16 else 1e-6
        torch.testing.assert_close(to_pixels(form), expected, rtol=0, atol=atol)
    assert to_pixels([picture, grey, unit]).shape == (3, 1, 12, 16)


def test_what_the_pipeline_draws_it_also_takes(pipe):
    drawn = {kind: pipe(2, rngs(0, 1), output_type=kind).images for kind in ("pt", "np", "pil")}
    pixels = {kind: to_pixels(images) for kind, images in drawn.items()}
    torch.testing.assert_close(pixels["np"], pixels["pt"])
    torch.testing.assert_close(pixels["pil"], pixels["pt"], rtol=0, atol=0.005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.5}, "there is no `image`"),
        ({"image": pictures(1), "strength": 1.5}, "`strength` is 1.5; it must be from 0 to 1"),
        ({"image": pictures(1), "strength": math.nan}, "from 0 to 1"),
        ({"image": pictures(2), "batch_size": 3}, "2 images for a `batch_size` of 3"),
        ({"image": pictures(2), "generator": rngs(0)}, "1 generators for 2 images"),
        ({"image": pictures(1) * 2 - 1}, r"must be in \[0, 1\]; put images in \[-1, 1\] there"),
        ({"image": pictures(1) * math.nan}, "values from nan to nan"),
        ({"image": pictures(1).expand(1, 3, 16, 16)}, "does not hold grey images"),
        ({"image": np.zeros((16, 16, 3))[None]}, "does not hold grey images"),
        ({"image": PIL.Image.new("RGB", (16, 16), "red")}, "has colours"),
        ({"image": torch.zeros(0, 1, 16, 16)}, "does not hold grey images"),
        ({"image": "cat.png"}, "is a str; give a PIL image"),
        ({"image": [pictures(1), pictures(1, 18)]}, r"sizes 16 x 16, 18 x 16"),
        ({"image": pictures(1), "height": 32}, "`height` is 32, but the images have 16"),
        ({"image": pictures(1, 17, 20)}, "The nearest size is 16 x 20"),
    ],
)
def test_mistakes_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_bfloat16_is_near_float32(pipe):
    options = {"image": pictures(2), "num_inference_steps": 8, "output_type": "pt"}
    exact = pipe(generator=rngs(0, 1), **options).images
    narrow = pipe.to(torch.bfloat16)(generator=rngs(0, 1), **options).images
    assert (exact - narrow).abs().mean() < 0.05
