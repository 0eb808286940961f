"""Images larger than a tile: windows, seams, statistics, and independence of batches."""

import math
from unittest import mock

import numpy as np
import pytest
import torch

from em_diffusion import EMLatentDiffusionPipeline, em_windows
from em_diffusion import pipeline_em_ldm as code
from em_diffusion.drawing import LDMDrawer
from em_diffusion.em_grain import EMGrain
from em_diffusion.em_windows import (
    MAX_PIXELS,
    blend_windows,
    find_nearest_size,
    place_windows,
    weigh_windows,
)
from em_diffusion.family import LDMOptions
from em_diffusion.samplers import create_sampler, list_samplers
from em_evaluation.micrograph_statistics import ring_powers
from support.models import draw, make_ldm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and numpy 2


@pytest.fixture
def pipe():
    return make_ldm()


def rngs(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def seam(images, step, cell):
    """Mean difference across the borders of a grid, over that across other borders of cells."""
    ratios = []
    for each in (images, images.swapaxes(1, 2)):
        places = np.arange(cell, each.shape[2], cell)
        edges = np.abs(each[..., places] - each[..., places - 1]).mean((0, 1))
        ratios.append(edges[places % step == 0].mean() / edges[places % step != 0].mean())
    return np.mean(ratios)


# ------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("length", [8, 9, 11, 16, 45])
@pytest.mark.parametrize("shift", [0.0, 0.3, 0.99])
def test_windows_cover_all_and_overlap_by_half(length, shift):
    starts = place_windows(length, 8, shift)
    assert (starts[0], starts[-1]) == (0, length - 8)
    assert (np.diff(starts) <= 4).all()
    weights = weigh_windows(starts, length, 8, 2, "cpu")
    total = torch.zeros(2 * length)
    for start, each in weights.items():
        assert (each > 0).all()
        total[2 * start : 2 * start + 16] += each
    torch.testing.assert_close(total, torch.ones(2 * length))


def test_a_function_of_single_pixels_does_not_see_the_windows():
    inputs = torch.randn(2, 3, 13, 22)
    windows = [[place_windows(13, 8, s), place_windows(22, 6, s)] for s in (0.0, 0.6)]
    result = blend_windows(lambda x: x.square().sum(1, keepdim=True), inputs, windows, (8, 6), 5)
    torch.testing.assert_close(result, inputs.square().sum(1, keepdim=True))
    repeated = blend_windows(
        lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3), inputs, windows, (8, 6), 64
    )
    torch.testing.assert_close(
        repeated, inputs.repeat_interleave(2, 2).repeat_interleave(2, 3), rtol=1e-5, atol=1e-6
    )


def test_the_memory_is_bounded_by_the_batch_of_windows(pipe):
    sizes = []
    for model, name in ((pipe.unet, "forward"), (pipe.guide, "forward"), (pipe.vqvae, "decode")):
        real = getattr(model, name)

        def record(x, *arguments, real=real, **options):
            sizes.append(tuple(x.shape))
            return real(x, *arguments, **options)

        setattr(model, name, record)
    pipe(2, rngs(0, 1), height=64, width=48, window_batch_size=5)
    sizes.remove((1, 2, 1, 1))  # a cell, to learn its pixels
    assert {shape[1:] for shape in sizes} == {(2, 8, 8)}
    assert max(shape[0] for shape in sizes) == 5


# --------------------------------------------------------------------------------------- sizes


