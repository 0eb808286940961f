"""Training of the autoencoder."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from em_data import BatchLoader, ImageSampler, save_image_grid
from em_diffusion.autoencoder import (
    AutoencoderObjective,
    CodebookMonitor,
    create_autoencoder,
    decode,
    encode,
    has_codebook,
    is_trainable,
    move_codes,
)
from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.optimization import (
    create_optimizer,
    learning_rate_at,
    set_learning_rate,
)
from em_diffusion.patch_discriminator import PatchDiscriminator
from em_diffusion.reconstruction import SSIM_WINDOW_PX, psnr, spectrum_error_db, ssim
from em_training import (
    EMA,
    MicroBatching,
    Prefetcher,
    TrainingRun,
    average_gradients,
    make_generator,
    run_in_parts,
    seed_for,
    step_optimizer,
    write_text_atomically,
)

NUM_GRID_COLUMNS = 8


def train_autoencoder(config, tiles, held_out, *, accelerator, out_dir) -> tuple[Path, float]:
    """Train the autoencoder on `tiles`, or go on from its last checkpoint; `held_out` is only looked at.

    Returns the folder of the saved model, `out_dir`/autoencoder/vqvae, and the training time in seconds. Logs the terms of
    the loss, the codebook's usage and perplexity over each window, and `evaluate_reconstruction` of held-out views. Sample
    grids are held-out originals over their reconstructions. With a half-life of the EMA, the averaged weights are the ones
    validated, drawn and saved. With `num_images` 0, the autoencoder of `init_from` is saved as it is, whatever its kind.
    """
    model = build_autoencoder(config, tiles.resolution, accelerator)
    validation_images = draw_validation_images(held_out, config.num_validation_images)
    path = Path(out_dir) / "autoencoder" / "vqvae"
    if config.num_images == 0:
        write_only_line(
            path.parent,
            evaluate_reconstruction(model, validation_images, accelerator, config.batch_size),
        )
        return save_autoencoder(model, path, accelerator), 0.0

    ema = EMA(model, config.ema_half_life_images) if config.ema_half_life_images > 0 else None
    averaged = ema.model if ema else model
    discriminator, optimizer_D = create_discriminator(config, accelerator.device)
    objective = AutoencoderObjective(model, config).to(
        accelerator.device, memory_format=torch.channels_last
    )
    parameters = list(model.parameters())
    optimizer = create_optimizer(group_parameters(model, config), config)
    monitor = None
    if has_codebook(model):
        monitor = CodebookMonitor(
            model.quantize.n_e, config.revive_after_images, device=accelerator.device
        )
    sampler = ImageSampler(tiles.num_views, seed_for(config.seed, "autoencoder data"))

    with TrainingRun(out_dir, "autoencoder", config, accelerator) as run:
        micro_batching = MicroBatching(
            config.micro_batch_size, run=run, flag="--autoencoder.micro-batch-size"
        )
        num_images_seen = run.resume(
            {
                "model": model,
                "ema": ema,
                "optimizer": optimizer,
                "codebook": monitor,
                "discriminator": discriminator,
                "optimizer_D": optimizer_D,
                "micro_batching": micro_batching,
                "scaler": accelerator.scaler,
            }
        )
        batches = draw_batches(tiles, sampler, model, config, accelerator, num_images_seen)
        with Prefetcher(batches, accelerator.device) as batches:
            while num_images_seen < config.num_images:
                generator = make_generator(
                    config.seed, num_images_seen=num_images_seen, stream="codebook"
                )
                batch = next(batches)
                if num_images_seen == 0 and monitor and config.init_from is None:
                    place_codebook(model, batch.images, generator, accelerator)
                    if ema:
                        ema.load_state_dict(model.state_dict())
                plays = (
                    discriminator is not None
                    and num_images_seen >= config.discriminator_start_images
                )
                players = [*parameters, *discriminator.parameters()] if plays else parameters
                objective.train()
                backward = make_step(objective, discriminator if plays else None, accelerator)
                outputs = micro_batching.accumulate(backward, batch, players)
                learning_rate = learning_rate_at(config, num_images_seen)
                if plays:
                    set_learning_rate(optimizer_D, learning_rate)
                    step_discriminator(accelerator, optimizer_D)
                set_learning_rate(optimizer, learning_rate)
                step = step_optimizer(accelerator, optimizer, parameters, config.max_grad_norm)
                num_images_seen += config.batch_size
                if ema:
                    ema.update(model, num_images_seen, config.batch_size)

                latents, indices = outputs.pop("latents"), outputs.pop("indices", None)
                run.log(**outputs, learning_rate=learning_rate, **step)
                if monitor:
                    monitor.count(indices, accelerator)
                if monitor and monitor.is_due(num_images_seen):
                    run.log(
                        codebook_usage=monitor.usage(), codebook_perplexity=monitor.perplexity()
                    )
                    recent = (
                        accelerator.gather(latents)
                        if num_images_seen <= 0.9 * config.num_images
                        else None
                    )
                    average = ema.model.quantize.embedding if ema else None
                    codes = model.quantize.embedding
                    revived = monitor.end_window(
                        codes, recent, generator, optimizer, num_images_seen, average
                    )
                    run.log(codes_revived=revived)
                if run.is_due(config.validate_every, num_images_seen):
                    run.log(
                        **evaluate_reconstruction(
                            averaged, validation_images, accelerator, config.batch_size
                        )
                    )
                if run.samples_due(num_images_seen) and accelerator.is_main_process:
                    originals = validation_images[:NUM_GRID_COLUMNS]
                    rows = torch.cat([originals, reconstruct(averaged, originals, accelerator)])
                    save_image_grid(
                        rows, run.samples_path(num_images_seen), num_columns=len(originals)
                    )
                run.step(num_images_seen)
        train_seconds = run.finish(num_images_seen)
    return save_autoencoder(averaged, path, accelerator), train_seconds


def build_autoencoder(config, resolution: int, accelerator):
    """The autoencoder that training begins with, on the accelerator's device: a new one, or that of `config.init_from`.

    The architecture of a loaded one stands, whatever the configuration says; what differs is printed once. Raises
    `ValueError` for one that cannot be trained on, unless it is to be used as it is, and for tiles that it cannot halve.
    """
    if config.init_from is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(config.seed, "autoencoder"))
            model = create_autoencoder(config, resolution)
    else:
        with accelerator.main_process_first():  # the first to come may download it
            model = load_autoencoder(config.init_from)
        if config.num_images > 0 and not is_trainable(model):
            raise ValueError(
                f"autoencoder.init_from {config.init_from} is a {type(model).__name__}, which is not trained on here; only VQ "
                "models with nearest codes and KL models are. Use it as it is with --autoencoder.num-images 0."
            )
        changes = [
            f"{name} {own} (not {asked})"
            for name, (asked, own) in find_changes(config, model).items()
        ]
        if changes:
            accelerator.print(
                f"{config.init_from} keeps its own architecture: {', '.join(changes)}"
            )
        unknown_yet = {
            name: None for name in ("latents_mean", "latents_std") if name in model.config
        }
        model.register_to_config(**unknown_yet)  # those of other micrographs; measured anew
        model.requires_grad_(True)
    return model.to(accelerator.device, memory_format=torch.channels_last)


def find_changes(config, model) -> dict:
    """{name: (in the configuration, in the model)} of the fields of the architecture in which the two differ."""
    own = {
        "family": "kl" if isinstance(model, AutoencoderKL) else "vq",
        "block_out_channels": tuple(model.config.get("block_out_channels", ())),
        "layers_per_block": model.config.get("layers_per_block"),
        "latent_channels": model.config.get("latent_channels"),
        "num_codes": model.config.get("num_vq_embeddings"),
        "norm_num_groups": model.config.get("norm_num_groups"),
        "mid_attention": model.config.get("mid_block_add_attention"),
    }
    known = {name: value for name, value in own.items() if value not in (None, ())}
    return {
        name: (getattr(config, name), value)
        for name, value in known.items()
        if getattr(config, name) != value
    }


def draw_batches(tiles, sampler, model, config, accelerator, num_images_seen):
    """Yield this process's batches from `num_images_seen` on; noise for a KL autoencoder alone."""
    rank = accelerator.process_index
    loader = BatchLoader(
        tiles,
        sampler,
        batch_size=config.batch_size,
        start=num_images_seen,
        rank=rank,
        world_size=accelerator.num_processes,
    )
    for batch in loader:
        if isinstance(model, AutoencoderKL):
            generator = make_generator(
                config.seed, rank=rank, num_images_seen=num_images_seen, stream="posterior"
            )
            factor = 2 ** (len(model.config.block_out_channels) - 1)
            side = batch.images.shape[-1] // factor
            shape = (len(batch), model.config.latent_channels, side, side)
            batch = replace(batch, noise=torch.randn(shape, generator=generator))
        yield batch
        num_images_seen += config.batch_size


