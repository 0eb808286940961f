"""Training of the denoiser."""

from pathlib import Path

import torch

from em_data import BatchLoader, ImageSampler, save_image_grid
from em_diffusion.autoencoder_loop import draw_validation_images, save_model
from em_diffusion.denoiser import compute_denoising_loss, create_denoiser, create_scheduler, draw_timesteps
from em_diffusion.optimization import create_optimizer, learning_rate_at, match_memory_format, set_learning_rate
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_training import EMA, TrainingRun, make_generator, seed_for


def train_denoiser(config, latents, held_out_latents, vqvae, *, accelerator, out_dir) -> tuple[Path, float]:
    """Train the denoiser on `latents`, or go on from its last checkpoint; `held_out_latents` are only looked at.

    `vqvae` decodes the sample grids, which are drawn from the averaged weights by DDIM, always from the same noise.
    Returns the folder of the averaged `UNet2DModel`, `out_dir`/denoiser/unet, and the training time in seconds. Logs the
    loss and, on held-out latents, the averaged weights' loss, always with the same noise and timesteps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "denoiser"))
        model = create_denoiser(config, latents.shape[-1], latents.shape[0])
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    ema = EMA(model, config.ema_half_life_images)
    scheduler = create_scheduler(config)
    optimizer = create_optimizer(model.parameters(), config)
    unet = accelerator.prepare_model(model)
    sampler = ImageSampler(latents.num_views, seed_for(config.seed, "denoiser data"))
    validation_batch = draw_validation_batch(held_out_latents, config)

    with TrainingRun(
        out_dir,
        "denoiser",
        accelerator=accelerator,
        num_images=config.num_images,
        batch_size=config.batch_size,
        log_every=config.log_every,
        sample_every=config.sample_every,
        checkpoint_every=config.checkpoint_every,
    ) as run:
        num_images_seen = run.resume({"model": model, "ema": ema, "optimizer": optimizer})
        match_memory_format(optimizer)
        loader = iter(
            BatchLoader(
                latents,
                sampler,
                batch_size=config.batch_size,
                start=num_images_seen,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
        )
        while num_images_seen < config.num_images:
            generator = make_generator(config.seed, rank=accelerator.process_index, num_images_seen=num_images_seen)
            images = next(loader)  # [B, C, h, w]
            noise = torch.randn(images.shape, generator=generator)
            timesteps = draw_timesteps(len(images), config.num_train_timesteps, generator, config.timestep_density)
            unet.train()
            loss = compute_denoising_loss(unet, scheduler, *move(accelerator, images, noise, timesteps)).mean()
            accelerator.backward(loss)
            gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            learning_rate = learning_rate_at(config, num_images_seen)
            set_learning_rate(optimizer, learning_rate)
            optimizer.step()
            optimizer.zero_grad()
            num_images_seen += config.batch_size
            ema.update(model, num_images_seen, config.batch_size)

            run.log(loss=loss, learning_rate=learning_rate, gradient_norm=gradient_norm)
            if run.is_due(config.validate_every, num_images_seen):
                run.log(held_out_loss=evaluate_denoising(ema.model, scheduler, validation_batch, accelerator, config))
            if run.samples_due(num_images_seen) and accelerator.is_main_process:
                samples = draw_samples(vqvae, ema.model, scheduler, config, accelerator)
                save_image_grid(samples, run.samples_path(num_images_seen), num_columns=min(8, len(samples)))
            run.step(num_images_seen)
        train_seconds = run.finish(num_images_seen)

    path = Path(out_dir) / "denoiser" / "unet"
    if accelerator.is_main_process:
        save_model(ema.model, path)
    accelerator.wait_for_everyone()
    return path, train_seconds


def move(accelerator, *tensors):
    """The tensors on the accelerator's device, images channels-last."""
    return [
        tensor.to(accelerator.device, memory_format=torch.channels_last if tensor.dim() == 4 else torch.preserve_format)
        for tensor in tensors
    ]


def draw_validation_batch(latents, config):
    """Held-out latents with the noise and timesteps that every validation of this seed uses."""
    images = draw_validation_images(latents, config.num_validation_images)
    generator = make_generator(config.seed, stream="validation")
    noise = torch.randn(images.shape, generator=generator)
    timesteps = draw_timesteps(len(images), config.num_train_timesteps, generator, config.timestep_density)
    order = torch.randperm(len(images), generator=generator)
    return images, noise, timesteps[order]


@torch.no_grad()
def evaluate_denoising(unet, scheduler, batch, accelerator, config):
    """Mean denoising loss over `batch`, (latents, noise, timesteps)."""
    losses = []
    for part in zip(*(tensor.split(config.batch_size) for tensor in batch)):
        with accelerator.autocast():
            losses.append(compute_denoising_loss(unet, scheduler, *move(accelerator, *part)))
    return torch.cat(losses).mean()


def draw_samples(vqvae, unet, scheduler, config, accelerator):
    """Images of the current average, float32 [N, 1, R, R] in [-1, 1], each from a seed of its own."""
    pipeline = EMLatentDiffusionPipeline(vqvae, unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generators = [make_generator(config.seed, stream=f"sample {i}") for i in range(config.num_sample_images)]
    with accelerator.autocast():
        images = pipeline(
            batch_size=len(generators),
            generator=generators,
            num_inference_steps=config.num_sample_steps,
            output_type="pt",
        ).images
    return images.cpu() * 2 - 1
