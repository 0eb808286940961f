"""Training of unpaired translation: the loop, and what measures and shows its images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from em_cyclegan.image_pool import ImagePool
from em_cyclegan.losses import Game
from em_cyclegan.networks import (
    Translators,
    create_networks,
    create_optimizer,
    learning_rate_at,
    set_learning_rate,
)
from em_data import BatchLoader, ImageSampler, Tiles, save_image_grid
from em_data.files import replace_folder
from em_data.sampler import make_permutation
from em_evaluation.held_out import HeldOutDistance
from em_training import (
    EMA,
    BestWeights,
    Prefetcher,
    TrainingRun,
    fail_together,
    make_generator,
    run_in_parts,
    seed_for,
    step_optimizer,
)

STAGE = "cyclegan"
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Unpaired:
    """Images of the two domains, which have nothing to do with each other.

    a, b: Float32 [B, 1, R, R] in [-1, 1].
    """

    a: torch.Tensor
    b: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Unpaired":
        """Return a batch of `function` of both."""
        return Unpaired(function(self.a), function(self.b))


@dataclass(frozen=True)
class Domains:
    """One side of the split of both sources: a is translated to b."""

    a: Tiles
    b: Tiles


def train_translation(
    config, domains: Domains, *, accelerator, out_dir, held_out: Domains
) -> tuple[Path, float]:
    """Train the translation from `domains.a` to `domains.b`, or resume from its last checkpoint.

    A step trains the generators on a batch of each domain, then the discriminators on the images
    that the pools return for the generated ones. Sample grids show held-out tiles of the source,
    their translations by the averaged generator, and held-out tiles of the target. With
    `evaluate_every`, the distance of translated to target tiles, both held out, is logged beside
    that of the tiles before translation, and the best weights are kept.

    Returns:
        The folder of the averaged generators, `out_dir`/cyclegan/generators, and the training time
        in seconds.
    """
    training, path = config.training, Path(out_dir) / STAGE / "generators"
    networks = create_networks(config, accelerator.device)
    game = Game(config, networks, accelerator)
    ema = EMA(networks.generators, training.ema_half_life_images, training.ema_ramp_up)
    optimizer = create_optimizer(game.parameters, training.learning_rate)
    optimizer_D = create_optimizer(game.parameters_D, training.learning_rate)
    pools = create_pools(config, networks, accelerator)

    with TrainingRun(out_dir, STAGE, training, accelerator) as run:
        num_images_seen = run.resume(
            {
                "generators": networks.generators,
                "discriminators": networks.discriminators,
                "projection": networks.projection,
                "ema": ema,
                "optimizer": optimizer,
                "optimizer_D": optimizer_D,
                **{f"pool_{domain}": pool for domain, pool in pools.items()},
            }
        )
        translate = create_translation(ema.model, held_out.a, config, accelerator)
        best = create_best_weights(config, held_out, run) if training.evaluate_every else None
        before = measure_untranslated(best, held_out.a, config, run)
        batches = draw_batches(config, domains, accelerator, num_images_seen)
        with Prefetcher(batches, accelerator.device) as batches:
            while num_images_seen < training.num_images:
                batch = next(batches)
                for each in (optimizer, optimizer_D):
                    set_learning_rate(each, learning_rate_at(training, num_images_seen))
                losses, generated = game.backward_G(batch, num_images_seen)
                step_G = step_optimizer(accelerator, optimizer, game.parameters)
                shown = exchange(pools, generated, config, accelerator, num_images_seen)
                losses |= game.backward_D({"a": batch.a, "b": batch.b}, shown)
                step_D = step_optimizer(accelerator, optimizer_D, game.parameters_D)
                num_images_seen += training.batch_size
                ema.update(networks.generators, num_images_seen, training.batch_size)

                run.log(**losses)
                run.log(**{f"{name}_G": value for name, value in step_G.items()})
                run.log(**{f"{name}_D": value for name, value in step_D.items()})
                if best and run.is_due(training.evaluate_every, num_images_seen):
                    distance = best.update(ema.model, translate, num_images_seen)
                    run.log(held_out_frechet_distance=distance, **before, **best.distance.curves)
                if run.samples_due(num_images_seen) and accelerator.is_main_process:
                    save_samples(translate, held_out, config, run.samples_path(num_images_seen))
                run.step(num_images_seen)
        train_seconds = run.finish(num_images_seen)

    with fail_together(accelerator):
        if accelerator.is_main_process:
            save_generators(ema.model, path)
    return path, train_seconds


def save_generators(model: nn.Module, path: Path) -> None:
    """Save generators in place of what `path` held."""
    assert isinstance(model, Translators)
    with replace_folder(path) as folder:
        model.save_pretrained(folder)


def check_batch_size(config, accelerator) -> None:
    """Raise `ValueError` if the processes do not divide the batch."""
    batch_size, num_processes = config.training.batch_size, accelerator.num_processes
    if batch_size % num_processes:
        raise ValueError(
            f"training.batch_size is {batch_size}, but must be a multiple of the {num_processes} "
            "processes. Use --training.batch-size."
        )


def draw_batches(config, domains: Domains, accelerator, num_images_seen: int):
    """Yield this process's batches of both domains from `num_images_seen` on."""
    loaders = []
    for name, tiles in (("a", domains.a), ("b", domains.b)):
        sampler = ImageSampler(tiles.num_views, seed_for(config.seed, f"cyclegan data {name}"))
        loaders.append(
            BatchLoader(
                tiles,
                sampler,
                batch_size=config.training.batch_size,
                start=num_images_seen,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
        )
    for a, b in zip(*loaders):
        yield Unpaired(a.images, b.images)


def create_pools(config, networks, accelerator) -> dict[str, ImagePool]:
    """Create a pool for each domain that has a discriminator."""
    shape = (1, config.tiles.resolution, config.tiles.resolution)
    size, device = config.training.pool_size, accelerator.device
    return {
        domain: ImagePool(size, shape, device)
        for domain in ("a", "b")
        if domain in networks.discriminators
    }


def exchange(pools, generated, config, accelerator, num_images_seen) -> dict[str, torch.Tensor]:
    """Return the images that the pools give for generated ones, both by their domain.

    The images of all processes go through the same pool, which every process holds.
    """
    shown = {}
    for domain, images in generated.items():
        rng = make_generator(config.seed, num_images_seen=num_images_seen, stream=f"pool {domain}")
        everywhere = accelerator.gather(images.float().contiguous())
        start = accelerator.process_index * len(images)
        shown[domain] = pools[domain].exchange(everywhere, rng)[start : start + len(images)]
    return shown


def create_best_weights(config, held_out: Domains, run) -> BestWeights:
    """Create what measures translated tiles against the target's and keeps the best weights."""
    training = config.training
    distance = HeldOutDistance(
        held_out.b,
        training.num_evaluation_images,
        seed_for(config.seed, "held-out distance"),
        accelerator=run.accelerator,
        metrics=training.evaluation_metrics,
        say=run.say,
    )
    return BestWeights(distance, run, "generators")


def measure_untranslated(best, tiles: Tiles, config, run) -> dict[str, float]:
    """Return the distance of held-out tiles of the source before translation, for the log."""
    if best is None:
        return {}
    order = draw_order(tiles, config)
    value = best.distance.measure(lambda numbers: read_numbers(tiles, order, numbers))
    run.say(f"Frechet distance of the source to the target before translation: {value:.3g}")
    return {"untranslated_frechet_distance": value}


def draw_order(tiles: Tiles, config) -> np.ndarray:
    """Return the order in which held-out tiles of the source are measured and shown."""
    return make_permutation(tiles.num_views, seed_for(config.seed, "held-out source"))


def read_numbers(tiles: Tiles, order: np.ndarray, numbers) -> torch.Tensor:
    """Return the tiles of these numbers, float32 [N, 1, R, R]; after the last one, the first."""
    return tiles.batch(order[np.asarray(numbers, dtype=np.int64) % len(order)])


def create_translation(generators, tiles: Tiles, config, accelerator) -> Callable:
    """Return a function: numbers of tiles of the source -> translations [N, 1, R, R] on the CPU."""
    order = draw_order(tiles, config)

    def translate(numbers):
        def compute(images):
            images = images.to(accelerator.device, memory_format=torch.channels_last)
            with accelerator.autocast():
                return generators["a_to_b"](images).float().clamp(-1, 1).cpu()

        return run_in_parts(compute, read_numbers(tiles, order, numbers), size=EVALUATION_BATCH)

    return translate


def save_samples(translate, held_out: Domains, config, path: Path) -> None:
    """Save a grid: tiles of the source, their translations below them, tiles of the target."""
    numbers = range(config.training.num_sample_images)
    source = read_numbers(held_out.a, draw_order(held_out.a, config), numbers)
    target = read_numbers(held_out.b, draw_order(held_out.b, config), numbers)
    rows = torch.cat([source, translate(numbers), target])
    save_image_grid(rows, path, num_columns=len(numbers), min_width=512)
