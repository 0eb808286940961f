"""Our sampling against stock diffusers: `LDMPipeline` with DDIM in 200 steps, float32.

    python benchmarks/sampling.py --model RUN

Both draw the same images from the same noise, with the same weights and batch size. Ours is what
generate.py does with the pipeline's default sampler and steps, decoding included. It prints one
JSON line per figure, with the ratio to the baseline timed in the same run.

Batches of the two alternate, so that changes of the machine's speed affect both. On one thread,
seconds are the process's own, which other programs do not disturb. On all cores they are wall
time, where ours runs as one process per core, as generate.py under torchrun. Distances to held-out
tiles have intervals, and so has their difference, paired by the noise.

Without --model, a small model is trained first and kept in runs/benchmark. Its images are poor,
but times and equality are real. This takes about 6 minutes on 2 cores.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from sampler_points import choose_clock, is_as_good, load_reference

from em_diffusion.drawing import LDMDrawer
from em_diffusion.em_schedulers import is_flow
from em_diffusion.family import LDMOptions
from em_diffusion.presets import PRESETS
from em_diffusion.samplers import create_sampler
from em_generation.loading import load_pipeline
from em_generation.sampling import draw_images
from em_training import create_process_state, make_image_rng
from em_training.cli import run_command

ROOT = Path(__file__).parents[1]
BASELINE = "diffusers LDMPipeline, DDIM with 200 steps, float32"


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time our sampling of images against stock diffusers, and compare the distances of both."""

    model: str | None = None
    """A run of a latent diffusion model. Default: a small one, trained into runs/benchmark."""
    num_images: int = 200
    """Images of each side for the distances and for the times on one thread."""
    batch_size: int = 50
    """Of both sides."""
    num_baseline_steps: int = 200
    cores: int = os.cpu_count() or 1
    """Cores of the second figure; 1 skips it."""
    seed: int = 0


def main():
    benchmark(tyro.cli(BenchmarkConfig))


def benchmark(config: BenchmarkConfig) -> list[dict]:
    """Measure, print one line per figure, and return the lines."""
    state = create_process_state()
    torch.set_num_threads(1)
    model = config.model or train_small_model()
    drawer, baseline = prepare(model, config, state.device)
    steps = drawer.num_steps
    facts = {
        "sampler": type(drawer.pipeline.scheduler).__name__,
        "num_inference_steps": steps,
        "batch_size": config.batch_size,
        "device": str(state.device),
        "latents": list(latent_shape(baseline.unet)),
        "unet_parameters": sum(parameter.numel() for parameter in baseline.unet.parameters()),
    }
    lines = []

    def report(name, ours, theirs, **more):
        line = {
            "name": name,
            "ours": round(ours, 3),
            "baseline": round(theirs, 3),
            "ratio": round(ours / theirs, 2),
            **more,
        }
        lines.append(line | {"baseline_is": BASELINE, **facts})
        print(json.dumps(lines[-1]), flush=True)

    reference = load_reference(model, config.num_images, device=state.device, log=lambda line: None)
    ours, theirs, seconds = run_by_turns(drawer, baseline, config, reference.num_images)
    clock = "CPU time, one thread" if state.device.type == "cpu" else "wall time"
    rate = reference.num_images / seconds.sum(axis=0)
    report(
        "images per second",
        *rate,
        clock=clock,
        ratio_by_batch=[round(b / a, 1) for a, b in seconds],
    )

    distances = [reference.measure(images) for images in (ours, theirs)]
    intervals = [reference.interval(distance) for distance in distances]
    difference = reference.difference(*distances)
    report(
        "frechet distance",
        distances[0].value,
        distances[1].value,
        intervals=[[round(i.low, 2), round(i.high, 2)] for i in intervals],
        difference=[
            round(value, 2) for value in (difference.value, difference.low, difference.high)
        ],
        equal_within_interval=is_as_good(difference, intervals[1]),
        num_images=reference.num_images,
    )
    if config.cores > 1 and state.device.type == "cpu":
        report(
            "images per second, all cores",
            *run_on_cores(model, baseline, config),
            clock="wall time",
            cores=config.cores,
        )
    return lines


