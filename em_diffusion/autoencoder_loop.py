"""Training of the autoencoder."""

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import VQModel

from em_data import BatchLoader, ImageSampler, save_image_grid
from em_diffusion.autoencoder import (
    AutoencoderObjective,
    CodebookMonitor,
    create_autoencoder,
    decode,
    encode,
    move_codes,
)
from em_diffusion.optimization import create_optimizer, learning_rate_at, match_memory_format, set_learning_rate
from em_diffusion.patch_discriminator import PatchDiscriminator, update_discriminator
from em_diffusion.reconstruction import SSIM_WINDOW_PX, psnr, spectrum_error_db, ssim
from em_training import EMA, TrainingRun, make_generator, seed_for

NUM_GRID_COLUMNS = 8


def train_autoencoder(config, tiles, held_out, *, accelerator, out_dir) -> tuple[Path, float]:
    """Train the autoencoder on `tiles`, or go on from its last checkpoint; `held_out` is only looked at.

    Returns the folder of the saved `VQModel` or `AutoencoderKL`, `out_dir`/autoencoder/vqvae, and the training time in seconds. Logs the
    terms of the loss, the codebook's usage and perplexity over each window, and `evaluate_reconstruction` of held-out
    views. Sample grids are held-out originals over their reconstructions. With a half-life
    of the EMA, the averaged weights are the ones validated, drawn and saved.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "autoencoder"))
        model = create_autoencoder(config, tiles.resolution)
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    ema = EMA(model, config.ema_half_life_images) if config.ema_half_life_images > 0 else None
    averaged = ema.model if ema else model
    discriminator, optimizer_D = create_discriminator(config, accelerator.device)
    objective = AutoencoderObjective(model, config, lambda tensor: accelerator.reduce(tensor, "mean"))
    objective = objective.to(accelerator.device, memory_format=torch.channels_last)
    monitor = None
    if isinstance(model, VQModel):
        monitor = CodebookMonitor(model.quantize.n_e, config.revive_after_images, device=accelerator.device)
    optimizer = create_optimizer(group_parameters(model, config), config)
    objective = accelerator.prepare_model(objective)
    sampler = ImageSampler(tiles.num_views, seed_for(config.seed, "autoencoder data"))
    validation_images = draw_validation_images(held_out, config.num_validation_images)

    with TrainingRun(
        out_dir,
        "autoencoder",
        accelerator=accelerator,
        num_images=config.num_images,
        batch_size=config.batch_size,
        log_every=config.log_every,
        sample_every=config.sample_every,
        checkpoint_every=config.checkpoint_every,
    ) as run:
        state = {"model": model, "optimizer": optimizer}
        if monitor:
            state["codebook"] = monitor
        if ema:
            state["ema"] = ema
        if discriminator:
            state |= {"discriminator": discriminator, "optimizer_D": optimizer_D}
        num_images_seen = run.resume(state)
        match_memory_format(optimizer)
        if discriminator:
            match_memory_format(optimizer_D)
        loader = iter(
            BatchLoader(
                tiles,
                sampler,
                batch_size=config.batch_size,
                start=num_images_seen,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
        )
        while num_images_seen < config.num_images:
            generator = make_generator(config.seed, num_images_seen=num_images_seen, stream="codebook")
            images = next(loader).to(accelerator.device, memory_format=torch.channels_last)  # [B, 1, R, R]
            if num_images_seen == 0 and monitor:
                place_codebook(model, images, generator, accelerator)
                if ema:
                    ema.load_state_dict(model.state_dict())
            objective.train()
            noise = None if monitor else draw_posterior_noise(model, images, config, num_images_seen, accelerator)
            plays = discriminator is not None and num_images_seen >= config.discriminator_start_images
            loss, terms, latents, indices, loss_D = objective(images, noise, discriminator if plays else None)
            accelerator.backward(loss)
            gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            learning_rate = learning_rate_at(config, num_images_seen)
            set_learning_rate(optimizer, learning_rate)
            optimizer.step()
            optimizer.zero_grad()
            if plays:
                set_learning_rate(optimizer_D, learning_rate)
                update_discriminator(discriminator, optimizer_D, loss_D, accelerator)
            num_images_seen += config.batch_size
            if ema:
                ema.update(model, num_images_seen, config.batch_size)

            run.log(loss=loss, **terms, learning_rate=learning_rate, gradient_norm=gradient_norm)
            if monitor:
                monitor.count(indices, accelerator)
            if monitor and monitor.is_due(num_images_seen):
                run.log(codebook_usage=monitor.usage(), codebook_perplexity=monitor.perplexity())
                recent = accelerator.gather(latents) if num_images_seen <= 0.9 * config.num_images else None
                average = ema.model.quantize.embedding if ema else None
                revived = monitor.end_window(
                    model.quantize.embedding, recent, generator, optimizer, num_images_seen, average
                )
                run.log(codes_revived=revived)
            if run.is_due(config.validate_every, num_images_seen):
                run.log(**evaluate_reconstruction(averaged, validation_images, accelerator, config.batch_size))
            if run.samples_due(num_images_seen) and accelerator.is_main_process:
                originals = validation_images[:NUM_GRID_COLUMNS]
                rows = torch.cat([originals, reconstruct(averaged, originals, accelerator)])
                save_image_grid(rows, run.samples_path(num_images_seen), num_columns=len(originals))
            run.step(num_images_seen)
        train_seconds = run.finish(num_images_seen)

    path = Path(out_dir) / "autoencoder" / "vqvae"
    if accelerator.is_main_process:
        save_model(accelerator.unwrap_model(averaged, keep_fp32_wrapper=False).eval(), path)
    accelerator.wait_for_everyone()
    return path, train_seconds


def group_parameters(model, config):
    """The autoencoder's parameters as the optimizer takes them: the codes of a `VQModel` have a rate of their own."""
    codebook = model.quantize.embedding.weight if isinstance(model, VQModel) else None
    groups = [{"params": [parameter for parameter in model.parameters() if parameter is not codebook]}]
    if codebook is not None:
        groups.append({"params": [codebook], "rate_scale": config.codebook_rate_scale})
    return groups


