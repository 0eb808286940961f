"""Seconds of a training step of the denoiser: ours, the plain loop's, and the network's alone.

    python benchmarks/train_step.py [--preset small] [--resolution 256] [--base-channels 64]

Ours is `train_denoiser` itself, held between two steps: cached latents, channels-last, fused Adam,
averaged weights, log. The plain loop (plain_loop.py) decodes PNG tiles and encodes them with the
autoencoder in every step, in float32 and eager mode. The bare pass is forward and backward of the
same network on a batch in memory, with and without the optimizer. U-Net, autoencoder and batch are
the same on all sides. Weights are random, which costs the same as trained ones.

After a warm-up, rounds of all sides alternate, so that a busy machine slows all of them. Medians
count. Validation, sample grids and checkpoints count on neither side. It prints one JSON line per
figure: the ratio to the plain loop, the ratio to the bare pass, and the seconds of each part.

Caching saves the encoder's work, so the ratio to the plain loop depends on how large the U-Net is
compared with the encoder: `encoder_share` is the encoder's part of the plain step. By default the
U-Net has half of the preset's width and one block per level, as its autoencoder has.
--base-channels 0 --layers-per-block 0 takes the preset's own; the ratio is then about 2 in float32
on a CPU.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from data_loading import write_png_tiles
from plain_loop import PlainLoop

from em_data import DataConfig, ImageSampler, load_data
from em_diffusion import denoiser_loop
from em_diffusion.autoencoder import create_autoencoder
from em_diffusion.denoiser import create_denoiser, create_scheduler
from em_diffusion.denoiser_loop import compute_denoising_loss
from em_diffusion.latents import encode_latents, measure_latents
from em_diffusion.optimization import create_optimizer
from em_diffusion.presets import PRESETS
from em_training import EMA, Prefetcher, TrainingRun, create_accelerator, make_generator
from em_training.latents import Latents

NUM_VIEWS = 16  # latents to train on: their number changes no step's time


class LoopInSteps:
    """`train_denoiser`, or another module's loop, unchanged, held at the end of each step.

    `train()` calls the loop in a thread of its own, and only the loop or its caller runs at any
    time. A step is all that the loop does between the ends of two steps. Construction trains the
    first one.
    """

    def __init__(self, train, num_threads, module=denoiser_loop):
        self._module = module
        self._go, self._held = threading.Semaphore(0), threading.Semaphore(0)
        self._error, self._stopped = None, False
        self._thread = threading.Thread(target=self._work, args=(train, num_threads), daemon=True)
        self._thread.start()
        self._wait()

    def step(self):
        self._go.release()
        self._wait()

    def stop(self):
        self._stopped = True
        self._go.release()
        self._thread.join()

    def _wait(self):
        self._held.acquire()
        if self._error is not None:
            raise self._error

    def _hold(self):
        self._held.release()
        self._go.acquire()
        if self._stopped:
            raise StopLoop

    def _work(self, train, num_threads):
        torch.set_num_threads(
            num_threads
        )  # the number of threads belongs to the thread that computes
        hold = self._hold

        class HeldRun(TrainingRun):
            def step(self, num_images_seen):
                super().step(num_images_seen)
                hold()

        try:
            with mock.patch.object(self._module, "TrainingRun", HeldRun):
                train()
            raise RuntimeError(
                "the loop came to its end: num_images is too small for so many steps"
            )
        except StopLoop:
            pass
        except Exception as error:  # is raised in the caller's thread
            self._error = error
            self._held.release()


class StopLoop(Exception):
    """Ends a loop between two steps."""


class BarePass:
    """The network's passes and step on a batch in memory, and each other part of our step."""

    def __init__(self, config, latents, accelerator):
        self.config, self.accelerator = config, accelerator
        model = create_denoiser(config, latents.shape[-1], latents.shape[0])
        self.model = model.to(accelerator.device, memory_format=torch.channels_last)
        self.optimizer = create_optimizer(self.model.parameters(), config)
        self.ema = EMA(self.model, config.ema_half_life_images)
        self.scheduler = create_scheduler(config)
        sampler = ImageSampler(latents.num_views, seed=0)
        batches = denoiser_loop.draw_batches(latents, sampler, config, accelerator, 0)
        self.batches = Prefetcher(batches, accelerator.device, threaded=False)
        self.batch = next(self.batches)

    def step(self, lap):
        """Do one step; `lap(part)` after each part: the bare ones first, then our others."""
        with self.accelerator.autocast():
            batch = (self.batch.images, self.batch.noise, self.batch.timesteps)
            loss = compute_denoising_loss(self.model, self.scheduler, *batch).mean()
        self.accelerator.backward(loss)
        lap("forward and backward")
        self.optimizer.step()
        lap("optimizer")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        lap("clip")
        self.optimizer.zero_grad()
        self.ema.update(self.model, 10 * self.config.batch_size, self.config.batch_size)
        lap("average of the weights")
        next(self.batches)
        lap("read latents, draw noise")


class Laps:
    """A stopwatch: seconds of each part since the lap before it, on `clock`."""

    def __init__(self, clock):
        self.clock, self.seconds = clock, {}
        self.last = clock()

    def __call__(self, part):
        now = self.clock()
        self.seconds[part], self.last = now - self.last, now


