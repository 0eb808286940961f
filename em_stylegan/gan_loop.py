"""Training of StyleGAN2 and 3: the losses of a step, then the loop."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from em_data import BatchLoader, ImageSampler, save_image_grid
from em_data.files import replace_folder
from em_evaluation.held_out import HeldOutDistance
from em_stylegan.augmentation import AdaptiveProbability, augment
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_stylegan.grain import reduce_images, set_grain_of_tiles
from em_stylegan.losses import (
    PathLengthMean,
    blur_sigma,
    discriminator_loss,
    gaussian_blur,
    generator_loss,
    path_lengths,
    r1_penalty,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
)
from em_stylegan.networks import create_networks, create_optimizer, set_trainable
from em_stylegan.second_derivatives import second_derivatives
from em_stylegan.transfer import start_from
from em_training import (
    EMA,
    BestWeights,
    MicroBatching,
    Prefetcher,
    TrainingRun,
    list_checkpoints,
    make_generator,
    seed_for,
    step_optimizer,
)


class Generated(NamedTuple):
    """Generated and real images of a part of the batch."""

    w: torch.Tensor  # [B, w_dim]
    images: torch.Tensor  # [B, 1, R, R], generated
    seen: torch.Tensor  # the same, as the discriminator sees them
    seen_real: torch.Tensor  # [B, 1, R, R]


class Game:
    """The losses of one step, each with its backward pass over a part of the batch.

    The random numbers of a part depend on the seed, the step, their use and the part's first row,
    so that the generator's turn can repeat the images that the discriminator's turn has judged. If
    the batch is a single part, its graph is kept from one turn to the next instead.
    """

    def __init__(self, config, model, discriminator, accelerator):
        self.config, self.training = config, config.training
        self.model, self.discriminator, self.accelerator = model, discriminator, accelerator
        self.parameters = list(model.parameters())
        set_trainable(discriminator, True, config.discriminator.num_frozen_layers)
        self.parameters_D = [p for p in discriminator.parameters() if p.requires_grad]
        self.path_length_mean = PathLengthMean(self.training.path_length_decay, accelerator.device)
        self.augmentation = create_augmentation(self.training.augmentation, accelerator.device)
        self.is_relativistic = self.training.loss == "relativistic"
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self.compute_dtype = dtypes.get(accelerator.mixed_precision)

    def start_step(self, num_images_seen: int) -> None:
        """Set what is fixed for one step."""
        training = self.training
        self.num_images_seen, self._kept = num_images_seen, None
        self.sigma = blur_sigma(
            num_images_seen, training.blur_initial_sigma_px, training.blur_fade_images
        )
        self.p = 0.0 if self.augmentation is None else self.augmentation.p

    def backward_D(self, part, share):
        """Discriminator: real images against generated ones."""
        with torch.set_grad_enabled(share == 1):
            generated = self.generate(part, update_magnitudes=True)
        seen = torch.cat([generated.seen_real, generated.seen.detach()])
        scores_real, scores_fake = self.judge(seen, num_batches=2).chunk(2)  # [B, 1]
        if self.is_relativistic:
            loss = relativistic_discriminator_loss(scores_real, scores_fake)
        else:
            loss = discriminator_loss(scores_real, scores_fake)
        self.accelerator.backward(loss * share, inputs=self.parameters_D)
        self._kept = generated if share == 1 else None
        scores = {"scores_real": scores_real, "scores_fake": scores_fake}
        return {"loss_D": loss, "w": generated.w, **scores}

    def backward_penalty_D(self, part, share):
        """Discriminator: R1 on real images, and R2 on generated ones in the relativistic game."""
        show = partial(self.show, rng=self.make_rng(part, "r1"))
        real = reduce_images(part.images, self.config.generator.reduction)
        penalties = {"r1": compute_gradient_penalty(self.discriminator, real, show)}
        if self.is_relativistic:
            with torch.no_grad():
                images = (self._kept or self.generate(part)).images
            penalties["r2"] = compute_gradient_penalty(self.discriminator, images, show)
        scale = self.discriminator.config.image_std  # gradients are those of scaled images
        weight = self.config.r1_gamma / 2 * self.training.r1_every_steps * scale**2
        self.accelerator.backward(
            sum(penalties.values()) * (weight * share), inputs=self.parameters_D
        )
        return penalties

    def backward_G(self, part, share):
        """Generator: its images as the updated discriminator judges them."""
        generated, self._kept = self._kept or self.generate(part), None
        if self.is_relativistic:
            scores_real = self.judge(generated.seen_real).detach()
            loss = relativistic_generator_loss(scores_real, self.judge(generated.seen))
        else:
            loss = generator_loss(self.judge(generated.seen))
        self.accelerator.backward(loss * share, inputs=self.parameters)
        return {"loss_G": loss}

    def backward_path_length(self, part, share):
        """Generator: deviation of the path lengths from their running mean."""
        training, rng = self.training, self.make_rng(part, "path length")
        count = max(1, round(len(part) * training.path_length_batch_fraction))
        lengths = compute_path_lengths(self.model, count, training.style_mixing_probability, rng)
        mean = self.path_length_mean.next(lengths.detach().mean())
        penalty = (lengths - mean).square().mean()
        weight = training.path_length_weight * training.path_length_every_steps
        self.accelerator.backward(penalty * (weight * share), inputs=self.parameters)
        return {"path_length": lengths, "path_length_penalty": penalty}

    def generate(self, part, update_magnitudes=False) -> Generated:
        """Generate as many images as the part has."""
        rng = self.make_rng(part)
        w, ws = draw_ws(self.model, len(part), self.training.style_mixing_probability, rng)
        is_alias_free = isinstance(self.model, StyleGAN3Generator)
        options = {"update_magnitudes": update_magnitudes} if is_alias_free else {}
        images = draw_images(self.model, ws, rng, self.compute_dtype, **options)
        real = reduce_images(part.images, self.config.generator.reduction)
        return Generated(w, images, self.show(images, rng), self.show(real, rng))

    def judge(self, seen, num_batches=1):
        """Return the discriminator's logits; a part is compared in groups that divide it."""
        count, largest = len(seen) // num_batches, self.config.discriminator.group_size
        sizes = range(min(largest, count), 0, -1)
        self.discriminator.group_size = next(size for size in sizes if count % size == 0)
        return self.discriminator(seen, compute_dtype=self.compute_dtype, num_batches=num_batches)

    def show(self, images, rng):
        """Return images as the discriminator sees them: blurred, then augmented."""
        return augment(gaussian_blur(images, self.sigma), self.p, rng)

    def make_rng(self, part, stream=""):
        """Create the random generator of one use by one part in this step."""
        stream = stream if part.first_row == 0 else f"{stream} from row {part.first_row}"
        return make_generator(
            self.config.seed,
            rank=self.accelerator.process_index,
            num_images_seen=self.num_images_seen,
            stream=stream,
            device=self.accelerator.device,
        )


