"""Find the w whose image is nearest to a micrograph: `python -m em_stylegan.project MICROGRAPH RUN`.

Written from "Analyzing and Improving the Image Quality of StyleGAN" (Karras et al. 2020), section 5 and appendix D, with the offline
perceptual distance in place of LPIPS and a pixel loss beside it. What a generator cannot project it cannot make: the distance that
is left says how far a micrograph lies from what it has learned.
"""

import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.func import functional_call
from tqdm.auto import tqdm

from em_data import from_uint, read_micrograph
from em_data.cutting import average_area
from em_data.files import write_atomically
from em_data.intensity import find_levels
from em_evaluation.perceptual import PerceptualDistance
from em_stylegan.interpolate import load_generator, save_grid
from em_training import make_generator
from em_training.cli import run_command

SMALLEST_NOISE_PX = 8  # maps up to this side are neither halved nor regularised further


@dataclass(frozen=True)
class ProjectionConfig:
    """Lengths are shares of `num_steps`, as the paper's 50, 250 and 750 are of its 1000."""

    num_steps: int = 1000
    learning_rate: float = 0.1
    ramp_up: float = 0.05
    ramp_down: float = 0.25
    num_w_samples: int = 10_000
    """z from which the mean and the deviation of w are measured."""
    w_noise: float = 0.05
    """Noise added to w at first, in deviations of w; it falls with the square of the time left until `w_noise_until`."""
    w_noise_until: float = 0.75
    perceptual_weight: float = 1.0
    pixel_weight: float = 0.1
    noise_weight: float = 1e5
    """Of the noise maps' regularisation (alpha of appendix D)."""
    seed: int = 0

    def __post_init__(self):
        if self.num_steps < 1 or self.num_w_samples < 2:
            raise ValueError("num_steps must be at least 1 and num_w_samples at least 2")
        for name in (
            "learning_rate",
            "w_noise",
            "perceptual_weight",
            "pixel_weight",
            "noise_weight",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


def noise_regularization(noise):
    """How much neighbours in a noise map [R, R] resemble each other, over all scales (appendix D, equation 11).

    Sum over the map and its halvings (means of 2 x 2, times 2, which keeps the variance of white noise) down to 8 x 8 of the squared
    autocorrelations at one pixel to the side and one down, borders wrapped: 0 for noise without a signal in it.
    """
    noise, total = noise[None, None], noise.new_zeros(())
    while True:
        for dim in (2, 3):
            total = total + (noise * noise.roll(1, dims=dim)).mean().square()
        if noise.shape[2] <= SMALLEST_NOISE_PX:
            return total
        noise = torch.nn.functional.avg_pool2d(noise, 2) * 2


def learning_rate_factor(step, config):
    """Share of the learning rate at `step`, from 0 to `config.num_steps`: linear from 0 at first, a half cosine to 0 at the end
    (appendix D). Steps are taken at their middle, so that none is of length 0."""
    t = step / config.num_steps
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / config.ramp_down))
    return down * min(1.0, t / config.ramp_up)


@torch.no_grad()
def measure_w(generator, num_samples, rng, class_label=None):
    """Mean [w_dim] of w over random z, and its deviation, a number: the root of E|w - mean|^2."""
    z = torch.randn(num_samples, generator.config.z_dim, generator=rng)
    w = torch.cat(
        [generator.mapping(part, class_label)[:, 0] for part in z.split(1000)]
    )  # [N, w_dim]
    mean = w.mean(dim=0)
    return mean, (w - mean).square().sum(dim=1).mean().sqrt()