def make_clock(name, device):
    """Return a clock in seconds, wall or process time, that waits for the device's queue."""
    read = {"wall": time.perf_counter, "cpu": time.process_time}[name]

    def clock():
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return read()

    return clock


def prepare(arguments, folder):
    """Tiles, their PNG files, an autoencoder and cached latents."""
    preset = PRESETS[arguments.preset]()
    tiles_config = DataConfig(
        resolution=arguments.resolution,
        num_micrographs=4,
        micrograph_size=2 * arguments.resolution,
        cache_dir=folder,
    )
    tiles = load_data("synthetic", tiles_config, log=lambda line: None).train
    paths = write_png_tiles(tiles, Path(folder))
    accelerator = create_accelerator(folder, arguments.precision)
    torch.manual_seed(0)
    vqvae = (
        create_autoencoder(preset.autoencoder, arguments.resolution).to(accelerator.device).eval()
    )
    view_ids = np.arange(min(NUM_VIEWS, tiles.num_views))
    array, _ = encode_latents(
        vqvae, tiles, folder, accelerator=accelerator, batch_size=4, view_ids=view_ids
    )
    latents = Latents(array, *measure_latents(array))
    num_images = arguments.batch_size * (
        arguments.steps * (arguments.rounds + 1) + 2
    )  # the loop never comes to its end
    config = replace(
        preset.denoiser,
        batch_size=arguments.batch_size,
        base_channels=arguments.base_channels or preset.denoiser.base_channels,
        layers_per_block=arguments.layers_per_block or preset.denoiser.layers_per_block,
        num_images=num_images,
        validate_every=num_images,
        sample_every=num_images,
        checkpoint_every=num_images,
        evaluate_every=0,
        num_validation_images=2,
    )
    return config, tiles, paths, vqvae, latents, accelerator


def measure(config, tiles, paths, vqvae, latents, accelerator, arguments, folder):
    """Seconds of each side and part, one dictionary a round."""
    clock = make_clock(arguments.clock, accelerator.device)
    bare = BarePass(config, latents, accelerator)
    plain = PlainLoop(
        create_denoiser(config, latents.shape[-1], latents.shape[0]),
        vqvae,
        create_scheduler(config),
        tiles,
        paths,
        batch_size=config.batch_size,
        learning_rate=1e-4,
        latents_mean=latents.mean,
        latents_std=latents.std,
        generator=make_generator(0),
    )

    def train():
        out_dir = Path(folder) / "run"
        denoiser_loop.train_denoiser(
            config, latents, latents, vqvae, accelerator=accelerator, out_dir=out_dir
        )

    ours = LoopInSteps(train, arguments.threads)
    rounds = []
    for number in range(-1, arguments.rounds):  # the first warms up
        plain_laps = Laps(clock)
        plain.step(plain_laps)
        steps, bare_laps = [], []
        for _ in range(arguments.steps):
            whole = Laps(clock)
            ours.step()
            whole("step")
            steps.append(whole.seconds["step"])
            bare_laps.append(Laps(clock))
            bare.step(bare_laps[-1])
        if number >= 0:
            parts = {
                name: statistics.median(laps.seconds[name] for laps in bare_laps)
                for name in bare_laps[0].seconds
            }
            rounds.append(
                {"ours": statistics.median(steps), "plain": plain_laps.seconds, "parts": parts}
            )
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
        return {
            "ratio": round(middle(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }

    def medians(dictionaries):
        return {
            name: round(middle([each[name] for each in dictionaries]), 4)
            for name in dictionaries[0]
        }

    yield {
        "name": "training step, images per second",
        "ours": round(batch_size / middle(ours), 3),
        "baseline": round(batch_size / middle(plain), 3),
        **ratio(plain, ours),
        "encoder_share": round(
            middle([each["plain"]["encode"] / total for each, total in zip(rounds, plain)]), 3
        ),
        "baseline_is": "PNG decoded and encoded by the autoencoder in every step, float32, eager",
        **facts,
    }
    yield {
        "name": "training step over the bare pass, seconds",
        "ours": round(middle(ours), 4),
        "baseline": round(middle(bare), 4),
        **ratio(ours, bare),
        "baseline_is": "forward, backward and optimizer step of the same network, batch in memory",
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="small", help="whose autoencoder and U-Net"
    )
    parser.add_argument("--resolution", type=int, default=256, help="side of a tile in pixels")
    parser.add_argument(
        "--base-channels", type=int, default=64, help="width of the U-Net; 0 for the preset's own"
    )
    parser.add_argument(
        "--layers-per-block", type=int, default=1, help="of the U-Net; 0 for the preset's own"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="that are timed")
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        help="of ours and of the bare pass, for each of the plain loop",
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor seconds, for a machine busy with others",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        help="of ours: auto (bf16 where the hardware has it), bf16 or no",
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
        "layers_per_block": config.layers_per_block,
        "unet_million_parameters": round(sum(p.numel() for p in unet.parameters()) / 1e6, 1),
        "batch_size": config.batch_size,
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
        "num_threads": arguments.threads,
        "clock": arguments.clock,
    }
    for figure in summarise(rounds, facts, config.batch_size):
        print(json.dumps(figure))


if __name__ == "__main__":
    main()