def make_step(objective, discriminator, accelerator):
    """Return the backward pass of a part of a batch, for both networks at once."""

    def backward(part, share):
        with accelerator.autocast():
            result = objective(part.images, part.noise, discriminator)
        outputs = {"loss": result.loss, **result.terms, "latents": result.latents}
        if result.indices is not None:
            outputs["indices"] = result.indices
        total = (
            result.loss
            if result.discriminator_loss is None
            else result.loss + result.discriminator_loss
        )
        accelerator.backward(total * share)
        return outputs

    return backward


def step_discriminator(accelerator, optimizer):
    """Step on the gradients and drop them; before `step_optimizer`, which adapts the scale."""
    if accelerator.num_processes > 1:
        average_gradients(p for group in optimizer.param_groups for p in group["params"])
    if accelerator.scaler is None:
        optimizer.step()
    else:
        accelerator.scaler.step(optimizer)
    optimizer.zero_grad()


def group_parameters(model, config):
    """The autoencoder's parameters as the optimizer takes them: the codes of a `VQModel` have a rate of their own."""
    codebook = model.quantize.embedding.weight if has_codebook(model) else None
    groups = [
        {"params": [parameter for parameter in model.parameters() if parameter is not codebook]}
    ]
    if codebook is not None:
        groups.append({"params": [codebook], "rate_scale": config.codebook_rate_scale})
    return groups


