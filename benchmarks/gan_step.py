"""Compare the seconds of a StyleGAN2 training step, ours and the textbook's, in one run.

    python benchmarks/gan_step.py [--resolutions 64 256] [--threads 2 --clock wall]

Ours is `train_stylegan` itself, stopped between two steps: data, both updates, lazy R1 and path
length, average of the weights, log. The textbook (textbook_stylegan2.py) computes the same networks
straight from the equations, with its images in memory. Each side has its own process and waits
while the other one works. Our feature maps are bfloat16 if the hardware multiplies it, as in
training. Both have the same weights. Images, logits and the gradients of all four losses are
compared first, in float32.

A round has every kind of step: ours has R1 in every 4th step and path length in every 2nd, the
textbook one of each. Means are weighted as in training: R1 in every 16th step, path length in every
8th. Prints one JSON line per resolution, with medians over rounds.

With many feature maps the ratio falls, because both sides then spend their time in the same 3 x 3
convolutions. The default is that of the preset `demo`: 64 maps at the lowest resolutions, 16 at the
highest.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import textbook_stylegan2 as textbook
import torch
from train_step import LoopInSteps, make_clock

from em_data import DataConfig, load_data
from em_stylegan import game, gan_loop, losses, networks
from em_stylegan.config import DiscriminatorConfig, GeneratorConfig, StyleGANConfig
from em_stylegan.presets import demo
from em_stylegan.second_derivatives import second_derivatives
from em_training import create_accelerator, make_generator

# our steps, with R1 in every 4th and path length in every 2nd
KINDS = ("r1 and path length", "plain", "path length", "plain")
R1_EVERY, PATH_LENGTH_EVERY = 16, 8


def prepare(arguments, resolution, folder):
    """Return the configuration and its tiles."""
    channel_base = arguments.channel_base or 16 * resolution
    tiles = DataConfig(
        resolution=resolution, num_micrographs=4, micrograph_size=2 * resolution, cache_dir=folder
    )
    batch_size = arguments.batch_size or max(4, 1024 // resolution)
    preset = demo()
    num_images = batch_size * (4 * (arguments.rounds + 1) + 2)  # the loop never comes to its end
    training = replace(
        preset.training,
        batch_size=batch_size,
        num_images=num_images,
        r1_every_steps=4,
        path_length_every_steps=2,
        path_length_weight=2.0,
        num_sample_images=1,
        log_every=num_images,
        sample_every=0,
        checkpoint_every=num_images,
    )
    config = StyleGANConfig(
        tiles=tiles,
        generator=GeneratorConfig(
            z_dim=64, w_dim=64, channel_base=channel_base, max_channels=arguments.max_channels
        ),
        discriminator=DiscriminatorConfig(
            channel_base=channel_base, max_channels=arguments.max_channels
        ),
        training=training,
    )
    return config, load_data("synthetic", tiles, log=lambda line: None).train


def compare(model, discriminator, plain, images, config) -> dict:
    """Return relative differences of images, logits, and the gradients of each loss."""
    generator = make_generator(0)
    batch_size = min(config.training.batch_size, 4)
    _, ws = game.draw_ws(model, batch_size, 0.9, generator)
    ws = ws.detach()
    images = images[:batch_size]
    noise = torch.randn(images.shape, generator=generator)
    leaf = ws.clone().requires_grad_()

    def evaluate(synthesise, judge, model_weights, judge_weights, r1, lengths, loss_G, loss_D):
        fake = synthesise(ws)
        real_scores, fake_scores = judge(images), judge(fake)
        values = {"images": [fake], "logits": [real_scores, fake_scores]}
        targets = {
            "gradients of loss_G": (loss_G(fake_scores), model_weights),
            "gradients of loss_D": (loss_D(real_scores, judge(fake.detach())), judge_weights),
            "gradients of R1": (r1().mean(), judge_weights),
            "gradients of path length": (lengths().square().mean(), model_weights),
        }
        for name, (loss, weights) in targets.items():
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
            values[name] = [loss, *(torch.zeros(()) if g is None else g for g in gradients)]
        return {
            name: torch.cat([value.detach().flatten() for value in parts])
            for name, parts in values.items()
        }

    def our_r1():
        inputs = images.clone().requires_grad_()
        with second_derivatives():
            return losses.r1_penalty(discriminator(inputs), inputs)

    def our_path_lengths():
        with second_derivatives():
            return losses.path_lengths(model.synthesis(leaf, "const"), leaf, noise)

    ours = evaluate(
        lambda ws: model.synthesis(ws, "const"), discriminator,
        weights_of(model), weights_of(discriminator), our_r1, our_path_lengths,
        losses.generator_loss, losses.discriminator_loss,
    )  # fmt: skip
    theirs = evaluate(
        lambda ws: plain.model.synthesis(ws, False), plain.discriminator,
        weights_of(plain.model, model), weights_of(plain.discriminator, discriminator),
        lambda: textbook.r1_penalty(plain.discriminator, images),
        lambda: textbook.path_lengths(plain.model, leaf, noise, False),
        textbook.generator_loss, textbook.discriminator_loss,
    )  # fmt: skip
    return {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours}


def weights_of(network, order=None):
    """Return the parameters in the order of `order`, the same network in other code."""
    named = dict(network.named_parameters())
    return [named[name] for name, _ in (order or network).named_parameters()]


def measure(config, tiles, accelerator, arguments, folder):
    """Return relative differences, and for each round the seconds of each kind of step."""
    model, discriminator = networks.create_networks(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.1)
    images = tiles.batch(np.arange(min(32, tiles.num_views)))
    torch.manual_seed(0)
    plain = textbook.TextbookTraining(model, discriminator, images, config)
    differences = compare(model, discriminator, plain, images, config)
    clock = make_clock(arguments.clock, accelerator.device)
    baseline = TextbookProcess(model, discriminator, images, config, arguments)
    ours = LoopInSteps(
        lambda: gan_loop.train_stylegan(config, tiles, accelerator=accelerator, out_dir=folder),
        arguments.threads,
        gan_loop,
    )
    rounds = []
    for number in range(-1, arguments.rounds):  # the first warms up
        seconds = {}
        for i in range(len(KINDS)):
            step = (4 * (number + 1) + i + 1) % 4  # construction trained the first one
            seconds.setdefault(KINDS[step], []).append(time_call(clock, ours.step))
            if i < 2:
                seconds.setdefault("textbook main", []).append(baseline.time("main"))
        seconds["textbook r1"] = [baseline.time("r1")]
        seconds["textbook path length"] = [baseline.time("path_length")]
        if number >= 0:
            rounds.append({name: statistics.mean(values) for name, values in seconds.items()})
    ours.stop()
    baseline.stop()
    return differences, rounds


class TextbookProcess:
    """The textbook's training in its own process, which waits while ours works."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve_textbook, args=(other, *arguments), daemon=True)
        self.process.start()
        other.close()

    def time(self, part) -> float:
        """Return the seconds of one `part` of `TextbookTraining`."""
        self.connection.send(part)
        return self.connection.recv()

    def stop(self):
        self.connection.send(None)
        self.process.join()


