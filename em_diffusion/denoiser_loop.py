"""Training of the denoiser: its loss, then the loop."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import ModelMixin

from em_data import BatchLoader, ImageSampler, Views, save_image_grid
from em_data.batch import Batch
from em_diffusion.config import DenoiserConfig
from em_diffusion.denoiser import create_denoiser, create_scheduler
from em_diffusion.em_grain import EMGrain
from em_diffusion.em_schedulers import is_flow
from em_diffusion.masks import create_pipeline, draw_conditions, find_layout_sampler
from em_diffusion.muon import create_muon
from em_diffusion.optimization import (
    create_ema,
    create_optimizer,
    learning_rate_at,
    set_learning_rate,
)
from em_diffusion.validation import choose_spaced_views
from em_evaluation.held_out import HeldOutDistance
from em_training import (
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
from em_training.latents import Latents
from em_training.timesteps import average_losses, draw_timesteps
from em_training.weights import hash_weights, save_from_main_process

OPTIMIZERS = {
    "adam": lambda model, config: create_optimizer(list(model.parameters()), config),
    "muon": create_muon,
}


def compute_denoising_loss(
    unet, scheduler, latents, noise, timesteps, class_labels=None, masks=None
):
    """Return ||target - unet(x_t, t)||^2, mean over elements, of each sample: float32 [B].

    The scheduler decides x_t and the target. With a `DDIMScheduler`, x_t = sqrt(abar_t) latents +
    sqrt(1 - abar_t) noise. For prediction_type "epsilon" the target is the noise, the simple
    objective of DDPM (Ho et al. 2020, arXiv:2006.11239, equation 14); for "v_prediction" it is
    sqrt(abar_t) noise - sqrt(1 - abar_t) latents. With a `FlowMatchEulerDiscreteScheduler`,
    x_t = (1 - s) latents + s noise for s = t / num_train_timesteps, and the target is dx/ds =
    noise - latents (Lipman et al. 2023, arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206).

    Args:
        latents, noise: Float32 [B, C, h, w]; latents are normalised.
        timesteps: [B], int64, or float32 for flow matching.
        class_labels: Int64 [B] for a U-Net with classes, else None.
        masks: Float32 [B, M, h, w], which a U-Net with masks takes as further channels, or None.
    """
    if is_flow(scheduler):
        s = (timesteps / scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
        noisy, target = (1 - s) * latents + s * noise, noise - latents
    else:
        noisy = scheduler.add_noise(latents, noise, timesteps)
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    options = {} if class_labels is None else {"class_labels": class_labels}
    inputs = noisy if masks is None else torch.cat([noisy, masks], dim=1)
    predicted = unet(inputs, timesteps, **options).sample
    return F.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))


def compute_min_snr_weights(scheduler, timesteps, gamma: float):
    """Return weights of the loss, float32 [B]: errors of the latents count min(SNR, gamma).

    From Hang et al. 2023, arXiv:2303.09556, section 3.4, with SNR = abar / (1 - abar). An error of
    the noise is one of the latents over SNR^(1/2), one of the velocity over (SNR + 1)^(1/2). The
    weights are therefore min(SNR, gamma) / SNR for "epsilon" and min(SNR, gamma) / (SNR + 1) for
    "v_prediction".
    """
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)
    abar = scheduler.alphas_cumprod[timesteps]
    snr = abar / (1 - abar)
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    return snr.clamp(max=gamma) / (snr + 1 if is_velocity else snr)


def compute_batch_losses(unet, scheduler, batch: Batch):
    """Return the loss of each sample of a batch, float32 [B]."""
    conditions = {"class_labels": batch.class_labels, "masks": batch.masks}
    return compute_denoising_loss(
        unet, scheduler, batch.images, batch.noise, batch.timesteps, **conditions
    )


def compute_training_loss(unet, scheduler, batch: Batch, config):
    """Return the mean loss over a batch, weighted as `config` says."""
    losses = compute_batch_losses(unet, scheduler, batch)
    if gamma := config.min_snr_gamma:
        losses = losses * compute_min_snr_weights(scheduler, batch.timesteps, gamma)
    return losses.mean()


def train_denoiser(
    config: DenoiserConfig,
    latents: Latents,
    held_out_latents: Latents,
    vqvae: ModelMixin,
    *,
    accelerator: Accelerator,
    out_dir: str | Path,
    held_out: Views | None = None,
    grain: EMGrain | None = None,
    start: ModelMixin | None = None,
) -> tuple[Path, float]:
    """Train the denoiser on `latents`, or resume from its last checkpoint.

    Logs the loss, and that of the averaged weights on held-out latents with the same noise each
    time. Sample grids come from the averaged weights. With `config.evaluate_every`, logs the
    distance of images to held-out tiles and keeps the best weights in best/. Keeps the guide.

    Args:
        vqvae: Decodes samples.
        held_out: Tiles that generated images are compared with.
        grain: Added to samples.
        start: A trained U-Net to train further, whatever the configuration's sizes.

    Returns:
        The folder of the averaged U-Net, `out_dir`/denoiser/unet, and the training time in seconds.
    """
    model = build_denoiser(config, latents, accelerator.device, start)
    ema = create_ema(model, config)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    network = torch.compile(model) if config.compile else model
    scheduler = create_scheduler(config)
    parameters = list(model.train().parameters())
    optimizer = OPTIMIZERS[config.optimizer](model, config)
    sampler = ImageSampler(latents.num_views, seed_for(config.seed, "denoiser data"))
    validation_batch = draw_validation_batch(held_out_latents, config)

    def backward(part, share):
        with accelerator.autocast():
            loss = compute_training_loss(network, scheduler, part, config)
        accelerator.backward(loss * share)
        return {"loss": loss}

    def validate():
        return evaluate_denoising(ema.model, scheduler, validation_batch, accelerator, config)

    def generate(numbers, num_steps, stream="sample"):
        pipeline = create_pipeline(
            vqvae, ema.model, scheduler, find_layout_sampler(latents), grain=grain
        )
        labels = (held_out_latents if stream == "evaluation" else latents).share_classes(numbers)
        return generate_images(
            pipeline, config.seed, numbers, num_steps, accelerator, stream, labels
        )

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
        batches = draw_batches(latents, sampler, config, accelerator, num_images_seen)
        with Prefetcher(batches, accelerator.device) as batches:
            while num_images_seen < config.num_images:
                batch = next(batches)
                learning_rate = learning_rate_at(config, num_images_seen)
                outputs = micro_batching.accumulate(backward, batch, parameters)
                set_learning_rate(optimizer, learning_rate)
                step = step_optimizer(accelerator, optimizer, parameters, config.max_grad_norm)
                num_images_seen += config.batch_size
                ema.update(model, num_images_seen, config.batch_size)
                keep_averages(ema, posthoc_ema, run, config, num_images_seen)

                run.log(**outputs, learning_rate=learning_rate, **step)
                if run.is_due(config.validate_every, num_images_seen):
                    run.log(**validate())
                if run.is_due(config.evaluate_every, num_images_seen):
                    run.log(**update_best(best, ema.model, generate, config, num_images_seen))
                if run.samples_due(num_images_seen) and accelerator.is_main_process:
                    samples = generate(range(config.num_sample_images), config.num_sample_steps)
                    save_image_grid(samples, run.samples_path(num_images_seen), num_columns=8)
                run.step(num_images_seen)
        train_seconds = run.finish(num_images_seen)
    folder = Path(out_dir) / "denoiser" / "unet"
    return save_from_main_process(ema.model, folder, accelerator), train_seconds


def build_denoiser(config, latents, device, start=None):
    """Create the U-Net for `Latents`, or a copy of `start` for them.

    The weights of a new one depend on the seed alone.
    """
    channels, _, side = latents.shape
    if start is not None:
        model = deepcopy(start)
        model.register_to_config(sample_size=side)
        return model.to(device, memory_format=torch.channels_last)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "denoiser"))
        model = create_denoiser(config, side, channels, latents.num_classes)
    return model.to(device, memory_format=torch.channels_last)


def keep_averages(ema, posthoc_ema, run, config, num_images_seen):
    """Save the guide at its moment; update the post-hoc averages, and save snapshots when due."""
    if num_images_seen - config.batch_size < config.guide_images <= num_images_seen:
        save_from_main_process(ema.model, run.dir / "guide", run.accelerator)
    if posthoc_ema is None:
        return
    posthoc_ema.update(num_images_seen, config.batch_size)
    is_due = run.is_due(config.posthoc_ema_every, num_images_seen)
    if is_due and run.accelerator.is_main_process:
        posthoc_ema.save_snapshot(num_images_seen)


def create_best_weights(held_out, config, run, grain):
    """Create what measures images against `held_out` during training and keeps the best U-Net."""
    distance = HeldOutDistance(
        held_out,
        config.num_evaluation_images,
        seed_for(config.seed, "held-out distance"),
        accelerator=run.accelerator,
        metrics=config.evaluation_metrics,
        say=run.say,
    )
    return BestWeights(
        distance,
        run,
        "unet",
        num_inference_steps=config.num_evaluation_steps,
        grain_sha256=None if grain is None else hash_weights(grain),
    )


def update_best(best, model, generate, config, num_images_seen) -> dict:
    """Measure generated images, keep `model` if it is the best so far, and return what to log."""

    def generate_evaluation(numbers):
        return generate(numbers, config.num_evaluation_steps, "evaluation")

    value = best.update(model, generate_evaluation, num_images_seen)
    return {"held_out_frechet_distance": value} | best.distance.curves


def draw_batches(latents, sampler, config, accelerator, num_images_seen):
    """Yield this process's batches from `num_images_seen` on: latents, noise and timesteps."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    loader = BatchLoader(
        latents,
        sampler,
        batch_size=config.batch_size,
        start=num_images_seen,
        rank=rank,
        world_size=world_size,
    )
    for batch in loader:
        rng = make_generator(config.seed, rank=rank, num_images_seen=num_images_seen)
        batch = draw_noise(batch, config, rng)
        yield replace(
            batch,
            class_labels=draw_classes(latents, batch.ids, config, rng),
            masks=draw_conditions(latents, batch.ids, config.mask_dropout, rng),
        )
        num_images_seen += config.batch_size


