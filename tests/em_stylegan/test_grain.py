"""Grain in place of hatching, images of unit variance, and noise that is there from the start."""

import json
from dataclasses import replace

import pytest
import torch

from em_stylegan.config import GeneratorConfig, StyleGANConfig
from em_stylegan.discriminator import StyleGANDiscriminator
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.grain import (
    measure_grain,
    read_tiles,
    reduce_images,
    set_grain,
    set_grain_of_tiles,
)
from em_stylegan.networks import create_networks, measure_scale
from em_stylegan.pictures.projection import ProjectionConfig, project
from em_stylegan.presets import PRESETS
from em_stylegan.train import settle_scale, train_gan

SIZES = {"z_dim": 8, "w_dim": 8, "mapping_depth": 2, "channel_base": 128, "max_channels": 8}


def create_generator(seed=0, **options):
    torch.manual_seed(seed)
    return StyleGAN2Generator(32, **SIZES, **options)


def share_of_fine_power(images):
    """Return the share of the power beyond 0.35 cycles per pixel."""
    power = torch.fft.fft2(images - images.mean(dim=(2, 3), keepdim=True)).abs().square().mean(0)[0]
    frequency = torch.fft.fftfreq(images.shape[-1])
    return float(power[torch.hypot(frequency[:, None], frequency) > 0.35].sum() / power.sum())


def draw_noisy(num=200, deviation=0.1, spread=0.2, size=32):
    """Return smooth images plus white noise whose strength varies log-normally."""
    rng = torch.Generator().manual_seed(1)
    smooth = torch.nn.functional.interpolate(
        torch.randn(num, 1, 4, 4, generator=rng), size=(size, size), mode="bicubic"
    )
    strength = (spread * torch.randn(num, 1, 1, 1, generator=rng)).exp()
    return smooth + deviation * strength * torch.randn(smooth.shape, generator=rng)


def test_gradient_of_a_noise_strength_vanishes_at_zero_in_the_mean():
    """At 0 the gradients of a noise and of its negative cancel, so that strengths drift at random.

    With a strength from the start they do not.
    """
    for strength, cancels in ((0.0, True), (0.2, False)):
        model = create_generator(noise_strength=strength).double()
        z, weight = torch.randn(4, 8).double(), torch.randn(4, 1, 32, 32).double()
        noises = [m for name, m in model.named_buffers() if name.endswith("noise_const")]
        strengths = [p for n, p in model.named_parameters() if n.endswith("noise_strength")]
        assert all(float(each.detach()) == pytest.approx(strength) for each in strengths)
        total = torch.zeros(len(strengths)).double()
        sizes = total.clone()
        for _ in range(2):
            loss = (model(z, noise_mode="const") * weight).sum()
            # one at a time, so that the other layers' noise stays as it is
            gradients = torch.stack(torch.autograd.grad(loss, strengths))
            total, sizes = total + gradients, sizes + gradients.abs()
            for noise in noises:
                noise.neg_()
        assert (sizes > 0).all()
        assert bool((total.abs() < 1e-9 * sizes).all()) == cancels


def test_images_are_scaled_from_unit_variance():
    plain, scaled = create_generator(), create_generator(image_mean=0.1, image_std=0.25)
    z = torch.randn(3, 8)
    images = [model(z, noise_mode="const") for model in (plain, scaled)]
    torch.testing.assert_close(images[1], images[0] * 0.25 + 0.1)
    judges = []
    for options in ({}, {"image_mean": 0.1, "image_std": 0.25}):
        torch.manual_seed(0)
        judges.append(StyleGANDiscriminator(32, channel_base=128, max_channels=8, **options))
    torch.testing.assert_close(judges[1](images[1]), judges[0](images[0]))


def test_reduced_generator_cannot_draw_a_hatching_and_gets_grain():
    """Finer than half the side, images hold the measured grain and nothing of the layers."""
    reduced, real = create_generator(reduction=2), draw_noisy()
    z, white = torch.randn(50, 8), torch.randn(50, 1, 16, 16)  # white: any hatching of the layers
    assert share_of_fine_power(torch.randn(50, 1, 32, 32)) > 0.5
    assert share_of_fine_power(reduced.finish(white, "none", None)) < 0.05
    assert reduced.draw(reduced.mapping(z)).shape == (50, 1, 16, 16)
    set_grain(reduced, real)
    rngs = [torch.Generator().manual_seed(i) for i in range(50)]
    smooth = reduced.finish(torch.zeros(50, 1, 16, 16), "none", None)
    grain = reduced.finish(torch.zeros(50, 1, 16, 16), "random", rngs) - smooth
    lacking = real - torch.nn.functional.interpolate(
        reduce_images(real, 2), scale_factor=2, mode="bicubic"
    )
    assert float(grain.std() / lacking.std()) == pytest.approx(1, abs=0.1)
    spectrum = torch.fft.rfft2(grain[:, 0]).abs().square().mean(0)
    assert float(spectrum[16].mean() / spectrum[:, 16].mean()) == pytest.approx(1, abs=0.25)


def test_grain_of_an_image_depends_on_its_own_generator():
    model = create_generator(reduction=2).eval()
    set_grain(model, draw_noisy())
    z = torch.randn(3, 8)
    with torch.no_grad():
        images, again = (
            model(z[rows], generator=[torch.Generator().manual_seed(i) for i in rows])
            for rows in ([0, 1, 2], [1, 2])
        )
    torch.testing.assert_close(again, images[1:], rtol=0, atol=1e-5)