def create_discriminator(config, device):
    """The patch discriminator and its Adam, or two Nones without a `discriminator_weight`; weights depend on the seed alone.

    Its rate is the autoencoder's at each moment, times the ratio of the two. Betas are those of the VQGAN, little momentum
    in a game whose other player moves.
    """
    if config.discriminator_weight == 0:
        return None, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "autoencoder discriminator"))
        discriminator = PatchDiscriminator(
            config.discriminator_channels, config.discriminator_layers
        )
    discriminator = discriminator.to(device, memory_format=torch.channels_last)
    scale = config.discriminator_learning_rate / config.learning_rate
    groups = [{"params": list(discriminator.parameters()), "rate_scale": scale}]
    return discriminator, torch.optim.Adam(groups, betas=(0.5, 0.9), fused=True)


def choose_validation_views(tiles, count: int):
    """Ids of up to `count` views, evenly spaced over all: int64 [N]."""
    return np.unique(
        np.linspace(0, tiles.num_views - 1, min(count, tiles.num_views)).astype(np.int64)
    )


def draw_validation_images(tiles, count: int):
    """Up to `count` views, evenly spaced over all: float32 [N, 1, R, R]."""
    return tiles.batch(choose_validation_views(tiles, count))


@torch.no_grad()
def place_codebook(model, images, generator, accelerator):
    """Put all codes onto encoder outputs of the first batch, of all processes: no code begins far from every latent."""
    model.eval()

    def find_latents(images):
        with accelerator.autocast():
            return encode(model, images).float()

    latents = run_in_parts(find_latents, images, size=len(images))
    codes = torch.arange(model.quantize.n_e, device=latents.device)
    move_codes(model.quantize.embedding, codes, accelerator.gather(latents), generator)


def reconstruct(model, images, accelerator, batch_size: int = 32):
    """Images [N, 1, R, R] in [-1, 1] through the autoencoder and back; float32 on the CPU, clamped to [-1, 1]."""
    model.eval()

    def reconstruct_part(images):
        with accelerator.autocast():
            decoded = decode(
                model,
                encode(model, images.to(accelerator.device, memory_format=torch.channels_last)),
            )
        return decoded.float().clamp(-1, 1).cpu()

    return run_in_parts(reconstruct_part, images, size=batch_size)


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


def write_only_line(folder, metrics: dict):
    """Write the log of a stage that does not train."""
    write_text_atomically(
        folder / "stats.jsonl",
        json.dumps({"num_images_seen": 0, "train_seconds": 0.0, **metrics}) + "\n",
    )


def save_autoencoder(model, path, accelerator) -> Path:
    """Save the model from the main process, when all are there; return `path`."""
    if accelerator.is_main_process:
        save_model(model.eval(), path)
    accelerator.wait_for_everyone()
    return path


def save_model(model, path):
    """`model.save_pretrained(path)`, put in place whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