def draw_noise(batch: Batch, config, rng) -> Batch:
    """Return the batch with noise and a timestep for each image, as `config` draws them."""
    noise = torch.randn(batch.images.shape, generator=rng)
    timesteps = draw_timesteps(
        len(batch),
        config.num_train_timesteps,
        rng,
        config.timestep_density,
        continuous=config.prediction_type == "flow",
    )
    return replace(batch, noise=noise, timesteps=timesteps)


def draw_classes(latents, ids, config, rng):
    """Return the classes of these views, int64 [B], some of them dropped; None without classes.

    A dropped class is that of no class, `latents.num_classes`.
    """
    labels = latents.class_labels(ids)
    if labels is None:
        return None
    is_dropped = torch.rand(len(labels), generator=rng) < config.class_dropout
    return torch.where(is_dropped, latents.num_classes, labels)


def draw_validation_batch(latents, config) -> Batch:
    """Return held-out latents with the noise and timesteps of every validation of this seed."""
    ids = torch.from_numpy(choose_spaced_views(latents, config.num_validation_images))
    rng = make_generator(config.seed, stream="validation")
    masks = draw_conditions(latents, ids, 0.0, rng)
    batch = Batch(latents.batch(ids), ids, latents.class_labels(ids), masks)
    batch = draw_noise(batch, config, rng)
    assert batch.timesteps is not None  # just drawn
    order = torch.randperm(len(batch), generator=rng)
    return replace(batch, timesteps=batch.timesteps[order])