def test_measured_grain_of_white_noise():
    amplitude, strength = measure_grain(draw_noisy(deviation=0.1, spread=0.2, num=1000), 2)
    assert amplitude.shape == (32, 17)
    assert float(amplitude[12, 12]) == pytest.approx(0.1, rel=0.1)
    assert float(amplitude[:2, :2].max()) < 0.06
    assert float(strength[1]) == pytest.approx(0.2, abs=0.03)
    flat = measure_grain(torch.full((4, 1, 32, 32), 0.3), 2)
    assert float(flat[0].max()) < 1e-5
    assert torch.isfinite(flat[1]).all()


def configure(tmp_path, name="run", **options):
    config = PRESETS["test"]()
    generator = replace(config.generator, image_mean=None, image_std=None, reduction=2)
    tiles = replace(config.tiles, cache_dir=str(tmp_path / "cache"))
    return replace(config, out=str(tmp_path / name), tiles=tiles, generator=generator, **options)


def test_training_measures_scale_and_grain_once(tmp_path, capsys):
    config = configure(tmp_path)
    out = train_gan(config)
    saved = json.loads((out / "config.json").read_text())["generator"]
    assert -1 < saved["image_mean"] < 1
    assert 0.02 < saved["image_std"] < 0.6
    untrained, trained = (
        StyleGAN2Generator.from_pretrained(out / name / "generator")
        for name in ("untrained", "pipeline")
    )
    assert trained.config.image_std == saved["image_std"]
    assert trained.grain_amplitude.max() > 0
    assert torch.equal(trained.grain_amplitude, untrained.grain_amplitude)
    capsys.readouterr()
    train_gan(config)
    assert "already complete" in capsys.readouterr().out
    other = replace(config, generator=replace(config.generator, image_std=0.5))
    with pytest.raises(ValueError, match="image_std"):
        train_gan(other)

    start = replace(configure(tmp_path, "second", init_from=str(out)), seed=5)
    config_of_start = json.loads((train_gan(start) / "config.json").read_text())
    assert config_of_start["generator"]["image_std"] == saved["image_std"]


def test_options_are_of_stylegan2_and_leave_enough_pixels():
    with pytest.raises(ValueError, match="reduction is 2, but stylegan1 has no such option"):
        StyleGANConfig(generator=GeneratorConfig(architecture="stylegan1", reduction=2))
    config = PRESETS["test"]()
    with pytest.raises(ValueError, match="which leaves 4 of 16 pixels"):
        replace(
            config,
            tiles=replace(config.tiles, resolution=16),
            generator=replace(config.generator, reduction=4),
        )
    with pytest.raises(ValueError, match="reduction is 3"):
        StyleGAN2Generator(32, **SIZES, reduction=3)


def test_scale_is_measured_only_where_it_is_open():
    config = PRESETS["test"]()
    images = torch.randn(4, 1, 32, 32) * 0.2 + 0.1
    assert measure_scale(config, images) is config
    half = replace(config, generator=replace(config.generator, image_std=None))
    measured = measure_scale(half, images).generator
    assert measured.image_mean == 0
    assert measured.image_std == pytest.approx(0.2, rel=0.05)
    assert create_networks(half)[0].config.image_std == 1


def test_projection_onto_a_reduced_generator_has_the_size_and_scale_of_images():
    model = create_generator(reduction=2, image_mean=0.2, image_std=0.1).eval()
    set_grain(model, draw_noisy())
    config = ProjectionConfig(num_steps=2, num_w_samples=10)
    target = torch.full((1, 1, 32, 32), 0.2)
    found, image, _ = project(model, target, config, lambda a, b: (a - b).square().mean())
    assert image.shape == target.shape
    assert (image - 0.2).abs().mean() < 0.5
    assert all(tensor.shape[-1] <= 16 for tensor in found.values() if tensor.ndim == 2)


class CountedTiles:
    """Tiles of one grey level that count what is read."""

    def __init__(self, num_tiles, resolution):
        self.num_tiles, self.resolution, self.num_read = num_tiles, resolution, 0

    def __len__(self):
        return 6 * self.num_tiles

    def batch(self, ids):
        self.num_read += len(ids)
        return torch.zeros(1, 1, 1, 1).expand(len(ids), 1, self.resolution, self.resolution)


@pytest.mark.parametrize(
    ("num_tiles", "resolution", "most"), [(30, 64, 30), (5_000, 64, 1000), (5_000, 2048, 16)]
)
def test_what_is_measured_fits_the_memory(num_tiles, resolution, most):
    tiles = CountedTiles(num_tiles, resolution)
    assert 0.5 * most < len(read_tiles(tiles)) <= most


def test_nothing_is_read_for_networks_that_need_nothing(tmp_path):
    tiles = CountedTiles(10, 32)
    config = PRESETS["test"]()
    assert settle_scale(config, tiles, tmp_path) == config
    set_grain_of_tiles(create_networks(config)[0], tiles)
    assert tiles.num_read == 0


def test_another_architecture_names_every_option_to_take_back():
    demo = PRESETS["demo"]()
    with pytest.raises(ValueError, match="stylegan3-t has no such option") as refused:
        replace(demo, generator=replace(demo.generator, architecture="stylegan3-t"))
    for flag in ("image-mean 0", "image-std 1", "noise-strength 0", "reduction 1"):
        assert f"--generator.{flag}" in str(refused.value)
    plain = {"image_mean": 0.0, "image_std": 1.0, "noise_strength": 0.0, "reduction": 1}
    replace(demo, generator=replace(demo.generator, architecture="stylegan3-t", **plain))