def draw_posterior_noise(model, images, config, num_images_seen: int, accelerator):
    """Standard normal noise for the posterior of each of these images: [B, C, h, w]."""
    rank = accelerator.process_index
    generator = make_generator(config.seed, rank=rank, num_images_seen=num_images_seen, stream="posterior")
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    shape = (len(images), model.config.latent_channels, images.shape[2] // factor, images.shape[3] // factor)
    return torch.randn(shape, generator=generator).to(images.device)


def create_discriminator(config, device):
    """The patch discriminator and its Adam, or two Nones without a `discriminator_weight`; weights depend on the seed alone.

    Its rate is the autoencoder's at each moment, times the ratio of the two. Betas are those of the VQGAN, little momentum
    in a game whose other player moves.
    """
    if config.discriminator_weight == 0:
        return None, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "autoencoder discriminator"))
        discriminator = PatchDiscriminator(config.discriminator_channels, config.discriminator_layers)
    discriminator = discriminator.to(device, memory_format=torch.channels_last)
    scale = config.discriminator_learning_rate / config.learning_rate
    groups = [{"params": list(discriminator.parameters()), "rate_scale": scale}]
    return discriminator, torch.optim.Adam(groups, betas=(0.5, 0.9), fused=True)


def choose_validation_views(tiles, count: int):
    """Ids of up to `count` views, evenly spaced over all: int64 [N]."""
    return np.unique(np.linspace(0, tiles.num_views - 1, min(count, tiles.num_views)).astype(np.int64))


def draw_validation_images(tiles, count: int):
    """Up to `count` views, evenly spaced over all: float32 [N, 1, R, R]."""
    return tiles.batch(choose_validation_views(tiles, count))


@torch.no_grad()
def place_codebook(vqvae, images, generator, accelerator):
    """Put all codes onto encoder outputs of the first batch, of all processes: no code begins far from every latent."""
    vqvae.eval()
    with accelerator.autocast():
        latents = vqvae.encode(images).latents.float()
    codes = torch.arange(vqvae.quantize.n_e, device=latents.device)
    move_codes(vqvae.quantize.embedding, codes, accelerator.gather(latents), generator)


@torch.no_grad()
def reconstruct(model, images, accelerator, batch_size: int = 32):
    """Images [N, 1, R, R] in [-1, 1] through the autoencoder and back; float32 on the CPU, clamped to [-1, 1]."""
    model.eval()
    reconstructions = []
    for part in images.split(batch_size):
        part = part.to(accelerator.device, memory_format=torch.channels_last)
        with accelerator.autocast():
            decoded = decode(model, encode(model, part))
        reconstructions.append(decoded.float().clamp(-1, 1).cpu())
    return torch.cat(reconstructions)


def evaluate_reconstruction(model, images, accelerator, batch_size: int = 32) -> dict[str, float]:
    """How well images [N, 1, R, R] are reconstructed: mean absolute error, PSNR in dB, SSIM, error of the spectrum in dB.

    SSIM is left out for images smaller than its window of 11 pixels.
    """
    images = images.float()
    reconstructions = reconstruct(model, images, accelerator, batch_size)
    metrics = {
        "held_out_l1": float((reconstructions - images).abs().mean()),
        "held_out_psnr": float(psnr(images, reconstructions).mean()),
        "held_out_spectrum_error_db": spectrum_error_db(images, reconstructions),
    }
    if images.shape[-1] >= SSIM_WINDOW_PX:
        metrics["held_out_ssim"] = float(ssim(images, reconstructions).mean())
    return metrics


def save_model(model, path):
    """`model.save_pretrained(path)`, put in place whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