def test_a_tile_is_drawn_as_before(pipe):
    expected = draw(pipe, 3, 4)
    for size in ({"height": 16, "width": 16}, {"height": 16}, {"width": 16}):
        assert np.array_equal(draw(pipe, 3, 4, **size), expected)
    drawers = [LDMDrawer(pipe, LDMOptions(size=size)) for size in (None, "16", "16x16")]
    first, *others = [each.draw([0, 5]) for each in drawers]
    assert all(torch.equal(first, each) for each in others)
    assert all(each.describe() == drawers[0].describe() for each in drawers)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((17, 20), "16 x 20"),
        ((8, 40), "16 x 40"),
        ((2**20, 2**20), "8192 x 8192"),
        ((16, 2**30), f"16 x {MAX_PIXELS // 16}"),
        ((30.5, 16), "30 x 16"),
        ((-4, None), "16 x 16"),
    ],
)
def test_other_sizes_are_refused_before_any_work(pipe, size, nearest):
    with (
        mock.patch.object(pipe.unet, "forward", side_effect=AssertionError),
        pytest.raises(ValueError, match=rf"multiples of 2 x 2, .*nearest size is {nearest}\."),
    ):
        pipe(1, height=size[0], width=size[1])


def test_the_nearest_size_is_possible():
    generator = np.random.default_rng(0)
    for _ in range(200):
        asked = np.exp(generator.uniform(0, 25, 2))
        tile, factors = (64, 32), (8, 4)
        nearest = find_nearest_size(asked, tile, factors)
        assert math.prod(nearest) <= MAX_PIXELS
        assert all(n % f == 0 and n >= least for n, f, least in zip(nearest, factors, tile))


def test_latents_must_have_the_size_that_is_asked_for(pipe):
    noise = torch.randn(1, 2, 12, 20)
    image = pipe(latents=noise, height=24, width=40, output_type="np").images
    assert image.shape == (1, 24, 40, 1)
    with pytest.raises(ValueError, match="starts from"):
        pipe(latents=noise, height=40, width=24)


# -------------------------------------------------------------------------------- independence


def test_an_image_depends_on_its_generator_alone(pipe):
    options = {"height": 40, "width": 28}
    batch = draw(pipe, 5, 6, 7, **options)
    assert np.array_equal(draw(pipe, 6, **options)[0], batch[1])
    assert np.array_equal(draw(pipe, 7, 5, window_batch_size=33, **options), batch[[2, 0]])
    assert np.abs(batch[0] - batch[1]).max() > 0.1
    again = pipe(1, rngs(6)[0], output_type="np", **options).images
    assert np.array_equal(again[0], batch[1])


@pytest.mark.parametrize("name", list_samplers(make_ldm().scheduler))
def test_every_sampler_draws_whole_images(pipe, name):
    pipe.scheduler = create_sampler(name, pipe.scheduler)
    options = {"num_inference_steps": 4, "height": 24, "width": 32}
    pair = pipe.denoise(2, rngs(1, 2), **options)
    assert pair.shape == (2, 2, 12, 16)
    torch.testing.assert_close(pipe.denoise(1, rngs(2), **options), pair[1:], rtol=1e-4, atol=1e-4)
    assert pipe.decode(pair, rngs(1, 2)).shape == (2, 1, 24, 32)


def test_the_noise_of_a_step_is_that_of_the_whole_image(pipe):
    """With a U-Net of single pixels, DDPM's result is that of the whole image at once."""

    def forward(x, timestep):
        return mock.Mock(sample=0.3 * x)

    pipe.scheduler = create_sampler("ddpm", pipe.scheduler)
    pipe.unet.forward = pipe.guide.forward = forward
    noise, options = torch.randn(1, 2, 16, 24), {"height": 32, "width": 48}

    def denoise():
        return pipe.denoise(1, rngs(0), 5, latents=noise, **options)

    windows = denoise()
    with mock.patch.object(code, "blend_windows", lambda function, x, *rest: function(x)):
        torch.testing.assert_close(windows, denoise(), rtol=1e-4, atol=1e-5)