def serve_textbook(connection, model, discriminator, images, config, arguments):
    """Answer each name of a part with its seconds."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    training = textbook.TextbookTraining(model, discriminator, images, config)
    clock = make_clock(arguments.clock, images.device)
    while (part := connection.recv()) is not None:
        connection.send(time_call(clock, getattr(training, part)))


def time_call(clock, function):
    start = clock()
    function()
    return clock() - start


def summarise(differences, rounds, facts):
    """Return the line of a resolution."""
    ours = [
        (r["r1 and path length"] + (R1_EVERY // PATH_LENGTH_EVERY - 1) * r["path length"]
         + (R1_EVERY - R1_EVERY // PATH_LENGTH_EVERY) * r["plain"]) / R1_EVERY
        for r in rounds
    ]  # fmt: skip
    plain = [
        r["textbook main"]
        + r["textbook r1"] / R1_EVERY
        + r["textbook path length"] / PATH_LENGTH_EVERY
        for r in rounds
    ]
    ratios = [b / a for a, b in zip(ours, plain)]
    return {
        "name": "StyleGAN2 training step, seconds",
        "ours": round(statistics.median(ours), 4),
        "baseline": round(statistics.median(plain), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "baseline_is": "grouped convolution a sample, explicit zeros and padding, filters apart, "
        "float32, eager",
        "seconds": {
            name: round(statistics.median(r[name] for r in rounds), 4) for name in rounds[0]
        },
        "relative_differences": {
            name: float(f"{value:.2e}") for name, value in differences.items()
        },
        **facts,
    }


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--resolutions", type=int, nargs="+", default=[64, 256], help="sides of the image in pixels"
    )
    parser.add_argument(
        "--channel-base", type=int, default=0, help="feature maps at side r are this / r; 0: 16 r"
    )
    parser.add_argument("--max-channels", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=0, help="0: 16 at 64 pixels, 4 at 256")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument(
        "--precision",
        default="auto",
        help="of ours: auto (bf16 where the hardware has it), bf16 or no",
    )
    parser.add_argument("--rounds", type=int, default=5, help="that are timed")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="cpu",
        help="cpu: processor seconds, for a busy machine",
    )
    return parser.parse_args(argv)


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    for resolution in arguments.resolutions:
        with tempfile.TemporaryDirectory() as folder:
            config, tiles = prepare(arguments, resolution, folder)
            accelerator = create_accelerator(folder, arguments.precision)
            differences, rounds = measure(
                config, tiles, accelerator, arguments, Path(folder) / "run"
            )
        facts = {
            "resolution": resolution,
            "channel_base": config.generator.channel_base,
            "max_channels": config.generator.max_channels,
            "batch_size": config.training.batch_size,
            "device": accelerator.device.type,
            "precision": accelerator.mixed_precision,
            "num_threads": arguments.threads,
            "clock": arguments.clock,
        }
        print(json.dumps(summarise(differences, rounds, facts)), flush=True)


if __name__ == "__main__":
    main()
