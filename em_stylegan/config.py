"""What decides a StyleGAN run: networks, training, and the run that holds them."""

from dataclasses import dataclass, field

from em_data import DataConfig

ARCHITECTURES = ("stylegan2", "stylegan3-t", "stylegan3-r", "stylegan1")
DISCRIMINATORS = ("resnet", "orig", "skip")


@dataclass(frozen=True)
class GeneratorConfig:
    """The generator; its resolution is the tiles'."""

    architecture: str = "stylegan2"
    """"stylegan2", "stylegan3-t" (equivariant to translation), "stylegan3-r" (and to rotation; it wants twice the feature maps), or
    "stylegan1" (2019, for comparison)."""
    z_dim: int = 512
    w_dim: int = 512
    mapping_depth: int = 4
    """Layers of the mapping network; the study compares 2, 4 and 8."""
    channel_base: int = 32768
    """Feature maps at side r are min(channel_base // r, max_channels)."""
    max_channels: int = 1024
    """The study compares 256, 512 and 1024."""
    clamp: float | None = None
    """Bound on the feature maps, for half precision; None for the architecture's own: none in StyleGAN2, 256 in StyleGAN3 and in fp16."""
    num_reduced_resolutions: int | None = None
    """Resolutions, from the highest down, whose maps have the run's precision, the others being float32; None for the architecture's own:
    all in StyleGAN2, 4 in StyleGAN3 and in fp16."""
    magnitude_half_life_images: float = 20_000
    """Of the running magnitudes by which StyleGAN3 scales the layers' inputs."""

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f'generator.architecture is "{self.architecture}"; choose one of {", ".join(ARCHITECTURES)}.'
            )
        for name in ("z_dim", "w_dim", "mapping_depth", "channel_base", "max_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"generator.{name} is {getattr(self, name)}; it must be positive.")
        if self.magnitude_half_life_images <= 0:
            raise ValueError(
                f"generator.magnitude_half_life_images is {self.magnitude_half_life_images}; it must be positive."
            )


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator; its resolution is the tiles'."""

    architecture: str = "resnet"
    """"resnet", "orig" or "skip" (2020, figure 7)."""
    channel_base: int = 32768
    max_channels: int = 1024
    group_size: int = 4
    """Images whose deviation from each other the discriminator sees; it must divide a process's batch."""
    clamp: float | None = None
    """Bound on the feature maps, for half precision; None for none, and 256 in fp16."""
    num_reduced_resolutions: int | None = None
    """Resolutions, from the highest down, whose maps have the run's precision; None for all above 4 x 4, and 4 in fp16."""
    num_frozen_layers: int = 0
    """Layers, from the image on, that are not trained: for a discriminator that starts from another's weights."""

    def __post_init__(self):
        if self.architecture not in DISCRIMINATORS:
            raise ValueError(
                f'discriminator.architecture is "{self.architecture}"; choose one of {", ".join(DISCRIMINATORS)}.'
            )
        for name in ("channel_base", "max_channels", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"discriminator.{name} is {getattr(self, name)}; it must be positive."
                )
        if self.num_frozen_layers < 0:
            raise ValueError(
                f"discriminator.num_frozen_layers is {self.num_frozen_layers}; it must not be negative."
            )


@dataclass(frozen=True)
class AugmentationConfig:
    """Augmentation of what the discriminator sees, for few micrographs (Karras et al. 2020, ADA)."""

    mode: str = "none"
    """"none", "adaptive" (ADA), or "fixed" (the initial probability throughout)."""
    initial_probability: float = 0.0
    """Of each transformation."""
    target: float = 0.6
    """Mean sign of the real images' logits at which the probability is held."""
    images_to_one: float = 500_000
    """Images in which the probability can rise from 0 to 1."""
    every_steps: int = 4

    def __post_init__(self):
        if self.mode not in ("none", "adaptive", "fixed"):
            raise ValueError(
                f'training.augmentation.mode is "{self.mode}"; choose "none", "adaptive" or "fixed".'
            )
        if not 0 <= self.initial_probability <= 1:
            raise ValueError("training.augmentation.initial_probability must lie between 0 and 1.")
        if not -1 < self.target < 1:
            raise ValueError(
                f"training.augmentation.target is {self.target}, a mean sign; it must lie between -1 and 1."
            )
        if self.images_to_one <= 0 or self.every_steps < 1:
            raise ValueError(
                "training.augmentation.images_to_one and every_steps must be positive."
            )


@dataclass(frozen=True)
class GANTrainingConfig:
    """The loop. Every interval and length counts images, but for the two of lazy regularisation."""

    num_images: int = 1_200_000
    """Real images shown to the discriminator."""
    batch_size: int = 32
    generator_learning_rate: float = 0.0025
    discriminator_learning_rate: float = 0.0025
    loss: str = "logistic"
    """"logistic" (StyleGAN's), or "relativistic": each generated image against a real one, with R1 on real and R2 on generated images
    (R3GAN, Huang et al. 2024, which computes both in every step: r1_every_steps 1)."""
    r1_gamma: float | None = None
    """Weight of R1; None for 0.0002 resolution^2 / batch_size."""
    r1_every_steps: int = 16
    """R1 is computed in every 16th step and weighted by 16 (lazy regularisation); 0 for never."""
    path_length_weight: float = 2.0
    path_length_every_steps: int = 8
    """The same for path length; 0 for never."""
    path_length_batch_fraction: float = 0.5
    path_length_decay: float = 0.01
    style_mixing_probability: float = 0.9
    w_mean_decay: float = 0.998
    blur_initial_sigma_px: float = 0.0
    """Deviation of a Gaussian that blurs what the discriminator sees, at the start; StyleGAN3-R has 10 (2021, appendix E)."""
    blur_fade_images: float = 200_000
    """Images after which that deviation has fallen to 0, linearly."""
    ema_half_life_images: float = 10_000
    ema_ramp_up: float | None = 0.05
    """The EMA's half-life is at most this share of the images seen; None for no such bound."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    evaluate_every: int = 0
    """Interval, in images, at which the averaged generator's images are compared with held-out tiles (Frechet distance,
    efficientnet-lite0); the nearest weights are kept as best/generator and go into the pipeline. 0: never, and the last weights do."""
    num_evaluation_images: int = 500
    num_sample_images: int = 16
    log_every: int = 4_000
    sample_every: int = 40_000
    checkpoint_every: int = 100_000

    def __post_init__(self):
        if self.loss not in ("logistic", "relativistic"):
            raise ValueError(
                f'training.loss is "{self.loss}"; choose "logistic" or "relativistic".'
            )
        positive = (
            "num_images",
            "batch_size",
            "generator_learning_rate",
            "discriminator_learning_rate",
            "num_sample_images",
            "num_evaluation_images",
            "log_every",
            "checkpoint_every",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"training.{name} is {getattr(self, name)}; it must be positive.")
        not_negative = (
            "r1_every_steps",
            "path_length_every_steps",
            "path_length_weight",
            "ema_half_life_images",
        )
        for name in (
            *not_negative,
            "blur_initial_sigma_px",
            "blur_fade_images",
            "evaluate_every",
            "sample_every",
        ):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"training.{name} is {getattr(self, name)}; it must not be negative."
                )
        if self.r1_gamma is not None and self.r1_gamma < 0:
            raise ValueError(f"training.r1_gamma is {self.r1_gamma}; it must not be negative.")
        for name in (
            "style_mixing_probability",
            "path_length_batch_fraction",
            "path_length_decay",
            "w_mean_decay",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"training.{name} is {getattr(self, name)}; it must lie between 0 and 1."
                )


@dataclass(frozen=True)
class StyleGANConfig:
    """A StyleGAN run: data, where it goes, networks and training."""

    data: str = "synthetic"
    """A folder of micrographs, "synthetic", "hub:owner/name[@revision]" (written by em_data.push), "hub-stream:owner/name[@revision]"
    (the same, read over the network without keeping it: the tiles alone lie on this disk), "damaged-alloys:FOLDER" or
    "datasets:NAME_OR_PATH"."""
    out: str = "runs/stylegan2"
    """The run's folder; the same command on it resumes."""
    seed: int = 0
    """Weights, data order and noise; the split has its own seed in tiles."""
    precision: str = "auto"
    """"bf16", "fp16" (GPUs without bf16; the loss is scaled, the maps are bounded), "no" (float32), or "auto": bf16 where the hardware
    computes in it."""
    init_from: str | None = None
    """Weights to start from instead of random ones: the folder of a run, or one that `em_stylegan.load_official` wrote, with networks of
    the same sizes. With few micrographs, discriminator.num_frozen_layers keeps what such a discriminator has learned."""
    save_untrained: bool = False
    """Save the pipeline of the first weights as well, for comparison: random ones in untrained/, those of init_from in start/."""
    tiles: DataConfig = field(default_factory=DataConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    training: GANTrainingConfig = field(default_factory=GANTrainingConfig)

    def __post_init__(self):
        if self.precision not in ("auto", "bf16", "fp16", "no"):
            raise ValueError(
                f'precision is "{self.precision}"; choose "auto", "bf16", "fp16" or "no".'
            )
        if self.precision == "fp16" and self.generator.architecture == "stylegan1":
            raise ValueError(
                "stylegan1 has no bound on its feature maps for fp16; choose bf16 or no (float32)."
            )
        smallest = 16 if self.generator.architecture.startswith("stylegan3") else 8
        if self.tiles.resolution < smallest or self.tiles.resolution & (self.tiles.resolution - 1):
            raise ValueError(
                f"tiles.resolution is {self.tiles.resolution}; {self.generator.architecture} needs a power of two, at least {smallest}."
            )
        for name in ("generator", "discriminator"):
            base = getattr(self, name).channel_base
            if base < self.tiles.resolution:
                raise ValueError(
                    f"{name}.channel_base is {base}, which leaves no feature map at {self.tiles.resolution} pixels; make it larger."
                )

    @property
    def r1_gamma(self) -> float:
        """The weight of R1 in force."""
        if self.training.r1_gamma is not None:
            return self.training.r1_gamma
        return 0.0002 * self.tiles.resolution**2 / self.training.batch_size
