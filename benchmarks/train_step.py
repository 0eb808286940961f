"""Seconds of a training step of the denoiser: ours, the plain loop's, and the bare pass of the network; all in one run.

    python benchmarks/train_step.py [--preset small] [--resolution 256] [--base-channels 64] [--batch-size 8] [--threads 1]

Ours is `train_denoiser` itself, held between two batches: cached latents, channels-last, fused Adam, averaged weights, log.
The plain loop (plain_loop.py) decodes PNG tiles and encodes them with the autoencoder in every step, in float32 and eager
mode. The bare pass is forward and backward of the same network on a batch that lies ready, with and without the optimizer.
U-Net, autoencoder and batch are the same on all sides; weights are random, which costs the same as trained ones.

Rounds of all sides alternate after a warm-up, so that a busy machine slows all of them; medians count. What a run does now
and then (validation, sample grids, checkpoints) is left out on both sides. One JSON line a figure: the ratio to the plain
loop, the ratio to the bare pass, and the seconds of each part. The ratio to the plain loop falls as the U-Net grows against
the autoencoder, whose work is what caching saves: by default the U-Net has half of the preset's width.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from data_loading import write_png_tiles
from plain_loop import PlainLoop

from em_data import DataConfig, load_data
from em_diffusion.autoencoder import create_autoencoder
from em_diffusion.denoiser import compute_denoising_loss, create_denoiser, create_scheduler, draw_timesteps
from em_diffusion.denoiser_loop import move, train_denoiser
from em_diffusion.latents import Latents, encode_latents, measure_latents
from em_diffusion.optimization import create_optimizer
from em_diffusion.presets import PRESETS
from em_training import EMA, create_accelerator, make_generator

NUM_VIEWS = 16  # latents to train on: their number changes no step's time


class LoopInSteps:
    """A training loop that goes on by one step at a time, as it reaches for its next batch.

    `run(tiles)` is the loop, in a thread of its own; only one of it and its caller runs at any time. A step begins where the
    loop asks for a batch and ends where it asks for the next one, so that nothing which it does is left out.
    """

    def __init__(self, run, tiles, num_threads):
        self.tiles, self.num_views, self.shape = tiles, tiles.num_views, tiles.shape
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._error, self._stopped = None, False
        self._thread = threading.Thread(target=self._work, args=(run, num_threads), daemon=True)
        self._thread.start()
        self._wait()

    def batch(self, view_ids):
        """A batch of the tiles, when the caller lets the loop go on."""
        self._paused.release()
        self._go.acquire()
        if self._stopped:
            raise StopLoop
        return self.tiles.batch(view_ids)

    def step(self):
        self._go.release()
        self._wait()

    def stop(self):
        self._stopped = True
        self._go.release()
        self._thread.join()

    def _wait(self):
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def _work(self, run, num_threads):
        torch.set_num_threads(num_threads)  # the number of threads belongs to the thread that computes
        try:
            run(self)
            raise RuntimeError("the loop came to its end: num_images is too small for so many steps")
        except StopLoop:
            pass
        except Exception as error:  # is raised in the caller's thread
            self._error = error
            self._paused.release()


class StopLoop(Exception):
    """Ends a loop between two steps."""


class BarePass:
    """Forward, backward and optimizer step of the network on a batch that lies ready; with each other part of our step."""

    def __init__(self, config, latents, accelerator):
        model = create_denoiser(config, latents.shape[-1], latents.shape[0])
        self.model = model.to(accelerator.device, memory_format=torch.channels_last)
        self.optimizer = create_optimizer(self.model.parameters(), config)
        self.ema = EMA(self.model, config.ema_half_life_images)
        self.unet = accelerator.prepare_model(self.model)
        self.scheduler, self.config, self.latents, self.accelerator = (
            create_scheduler(config),
            config,
            latents,
            accelerator,
        )
        self.batch = self.draw_batch()

    def draw_batch(self):
        config = self.config
        images = self.latents.batch(np.arange(config.batch_size) % self.latents.num_views)
        generator = make_generator(config.seed)
        noise = torch.randn(images.shape, generator=generator)
        timesteps = draw_timesteps(len(images), config.num_train_timesteps, generator, config.timestep_density)
        return move(self.accelerator, images, noise, timesteps)

    def step(self, lap):
        """One pass; `lap(part)` after each part: first the bare ones, then what else our step has."""
        loss = compute_denoising_loss(self.unet, self.scheduler, *self.batch).mean()
        self.accelerator.backward(loss)
        lap("forward and backward")
        self.optimizer.step()
        lap("optimizer")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        lap("clip")
        self.optimizer.zero_grad()
        self.ema.update(self.model, 10 * self.config.batch_size, self.config.batch_size)
        lap("average of the weights")
        self.draw_batch()
        lap("read latents, draw noise")


class Laps:
    """A stopwatch: seconds of each part since the lap before it."""

    def __init__(self, device):
        self.device, self.seconds = device, {}
        self.last = read_clock(device)

    def __call__(self, part):
        now = read_clock(self.device)
        self.seconds[part], self.last = now - self.last, now


def read_clock(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def time_once(function, device):
    start = read_clock(device)
    function()
    return read_clock(device) - start


def prepare(arguments, folder):
    """Tiles, their PNG files, an autoencoder and cached latents."""
    preset = PRESETS[arguments.preset]()
    tiles_config = DataConfig(
        resolution=arguments.resolution, num_micrographs=4, micrograph_size=2 * arguments.resolution, cache_dir=folder
    )
    tiles = load_data("synthetic", tiles_config, log=lambda line: None).train
    paths = write_png_tiles(tiles, Path(folder))
    accelerator = create_accelerator(folder, arguments.precision)
    torch.manual_seed(0)
    vqvae = create_autoencoder(preset.autoencoder, arguments.resolution).to(accelerator.device).eval()
    view_ids = np.arange(min(NUM_VIEWS, tiles.num_views))
    array = encode_latents(vqvae, tiles, folder, accelerator=accelerator, batch_size=4, view_ids=view_ids)
    latents = Latents(array, *measure_latents(array))
    num_images = arguments.batch_size * (arguments.steps * (arguments.rounds + 1) + 2)  # the loop never comes to its end
    config = replace(
        preset.denoiser,
        batch_size=arguments.batch_size,
        base_channels=arguments.base_channels or preset.denoiser.base_channels,
        num_images=num_images,
        validate_every=num_images,
        sample_every=num_images,
        checkpoint_every=num_images,
        num_validation_images=2,
    )
    return config, tiles, paths, vqvae, latents, accelerator


def measure(config, tiles, paths, vqvae, latents, accelerator, arguments, folder):
    """Seconds of each side and part, one dictionary a round."""
    device = accelerator.device
    bare = BarePass(config, latents, accelerator)
    plain = PlainLoop(
        create_denoiser(config, latents.shape[-1], latents.shape[0]), vqvae, create_scheduler(config), tiles, paths,
        batch_size=config.batch_size, learning_rate=1e-4, latents_mean=latents.mean, latents_std=latents.std,
        generator=make_generator(0),
    )  # fmt: skip

    def train(stepped):
        train_denoiser(config, stepped, latents, vqvae, accelerator=accelerator, out_dir=Path(folder) / "run")

    ours = LoopInSteps(train, latents, arguments.threads)
    rounds = []
    for number in range(-1, arguments.rounds):  # the first warms up
        plain_laps = Laps(device)
        plain.step(plain_laps)
        steps, bare_laps = [], []
        for _ in range(arguments.steps):
            steps.append(time_once(ours.step, device))
            bare_laps.append(Laps(device))
            bare.step(bare_laps[-1])
        if number >= 0:
            parts = {name: statistics.median(laps.seconds[name] for laps in bare_laps) for name in bare_laps[0].seconds}
            rounds.append({"ours": statistics.median(steps), "plain": plain_laps.seconds, "parts": parts})
    ours.stop()
    return rounds


def summarise(rounds, facts, batch_size):
    """The three figures of all rounds."""
    ours = [each["ours"] for each in rounds]
    plain = [sum(each["plain"].values()) for each in rounds]
    passes = [each["parts"]["forward and backward"] for each in rounds]
    bare = [seconds + each["parts"]["optimizer"] for seconds, each in zip(passes, rounds)]
    middle = statistics.median

    def ratio(numerators, denominators):
        ratios = [a / b for a, b in zip(numerators, denominators)]
        return {"ratio": round(middle(ratios), 3), "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)]}

    def medians(dictionaries):
        return {name: round(middle([each[name] for each in dictionaries]), 4) for name in dictionaries[0]}

    yield {
        "name": "training step, images per second",
        "ours": round(batch_size / middle(ours), 3),
        "baseline": round(batch_size / middle(plain), 3),
        **ratio(plain, ours),
        "baseline_is": "PNG decoded and encoded by the autoencoder in every step, float32, eager",
        **facts,
    }
    yield {
        "name": "training step over the bare pass, seconds",
        "ours": round(middle(ours), 4),
        "baseline": round(middle(bare), 4),
        **ratio(ours, bare),
        "baseline_is": "forward, backward and optimizer step of the same network on a batch that lies ready",
        "ratio_without_optimizer": ratio(ours, passes)["ratio"],
        **facts,
    }
    parts = medians([each["parts"] for each in rounds])
    plain_parts = medians([each["plain"] for each in rounds])
    rest = middle([a - sum(each["parts"].values()) for a, each in zip(ours, rounds)])
    saved = {
        "latents cached instead of decoded and encoded": plain_parts["decode PNG"]
        + plain_parts["encode"]
        - parts["read latents, draw noise"],
        "channels-last (on a GPU also bf16) in the pass": plain_parts["forward and backward"]
        - parts["forward and backward"],
        "fused Adam": plain_parts["clip and optimizer"] - parts["optimizer"] - parts["clip"],
        "average of the weights, log, bar": -parts["average of the weights"] - rest,
    }
    yield {
        "name": "seconds of a step by part",
        "plain": plain_parts,
        "ours": parts | {"log, bar and the rest": round(rest, 4)},
        "saved": {name: round(seconds, 4) for name, seconds in saved.items()},
        **facts,
    }


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="whose autoencoder and U-Net")
    parser.add_argument("--resolution", type=int, default=256, help="side of a tile in pixels")
    parser.add_argument("--base-channels", type=int, default=64, help="width of the U-Net; 0 for the preset's own")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="that are timed")
    parser.add_argument("--steps", type=int, default=3, help="of ours and of the bare pass, for each of the plain loop")
    parser.add_argument(
        "--precision", default="auto", help="of ours: auto (bf16 where the hardware has it), bf16 or no"
    )
    return parser.parse_args(argv)


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        config, tiles, paths, vqvae, latents, accelerator = prepare(arguments, folder)
        rounds = measure(config, tiles, paths, vqvae, latents, accelerator, arguments, folder)
    unet = create_denoiser(config, latents.shape[-1], latents.shape[0])
    facts = {
        "preset": arguments.preset,
        "resolution": arguments.resolution,
        "base_channels": config.base_channels,
        "unet_million_parameters": round(sum(p.numel() for p in unet.parameters()) / 1e6, 1),
        "batch_size": config.batch_size,
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
        "num_threads": arguments.threads,
    }
    for figure in summarise(rounds, facts, config.batch_size):
        print(json.dumps(figure))


if __name__ == "__main__":
    main()
