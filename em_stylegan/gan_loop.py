"""Training of StyleGAN2 and 3: the loop; the losses of a step are in `em_stylegan.game`."""

from functools import partial
from pathlib import Path

import torch

from em_data import BatchLoader, ImageSampler, save_image_grid
from em_data.files import replace_folder
from em_evaluation.held_out import HeldOutDistance
from em_stylegan.game import Game, map_to_ws, share_magnitudes, update_w_means
from em_stylegan.grain import set_grain_of_tiles
from em_stylegan.losses import find_class_weight
from em_stylegan.networks import count_classes, create_networks, create_optimizer, set_trainable
from em_stylegan.transfer import start_from
from em_training import (
    EMA,
    BestWeights,
    MicroBatching,
    Prefetcher,
    TrainingRun,
    ask_main_process,
    fail_together,
    fill_cache,
    list_checkpoints,
    make_generator,
    seed_for,
    step_optimizer,
)


def train_stylegan(config, tiles, *, accelerator, out_dir, held_out=None) -> tuple[Path, float]:
    """Train StyleGAN on `tiles`, or resume from its last checkpoint.

    A step trains the discriminator on a batch and as many generated images, with R1 in every 16th
    step, then the generator on the same generated images, with path length in every 8th. Sample
    grids come from the averaged generator and always the same z and noise. With `evaluate_every`,
    logs the distance of its images to the tiles `held_out`, and keeps the best weights in
    `out_dir`/stylegan/best (`em_training.read_best`).

    Returns:
        The folder of the averaged generator, `out_dir`/stylegan/generator, and the training time in
        seconds.
    """
    training, path = config.training, Path(out_dir) / "stylegan" / "generator"
    check_batch_size(config, accelerator)
    r1_every = training.r1_every_steps
    path_length_every = training.path_length_every_steps if training.path_length_weight > 0 else 0
    networks = create_networks(config, count_classes(config, tiles))
    model, discriminator = (network.to(accelerator.device) for network in networks)
    # the ramp forgets random weights; given weights are not to be forgotten
    ramp_up = None if config.init_from else training.ema_ramp_up
    ema = EMA(model, training.ema_half_life_images, ramp_up)
    start_networks(config, model, discriminator, ema.model, accelerator, Path(out_dir))
    set_grain_of_tiles(model, tiles)  # the average copies it
    game = Game(config, model, discriminator, accelerator)
    optimizer = create_optimizer(model, training.generator_learning_rate, path_length_every)
    optimizer_D = create_optimizer(discriminator, training.discriminator_learning_rate, r1_every)
    sampler = ImageSampler(tiles.num_views, seed_for(config.seed, "stylegan data"))

    def update_D(backward, batch):
        set_trainable(discriminator, True, config.discriminator.num_frozen_layers)
        outputs = micro_batching.accumulate(backward, batch, game.parameters_D)
        return outputs, step_optimizer(accelerator, optimizer_D, game.parameters_D)

    def update_G(backward, batch):
        set_trainable(discriminator, False, 0)
        outputs = micro_batching.accumulate(backward, batch, game.parameters)
        return outputs, step_optimizer(accelerator, optimizer, game.parameters)

    with TrainingRun(out_dir, "stylegan", training, accelerator) as run:
        micro_batching = MicroBatching(
            training.micro_batch_size, run=run, flag="--training.micro-batch-size"
        )
        num_images_seen = run.resume(
            {
                "model": model,
                "discriminator": discriminator,
                "ema": ema,
                "optimizer": optimizer,
                "optimizer_D": optimizer_D,
                "path_length_mean": game.path_length_mean,
                "augmentation": game.augmentation,
                "micro_batching": micro_batching,
                "scaler": accelerator.scaler,
            }
        )
        best = create_best_weights(held_out, config, run) if training.evaluate_every else None
        batches = draw_batches(tiles, sampler, training, accelerator, num_images_seen)
        with Prefetcher(batches, accelerator.device) as batches:
            while num_images_seen < training.num_images:
                batch, step = next(batches), num_images_seen // training.batch_size
                game.start_step(num_images_seen)
                outputs_D, step_D = update_D(game.backward_D, batch)
                if r1_every and step % r1_every == 0:
                    penalties, _ = update_D(game.backward_penalty_D, batch)
                    run.log(**penalties)
                outputs_G, step_G = update_G(game.backward_G, batch)
                if path_length_every and step % path_length_every == 0:
                    outputs, _ = update_G(game.backward_path_length, batch)
                    length = accelerator.reduce(outputs["path_length"].mean(), "mean")
                    game.path_length_mean.update(length)
                    run.log(path_length=length, path_length_penalty=outputs["path_length_penalty"])
                num_images_seen += training.batch_size
                w, scores_real = outputs_D.pop("w"), outputs_D.pop("scores_real")
                update_w_means(model, w, batch.class_labels, accelerator, training.w_mean_decay)
                share_magnitudes(model, accelerator)
                if game.augmentation is not None:
                    run.log(augmentation_probability=game.p)
                    sign = accelerator.reduce(scores_real.float().sign().mean(), "mean")
                    game.augmentation.update(sign, training.batch_size)
                ema.update(model, num_images_seen, training.batch_size)
                run.log(scores_real=scores_real.mean(), scores_fake=outputs_D["scores_fake"].mean())
                losses = {"loss_G": outputs_G["loss_G"], "loss_D": outputs_D["loss_D"]}
                run.log(**losses, **game.settings)
                run.log(**{f"{name}_G": value for name, value in step_G.items()})
                run.log(**{f"{name}_D": value for name, value in step_D.items()})
                generate = partial(generate_images, ema.model, config, seen=num_images_seen)
                if best and run.is_due(training.evaluate_every, num_images_seen):
                    distance = measure(best, ema.model, generate, config, num_images_seen)
                    run.log(held_out_frechet_distance=distance, **best.distance.curves)
                if run.samples_due(num_images_seen) and accelerator.is_main_process:
                    samples = generate(range(training.num_sample_images))
                    save_image_grid(samples, run.samples_path(num_images_seen))
                run.step(num_images_seen)
        train_seconds = run.finish(num_images_seen)

    with fail_together(accelerator):
        if accelerator.is_main_process:
            save_generator(ema.model, path)
    return path, train_seconds


