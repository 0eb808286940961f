"""Measure on a GPU what was never timed on one: presets, training steps, 50,000 images.

    python benchmarks/gpu.py [--budget-minutes 9] [--parts gan sampling] [--out gpu.json]

One command, at most 25 minutes on one card (`--budget-minutes`; 9 is the short form). Parts:

- gan: seconds per 1,000 images (s/kimg) and peak memory of each StyleGAN preset of 256 x 256 at
  its batch size, over 16 steps, which have R1 and path length as often as in training
- ldm: images per second and peak memory of the training steps of each LDM preset of 256 x 256,
  autoencoder (with its discriminator) and denoiser, at their batch sizes
- step: a training step of the denoiser of `small` and `paper` against the plain loop
  (train_step.py)
- sampling: 50,000 images of 256 x 256 with the networks of `paper`, written as generate.py does
- compiled: the same with --compile

Weights are random, which costs the same as trained ones. Each part runs in a process of its own and
is stopped at its share of the budget; time that a part leaves goes to those after it. A figure that
fails, for instance because the memory is full, is recorded with its error, and the others go on.
Results are written to the JSON file after each part. If the time is too short for 50,000 images,
the speed is measured on fewer and the result says so.

Without a GPU it needs `--tiny`, which tries every part with tiny networks and shows that it works.
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import train_step
from train_step import LoopInSteps, make_clock

from em_data import DataConfig, load_data
from em_data.files import write_atomically
from em_diffusion import autoencoder_loop, denoiser_loop
from em_diffusion import presets as ldm_presets
from em_diffusion.autoencoder import create_autoencoder
from em_diffusion.denoiser import create_denoiser
from em_diffusion.drawing import LDMDrawer
from em_diffusion.family import LDMOptions
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_diffusion.train import choose_sampler
from em_evaluation.environment import describe_environment
from em_generation.loading import load_pipeline
from em_generation.sampling import draw_images
from em_generation.store import create_store
from em_stylegan import gan_loop
from em_stylegan import presets as gan_presets
from em_training import MicroBatching, choose_precision, create_accelerator
from em_training.latents import Latents

PARTS = {"gan": 0.2, "ldm": 0.2, "step": 0.1, "sampling": 0.15, "compiled": 0.35}
"""Part -> its share of the budget."""
GAN_PRESETS = ("paper", "small", "stylegan3-t", "stylegan3-r")
LDM_PRESETS = ("paper", "base", "small")
STEPS_OF_A_PERIOD = 16  # R1 is computed in one of them, path length in two
NUM_IMAGES = 50_000
SECONDS_OF_A_CHUNK = 10  # of sampling, between two looks at the clock
SECONDS_TO_END = 20  # that sampling leaves for its last chunk
LEAST_SECONDS = 20  # a part with less time left is not started


def main(argv=None):
    arguments = parse_arguments(argv)
    if not torch.cuda.is_available() and not arguments.tiny:
        sys.exit(
            "gpu.py measures a GPU, and torch finds none. Install torch with CUDA, or try the "
            "script with --tiny."
        )
    if arguments.worker:
        work(arguments)
    else:
        measure_parts(arguments)


def measure_parts(arguments) -> dict:
    """Run all parts, each in its own process; write the results after each and return them."""
    started = time.monotonic()
    result = {
        "command": "python benchmarks/gpu.py " + " ".join(arguments.command),
        "date": date.today().isoformat(),
        "hardware": describe_hardware(),
        "budget_minutes": arguments.budget_minutes,
        "tiny": arguments.tiny,
        "parts": {},
    }
    for position, name in enumerate(arguments.parts):
        left = 60 * arguments.budget_minutes - (time.monotonic() - started)
        shares = [PARTS[each] for each in arguments.parts[position:]]
        seconds = left * shares[0] / sum(shares)
        print(f"{name}: at most {seconds:.0f} s, {left / 60:.1f} minutes left", flush=True)
        if seconds < LEAST_SECONDS:
            result["parts"][name] = {"state": "not started: no time left", "figures": []}
        else:
            result["parts"][name] = run_worker(name, seconds, arguments)
        state = result["parts"][name]["state"]
        print(f"{name}: {state}", flush=True)
        result["minutes"] = round((time.monotonic() - started) / 60, 2)
        write_atomically(arguments.out, json.dumps(result, indent=1) + "\n")
    print(f"{arguments.out}: {result['minutes']:.1f} minutes", flush=True)
    return result


def run_worker(name: str, seconds: float, arguments) -> dict:
    """Run one part in a process of its own; return its state, seconds and figures."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures, log = Path(folder) / "figures.jsonl", Path(folder) / "log.txt"
        command = [sys.executable, __file__, "--worker", name, "--out", str(figures)]
        command += ["--deadline", str(time.time() + seconds)]
        command += ["--tiny"] if arguments.tiny else []
        # temporary files of the worker, too: it may be stopped at any moment
        environment = os.environ | {"TMPDIR": folder}
        try:
            with log.open("w") as errors:
                done = subprocess.run(command, stderr=errors, timeout=seconds, env=environment)
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            state = "done" if done.returncode == 0 else f"failed: {''.join(last)}"
        except subprocess.TimeoutExpired:
            state = "stopped: its time was over"
        lines = figures.read_text().splitlines() if figures.exists() else []
    return {
        "state": state,
        "seconds": round(time.monotonic() - started, 1),
        "figures": [json.loads(line) for line in lines],
    }


