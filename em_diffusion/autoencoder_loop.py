"""Training of the autoencoder: its losses, then the loop."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL

from em_data import BatchLoader, ImageSampler, Tiles, save_image_grid
from em_data.files import write_atomically
from em_diffusion.autoencoder import encode, has_codebook, is_trainable
from em_diffusion.codebook import CodebookMonitor, move_codes, quantise
from em_diffusion.config import AutoencoderConfig
from em_diffusion.first_autoencoder import build_autoencoder, list_trained
from em_diffusion.optimization import (
    create_ema,
    create_optimizer,
    learning_rate_at,
    set_learning_rate,
)
from em_diffusion.patch_discriminator import adaptive_weight, create_discriminator, hinge_loss
from em_diffusion.validation import evaluate_reconstruction, read_spaced_images, reconstruct
from em_evaluation.perceptual import LPIPSDistance, PerceptualDistance
from em_training import (
    MicroBatching,
    Prefetcher,
    TrainingRun,
    average_gradients,
    fill_cache,
    make_generator,
    run_in_parts,
    seed_for,
    step_optimizer,
)
from em_training.weights import save_from_main_process

NUM_GRID_COLUMNS = 8


def compute_losses(model, perceptual, images, noise, config):
    """Reconstruct images [B, 1, R, R] in [-1, 1] and compute all losses but the adversarial one.

    Args:
        model: A `VQModel` or an `AutoencoderKL`.
        perceptual: Distance f(images, targets), or None.
        noise: Standard normal noise of the posterior [B, C, h, w]; None for a `VQModel`.
        config: An `AutoencoderConfig`.

    Returns:
        (reconstructions [B, 1, R, R], weighted loss of the reconstruction, weighted loss of the
        latents, outputs by name: terms of the losses, encoder outputs "latents" [B, C, h, w] and,
        with a codebook, "indices" [B, h, w]).
    """
    if isinstance(model, AutoencoderKL):
        latents, latent_loss, outputs = encode_kl(model, images, noise, config)
        decoded = model.decode(latents).sample  # [B, 1, R, R]
    else:
        latents, latent_loss, outputs = encode_vq(model, images, config)
        decoded = model.decode(latents, force_not_quantize=True).sample  # [B, 1, R, R]
    outputs["l1"] = F.l1_loss(decoded.float(), images)
    outputs["l2"] = F.mse_loss(decoded.float(), images)
    loss = config.l1_weight * outputs["l1"] + config.l2_weight * outputs["l2"]
    if perceptual is not None:
        outputs["perceptual"] = perceptual(decoded, images)
        loss = loss + config.perceptual_weight * outputs["perceptual"]
    return decoded, loss, latent_loss, outputs


def encode_vq(model, images, config):
    """Return (nearest codes [B, C, h, w], loss of the codebook, outputs) of a `VQModel`."""
    latents = model.encode(images).latents  # [B, C, h, w]
    quantised = quantise(latents, model.quantize.embedding.weight)
    terms = {"codebook": quantised.codebook_loss, "commitment": quantised.commitment_loss}
    loss = config.codebook_weight * (
        terms["codebook"] + config.commitment_weight * terms["commitment"]
    )
    return quantised.latents, loss, terms | {"latents": latents, "indices": quantised.indices}


def encode_kl(model, images, noise, config):
    """Return (sample of the posterior [B, C, h, w], loss, outputs) of an `AutoencoderKL`.

    The loss is the divergence of the posterior from a standard normal in nats per pixel (Kingma and
    Welling 2014, arXiv:1312.6114, appendix B), the unit of the reconstruction's loss: `kl_weight`
    means the same at every resolution and for every number of channels.
    """
    posterior = model.encode(images).latent_dist
    with torch.autocast(images.device.type, enabled=False):
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()  # [B, C, h, w]
        latents = mean + (0.5 * log_variance).exp() * noise
        terms = mean.square() + log_variance.exp() - 1 - log_variance
        divergence = terms.sum() / 2 / images.numel()
    return latents, config.kl_weight * divergence, {"kl": divergence, "latents": mean}


def backward_losses(part, share, model, perceptual, discriminator, config, accelerator) -> dict:
    """Add the gradients of a part of a batch to both networks, each of its own loss.

    The adversarial loss has VQGAN's adaptive weight (Esser et al. 2021, arXiv:2012.09841, equation
    7). Each process, and each part of a batch, computes the weight from its own images. The
    discriminator's loss shares the pass over the reconstructions.

    Args:
        part: `Batch` of micrographs.
        share: The part's share of the batch.
        discriminator: None leaves the adversarial losses out.

    Returns:
        What to log, "latents" and "indices", see `compute_losses`.
    """
    adversarial = discriminator is not None
    with accelerator.autocast():
        decoded, loss, latent_loss, outputs = compute_losses(
            model, perceptual, part.images, part.noise, config
        )
        total = loss + latent_loss
        if adversarial:
            logits_fake = discriminator(decoded)  # [B, 1, h, w]
            loss_G = -logits_fake.float().mean()
            last_layer, scale = model.decoder.conv_out.weight, decoded.numel() ** 0.5
            weight = adaptive_weight(loss, loss_G, last_layer, scale)
            total = total + config.discriminator_weight * weight * loss_G
    # only the autoencoder's: the discriminator has a loss of its own
    inputs = list_trained(model)
    accelerator.backward(total * share, inputs=inputs, retain_graph=adversarial)
    outputs = {"loss": total} | outputs
    if adversarial:
        with accelerator.autocast():
            logits_real = discriminator(part.images)  # [B, 1, h, w]
            loss_D = hinge_loss(logits_real, logits_fake)
        accelerator.backward(loss_D * share, inputs=list(discriminator.parameters()))
        outputs |= {"generator": loss_G, "adaptive_weight": weight, "discriminator": loss_D}
        outputs |= {"logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
    return outputs


def train_autoencoder(
    config: AutoencoderConfig,
    tiles: Tiles,
    held_out: Tiles,
    *,
    accelerator: Accelerator,
    out_dir: str | Path,
) -> tuple[Path, float]:
    """Train the autoencoder on `tiles`, or resume from its last checkpoint.

    Logs the terms of the loss, the codebook's usage and perplexity over each window, and
    `evaluate_reconstruction` of held-out views. Sample grids show held-out views above their
    reconstructions. With a half-life of the EMA, the averaged weights are validated and saved.
    With `num_images` 0, the autoencoder of `init_from` is saved unchanged, whatever its kind. The
    kind "basis" is fitted, not trained.

    Returns:
        The folder of the saved model, `out_dir`/autoencoder/vqvae, and the training time in
        seconds.
    """
    folder = Path(out_dir) / "autoencoder" / "vqvae"
    model, build_seconds = build_autoencoder(config, tiles, accelerator)
    validation_images = read_spaced_images(held_out, config.num_validation_images)

    def validate(model):
        return evaluate_reconstruction(model, validation_images, accelerator, config.batch_size)

    if config.num_images == 0 or not is_trainable(model):
        return keep_untrained(model, build_seconds, validation_images, folder, accelerator, config)
    ema = create_ema(model, config) if config.ema_half_life_images > 0 else None
    averaged = ema.model if ema else model
    perceptual = load_perceptual_distance(config, accelerator)
    discriminator, optimizer_D = create_discriminator(config, accelerator.device)
    parameters = list_trained(model)
    parameters_D = list(discriminator.parameters()) if discriminator else []
    optimizer = create_optimizer(group_parameters(model, config), config)
    monitor = None
    if has_codebook(model):
        num_codes, window = model.quantize.n_e, config.revive_after_images
        monitor = CodebookMonitor(num_codes, window, accelerator.device)
    sampler = ImageSampler(tiles.num_views, seed_for(config.seed, "autoencoder data"))

    def backward(part, share):
        judge = discriminator if adversarial else None
        return backward_losses(part, share, model, perceptual, judge, config, accelerator)

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
                batch = next(batches)
                rng = make_generator(
                    config.seed, num_images_seen=num_images_seen, stream="codebook"
                )
                if num_images_seen == 0 and monitor and config.init_from is None:
                    place_codebook(model, ema, batch.images, rng, accelerator)
                adversarial = (
                    discriminator is not None
                    and num_images_seen >= config.discriminator_start_images
                )
                learning_rate = learning_rate_at(config, num_images_seen)
                model.train()
                outputs = micro_batching.accumulate(backward, batch, parameters + parameters_D)
                if adversarial:
                    set_learning_rate(optimizer_D, learning_rate)
                    step_discriminator(accelerator, optimizer_D, parameters_D)
                set_learning_rate(optimizer, learning_rate)
                step = step_optimizer(accelerator, optimizer, parameters, config.max_grad_norm)
                num_images_seen += config.batch_size
                if ema:
                    ema.update(model, num_images_seen, config.batch_size)

                latents, indices = outputs.pop("latents"), outputs.pop("indices", None)
                run.log(**outputs, learning_rate=learning_rate, **step)
                if monitor:
                    monitor.count(indices, accelerator)
                    end_window(run, monitor, model, ema, optimizer, latents, rng, num_images_seen)
                if run.is_due(config.validate_every, num_images_seen):
                    run.log(**validate(averaged))
                if run.samples_due(num_images_seen) and accelerator.is_main_process:
                    path = run.samples_path(num_images_seen)
                    save_samples(averaged, validation_images, path, accelerator)
                run.step(num_images_seen)
        train_seconds = run.finish(num_images_seen)
    return save_from_main_process(averaged, folder, accelerator), train_seconds


def keep_untrained(model, seconds, images, folder, accelerator, config):
    """Save a fitted or given model with a line of statistics and a sample grid of its own."""
    metrics = evaluate_reconstruction(model, images, accelerator, config.batch_size)
    line = {"num_images_seen": config.num_images, "train_seconds": seconds} | metrics
    if accelerator.is_main_process:
        write_atomically(folder.parent / "stats.jsonl", json.dumps(line) + "\n")
        path = folder.parent / "samples" / f"{config.num_images:012d}.png"
        save_samples(model, images, path, accelerator)
    return save_from_main_process(model, folder, accelerator), seconds


def draw_batches(tiles, sampler, model, config, accelerator, num_images_seen):
    """Yield this process's batches from `num_images_seen` on, with noise for a KL autoencoder."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    loader = BatchLoader(
        tiles,
        sampler,
        batch_size=config.batch_size,
        start=num_images_seen,
        rank=rank,
        world_size=world_size,
    )
    for batch in loader:
        if isinstance(model, AutoencoderKL):
            rng = make_generator(
                config.seed, rank=rank, num_images_seen=num_images_seen, stream="posterior"
            )
            factor = 2 ** (len(model.config.block_out_channels) - 1)
            height, width = (side // factor for side in batch.images.shape[2:])
            shape = (len(batch), model.config.latent_channels, height, width)
            batch = replace(batch, noise=torch.randn(shape, generator=rng))
        yield batch
        num_images_seen += config.batch_size


def load_perceptual_distance(config, accelerator):
    """Return `create_perceptual_distance` on the device; the first process may download it."""
    return fill_cache(accelerator, partial(create_perceptual_distance, config, accelerator.device))


def create_perceptual_distance(config, device="cpu"):
    """Create the distance that an `AutoencoderConfig` asks for; None with a weight of 0."""
    if config.perceptual_weight == 0:
        return None
    if config.perceptual_network == "lpips":
        distance = LPIPSDistance()
    else:
        distance = PerceptualDistance(config.perceptual_layers)
    return distance.to(device, memory_format=torch.channels_last)


def step_discriminator(accelerator, optimizer, parameters):
    """Step and drop the gradients; before `step_optimizer`, which adapts the scale of fp16."""
    if accelerator.num_processes > 1:
        average_gradients(parameters)
    if accelerator.scaler is None:
        optimizer.step()
    else:
        accelerator.scaler.step(optimizer)
    optimizer.zero_grad()


def group_parameters(model, config):
    """Return the optimizer's groups: the codes of a `VQModel` have a learning rate of their own."""
    if not has_codebook(model):
        return [{"params": list_trained(model)}]
    codebook = model.quantize.embedding.weight
    networks = [parameter for parameter in list_trained(model) if parameter is not codebook]
    codes = {"params": [codebook], "rate_scale": config.codebook_rate_scale}
    return [{"params": networks}, codes]


@torch.no_grad()
def place_codebook(model, ema, images, rng, accelerator):
    """Put all codes onto encoder outputs of the first batch, so that none begins far from all."""
    model.eval()

    def find_latents(images):
        with accelerator.autocast():
            return encode(model, images).float()

    latents = run_in_parts(find_latents, images, size=len(images))
    codes = torch.arange(model.quantize.n_e, device=latents.device)
    move_codes(model.quantize.embedding, codes, accelerator.gather(latents), rng)
    if ema:
        ema.load_state_dict(model.state_dict())


def end_window(run, monitor, model, ema, optimizer, latents, rng, num_images_seen):
    """Log the codebook's use and move unused codes, if the monitor's window is over."""
    if not monitor.is_due(num_images_seen):
        return
    run.log(codebook_usage=monitor.usage(), codebook_perplexity=monitor.perplexity())
    is_late = num_images_seen > 0.9 * run.num_images
    moved = monitor.end_window(
        model.quantize.embedding,
        None if is_late else run.accelerator.gather(latents),
        rng,
        optimizer,
        num_images_seen,
        ema.model.quantize.embedding if ema else None,
    )
    run.log(codes_revived=moved)


def save_samples(model, images, path, accelerator):
    """Save a grid of images above their reconstructions."""
    originals = images[:NUM_GRID_COLUMNS]
    rows = torch.cat([originals, reconstruct(model, originals, accelerator)])
    save_image_grid(rows, path, num_columns=len(originals))