def prepare(model: str, config: BenchmarkConfig, device):
    """Return (our drawer, the stock pipeline), with weights of their own."""
    from diffusers import LDMPipeline

    stock = load_pipeline(model, device=device)
    if is_flow(stock.scheduler):
        raise ValueError(
            "The stock LDMPipeline cannot sample a flow-matching model. Give a run with another "
            "prediction_type."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so
        baseline = LDMPipeline(
            ScaledAutoencoder(stock), stock.unet, create_sampler("ddim", stock.scheduler)
        )
    baseline.set_progress_bar_config(disable=True)
    ours = load_pipeline(model, device=device)
    options = LDMOptions(grain=False)  # the stock pipeline adds no grain
    return LDMDrawer(ours, options, seed=config.seed, batch_size=config.batch_size), baseline


class ScaledAutoencoder(torch.nn.Module):
    """The autoencoder as LDMPipeline wants it: latents are put into its scale before decoding."""

    def __init__(self, pipeline):
        super().__init__()
        self.vqvae, self.config = pipeline.vqvae, type("Config", (), {"scaling_factor": 1.0})
        self.denormalise = pipeline.denormalise_latents
        self.device, self.dtype = pipeline.vqvae.device, pipeline.vqvae.dtype

    def decode(self, latents):
        return self.vqvae.decode(self.denormalise(latents))


def run_by_turns(drawer, baseline, config: BenchmarkConfig, num_images: int):
    """Return (our images, the baseline's, both uint8 [N, 1, H, W], seconds [batches, 2])."""
    clock = choose_clock(drawer.pipeline.device)
    ours, theirs, seconds = {}, [], []

    def write(numbers, images):
        ours.update(zip(numbers, images, strict=True))
        return len(images)

    def make_ours(numbers):
        draw_images(drawer, numbers, write, batch_size=config.batch_size)

    make_ours(
        list(range(min(num_images, config.batch_size)))
    )  # the first calls pay for what comes once
    sample_stock(baseline, list(range(min(num_images, config.batch_size))), config, num_steps=2)
    for first in range(0, num_images, config.batch_size):
        numbers = list(range(first, min(first + config.batch_size, num_images)))
        times = [clock()]
        make_ours(numbers)
        times.append(clock())
        theirs.append(sample_stock(baseline, numbers, config, config.num_baseline_steps))
        times.append(clock())
        seconds.append(np.diff(times))
    return (
        to_levels([ours[i] for i in range(num_images)]),
        to_levels(np.concatenate(theirs)),
        np.array(seconds),
    )


def sample_stock(baseline, numbers, config: BenchmarkConfig, num_steps: int):
    """Return the stock pipeline's images, float32 [B, 1, H, W] in [-1, 1]."""
    generators = [make_image_rng(config.seed, i) for i in numbers]
    images = baseline(
        len(numbers), generators, num_inference_steps=num_steps, output_type="np"
    ).images
    return images.transpose(0, 3, 1, 2) * 2 - 1


def to_levels(images):
    from em_data import to_uint8

    return to_uint8(torch.stack([torch.as_tensor(image) for image in images]))


def run_on_cores(model: str, baseline, config: BenchmarkConfig) -> tuple[float, float]:
    """Return images/s on all cores: ours with one process per core, the baseline with threads."""
    torch.set_num_threads(config.cores)
    numbers = list(range(config.batch_size))
    sample_stock(baseline, numbers, config, num_steps=2)
    started = time.perf_counter()
    sample_stock(baseline, numbers, config, config.num_baseline_steps)
    theirs = len(numbers) / (time.perf_counter() - started)
    num_images = 4 * config.cores * config.batch_size
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(config.cores),
        ]
        command += [
            str(ROOT / "generate.py"),
            "--model",
            str(model),
            "--out",
            folder,
            "--num-images",
            str(num_images),
        ]
        command += ["--batch-size", str(config.batch_size), "--precision", "no"]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        subprocess.run(
            command,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        record = json.loads((Path(folder) / "generation.json").read_text())
    return record["sample_images_per_second"], theirs


def latent_shape(unet) -> tuple[int, ...]:
    return unet.config.in_channels, unet.config.sample_size, unet.config.sample_size


def train_small_model() -> str:
    """Train a short preset demo with latents of 16 x 16 and a 3-level U-Net; return its folder."""
    from em_diffusion import train_ldm

    preset = PRESETS["demo"]()
    autoencoder = replace(
        preset.autoencoder, block_out_channels=(16, 32, 64), latent_channels=4, num_images=1_600
    )
    denoiser = replace(
        preset.denoiser, channel_multipliers=(1, 2, 2), attention_levels=(1, 2), num_images=1_600
    )
    config = replace(preset, out="runs/benchmark", autoencoder=autoencoder, denoiser=denoiser)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    train_ldm(config)
    torch.set_num_threads(threads)
    return config.out


if __name__ == "__main__":
    run_command(main)
