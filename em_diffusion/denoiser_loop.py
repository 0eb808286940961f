"""Training of the denoiser."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from em_data import BatchLoader, ImageSampler, save_image_grid
from em_diffusion.autoencoder import hash_weights
from em_diffusion.autoencoder_loop import draw_validation_images, save_model
from em_diffusion.denoiser import (
    compute_denoising_loss,
    compute_min_snr_weights,
    create_denoiser,
    create_scheduler,
    draw_timesteps,
)
from em_diffusion.optimization import (
    create_optimizer,
    learning_rate_at,
    set_learning_rate,
)
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_evaluation.held_out import HeldOutDistance
from em_training import (
    EMA,
    BestWeights,
    MicroBatching,
    PosthocEMA,
    Prefetcher,
    TrainingRun,
    make_generator,
    run_in_parts,
    seed_for,
    step_optimizer,
)


def train_denoiser(
    config, latents, held_out_latents, vqvae, *, accelerator, out_dir, held_out=None, grain=None
) -> tuple[Path, float]:
    """Train the denoiser on `latents`, or go on from its last checkpoint; `held_out_latents` are only looked at.

    `vqvae` decodes the sample grids, and `grain`, where there is one, adds the noise that it leaves out. They are drawn from the
    averaged weights by the scheduler that is saved with them, always from the same noise. Returns the folder of the averaged
    U-Net, `out_dir`/denoiser/unet, and the training time in seconds. Logs the loss and, on held-out latents, the averaged
    weights' loss, always with the same noise and timesteps; with `config.evaluate_every` also the distance of generated images
    to the tiles `held_out`, and keeps the weights that came nearest in `out_dir`/denoiser/best (`em_training.read_best`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "denoiser"))
        model = create_denoiser(config, latents.shape[-1], latents.shape[0])
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    ema = EMA(model, config.ema_half_life_images)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    scheduler = create_scheduler(config)
    parameters = list(model.train().parameters())
    optimizer = create_optimizer(parameters, config)
    sampler = ImageSampler(latents.num_views, seed_for(config.seed, "denoiser data"))
    validation_batch = draw_validation_batch(held_out_latents, config)

    with TrainingRun(out_dir, "denoiser", config, accelerator) as run:
        micro_batching = MicroBatching(
            config.micro_batch_size, run=run, flag="--denoiser.micro-batch-size"
        )
        posthoc_ema = (
            PosthocEMA(model, run.dir / "posthoc_ema") if config.posthoc_ema_every else None
        )
        num_images_seen = run.resume(
            {
                "model": model,
                "ema": ema,
                "optimizer": optimizer,
                "posthoc_ema": posthoc_ema,
                "micro_batching": micro_batching,
                "scaler": accelerator.scaler,
            }
        )
        if posthoc_ema and accelerator.is_main_process:
            posthoc_ema.drop_snapshots_after(num_images_seen)
        best = create_best_weights(held_out, config, run, grain) if config.evaluate_every else None
        generate = partial(
            generate_images, vqvae, ema.model, scheduler, accelerator, config.seed, grain=grain
        )

        def backward(part, share):
            with accelerator.autocast():
                losses = compute_denoising_loss(
                    network, scheduler, part.images, part.noise, part.timesteps
                )  # [B]
            if config.min_snr_gamma:
                losses = losses * compute_min_snr_weights(
                    scheduler, part.timesteps, config.min_snr_gamma
                )
            loss = losses.mean()
            accelerator.backward(loss * share)
            return {"loss": loss}

        network = torch.compile(model) if config.compile else model
        batches = draw_batches(latents, sampler, config, accelerator, num_images_seen)
        with Prefetcher(batches, accelerator.device) as batches:
            while num_images_seen < config.num_images:
                outputs = micro_batching.accumulate(backward, next(batches), parameters)
                learning_rate = learning_rate_at(config, num_images_seen)
                set_learning_rate(optimizer, learning_rate)
                step = step_optimizer(accelerator, optimizer, parameters, config.max_grad_norm)
                num_images_seen += config.batch_size
                ema.update(model, num_images_seen, config.batch_size)
                if posthoc_ema:
                    posthoc_ema.update(num_images_seen, config.batch_size)
                    if (
                        run.is_due(config.posthoc_ema_every, num_images_seen)
                        and accelerator.is_main_process
                    ):
                        posthoc_ema.save_snapshot(num_images_seen)

                run.log(**outputs, learning_rate=learning_rate, **step)
                if run.is_due(config.validate_every, num_images_seen):
                    run.log(
                        **evaluate_denoising(
                            ema.model, scheduler, validation_batch, accelerator, config
                        )
                    )
                if run.is_due(config.evaluate_every, num_images_seen):
                    generate_evaluation = partial(
                        generate, num_steps=config.num_evaluation_steps, stream="evaluation"
                    )
                    run.log(
                        held_out_frechet_distance=best.update(
                            ema.model, generate_evaluation, num_images_seen
                        )
                    )
                    run.log(
                        **{
                            f"held_out_{name}": value
                            for name, value in best.distance.further.items()
                        }
                    )
                if run.samples_due(num_images_seen) and accelerator.is_main_process:
                    samples = generate(range(config.num_sample_images), config.num_sample_steps)
                    save_image_grid(
                        samples, run.samples_path(num_images_seen), num_columns=min(8, len(samples))
                    )
                run.step(num_images_seen)
        train_seconds = run.finish(num_images_seen)

    path = Path(out_dir) / "denoiser" / "unet"
    if accelerator.is_main_process:
        save_model(ema.model, path)
    accelerator.wait_for_everyone()
    return path, train_seconds