def work(arguments) -> None:
    """Measure one part and append each figure to the file `arguments.out`."""
    parts: dict[str, Callable[..., Iterator]] = {
        "gan": list_gan_figures,
        "ldm": list_ldm_figures,
        "step": list_step_figures,
        "sampling": list_sampling_figures,
        "compiled": list_sampling_figures,
    }
    for preset, measure in parts[arguments.worker](arguments):
        try:
            figure = measure()
        except Exception as error:  # one that does not fit must not stop the others
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            figure = {"error": text[:300]}
            error.__traceback__ = None  # it holds the tensors that did not fit
        line = {"preset": preset} | figure
        free_memory()
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"  {json.dumps(line)}", flush=True)


def list_gan_figures(arguments):
    """Yield (preset, its measurement) of StyleGAN."""
    for name in ("test",) if arguments.tiny else GAN_PRESETS:
        yield name, lambda name=name: measure_gan(gan_presets.PRESETS[name]())


def measure_gan(config) -> dict:
    """Return s/kimg and peak memory of a preset's training."""
    batch_size, resolution = config.training.batch_size, config.tiles.resolution
    num_images = (STEPS_OF_A_PERIOD + 3) * batch_size  # the loop never comes to its end
    training = replace(
        config.training,
        num_images=num_images,
        num_sample_images=1,
        log_every=num_images,
        sample_every=0,
        checkpoint_every=num_images,
    )
    with tempfile.TemporaryDirectory() as folder:
        tiles = replace(make_tiles(resolution, folder), symmetries=config.tiles.symmetries)
        config = replace(config, tiles=tiles, training=training)
        accelerator = create_accelerator(folder, config.precision)
        data = load_data("synthetic", tiles, log=lambda line: None)

        def train():
            gan_loop.train_stylegan(
                config, data.train, accelerator=accelerator, out_dir=f"{folder}/run"
            )

        timed = time_steps(train, gan_loop, STEPS_OF_A_PERIOD, batch_size, accelerator)
    return {"stage": "stylegan", "architecture": config.generator.architecture} | timed


def list_ldm_figures(arguments):
    """Yield (preset, its measurement) of each stage of the LDM."""
    num_steps = 2 if arguments.tiny else 8
    for name in ("test",) if arguments.tiny else LDM_PRESETS:
        config = ldm_presets.PRESETS[name]()
        yield name, lambda config=config: measure_autoencoder(config, num_steps)
        yield name, lambda config=config: measure_denoiser(config, num_steps)


