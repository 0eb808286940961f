"""Training of the adapters: the loop, and what measures and shows its images."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from em_data import BatchLoader, ImageSampler, Tiles, save_image_grid
from em_data.batch import Batch
from em_evaluation.held_out import HeldOutDistance
from em_stable_diffusion.adapters import add_adapters, use_weights
from em_stable_diffusion.bases import NUM_TRAIN_TIMESTEPS, Base
from em_stable_diffusion.config import LoRAConfig
from em_stable_diffusion.em_base_models import draw_grey
from em_stable_diffusion.em_prompts import EMPrompts
from em_stable_diffusion.prompts import draw_rows
from em_training import (
    EMA,
    BestWeights,
    Latents,
    MicroBatching,
    Prefetcher,
    TrainingRun,
    make_generator,
    run_in_parts,
    seed_for,
    step_optimizer,
)
from em_training.timesteps import average_losses, draw_timesteps
from em_training.weights import save_from_main_process

STAGE = "lora"
SAMPLING_BATCH = 8
MICRO_BATCH_FLAG = "--training.micro-batch-size"
DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}  # precision -> type of the base's weights


def train_adapters(
    config: LoRAConfig,
    base: Base,
    latents: Latents,
    held_out_latents: Latents,
    prompts: EMPrompts,
    vae: Any,
    *,
    accelerator: Accelerator,
    out_dir: str | Path,
    held_out: Tiles,
) -> tuple[Path, float]:
    """Train adapters of the base's denoiser on `latents`, or resume from the last checkpoint.

    Logs the loss, and that of the averaged adapters on held-out latents with the same noise each
    time. Sample grids come from the averaged adapters, and their colourfulness is logged. With
    `evaluate_every`, logs the distance of images to held-out tiles and keeps the best adapters.

    Args:
        vae: The base's autoencoder, which decodes samples.
        held_out: Tiles that generated images are compared with.

    Returns:
        The folder of the averaged adapters, `out_dir`/lora/adapters, and the training time in
        seconds.
    """
    training, device = config.training, accelerator.device
    denoiser, adapters = build_denoiser(config, base, accelerator)
    ema = EMA(adapters, training.ema_half_life_images)
    parameters = list(adapters.parameters())
    optimizer = create_optimizer(parameters, training)
    embeddings = prompts.embeddings.to(device)
    sampler = ImageSampler(latents.num_views, seed_for(config.seed, "lora data"))
    validation_batch = draw_validation_batch(held_out_latents, base, config)
    compute_losses = partial(compute_batch_losses, base, denoiser, embeddings)
    pipeline = base.model.make_pipeline(denoiser, vae.to(device), base.load_scheduler())

    def backward(part, share):
        with accelerator.autocast():
            loss = compute_losses(part).mean()
        accelerator.backward(loss * share)
        return {"loss": loss}

    def validate():
        with use_weights(adapters, ema.model):
            return evaluate_denoising(compute_losses, validation_batch, accelerator, training)

    def generate(numbers, num_steps, stream="sample"):
        views = held_out_latents if stream == "evaluation" else latents
        rows = find_rows(views, numbers)
        with use_weights(adapters, ema.model):
            return generate_images(
                pipeline,
                config,
                embeddings.to(denoiser.dtype),
                rows,
                numbers,
                num_steps,
                accelerator,
                stream,
            )

    with TrainingRun(out_dir, STAGE, training, accelerator) as run:
        micro_batching = MicroBatching(training.micro_batch_size, run=run, flag=MICRO_BATCH_FLAG)
        num_images_seen = run.resume(
            {
                "adapters": adapters,
                "ema": ema,
                "optimizer": optimizer,
                "micro_batching": micro_batching,
            }
        )
        best = create_best_weights(held_out, config, run) if training.evaluate_every else None
        batches = draw_batches(latents, sampler, base, config, accelerator, num_images_seen)
        with Prefetcher(batches, device) as batches:
            while num_images_seen < training.num_images:
                batch = next(batches)
                learning_rate = learning_rate_at(training, num_images_seen)
                outputs = micro_batching.accumulate(backward, batch, parameters)
                set_learning_rate(optimizer, learning_rate)
                step = step_optimizer(accelerator, optimizer, parameters, training.max_grad_norm)
                num_images_seen += training.batch_size
                ema.update(adapters, num_images_seen, training.batch_size)

                run.log(**outputs, learning_rate=learning_rate, **step)
                if run.is_due(training.validate_every, num_images_seen):
                    run.log(**validate())
                if run.is_due(training.evaluate_every, num_images_seen):
                    run.log(**update_best(best, ema.model, generate, training, num_images_seen))
                if run.samples_due(num_images_seen):  # in all processes, which log the same
                    numbers = range(training.num_sample_images)
                    samples, colourfulness = generate(numbers, training.num_sample_steps)
                    run.log(colourfulness=colourfulness)
                    if accelerator.is_main_process:
                        save_image_grid(samples, run.samples_path(num_images_seen), num_columns=8)
                run.step(num_images_seen)
        train_seconds = run.finish(num_images_seen)
    folder = Path(out_dir) / STAGE / "adapters"
    return save_from_main_process(ema.model, folder, accelerator), train_seconds


def build_denoiser(config: LoRAConfig, base: Base, accelerator: Accelerator):
    """Return the base's denoiser on the device, and its adapters."""
    denoiser = base.load_denoiser()
    if config.training.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    adapters = add_adapters(
        denoiser,
        base.source,
        config,
        base.targets,
        device=accelerator.device,
        dtype=DTYPES[accelerator.mixed_precision],
    )
    return denoiser, adapters