@torch.no_grad()
def evaluate_denoising(unet, scheduler, batch: Batch, accelerator, config) -> dict:
    """Return mean denoising losses over `batch`, without weights, see `average_losses`."""

    def compute_losses(rows):
        part = batch.map(lambda tensor: tensor[rows].to(accelerator.device))
        part = replace(part, images=part.images.contiguous(memory_format=torch.channels_last))
        with accelerator.autocast():
            return compute_batch_losses(unet, scheduler, part)

    assert batch.timesteps is not None
    losses = run_in_parts(compute_losses, torch.arange(len(batch)), size=config.batch_size)  # [N]
    return average_losses(losses, batch.timesteps, config.num_train_timesteps)


def generate_images(
    pipeline,
    seed,
    numbers,
    num_steps,
    accelerator,
    stream="sample",
    class_labels: list[int] | None = None,
    batch_size: int = 32,
):
    """Generate the images of these numbers: float32 [N, 1, R, R] in [-1, 1] on the CPU.

    Each image depends on the seed, its number and its class alone.
    """
    pipeline.set_progress_bar_config(disable=True)

    def generate(numbers, *labels):
        rngs = [make_generator(seed, stream=f"{stream} {number}") for number in numbers.tolist()]
        with accelerator.autocast():
            latents = pipeline.denoise(
                len(rngs), rngs, num_steps, class_labels=labels[0] if labels else None
            )
            return pipeline.decode(latents, rngs).cpu()

    tensors = [numbers] if class_labels is None else [numbers, class_labels]
    return run_in_parts(generate, *map(torch.tensor, tensors), size=batch_size)