def draw_images(model, ws, rng, compute_dtype=None, **options):
    """Draw images from ws with fresh noise, as the discriminator sees them: before any grain."""
    draw = model.draw if isinstance(model, StyleGAN2Generator) else model.synthesis
    return draw(ws, "random", rng, compute_dtype, **options)


def draw_ws(model, batch_size: int, mixing_probability: float, rng):
    """Draw w [B, w_dim] and the ws [B, num_ws, w_dim] made of them.

    With `mixing_probability` an image changes to a second w at a random layer (StyleGAN paper,
    section 3.1).
    """
    device, num_ws = rng.device, model.num_ws
    z = torch.randn(2 * batch_size, model.config.z_dim, generator=rng, device=device)
    cutoffs = torch.randint(1, num_ws, (batch_size, 1), generator=rng, device=device)  # [B, 1]
    mixed = torch.rand(batch_size, 1, generator=rng, device=device) < mixing_probability
    ws, ws_second = model.mapping(z).chunk(2)  # [B, num_ws, w_dim]
    second = mixed & (torch.arange(num_ws, device=device) >= cutoffs)  # [B, num_ws]
    return ws[:, 0], torch.where(second.unsqueeze(2), ws_second, ws)


def compute_gradient_penalty(discriminator, images, show):
    """Compute the mean squared gradient of the discriminator at images, in float32.

    images [B, 1, R, R] pass through `show` before the discriminator sees them.
    """
    images = images.detach().requires_grad_()
    with second_derivatives():
        return r1_penalty(discriminator(show(images)), images).mean()


