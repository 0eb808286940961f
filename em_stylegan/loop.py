"""Training of StyleGAN2 and 3."""

from functools import partial
from pathlib import Path

import torch

from em_data import BatchLoader, ImageSampler, save_image_grid
from em_evaluation.held_out import HeldOutDistance
from em_stylegan.augmentation import AdaptiveProbability, augment
from em_stylegan.discriminator import StyleGANDiscriminator
from em_stylegan.em_stylegan1_generator import StyleGAN1Generator
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator, second_derivatives
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
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
from em_stylegan.transfer import start_from
from em_training import (
    EMA,
    BestWeights,
    TrainingRun,
    list_checkpoints,
    make_generator,
    seed_for,
    step_optimizer,
)

FLOAT16_BOUNDS = {"clamp": 256.0, "num_reduced_resolutions": 4}  # 2020 ADA, appendix D.1


def create_networks(config):
    """Generator and discriminator of a `StyleGANConfig`, with weights that depend on its seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "stylegan"))
        generator = create_generator(config)
        options = fill_bounds(vars(config.discriminator), config.precision)
        num_frozen = options.pop("num_frozen_layers")
        discriminator = StyleGANDiscriminator(resolution=config.tiles.resolution, **options)
    num_layers = len(list(discriminator.freezable_layers()))
    if num_frozen > num_layers:
        raise ValueError(
            f"discriminator.num_frozen_layers is {num_frozen}; there are {num_layers} layers above 4 x 4."
        )
    return generator.train(), discriminator.train()


def fill_bounds(options, precision) -> dict:
    """The options of a network; where they leave the bound on its maps or the resolutions in reduced precision open, fp16 decides."""
    bounds = FLOAT16_BOUNDS if precision == "fp16" else {}
    return {name: bounds.get(name) if value is None else value for name, value in options.items()}


def create_generator(config):
    """The generator that `config.generator.architecture` names, with random weights."""
    options = fill_bounds(vars(config.generator), config.precision)
    architecture, half_life = options.pop("architecture"), options.pop("magnitude_half_life_images")
    for name in ("clamp", "num_reduced_resolutions"):  # the architecture's own
        if options[name] is None:
            del options[name]
    resolution = config.tiles.resolution
    if architecture == "stylegan2":
        return StyleGAN2Generator(resolution, **options)
    if architecture == "stylegan1":
        for name in ("clamp", "num_reduced_resolutions"):
            if name in options:
                raise ValueError(
                    f"generator.{name} is {options[name]}; stylegan1 has no such option."
                )
        return StyleGAN1Generator(resolution, **options)
    if architecture == "stylegan3-r":
        options |= {"kernel_size": 1, "radial_filters": True}
    return StyleGAN3Generator(
        resolution, magnitude_decay=0.5 ** (config.training.batch_size / half_life), **options
    )


def create_augmentation(config, device):
    """The probability of augmentation that an `AugmentationConfig` asks for; None for no augmentation."""
    if config.mode == "none":
        return None
    target = config.target if config.mode == "adaptive" else None
    return AdaptiveProbability(
        config.initial_probability, target, config.images_to_one, config.every_steps, device
    )


def set_trainable(discriminator, trainable, num_frozen):
    """Let the discriminator's parameters take gradients, or none; its first `num_frozen` layers never do."""
    discriminator.requires_grad_(trainable)
    for layer in list(discriminator.freezable_layers())[:num_frozen]:
        layer.requires_grad_(False)


def create_optimizer(model, learning_rate, every_steps):
    """Adam without momentum; lazy regularisation every k steps adds one step in k, and lr and betas give way by c = k / (k + 1)
    (2020, appendix B)."""
    c = every_steps / (every_steps + 1) if every_steps else 1.0
    return torch.optim.Adam(
        model.parameters(), lr=learning_rate * c, betas=(0.0, 0.99**c), eps=1e-8, fused=True
    )


