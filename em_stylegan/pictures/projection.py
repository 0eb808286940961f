"""Find the w whose image is nearest to a micrograph.

Written from "Analyzing and Improving the Image Quality of StyleGAN" (Karras et al. 2020), section 5
and appendix D, with the offline perceptual distance in place of LPIPS, and a pixel loss. What a
generator cannot project it cannot make: the distance that is left says how far a micrograph is from
what the generator has learned.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch.func import functional_call
from tqdm.auto import tqdm

from em_data import from_uint, read_micrograph
from em_data.cutting import average_area
from em_data.files import write_atomically
from em_data.intensity import find_levels
from em_evaluation.perceptual import PerceptualDistance
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.pictures.files import save_grid
from em_training import make_generator

SMALLEST_NOISE_PX = 8  # noise maps are not halved further


@dataclass(frozen=True)
class ProjectionConfig:
    """How to project. Lengths are shares of `num_steps`; the paper's are of 1000 steps."""

    num_steps: int = 1000
    learning_rate: float = 0.1
    ramp_up: float = 0.05
    ramp_down: float = 0.25
    num_w_samples: int = 10_000
    """Samples of z that measure the mean and the deviation of w."""
    w_noise: float = 0.05
    """Noise added to w at the start, in deviations of w; it falls to 0 at `w_noise_until`."""
    w_noise_until: float = 0.75
    perceptual_weight: float = 1.0
    pixel_weight: float = 0.1
    noise_weight: float = 1e5
    """Weight of the noise maps' regularisation (alpha of appendix D)."""
    seed: int = 0

    def __post_init__(self):
        if self.num_steps < 1 or self.num_w_samples < 2:
            raise ValueError("num_steps must be at least 1, and num_w_samples at least 2.")
        for name in (
            "learning_rate",
            "w_noise",
            "perceptual_weight",
            "pixel_weight",
            "noise_weight",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative.")


def noise_regularization(noise):
    """Measure how similar neighbours in a noise map [R, R] are, over all scales (equation 11).

    The sum of the squared autocorrelations at one pixel to the side and one down, with wrapped
    borders, over the map and its halvings down to 8 x 8. A halving is the mean of 2 x 2 times 2,
    which keeps the variance of white noise. Noise without a signal has 0.
    """
    noise, total = noise[None, None], noise.new_zeros(())
    while True:
        for dim in (2, 3):
            total = total + (noise * noise.roll(1, dims=dim)).mean().square()
        if noise.shape[2] <= SMALLEST_NOISE_PX:
            return total
        noise = torch.nn.functional.avg_pool2d(noise, 2) * 2


def learning_rate_factor(step, config):
    """Return the factor on the learning rate at `step`, from 0 to `config.num_steps` (appendix D).

    It rises linearly from 0 and falls to 0 as half a cosine.
    """
    t = step / config.num_steps
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / config.ramp_down))
    return down * min(1.0, t / config.ramp_up)


@torch.no_grad()
def measure_w(generator, num_samples, rng, class_label=None):
    """Return the mean [w_dim] of w over random z, and the root of E|w - mean|^2, a number."""
    z = torch.randn(num_samples, generator.config.z_dim, generator=rng)
    w = torch.cat([generator.mapping(part, class_label)[:, 0] for part in z.split(1000)])
    mean = w.mean(dim=0)
    return mean, (w - mean).square().sum(dim=1).mean().sqrt()


def draw_noises(generator, rng):
    """Draw a noise map [r, r] for each layer that has one: {name of its buffer: map}."""
    return {
        name: torch.randn(buffer.shape, generator=rng).requires_grad_()
        for name, buffer in generator.synthesis_network.named_buffers()
        if name.endswith("noise_const")
    }


@torch.no_grad()
def normalize_noises(noises):
    """Give each noise map mean 0 and mean square 1, in place."""
    for noise in noises.values():
        noise.sub_(noise.mean()).mul_(noise.square().mean().rsqrt())


def project(generator, target, config=None, distance=None, class_label=None):
    """Optimise w and the noise maps until the generator's image is near `target`.

    Args:
        target: [1, 1, R, R] in [-1, 1].
        distance: f(images, targets) -> scalar. Default: `PerceptualDistance`.
        class_label: Where to start, for a generator with classes.

    Returns:
        {"w": [w_dim], "noise/NAME": [r, r] for every noise map}, the image [1, 1, R, R], and the
        perceptual distance of each step.
    """
    config = config or ProjectionConfig()
    distance = distance or PerceptualDistance()
    rng = make_generator(config.seed, stream="projection")
    w_mean, w_deviation = measure_w(generator, config.num_w_samples, rng, class_label)
    w = w_mean.clone().requires_grad_()
    noises = draw_noises(generator, rng)
    optimizer = torch.optim.Adam([w, *noises.values()], lr=config.learning_rate)

    def synthesise(w):
        ws = w.expand(1, generator.num_ws, -1)
        # a network without noise maps takes no noise mode
        image = functional_call(
            generator.synthesis_network, noises, (ws, "const") if noises else (ws,)
        )
        if isinstance(generator, StyleGAN2Generator):
            image = generator.finish(generator.scale(image), "none", None)
        return image.mean(dim=1, keepdim=True)

    distances = []
    bar = tqdm(range(config.num_steps), desc="projection", unit="step")
    for step in bar:
        optimizer.param_groups[0]["lr"] = config.learning_rate * learning_rate_factor(
            step + 0.5, config
        )
        left = max(0.0, 1 - step / config.num_steps / config.w_noise_until)
        seen = w + torch.randn(w.shape, generator=rng) * (w_deviation * config.w_noise * left**2)
        image = synthesise(seen)
        perceptual = distance(image, target)
        pixel = (image - target).square().mean()
        regular = sum((noise_regularization(noise) for noise in noises.values()), torch.zeros(()))
        loss = (
            config.perceptual_weight * perceptual
            + config.pixel_weight * pixel
            + config.noise_weight * regular
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        normalize_noises(noises)
        distances.append(perceptual.item())
        bar.set_postfix(distance=f"{distances[-1]:.4f}", refresh=False)
    with torch.no_grad():
        image = synthesise(w)
    found = {"w": w.detach()} | {f"noise/{name}": noise.detach() for name, noise in noises.items()}
    return found, image, distances


def read_tile(path, resolution, row, column, downsample=1, intensity="auto"):
    """Read the tile [1, 1, R, R] in [-1, 1] whose upper left pixel is at (row, column)."""
    micrograph = read_micrograph(path)
    side = resolution * downsample
    height, width = micrograph.image.shape
    if row < 0 or column < 0 or row + side > height or column + side > width:
        raise ValueError(
            f"{path}: there are no {side} x {side} pixels at row {row}, column {column} of its "
            f"{height} x {width}; choose --row and --column, or a smaller --downsample"
        )
    low, high, _ = find_levels(micrograph.image, intensity)
    tile = micrograph.image[row : row + side, column : column + side]
    limits = (low, high) if intensity == "auto" else ()
    tile = average_area(tile, downsample, *limits)
    return from_uint(tile, low, high)[None, None]


def save_projection(folder, found, image, target, facts):
    """Write projection.png (target beside projection), w.safetensors and projection.json."""
    folder = Path(folder)
    save_grid(torch.cat([target, image]), folder / "projection.png", num_columns=2)
    weights = {name: tensor.contiguous() for name, tensor in found.items()}
    write_atomically(folder / "w.safetensors", save(weights))
    write_atomically(folder / "projection.json", json.dumps(facts, indent=2) + "\n")