def project(generator, target, config=None, distance=None, class_label=None):
    """Optimise w and the noise maps until the generator's image is near `target` [1, 1, R, R] in [-1, 1].

    Returns ({"w" [w_dim], "noise/NAME" [r, r] for every map}, image [1, 1, R, R], list of each step's perceptual distance). `distance`:
    f(images, targets) -> scalar; the offline one by default. `class_label`: whose w are near the start, of a generator that knows classes.
    """
    config = config or ProjectionConfig()
    distance = distance or PerceptualDistance()
    rng = make_generator(config.seed, stream="projection")
    w_mean, w_deviation = measure_w(generator, config.num_w_samples, rng, class_label)
    w = w_mean.clone().requires_grad_()
    buffers = dict(generator.synthesis_network.named_buffers())
    noises = {
        name: torch.randn(buffer.shape, generator=rng).requires_grad_()
        for name, buffer in buffers.items()
        if name.endswith("noise_const")
    }
    optimizer = torch.optim.Adam([w, *noises.values()], lr=config.learning_rate)

    def synthesise(w):
        ws = w.expand(1, generator.num_ws, -1)
        # a network without noise maps takes no noise mode
        image = functional_call(
            generator.synthesis_network, noises, (ws, "const") if noises else (ws,)
        )
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
        with torch.no_grad():
            for noise in noises.values():
                noise.sub_(noise.mean()).mul_(noise.square().mean().rsqrt())
        distances.append(perceptual.item())
        bar.set_postfix(distance=f"{distances[-1]:.4f}", refresh=False)
    with torch.no_grad():
        image = synthesise(w)
    found = {"w": w.detach()} | {f"noise/{name}": noise.detach() for name, noise in noises.items()}
    return found, image, distances


def read_tile(path, resolution, row, column, downsample=1, intensity="auto"):
    """The tile [1, 1, R, R] in [-1, 1] of a micrograph whose upper left corner is at (row, column), in its own pixels."""
    micrograph = read_micrograph(path)
    side = resolution * downsample
    height, width = micrograph.image.shape
    if row < 0 or column < 0 or row + side > height or column + side > width:
        raise ValueError(
            f"{path}: no {side} x {side} pixels at row {row}, column {column} of its {height} x {width}; "
            "choose --row and --column, or a smaller --downsample"
        )
    low, high, _ = find_levels(micrograph.image, intensity)
    tile = average_area(micrograph.image[row : row + side, column : column + side], downsample)
    return from_uint(tile, low, high)[None, None]


def save_projection(folder, found, image, target, facts):
    """projection.png (target beside projection), w.safetensors and projection.json in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_grid(torch.cat([target, image]), folder / "projection.png", num_columns=2)
    temporary = folder / f".w-{os.getpid()}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, temporary)
    os.replace(temporary, folder / "w.safetensors")
    write_atomically(folder / "projection.json", json.dumps(facts, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("micrograph")
    parser.add_argument("model", help="a run's folder, or one that holds a saved pipeline")
    parser.add_argument(
        "--out",
        default="projection",
        help="folder for projection.png, w.safetensors, projection.json",
    )
    parser.add_argument(
        "--row", type=int, default=0, help="upper edge of the tile in the micrograph's pixels"
    )
    parser.add_argument("--column", type=int, default=0, help="left edge of the tile")
    parser.add_argument("--downsample", type=int, default=1, help="as in the run's tiles")
    parser.add_argument(
        "--intensity",
        default="auto",
        choices=("auto", "full", "percentile"),
        help="as in the run's tiles",
    )
    parser.add_argument("--num-steps", type=int, default=ProjectionConfig.num_steps)
    parser.add_argument("--pixel-weight", type=float, default=ProjectionConfig.pixel_weight)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--class-label", type=int, help="of a generator that knows classes")
    arguments = parser.parse_args()
    config = ProjectionConfig(
        num_steps=arguments.num_steps, pixel_weight=arguments.pixel_weight, seed=arguments.seed
    )
    generator = load_generator(arguments.model)
    resolution = generator.config.resolution
    target = read_tile(
        arguments.micrograph,
        resolution,
        arguments.row,
        arguments.column,
        arguments.downsample,
        arguments.intensity,
    )
    found, image, distances = project(generator, target, config, class_label=arguments.class_label)
    facts = {
        "micrograph": Path(arguments.micrograph).name,
        "row": arguments.row,
        "column": arguments.column,
        "downsample": arguments.downsample,
        "num_steps": config.num_steps,
        "perceptual_distance": distances[-1],
        "pixel_rms": (image - target).square().mean().sqrt().item(),
    }
    save_projection(arguments.out, found, image, target, facts)
    print(json.dumps(facts))


if __name__ == "__main__":
    run_command(main)