def test_guidance_holds_in_windows(pipe):
    class Mixture(torch.nn.Module):
        def __init__(self, unet, guide):
            super().__init__()
            self.unet, self.guide = unet, guide
            self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

        def forward(self, x, timestep):
            main, weak = (m(x, timestep).sample for m in (self.unet, self.guide))
            return mock.Mock(sample=2.5 * main - 1.5 * weak)

    options = {"height": 32, "width": 24}
    guided = pipe.denoise(1, rngs(0), guidance_scale=2.5, **options)
    assert not torch.allclose(guided, pipe.denoise(1, rngs(0), guidance_scale=1, **options))
    with mock.patch.object(pipe, "unet", Mixture(pipe.unet, pipe.guide)):
        alone = pipe.denoise(1, rngs(0), guidance_scale=1, **options)
    torch.testing.assert_close(guided, alone, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_near_float32(pipe):
    exact = draw(pipe, 0, height=40, width=40, add_grain=False)
    narrow = draw(pipe.to(torch.bfloat16), 0, height=40, width=40, add_grain=False)
    assert np.abs(exact - narrow).mean() < 0.02


def test_a_strangers_copy_draws_the_same(pipe, tmp_path):
    expected = draw(pipe, 3, height=24, width=24)
    pipe.save_pretrained(tmp_path)
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(loaded, 3, height=24, width=24), expected)


# ---------------------------------------------------------------------------------- statistics


class Convolutions(torch.nn.Module):
    """Two layers that see their border, since it is padded by zeros."""

    def __init__(self, num_inputs, num_outputs, gain):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(num_inputs, 16, 3, padding=1),
            torch.nn.Tanh(),
            torch.nn.Conv2d(16, num_outputs, 3, padding=1),
        )
        for each in self.layers[::2]:
            torch.nn.init.normal_(each.weight, std=gain)
        torch.nn.init.normal_(self.layers[0].bias)  # the padding of zeros has none
        torch.nn.init.zeros_(self.layers[2].bias)
        self.offset = 0.0
        self.offset = self(torch.zeros(1, num_inputs, 9, 9))[:, :, 4:5, 4:5]

    @torch.no_grad()
    def forward(self, x):
        return self.layers(x) - self.offset