def measure_autoencoder(preset, num_steps: int) -> dict:
    """Return speed and peak memory of the autoencoder's training with its discriminator."""
    batch_size = preset.autoencoder.batch_size
    config = replace(
        preset.autoencoder,
        discriminator_start_images=0,
        num_validation_images=2,
        **never(batch_size * (num_steps + 3)),
    )
    with tempfile.TemporaryDirectory() as folder:
        accelerator = create_accelerator(folder, preset.precision)
        tiles = make_tiles(preset.tiles.resolution, folder)
        data = load_data("synthetic", tiles, log=lambda line: None)

        def train():
            autoencoder_loop.train_autoencoder(
                config, data.train, data.held_out, accelerator=accelerator, out_dir=f"{folder}/run"
            )

        timed = time_steps(train, autoencoder_loop, num_steps, batch_size, accelerator)
    return {"stage": "autoencoder"} | timed


def measure_denoiser(preset, num_steps: int) -> dict:
    """Return speed and peak memory of the denoiser's training on latents of noise."""
    batch_size = preset.denoiser.batch_size
    config = replace(
        preset.denoiser,
        guide_images=0,
        evaluate_every=0,
        num_validation_images=2,
        **never(batch_size * (num_steps + 3)),
    )
    channels, side = preset.autoencoder.latent_channels, preset.latent_size
    noise = np.random.default_rng(0).standard_normal((64, channels, side, side))
    latents = Latents(noise.astype(np.float16), [0.0] * channels, [1.0] * channels)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = create_accelerator(folder, preset.precision)

        def train():  # without an autoencoder, which only decodes samples
            denoiser_loop.train_denoiser(
                config, latents, latents, None, accelerator=accelerator, out_dir=f"{folder}/run"
            )

        timed = time_steps(train, denoiser_loop, num_steps, batch_size, accelerator)
    return {"stage": "denoiser"} | timed


def never(num_images: int) -> dict:
    """Return the settings of a loop that only trains: its intervals are never due."""
    names = ("num_images", "log_every", "validate_every", "sample_every", "checkpoint_every")
    return dict.fromkeys(names, num_images)


def make_tiles(resolution: int, folder) -> DataConfig:
    """Return tiles of few embedded micrographs, cached in a folder."""
    size = max(256, 2 * resolution)
    return DataConfig(
        resolution=resolution, num_micrographs=4, micrograph_size=size, cache_dir=str(folder)
    )


def time_steps(train, module, num_steps: int, batch_size: int, accelerator) -> dict:
    """Hold a training loop between steps; return its speed and the peak of the memory.

    The first step, which has every kind of regularisation, and the second one warm up.
    """
    made = []

    class NotedMicroBatching(MicroBatching):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    free_memory()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = make_clock("wall", accelerator.device)
    with mock.patch.object(module, "MicroBatching", NotedMicroBatching):
        loop = LoopInSteps(train, torch.get_num_threads(), module)
        loop.step()
        start = clock()
        for _ in range(num_steps):
            loop.step()
        seconds = (clock() - start) / num_steps
        loop.stop()
    part = made[0].size
    return {
        "batch_size": batch_size,
        "computed_at_once": part or batch_size,
        "precision": accelerator.mixed_precision,
        "seconds_per_step": significant(seconds),
        "images_per_second": significant(batch_size / seconds),
        "seconds_per_kimg": significant(1000 * seconds / batch_size),
        **measure_memory(accelerator.device),
    }