def create_optimizer(parameters, training) -> torch.optim.Optimizer:
    """Create Adam without weight decay, as one fused kernel for all parameters."""
    return torch.optim.Adam(
        parameters, lr=training.learning_rate, betas=training.adam_betas, fused=True
    )


def learning_rate_at(training, num_images_seen: int) -> float:
    """Return the learning rate of the step after so many images: rising from 0, then constant."""
    if not training.warmup_images:
        return training.learning_rate
    seen = num_images_seen + training.batch_size
    return training.learning_rate * min(1.0, seen / training.warmup_images)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def compute_batch_losses(base: Base, denoiser, embeddings: torch.Tensor, batch: Batch):
    """Return the loss of each sample of a batch, float32 [B]; its labels are rows of prompts."""
    assert batch.noise is not None and batch.timesteps is not None  # noqa: PT018
    return base.compute_losses(
        denoiser, batch.images, batch.noise, batch.timesteps, embeddings[batch.class_labels]
    )


def create_best_weights(held_out, config, run) -> BestWeights:
    """Create what measures images against `held_out` and keeps the best adapters."""
    training = config.training
    distance = HeldOutDistance(
        held_out,
        training.num_evaluation_images,
        seed_for(config.seed, "held-out distance"),
        accelerator=run.accelerator,
        metrics=training.evaluation_metrics,
        say=run.say,
    )
    return BestWeights(
        distance,
        run,
        "adapters",
        num_inference_steps=training.num_evaluation_steps,
        guidance_scale=config.guidance_scale,
    )


def update_best(best, model, generate, training, num_images_seen) -> dict:
    """Measure generated images, keep `model` if it is the best so far, and return what to log."""

    def generate_evaluation(numbers):
        return generate(numbers, training.num_evaluation_steps, "evaluation")[0]

    value = best.update(model, generate_evaluation, num_images_seen)
    return {"held_out_frechet_distance": value} | best.distance.curves


def draw_batches(latents, sampler, base, config, accelerator, num_images_seen):
    """Yield this process's batches from `num_images_seen` on, with noise, timesteps and prompts."""
    training, rank = config.training, accelerator.process_index
    loader = BatchLoader(
        latents,
        sampler,
        batch_size=training.batch_size,
        start=num_images_seen,
        rank=rank,
        world_size=accelerator.num_processes,
    )
    for batch in loader:
        rng = make_generator(config.seed, rank=rank, num_images_seen=num_images_seen)
        batch = draw_noise(batch, base, rng)
        rows = draw_rows(latents, batch.ids, training.prompt_dropout, rng)
        yield replace(batch, class_labels=rows)
        num_images_seen += training.batch_size


def draw_noise(batch: Batch, base: Base, rng: torch.Generator) -> Batch:
    """Return the batch with noise and a timestep for each image, as the base draws them."""
    noise = torch.randn(batch.images.shape, generator=rng)
    timesteps = draw_timesteps(
        len(batch), NUM_TRAIN_TIMESTEPS, rng, base.density, continuous=base.is_continuous
    )
    return replace(batch, noise=noise, timesteps=timesteps)


def draw_validation_batch(latents: Latents, base: Base, config: LoRAConfig) -> Batch:
    """Return held-out latents with the noise and timesteps of every validation of this seed."""
    count = min(config.training.num_validation_images, latents.num_views)
    ids = torch.linspace(0, latents.num_views - 1, count).long()
    rng = make_generator(config.seed, stream="validation")
    rows = draw_rows(latents, ids, 0.0, rng)
    batch = draw_noise(Batch(latents.batch(ids), ids, rows), base, rng)
    assert batch.timesteps is not None  # just drawn
    order = torch.randperm(len(batch), generator=rng)
    return replace(batch, timesteps=batch.timesteps[order])


@torch.no_grad()
def evaluate_denoising(compute_losses, batch: Batch, accelerator, training) -> dict:
    """Return mean denoising losses over `batch`, see `average_losses`."""

    def compute_part(rows):
        part = batch.map(lambda tensor: tensor[rows].to(accelerator.device))
        with accelerator.autocast():
            return compute_losses(part)

    assert batch.timesteps is not None
    losses = run_in_parts(compute_part, torch.arange(len(batch)), size=training.batch_size)  # [N]
    return average_losses(losses, batch.timesteps, NUM_TRAIN_TIMESTEPS)


def find_rows(latents: Latents, numbers) -> torch.Tensor:
    """Return the row of the prompt of each image number: classes in their shares, int64 [N]."""
    labels = latents.share_classes(numbers)
    return (
        torch.ones(len(numbers), dtype=torch.int64) if labels is None else 1 + torch.tensor(labels)
    )


def generate_images(
    pipeline, config, embeddings, rows, numbers, num_steps, accelerator, stream
) -> tuple[torch.Tensor, float]:
    """Generate the images of these numbers, each from the prompt of its row.

    Each image depends on the seed, its number and its prompt alone.

    Returns:
        Float32 [N, 1, R, R] in [-1, 1] on the CPU, and the mean colourfulness in grey levels.
    """
    pipeline.set_progress_bar_config(disable=True)
    colourfulness = []

    def generate(numbers, rows):
        rngs = [make_generator(config.seed, stream=f"{stream} {each}") for each in numbers.tolist()]
        with accelerator.autocast():
            images, colours = draw_grey(
                pipeline,
                embeddings[rows],
                embeddings[0],
                rngs,
                resolution=config.tiles.resolution,
                num_inference_steps=num_steps,
                guidance_scale=config.guidance_scale,
            )
        colourfulness.append(colours.cpu())
        return images.cpu()

    images = run_in_parts(generate, torch.tensor(list(numbers)), rows, size=SAMPLING_BATCH)
    return images, float(torch.cat(colourfulness).mean())