@pytest.fixture(scope="module")
def bordered():
    """A model whose networks see the border of their input, but nothing from afar."""
    pipe = make_ldm()
    pipe.grain = None
    torch.manual_seed(0)
    denoise, decode = Convolutions(2, 2, 0.25), Convolutions(2, 1, 0.2)
    pipe.unet.forward = lambda x, timestep: mock.Mock(sample=0.5 * x + 0.5 * denoise(x))
    pipe.vqvae.decode = lambda x, **options: mock.Mock(
        sample=decode(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    )
    return pipe


def draw_many(pipe):
    options = {"height": 96, "width": 96, "guidance_scale": 1, "num_inference_steps": 6}
    return np.concatenate([draw(pipe, seed, **options) for seed in range(12)])[..., 0]


def test_there_are_no_seams(bordered):
    """Across borders of windows, 4 cells of 2 pixels apart, grey levels differ as elsewhere.

    The measure sees the seams of windows that do not overlap, and those of plain averages.
    """

    def side_by_side(length, window, shift=0.0):
        return sorted({min(start, length - window) for start in range(0, length, window)})

    def weigh_equally(starts, length, window, factor, device):
        count = torch.zeros(length)
        for start in starts:
            count[start : start + window] += 1
        return {
            start: 1 / count[start : start + window].repeat_interleave(factor) for start in starts
        }

    assert seam(draw_many(bordered), 8, 2) == pytest.approx(1, abs=0.05)
    with mock.patch.object(code, "place_windows", side_by_side):
        assert seam(draw_many(bordered), 16, 2) > 2
    with mock.patch.object(em_windows, "weigh_windows", weigh_equally):
        assert seam(draw_many(bordered), 8, 2) > 2


def test_the_place_of_the_grid_does_not_change_statistics(bordered):
    """Windows that are shifted by up to half a tile give other images of the same kind."""
    place, sets = code.place_windows, []
    for shift in (0.0, 0.5):
        with mock.patch.object(
            code, "place_windows", lambda n, window, _=0.0, shift=shift: place(n, window, shift)
        ):
            sets.append(draw_many(bordered))
    first, second = sets
    assert np.abs(first - second).max() > 0.02
    for statistic in (np.mean, np.std):
        assert statistic(first) == pytest.approx(statistic(second), rel=0.02)
    powers = [ring_powers(images * 255).mean(0) for images in sets]
    np.testing.assert_allclose(10 * np.log10(powers[0] / powers[1]), 0, atol=1)


def test_the_grain_of_a_whole_image_has_the_spectrum_of_a_tiles():
    grain = EMGrain(sample_size=(16, 16))
    rows, columns = torch.fft.fftfreq(16), torch.fft.rfftfreq(16)
    amplitude = torch.exp(-4 * torch.hypot(rows[:, None], columns))
    amplitude /= torch.fft.irfft2(amplitude, s=(16, 16)).square().sum().sqrt()
    grain.load_state_dict(
        grain.state_dict() | {"amplitude": amplitude, "deviations": torch.full((16,), 0.1)}
    )
    tiles = grain(torch.zeros(400, 1, 16, 16), torch.Generator().manual_seed(0))
    whole = grain(torch.zeros(20, 1, 80, 112), torch.Generator().manual_seed(1))
    assert whole.std() == pytest.approx(0.1, rel=0.02)
    cut = whole.unfold(2, 16, 16).unfold(3, 16, 16).reshape(-1, 16, 16)
    powers = [ring_powers(each.reshape(-1, 16, 16).numpy()).mean(0) for each in (tiles, cut)]
    np.testing.assert_allclose(powers[1] / powers[0], 1, atol=0.15)
    borders = (whole[..., 16::16] - whole[..., 15:-1:16]).std()
    assert borders == pytest.approx(whole.diff(dim=-1).std().item(), rel=0.03)
    # a multiple of a measured frequency keeps its amplitude
    torch.testing.assert_close(
        grain._find_amplitude((80, 112))[::5, ::7], amplitude, rtol=1e-3, atol=1e-4
    )


# ------------------------------------------------------------------------------------- drawer


def test_the_drawer_goes_on_with_fewer_windows_when_the_memory_is_full(pipe):
    expected = LDMDrawer(pipe, LDMOptions(size="40x24")).draw([3])
    said, real = [], pipe.unet.forward

    def forward(x, timestep):
        if len(x) > 6:
            raise torch.OutOfMemoryError("out of memory")
        return real(x, timestep)

    pipe.unet.forward = forward
    drawer = LDMDrawer(pipe, LDMOptions(size="40x24"), batch_size=24, say=said.append)
    torch.testing.assert_close(drawer.draw([3]), expected, rtol=1e-4, atol=1e-4)
    assert said[-1] == "out of memory: going on with --batch-size 6"


def test_small_images_are_drawn_several_at_once(pipe):
    fractions = []
    options = {"batch_size": 50, "on_progress": fractions.append}
    drawer = LDMDrawer(pipe, LDMOptions(size="24x32"), **options)
    assert drawer.images_at_once == 50 // 6  # 2 by 3 windows
    assert drawer.describe()["size"] == "24x32"
    assert drawer.draw([0, 1]).shape == (2, 1, 24, 32)
    assert fractions == pytest.approx([1 / 3, 2 / 3, 1])
    assert LDMDrawer(pipe, LDMOptions(size="1024"), batch_size=50).images_at_once == 1


@pytest.mark.parametrize("size", ["", "10a", "64x", "x64", "1e3", "64x64x64"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="give height x width in pixels, such as 1024x768"):
        LDMOptions(size=size)


def test_a_size_that_does_not_suit_the_model_names_the_flag(pipe):
    with pytest.raises(ValueError, match=r"--size is 31: .*nearest size is 32 x 32"):
        LDMDrawer(pipe, LDMOptions(size="31"))