def start_networks(config, model, discriminator, average, accelerator, out):
    """Load the weights of `init_from` into the networks of a new run, and record them."""
    folder = out / "stylegan" / "checkpoints"
    if config.init_from is None or ask_main_process(accelerator, lambda: list_checkpoints(folder)):
        return
    recorded = out if accelerator.is_main_process else None
    fill_cache(
        accelerator,
        lambda: start_from(config, model, discriminator, average, accelerator.print, recorded),
    )


def save_generator(model, path):
    """Save a generator in place of what `path` held."""
    with replace_folder(path) as folder:
        model.save_pretrained(folder)


def check_batch_size(config, accelerator) -> None:
    """Raise `ValueError` if processes or the discriminator's groups do not divide the batch."""
    batch_size, num_processes = config.training.batch_size, accelerator.num_processes
    group_size = config.discriminator.group_size
    local = batch_size // num_processes
    if batch_size % num_processes or local % min(group_size, local):
        raise ValueError(
            f"training.batch_size is {batch_size}, but must be a multiple of "
            f"{num_processes * group_size} ({num_processes} processes, discriminator groups of "
            f"{group_size}). Use --training.batch-size."
        )


def draw_batches(tiles, sampler, training, accelerator, num_images_seen):
    """Yield this process's batches from `num_images_seen` on."""
    yield from BatchLoader(
        tiles,
        sampler,
        batch_size=training.batch_size,
        start=num_images_seen,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def create_best_weights(held_out, config, run):
    """Create what measures images against `held_out` and keeps the best generator."""
    distance = HeldOutDistance(
        held_out,
        config.training.num_evaluation_images,
        seed_for(config.seed, "held-out distance"),
        accelerator=run.accelerator,
        metrics=config.training.evaluation_metrics,
        say=run.say,
    )
    return BestWeights(distance, run, "generator")


def measure(best, model, generate, config, num_images_seen):
    """Return the distance to held-out images; keep the best weights once classes count in full."""
    if model.config.num_classes and num_images_seen < config.training.class_ramp_images[1]:
        return best.distance.measure(generate)
    return best.update(model, generate, num_images_seen)


@torch.no_grad()
def generate_images(model, config, numbers, seen=None):
    """Generate the images of these numbers, float32 [N, 1, R, R] on the CPU, with fresh noise.

    Each image depends on the seed and its number alone. Classes take turns; `seen` is the number of
    images that the training has seen, on which their weight depends. Default: their full weight.
    """
    num_classes = model.config.num_classes
    weight = 1.0 if seen is None else find_class_weight(seen, config.training.class_ramp_images)
    images = []
    for start in range(0, len(numbers), config.training.batch_size):
        part = numbers[start : start + config.training.batch_size]
        rngs = [make_generator(config.seed, stream=f"evaluation {number}") for number in part]
        z = torch.stack([torch.randn(config.generator.z_dim, generator=rng) for rng in rngs])
        labels = [number % num_classes for number in part] if num_classes else None
        ws = map_to_ws(model, z.to(model.device), labels, weight)
        images.append(model.synthesis(ws, "random", rngs).cpu())
    return torch.cat(images)