def create_best_weights(held_out, config, run, grain):
    """What measures the distance to `held_out` during training, of images with `grain` if there is one, and keeps the best U-Net."""
    seed = seed_for(config.seed, "held-out distance")
    distance = HeldOutDistance(
        held_out,
        config.num_evaluation_images,
        seed,
        accelerator=run.accelerator,
        metrics=config.evaluation_metrics,
        say=run.say,
    )
    grain_sha256 = None if grain is None else hash_weights(grain)
    return BestWeights(
        distance,
        run,
        "unet",
        num_inference_steps=config.num_evaluation_steps,
        grain_sha256=grain_sha256,
    )


def draw_batches(latents, sampler, config, accelerator, num_images_seen):
    """Yield this process's batches of latents from `num_images_seen` on, with noise and timesteps."""
    rank = accelerator.process_index
    loader = BatchLoader(
        latents,
        sampler,
        batch_size=config.batch_size,
        start=num_images_seen,
        rank=rank,
        world_size=accelerator.num_processes,
    )
    for batch in loader:
        generator = make_generator(config.seed, rank=rank, num_images_seen=num_images_seen)
        noise, timesteps = draw_noise(batch.images.shape, config, generator)
        yield replace(batch, noise=noise, timesteps=timesteps)
        num_images_seen += config.batch_size


def draw_noise(shape, config, generator):
    """Noise of `shape` and a timestep for each image, as `config` draws them."""
    noise = torch.randn(shape, generator=generator)
    is_flow = config.prediction_type == "flow"
    return noise, draw_timesteps(
        shape[0], config.num_train_timesteps, generator, config.timestep_density, is_flow
    )


def draw_validation_batch(latents, config):
    """Held-out latents with the noise and timesteps that every validation of this seed uses."""
    images = draw_validation_images(latents, config.num_validation_images)
    generator = make_generator(config.seed, stream="validation")
    noise, timesteps = draw_noise(images.shape, config, generator)
    order = torch.randperm(len(images), generator=generator)
    return images, noise, timesteps[order]


@torch.no_grad()
def evaluate_denoising(unet, scheduler, batch, accelerator, config) -> dict:
    """Mean denoising loss over `batch`, (latents, noise, timesteps), without weights: {"held_out_loss": over all,
    "held_out_loss_q1" to "..._q4": over the quarters of the timesteps, from the least noise to the most, that have any}."""

    def compute_losses(images, noise, timesteps):
        images, noise = (
            x.to(accelerator.device, memory_format=torch.channels_last) for x in (images, noise)
        )
        with accelerator.autocast():
            return compute_denoising_loss(
                unet, scheduler, images, noise, timesteps.to(accelerator.device)
            )

    losses = run_in_parts(compute_losses, *batch, size=config.batch_size)  # [N]
    quarters = (batch[2] * 4 / config.num_train_timesteps).long().clamp(max=3)  # [N]
    means = {"held_out_loss": losses.mean()}
    for quarter in quarters.unique().tolist():
        means[f"held_out_loss_q{quarter + 1}"] = losses[
            (quarters == quarter).to(losses.device)
        ].mean()
    return means


def generate_images(
    vqvae,
    unet,
    scheduler,
    accelerator,
    seed,
    numbers,
    num_steps,
    *,
    grain=None,
    stream="sample",
    batch_size: int = 32,
):
    """Images of these numbers by the sampler `scheduler`, float32 [N, 1, R, R] in [-1, 1]: each depends on seed and number alone."""
    pipeline = EMLatentDiffusionPipeline(vqvae, unet, scheduler, grain=grain)
    pipeline.set_progress_bar_config(disable=True)

    def generate(numbers):
        generators = [
            make_generator(seed, stream=f"{stream} {number}") for number in numbers.tolist()
        ]
        with accelerator.autocast():
            images = pipeline(
                batch_size=len(generators),
                generator=generators,
                num_inference_steps=num_steps,
                output_type="pt",
            ).images
        return images.cpu() * 2 - 1

    return run_in_parts(generate, torch.tensor(numbers), size=batch_size)