def train_stylegan(config, tiles, *, accelerator, out_dir, held_out=None):
    """Train StyleGAN on `tiles`, or go on from the last checkpoint in `out_dir`/stylegan.

    A step updates the discriminator on a batch and on as many generated images, with R1 in every 16th step, then the generator on
    the same generated images, with path length in every 8th. With `evaluate_every` it measures the distance of the averaged generator's
    images to the tiles `held_out`, and keeps the weights that came nearest in `out_dir`/stylegan/best. Returns (averaged generator,
    images seen, training seconds).
    """
    training, device = config.training, accelerator.device
    r1_every = training.r1_every_steps
    path_length_every = training.path_length_every_steps if training.path_length_weight > 0 else 0
    is_relativistic = training.loss == "relativistic"
    loss_of_D = relativistic_discriminator_loss if is_relativistic else discriminator_loss
    local_batch_size = check_batch_size(config, accelerator)
    model, discriminator = (network.to(device) for network in create_networks(config))
    num_frozen = config.discriminator.num_frozen_layers
    set_trainable(discriminator, True, num_frozen)
    update_magnitudes = {"update_magnitudes": True} if isinstance(model, StyleGAN3Generator) else {}
    # a ramp forgets random weights; the average to start from is to be kept
    ema = EMA(
        model, training.ema_half_life_images, None if config.init_from else training.ema_ramp_up
    )
    if config.init_from is not None and not list_checkpoints(
        Path(out_dir) / "stylegan" / "checkpoints"
    ):
        start_from(config, model, discriminator, ema.model, accelerator.print)
    optimizer = create_optimizer(model, training.generator_learning_rate, path_length_every)
    optimizer_D = create_optimizer(discriminator, training.discriminator_learning_rate, r1_every)
    path_length_mean = PathLengthMean(training.path_length_decay, device)
    augmentation = create_augmentation(training.augmentation, device)
    sampler = ImageSampler(tiles.num_views, seed_for(config.seed, "stylegan data"))
    compute_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)

    with TrainingRun(out_dir, "stylegan", training, accelerator) as run:
        num_images_seen = run.resume(
            {
                "model": model,
                "discriminator": discriminator,
                "ema": ema,
                "optimizer": optimizer,
                "optimizer_D": optimizer_D,
                "path_length_mean": path_length_mean,
                "augmentation": augmentation,
                "scaler": accelerator.scaler,
            }
        )
        best = create_best_weights(held_out, config, run) if training.evaluate_every else None
        loader = iter(
            BatchLoader(
                tiles,
                sampler,
                batch_size=training.batch_size,
                start=num_images_seen,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
        )
        while num_images_seen < training.num_images:
            step = num_images_seen // training.batch_size
            generator = make_generator(
                config.seed,
                rank=accelerator.process_index,
                num_images_seen=num_images_seen,
                device=device,
            )
            sigma = blur_sigma(
                num_images_seen, training.blur_initial_sigma_px, training.blur_fade_images
            )
            images = next(loader).images.to(device)  # [B, 1, R, R]
            w, ws = draw_ws(model, local_batch_size, training.style_mixing_probability, generator)
            images_fake = model.synthesis(
                ws, "random", generator, compute_dtype, **update_magnitudes
            )  # [B, 1, R, R]
            p = 0.0 if augmentation is None else augmentation.p
            show = partial(show_images, sigma=sigma, p=p, generator=generator)
            seen_fake, seen_real = show(images_fake), show(images)

            seen = torch.cat([seen_real, seen_fake.detach()])
            scores_real, scores_fake = discriminator(
                seen, compute_dtype=compute_dtype, num_batches=2
            ).chunk(2)
            loss_D = loss_of_D(scores_real, scores_fake)
            step_D = update(discriminator, optimizer_D, loss_D, accelerator)
            if r1_every and step % r1_every == 0:
                penalties = {"r1": compute_gradient_penalty(discriminator, images, show)}
                if is_relativistic:
                    penalties["r2"] = compute_gradient_penalty(
                        discriminator, images_fake.detach(), show
                    )
                penalty = sum(penalties.values()) * (config.r1_gamma / 2 * r1_every)
                update(discriminator, optimizer_D, penalty, accelerator)
                run.log(**penalties)

            discriminator.requires_grad_(False)
            judge = partial(discriminator, compute_dtype=compute_dtype)
            if is_relativistic:  # the real images as the updated discriminator judges them
                loss = relativistic_generator_loss(judge(seen_real).detach(), judge(seen_fake))
            else:
                loss = generator_loss(judge(seen_fake))
            step_G = update(model, optimizer, loss, accelerator)
            set_trainable(discriminator, True, num_frozen)
            if path_length_every and step % path_length_every == 0:
                count = max(1, round(local_batch_size * training.path_length_batch_fraction))
                lengths = compute_path_lengths(
                    model, count, training.style_mixing_probability, generator
                )
                mean = path_length_mean.update(accelerator.reduce(lengths.detach().mean(), "mean"))
                penalty = (lengths - mean).square().mean()
                update(
                    model,
                    optimizer,
                    penalty * (training.path_length_weight * path_length_every),
                    accelerator,
                )
                run.log(path_length=lengths.detach().mean(), path_length_penalty=penalty)
            num_images_seen += training.batch_size
            w_mean = accelerator.reduce(w.detach().mean(dim=0), "mean")
            model.mapping_network.update_w_mean(w_mean, training.w_mean_decay)
            share_magnitudes(model, accelerator)
            if augmentation is not None:
                run.log(augmentation_probability=p)
                sign = accelerator.reduce(scores_real.detach().float().sign().mean(), "mean")
                augmentation.update(sign, training.batch_size)
            ema.update(model, num_images_seen, training.batch_size)

            run.log(
                loss_G=loss,
                loss_D=loss_D,
                scores_real=scores_real.mean(),
                scores_fake=scores_fake.mean(),
            )
            for network, logged in (("G", step_G), ("D", step_D)):
                run.log(**{f"{name}_{network}": value for name, value in logged.items()})
            if run.is_due(training.evaluate_every, num_images_seen):
                generate = partial(generate_images, ema.model, config)
                run.log(held_out_frechet_distance=best.update(ema.model, generate, num_images_seen))
            if run.samples_due(num_images_seen) and accelerator.is_main_process:
                save_image_grid(
                    generate_images(ema.model, config, range(training.num_sample_images)),
                    run.samples_path(num_images_seen),
                )
            run.step(num_images_seen)
        train_seconds = run.finish(num_images_seen)
    return ema.model, num_images_seen, train_seconds


def check_batch_size(config, accelerator) -> int:
    """Images of a step in one process; ValueError when processes or the discriminator's groups do not divide them evenly."""
    batch_size, num_processes = config.training.batch_size, accelerator.num_processes
    group_size = config.discriminator.group_size
    if batch_size % num_processes or (batch_size // num_processes) % min(
        group_size, batch_size // num_processes
    ):
        raise ValueError(
            f"training.batch_size is {batch_size}: {num_processes} processes with discriminator groups of {group_size} need a "
            f"multiple of {num_processes * group_size}."
        )
    return batch_size // num_processes


def draw_ws(model, batch_size, mixing_probability, generator):
    """Random w [B, w_dim] and the ws [B, num_ws, w_dim] made of them, where with `mixing_probability` an image changes to a second
    w at a random layer (2019, section 3.1)."""
    device, num_ws = generator.device, model.num_ws
    z = torch.randn(2 * batch_size, model.config.z_dim, generator=generator, device=device)
    cutoffs = torch.randint(
        1, num_ws, (batch_size, 1), generator=generator, device=device
    )  # [B, 1]
    mixed = torch.rand(batch_size, 1, generator=generator, device=device) < mixing_probability
    ws, ws_second = model.mapping(z).chunk(2)  # [B, num_ws, w_dim]
    second = mixed & (torch.arange(num_ws, device=device) >= cutoffs)  # [B, num_ws]
    return ws[:, 0], torch.where(second.unsqueeze(2), ws_second, ws)


def show_images(images, sigma, p, generator):
    """What the discriminator sees of images: blurred, then transformed at random."""
    return augment(gaussian_blur(images, sigma), p, generator)


def compute_gradient_penalty(discriminator, images, show):
    """Mean squared gradient of the discriminator at images [B, 1, R, R] that it sees through `show`, in float32."""
    images.requires_grad_()
    with second_derivatives():
        return r1_penalty(discriminator(show(images)), images).mean()


def compute_path_lengths(model, batch_size, mixing_probability, generator):
    """Path lengths [B] of fresh images, in float32: second derivatives of bfloat16 maps would be noise."""
    _, ws = draw_ws(model, batch_size, mixing_probability, generator)
    with second_derivatives():
        images = model.synthesis(ws, "random", generator)  # [B, 1, R, R]
    noise = torch.randn(images.shape, generator=generator, device=generator.device)
    return path_lengths(images, ws, noise)


def update(model, optimizer, loss, accelerator) -> dict:
    """Take one optimiser step on `loss`; return what to log of it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = loss if accelerator.scaler is None else accelerator.scaler.scale(loss)
    # not autograd.grad: backward brings each gradient to the layout of its parameter, and the fused Adam walks the memory of both
    loss.backward(inputs=parameters)
    return step_optimizer(accelerator, optimizer, parameters)


@torch.no_grad()
def share_magnitudes(model, accelerator):
    """Give all processes the mean of their running magnitudes, which is the running magnitude of all their images."""
    if accelerator.num_processes == 1 or not isinstance(model, StyleGAN3Generator):
        return
    magnitudes = [layer.magnitude for layer in model.synthesis_network.layers]
    for magnitude, mean in zip(
        magnitudes, accelerator.reduce(torch.stack(magnitudes), "mean"), strict=True
    ):
        magnitude.copy_(mean)


def create_best_weights(held_out, config, run):
    """What measures the distance to `held_out` during training, and keeps the best generator."""
    seed = seed_for(config.seed, "held-out distance")
    num_images = config.training.num_evaluation_images
    distance = HeldOutDistance(held_out, num_images, seed, accelerator=run.accelerator, say=run.say)
    return BestWeights(distance, run, "generator")


@torch.no_grad()
def generate_images(model, config, numbers):
    """Images of these numbers, float32 [N, 1, R, R] on the CPU, with fresh noise, as in training and in what `generate.py` makes.

    Each depends on the seed and its number alone.
    """
    images = []
    for start in range(0, len(numbers), config.training.batch_size):
        part = numbers[start : start + config.training.batch_size]
        generators = [make_generator(config.seed, stream=f"evaluation {number}") for number in part]
        z = torch.stack(
            [torch.randn(config.generator.z_dim, generator=generator) for generator in generators]
        )
        images.append(model(z.to(model.device), noise_mode="random", generator=generators).cpu())
    return torch.cat(images)
