"""The networks and optimizers that a `StyleGANConfig` describes."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from em_stylegan.discriminator import StyleGANDiscriminator
from em_stylegan.em_stylegan1_generator import StyleGAN1Generator
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_training import seed_for

# Karras et al. 2020, "Training GANs with limited data", appendix D.1
FLOAT16_BOUNDS = {"clamp": 256.0, "num_reduced_resolutions": 4}


def count_classes(config, tiles) -> int:
    """Return the number of classes of a run on `tiles`; 0 if it trains without classes."""
    return len(tiles.class_names) if config.conditional else 0


def create_networks(config, num_classes: int = 0):
    """Create the generator and discriminator; their weights depend on `config.seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "stylegan"))
        model = create_generator(config, num_classes)
        options = fill_bounds(vars(config.discriminator), config.precision) | get_scale(config)
        num_frozen = options.pop("num_frozen_layers")
        resolution = config.tiles.resolution // config.generator.reduction
        discriminator = StyleGANDiscriminator(
            resolution=resolution, num_classes=num_classes, **options
        )
    num_layers = len(list(discriminator.freezable_layers()))
    if num_frozen > num_layers:
        raise ValueError(
            f"discriminator.num_frozen_layers is {num_frozen}, but there are {num_layers} layers "
            f"above 4 x 4. Use --discriminator.num-frozen-layers {num_layers} or fewer."
        )
    return model.train(), discriminator.train()


def create_generator(config, num_classes: int = 0):
    """Create the generator that `config.generator.architecture` names, with random weights."""
    options = fill_bounds(vars(config.generator), config.precision)
    options |= {"num_classes": num_classes, "class_means": num_classes > 0}
    architecture, half_life = options.pop("architecture"), options.pop("magnitude_half_life_images")
    for name in ("clamp", "num_reduced_resolutions"):  # the architecture's own default
        if options[name] is None:
            del options[name]
    resolution = config.tiles.resolution
    own = {name: options.pop(name) for name in ("noise_strength", "reduction")}
    scale = get_scale(config)
    options = {name: value for name, value in options.items() if name not in scale}
    if architecture == "stylegan2":
        return StyleGAN2Generator(resolution, **own, **scale, **options)
    if architecture == "stylegan1":
        for name in ("clamp", "num_reduced_resolutions"):
            if name in options:
                raise ValueError(
                    f"generator.{name} is {options[name]}, but stylegan1 has no such option. "
                    f"Leave --generator.{name.replace('_', '-')} out."
                )
        return StyleGAN1Generator(resolution, **options)
    if architecture == "stylegan3-r":
        options |= {"kernel_size": 1, "radial_filters": True}
    decay = 0.5 ** (config.training.batch_size / half_life)
    return StyleGAN3Generator(resolution, magnitude_decay=decay, **options)


def get_scale(config) -> dict[str, float]:
    """Return image_mean and image_std; 0 and 1 where they are not measured yet."""
    mean, std = config.generator.image_mean, config.generator.image_std
    return {
        "image_mean": 0.0 if mean is None else mean,
        "image_std": 1.0 if std is None else std,
    }


def measure_scale(config, images):
    """Return `config` with what is None of image_mean and image_std measured on images."""
    mean, std = float(images.double().mean()), float(images.double().std())
    scale = SimpleNamespace(image_mean=round(mean, 4), image_std=max(round(std, 4), 1e-4))
    return fill_scale(config, scale)


def fill_scale(config, scale):
    """Return `config` with what is None of image_mean and image_std as an object has it."""
    generator = config.generator
    names = [name for name in ("image_mean", "image_std") if getattr(generator, name) is None]
    missing = {name: getattr(scale, name) for name in names}
    return replace(config, generator=replace(generator, **missing)) if missing else config


def fill_bounds(options, precision) -> dict:
    """Return a network's options, with the bounds that fp16 needs in place of None."""
    bounds = FLOAT16_BOUNDS if precision == "fp16" else {}
    return {name: bounds.get(name) if value is None else value for name, value in options.items()}


def set_trainable(discriminator, trainable: bool, num_frozen: int) -> None:
    """Turn the discriminator's gradients on or off; its first `num_frozen` layers have none."""
    discriminator.requires_grad_(trainable)
    for layer in list(discriminator.freezable_layers())[:num_frozen]:
        layer.requires_grad_(False)


def create_optimizer(model, learning_rate: float, every_steps: int):
    """Create Adam without momentum for a network that is regularised in every k-th step.

    Lazy regularisation adds one step in k. The learning rate and beta2 are adjusted by
    c = k / (k + 1) to keep the pace (StyleGAN2 paper, appendix B).
    """
    c = every_steps / (every_steps + 1) if every_steps else 1.0
    return torch.optim.Adam(
        model.parameters(), lr=learning_rate * c, betas=(0.0, 0.99**c), eps=1e-8, fused=True
    )