def measure_memory(device) -> dict:
    """Return the peaks of the memory in GiB: of tensors, and of what torch reserved for them."""
    if device.type != "cuda":
        return {"peak_memory_gib": None, "peak_reserved_gib": None}
    return {
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def list_step_figures(arguments):
    """Yield (preset, figures of train_step.py) with the presets' own networks."""
    for name in ("test",) if arguments.tiny else ("small", "paper"):
        yield name, lambda name=name: compare_steps(name, arguments.tiny)


def compare_steps(preset: str, tiny: bool) -> dict:
    """Compare our training step with the plain loop's, see train_step.py."""
    command = ["--preset", preset, "--base-channels", "0", "--layers-per-block", "0"]
    command += ["--resolution", "64" if tiny else "256", "--batch-size", "4" if tiny else "16"]
    command += ["--rounds", "1" if tiny else "5", "--steps", "1" if tiny else "3"]
    options = train_step.parse_arguments([*command, "--threads", str(torch.get_num_threads())])
    with tempfile.TemporaryDirectory() as folder:
        config, *prepared, accelerator = train_step.prepare(options, folder)
        rounds = train_step.measure(config, *prepared, accelerator, options, folder)
    facts = {"precision": accelerator.mixed_precision, "batch_size": config.batch_size}
    step, bare, parts = train_step.summarise(rounds, {}, config.batch_size)
    return facts | {"figures": [step, bare, parts]}


def list_sampling_figures(arguments):
    """Yield (preset, its measurement) of drawing 50,000 images."""
    is_compiled, until = arguments.worker == "compiled", arguments.deadline - SECONDS_TO_END
    if arguments.tiny:
        yield "test", lambda: time_sampling("test", is_compiled, 12, 4, until)
    else:
        yield "paper", lambda: time_sampling("paper", is_compiled, NUM_IMAGES, 50, until)


def time_sampling(preset: str, compile: bool, total: int, batch_size: int, until: float) -> dict:
    """Draw and write images with a preset's networks until all are done or it is `until`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision()
    with tempfile.TemporaryDirectory() as folder:
        save_random_pipeline(preset, Path(folder) / "pipeline")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        pipeline = load_pipeline(str(Path(folder) / "pipeline"), device=device, dtype=dtype)
        drawer = LDMDrawer(pipeline, LDMOptions(compile=compile), batch_size=batch_size)
        store = create_store(Path(folder), "arrow", 8, None)
        numbers = store.share(list(range(total + 2 * batch_size)), 0, 1)
        writers = max(1, min(8, (os.cpu_count() or 1) - 1))
        clock = make_clock("wall", device)

        def draw(count):
            """Draw the next images; return their seconds."""
            batch, numbers[:] = numbers[:count], numbers[count:]
            start = clock()
            draw_images(drawer, batch, store.write, batch_size=batch_size, num_writers=writers)
            return clock() - start

        first, second = draw(batch_size), draw(batch_size)
        done, seconds = 0, 0.0
        chunk = max(1, int(SECONDS_OF_A_CHUNK / second)) * batch_size
        while done < total and (time.time() < until or done == 0):
            count = min(chunk, total - done)
            seconds, done = seconds + draw(count), done + count
    return {
        "compiled": compile,
        "sampler": type(drawer.pipeline.scheduler).__name__,
        "num_inference_steps": drawer.num_steps,
        "batch_size": batch_size,
        "precision": precision,
        "first_batch_seconds": significant(first),
        "num_images": done,
        "seconds": significant(seconds),
        "images_per_second": significant(done / seconds),
        "seconds_of_50000": significant(NUM_IMAGES * seconds / done),
        "is_extrapolated": done < NUM_IMAGES,
        **measure_memory(device),
    }


def save_random_pipeline(preset: str, folder: Path) -> None:
    """Save the pipeline of a preset with random weights, as training would."""
    config = ldm_presets.PRESETS[preset]()
    torch.manual_seed(0)
    vqvae = create_autoencoder(config.autoencoder, config.tiles.resolution)
    channels = config.autoencoder.latent_channels
    vqvae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    unet = create_denoiser(config.denoiser, config.latent_size, channels)
    scheduler, num_steps = choose_sampler(config)
    EMLatentDiffusionPipeline(vqvae, unet, scheduler, None, num_steps).save_pretrained(folder)


def describe_hardware() -> dict:
    """Return the versions and the hardware, with the GPU's memory and driver."""
    found = describe_environment() | {"gpu_memory_gib": None, "driver": None, "cuda": None}
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        found |= {"gpu_memory_gib": round(memory / 2**30, 1), "cuda": torch.version.cuda}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
            found["driver"] = answer.stdout.strip().splitlines()[0]
    return found


def significant(value: float) -> float:
    """Return a number with four significant digits."""
    return float(f"{value:.4g}")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure"
    )
    parser.add_argument("--budget-minutes", type=float, default=25.0, help="for all parts together")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu.json"), help="JSON file of the results"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the script")
    parser.add_argument("--worker", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.command = sys.argv[1:] if argv is None else list(argv)
    return arguments


if __name__ == "__main__":
    main()