def compute_path_lengths(model, batch_size: int, mixing_probability: float, rng):
    """Compute path lengths [B] of new images in float32; in bfloat16 they would be noise."""
    _, ws = draw_ws(model, batch_size, mixing_probability, rng)
    with second_derivatives():
        images = draw_images(model, ws, rng)  # [B, 1, R, R]
    noise = torch.randn(images.shape, generator=rng, device=rng.device)
    return path_lengths(images, ws, noise)


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
    model, discriminator = (network.to(accelerator.device) for network in create_networks(config))
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
                w_mean = accelerator.reduce(w.mean(dim=0), "mean")
                model.mapping_network.update_w_mean(w_mean, training.w_mean_decay)
                share_magnitudes(model, accelerator)
                if game.augmentation is not None:
                    run.log(augmentation_probability=game.p)
                    sign = accelerator.reduce(scores_real.float().sign().mean(), "mean")
                    game.augmentation.update(sign, training.batch_size)
                ema.update(model, num_images_seen, training.batch_size)
                run.log(scores_real=scores_real.mean(), scores_fake=outputs_D["scores_fake"].mean())
                run.log(loss_G=outputs_G["loss_G"], loss_D=outputs_D["loss_D"])
                run.log(**{f"{name}_G": value for name, value in step_G.items()})
                run.log(**{f"{name}_D": value for name, value in step_D.items()})
                if best and run.is_due(training.evaluate_every, num_images_seen):
                    generate = partial(generate_images, ema.model, config)
                    distance = best.update(ema.model, generate, num_images_seen)
                    run.log(held_out_frechet_distance=distance, **best.distance.curves)
                if run.samples_due(num_images_seen) and accelerator.is_main_process:
                    samples = generate_images(ema.model, config, range(training.num_sample_images))
                    save_image_grid(samples, run.samples_path(num_images_seen))
                run.step(num_images_seen)
        train_seconds = run.finish(num_images_seen)

    if accelerator.is_main_process:
        save_generator(ema.model, path)
    accelerator.wait_for_everyone()
    return path, train_seconds


def start_networks(config, model, discriminator, average, accelerator, out):
    """Load the weights of `init_from` into the networks of a new run, and record them."""
    if config.init_from is None or list_checkpoints(out / "stylegan" / "checkpoints"):
        return
    recorded = out if accelerator.is_main_process else None
    start_from(config, model, discriminator, average, accelerator.print, recorded)


def save_generator(model, path):
    """Save a generator in place of what `path` held."""
    with replace_folder(path) as folder:
        model.save_pretrained(folder)


def create_augmentation(config, device):
    """Create the probability that an `AugmentationConfig` describes; None for no augmentation."""
    if config.mode == "none":
        return None
    target = config.target if config.mode == "adaptive" else None
    return AdaptiveProbability(
        config.initial_probability, target, config.images_to_one, config.every_steps, device
    )


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


@torch.no_grad()
def share_magnitudes(model, accelerator) -> None:
    """Average the running magnitudes over processes, as if one process had seen all images."""
    if accelerator.num_processes == 1 or not isinstance(model, StyleGAN3Generator):
        return
    magnitudes = [layer.magnitude for layer in model.synthesis_network.layers]
    means = accelerator.reduce(torch.stack(magnitudes), "mean")
    for magnitude, mean in zip(magnitudes, means, strict=True):
        magnitude.copy_(mean)


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


@torch.no_grad()
def generate_images(model, config, numbers):
    """Generate the images of these numbers, float32 [N, 1, R, R] on the CPU, with fresh noise.

    Each image depends on the seed and its number alone.
    """
    images = []
    for start in range(0, len(numbers), config.training.batch_size):
        part = numbers[start : start + config.training.batch_size]
        rngs = [make_generator(config.seed, stream=f"evaluation {number}") for number in part]
        z = torch.stack([torch.randn(config.generator.z_dim, generator=rng) for rng in rngs])
        images.append(model(z.to(model.device), noise_mode="random", generator=rngs).cpu())
    return torch.cat(images)
