"""What decides a StyleGAN run: networks, training, and the run that holds them."""

from dataclasses import dataclass, field

from em_data import DataConfig


@dataclass(frozen=True)
class GeneratorConfig:
    """The StyleGAN2 generator; its resolution is the tiles'."""

    z_dim: int = 512
    w_dim: int = 512
    mapping_depth: int = 4
    """Layers of the mapping network; the study compares 2, 4 and 8."""
    channel_base: int = 32768
    """Feature maps at side r are min(channel_base // r, max_channels)."""
    max_channels: int = 1024
    """The study compares 256, 512 and 1024."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The residual discriminator; its resolution is the tiles'."""

    channel_base: int = 32768
    max_channels: int = 1024
    group_size: int = 4
    """Images whose deviation from each other the discriminator sees; it must divide a process's batch."""


@dataclass(frozen=True)
class GANTrainingConfig:
    """The loop of StyleGAN2. Every interval and length counts images, but for the two of lazy regularisation."""

    num_images: int = 1_200_000
    """Real images shown to the discriminator."""
    batch_size: int = 32
    generator_learning_rate: float = 0.0025
    discriminator_learning_rate: float = 0.0025
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
    ema_half_life_images: float = 10_000
    ema_ramp_up: float | None = 0.05
    """The EMA's half-life is at most this share of the images seen; None for no such bound."""
    num_sample_images: int = 16
    log_every: int = 4_000
    sample_every: int = 40_000
    checkpoint_every: int = 100_000

    def __post_init__(self):
        positive = (
            "num_images",
            "batch_size",
            "generator_learning_rate",
            "discriminator_learning_rate",
            "num_sample_images",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"training.{name} is {getattr(self, name)}; it must be positive.")
        not_negative = ("r1_every_steps", "path_length_every_steps", "path_length_weight", "ema_half_life_images")
        for name in (*not_negative, "log_every", "sample_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name} is {getattr(self, name)}; it must not be negative.")
        for name in ("style_mixing_probability", "path_length_batch_fraction", "path_length_decay", "w_mean_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}; it must lie between 0 and 1.")


@dataclass(frozen=True)
class StyleGANConfig:
    """A StyleGAN run: data, where it goes, networks and training."""

    data: str = "synthetic"
    """A folder of micrographs, "synthetic", or "datasets:NAME_OR_PATH"."""
    out: str = "runs/stylegan2"
    """The run's folder; the same command on it resumes."""
    seed: int = 0
    """Weights, data order and noise; the split has its own seed in tiles."""
    precision: str = "auto"
    """"bf16", "no" (float32), or "auto": bf16 where the hardware computes in it."""
    save_untrained: bool = False
    """Save the pipeline of the first, random weights as well, for comparison."""
    tiles: DataConfig = field(default_factory=DataConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    training: GANTrainingConfig = field(default_factory=GANTrainingConfig)

    def __post_init__(self):
        if self.precision not in ("auto", "bf16", "no"):
            raise ValueError(f'precision is "{self.precision}"; choose "auto", "bf16" or "no".')
        if self.tiles.resolution < 8 or self.tiles.resolution & (self.tiles.resolution - 1):
            raise ValueError(
                f"tiles.resolution is {self.tiles.resolution}; StyleGAN2 needs a power of two, at least 8."
            )

    @property
    def r1_gamma(self) -> float:
        """The weight of R1 in force."""
        if self.training.r1_gamma is not None:
            return self.training.r1_gamma
        return 0.0002 * self.tiles.resolution**2 / self.training.batch_size
