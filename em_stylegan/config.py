"""Configuration of a StyleGAN run: networks, training, and the run that holds them."""

from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass

from em_data import DataConfig
from em_training import MAY_CHANGE, MEASURED, strict
from em_training.config import (
    Depth,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Size,
)

Share = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True, config=strict("generator"))
class GeneratorConfig:
    """The generator. Its resolution is that of the tiles."""

    architecture: Literal["stylegan2", "stylegan3-t", "stylegan3-r", "stylegan1"] = "stylegan2"
    """"stylegan2"; "stylegan3-t", equivariant to translation; "stylegan3-r", also equivariant to
    rotation, with twice the feature maps; or "stylegan1" of 2019, for comparison."""
    z_dim: Size = 512
    w_dim: Size = 512
    mapping_depth: Depth = 4
    """Layers of the mapping network. The study compares 2, 4 and 8."""
    channel_base: Size = 32768
    """A layer with side r has min(channel_base // r, max_channels) feature maps."""
    max_channels: Size = 1024
    """Largest number of feature maps. The study compares 256, 512 and 1024."""
    clamp: PositiveFloat | None = None
    """Bound on the feature maps, for half precision. Default: none for StyleGAN2, 256 for
    StyleGAN3 and in fp16."""
    num_reduced_resolutions: NotNegative | None = None
    """How many of the highest resolutions compute in the run's precision; the others compute in
    float32. Default: all for StyleGAN2, 4 for StyleGAN3 and in fp16."""
    magnitude_half_life_images: PositiveFloat = 20_000
    """Half-life of the running magnitudes that scale the inputs of StyleGAN3's layers."""
    image_mean: Annotated[Annotated[float, Ge(-1), Le(1)] | None, MEASURED] = 0.0
    """Mean of the images that StyleGAN2 is trained on, in [-1, 1]. The networks work on
    (image - image_mean) / image_std. None: measured on the training tiles."""
    image_std: Annotated[Annotated[float, Gt(0), Le(2)] | None, MEASURED] = 1.0
    """Their standard deviation. Micrographs of low contrast train faster with None than with 1."""
    noise_strength: Annotated[float, Ge(0), Le(100)] = 0.0
    """Strength of StyleGAN2's noise inputs at the start. At 0, as in the paper, the strengths do
    not grow in a short training."""
    reduction: Literal[1, 2, 4] = 1
    """StyleGAN2's layers, and the discriminator, work on images of 1 / reduction of the side. What
    is finer is added as grain, whose spectrum and strength are measured on the training tiles."""


@dataclass(frozen=True, config=strict("discriminator"))
class DiscriminatorConfig:
    """The discriminator. Its resolution is that of the tiles."""

    architecture: Literal["resnet", "orig", "skip"] = "resnet"
    """"resnet", "orig" or "skip" (StyleGAN2 paper, figure 7)."""
    channel_base: Size = 32768
    max_channels: Size = 1024
    group_size: Size = 4
    """Images that the minibatch standard deviation compares; must divide a process's batch."""
    clamp: PositiveFloat | None = None
    """Bound on the feature maps, for half precision. Default: none, and 256 in fp16."""
    num_reduced_resolutions: NotNegative | None = None
    """How many of the highest resolutions compute in the run's precision. Default: all above
    4 x 4, and 4 in fp16."""
    num_frozen_layers: NotNegative = 0
    """Layers, counted from the image, that are not trained; for a discriminator that starts from
    trained weights."""
    unconditional_output: bool = True
    """With classes: also judge images regardless of their class, which the ramp of the classes
    needs. Without it, as in StyleGAN2-ADA, training.class_ramp_images must be 0 0."""


@dataclass(frozen=True, config=strict("training.augmentation"))
class AugmentationConfig:
    """Augmentation of the discriminator's images, for few micrographs (ADA, Karras et al. 2020)."""

    mode: Literal["none", "adaptive", "fixed"] = "none"
    """"none", "adaptive" (ADA) or "fixed" (the initial probability throughout)."""
    initial_probability: Share = 0.0
    """Probability of each transformation at the start."""
    target: Annotated[float, Gt(-1), Lt(1)] = 0.6
    """Mean sign of the real images' logits that ADA aims at."""
    images_to_one: PositiveFloat = 500_000
    """Images in which the probability can rise from 0 to 1."""
    every_steps: Size = 4


@dataclass(frozen=True, config=strict("training"))
class GANTrainingConfig:
    """The training. Lengths and intervals count images, except the two of lazy regularisation."""

    num_images: Positive = 1_200_000
    """Real images shown to the discriminator."""
    batch_size: Size = 32
    """Real images of one step, over all processes."""
    micro_batch_size: Annotated[NotNegative, MAY_CHANGE] = 0
    """Images of a process that are computed at a time, with accumulated gradients; 0 for its whole
    batch. It is halved when the memory is full. The minibatch standard deviation then compares
    images of one part."""
    generator_learning_rate: PositiveFloat = 0.0025
    discriminator_learning_rate: PositiveFloat = 0.0025
    loss: Literal["logistic", "relativistic"] = "logistic"
    """"logistic" (StyleGAN's), or "relativistic": each generated image against a real one, with R1
    on real and R2 on generated images (R3GAN, Huang et al. 2024, with r1_every_steps 1)."""
    r1_gamma: NotNegativeFloat | None = None
    """Weight of R1. Default: 0.0002 resolution^2 / batch_size."""
    r1_every_steps: NotNegative = 16
    """Steps between computations of R1, which is weighted by this number (lazy regularisation); 0
    turns R1 off."""
    path_length_weight: NotNegativeFloat = 2.0
    path_length_every_steps: NotNegative = 8
    """The same for path length regularisation; 0 turns it off."""
    path_length_batch_fraction: Share = 0.5
    path_length_decay: Share = 0.01
    style_mixing_probability: Share = 0.9
    w_mean_decay: Share = 0.998
    blur_initial_sigma_px: Annotated[float, Ge(0), Le(1000)] = 0.0
    """Standard deviation of the blur of the discriminator's images at the start, in pixels;
    StyleGAN3-R uses 10 (StyleGAN3 paper, appendix E)."""
    blur_fade_images: NotNegativeFloat = 200_000
    """Images after which the blur has decreased linearly to 0."""
    ema_half_life_images: NotNegativeFloat = 10_000
    ema_ramp_up: PositiveFloat | None = 0.05
    """The EMA's half-life is at most this share of the images seen; None for no such limit."""
    class_ramp_images: tuple[NotNegative, NotNegative] = (200_000, 400_000)
    """With classes: training images between which the weight of the classes rises from 0 to 1.
    Small sets then train without classes first (Shahbazi et al. 2022, arXiv:2201.06578). 0 0:
    classes count from the beginning. The best weights are sought after the ramp."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    evaluate_every: Annotated[NotNegative, MAY_CHANGE] = 0
    """Interval in images for comparing the averaged generator with held-out tiles (Frechet
    distance, efficientnet-lite0). The best weights are kept in best/generator and go into the
    pipeline. 0: never, and the last weights go into the pipeline."""
    num_evaluation_images: Size = 500
    evaluation_metrics: Annotated[tuple[str, ...], MAY_CHANGE] = ()
    """More metrics at these moments, for the curves of the report: kernel_distance, precision,
    recall, density, coverage, frechet_distance_infinite. The Frechet distance chooses the
    weights."""
    num_sample_images: Size = 16
    log_every: Annotated[Positive, MAY_CHANGE] = 4_000
    sample_every: Annotated[NotNegative, MAY_CHANGE] = 40_000
    checkpoint_every: Annotated[Positive, MAY_CHANGE] = 100_000


@dataclass(frozen=True, config=strict())
class StyleGANConfig:
    """A StyleGAN run: data, output folder, networks and training."""

    data: str = "synthetic"
    """A folder of micrographs, or "synthetic" for the embedded ones. Also "synthetic-varied" (a
    wide variety of them), "synthetic-materials" (three classes), "synthetic-other" (another
    microscope), "hub:owner/name[@revision]" (written by em_data.push),
    "hub-stream:owner/name[@revision]" (the same, read over the network; only the tiles are kept on
    disk), "damaged-alloys:FOLDER" and "datasets:NAME_OR_PATH"."""
    out: Annotated[str, MAY_CHANGE] = "runs/stylegan2"
    """Folder of the run. The same command on it resumes the run."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the weights, the order of the data and the noise; the split has tiles.seed."""
    precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """Number format: auto (bf16 where the hardware computes in it), bf16, fp16 or no (float32).
    fp16 is for GPUs without bf16, with loss scaling and bounded feature maps."""
    init_from: str | None = None
    """Start from trained weights of networks of the same sizes. They are in a run's folder, a saved
    pipeline, a model of the package such as em-stylegan2-64, a Hub repository, or a folder written
    by `em_stylegan.load_official`. With few micrographs, use discriminator.num_frozen_layers to
    keep what the discriminator has learned."""
    conditional: bool = False
    """Train with the classes of the micrographs, such as materials: the model then draws images of
    a class that is asked for."""
    save_untrained: Annotated[bool, MAY_CHANGE] = False
    """Also save the pipeline of the first weights, for comparison: in untrained/ if they are
    random, in start/ if they come from init_from."""
    tiles: DataConfig = field(default_factory=DataConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    training: GANTrainingConfig = field(default_factory=GANTrainingConfig)

    def __post_init__(self):
        architecture, resolution = self.generator.architecture, self.tiles.resolution
        if self.precision == "fp16" and architecture == "stylegan1":
            raise ValueError(
                "precision is fp16, but stylegan1 has no bound on its feature maps. "
                "Use --precision bf16 or --precision no."
            )
        smallest = 16 if architecture.startswith("stylegan3") else 8
        if resolution < smallest or resolution & (resolution - 1):
            raise ValueError(
                f"tiles.resolution is {resolution}, but must be a power of two of at least "
                f"{smallest} for {architecture}. Use --tiles.resolution."
            )
        self._check_reduction()
        if self.conditional:
            self._check_ramp()
        for name in ("generator", "discriminator"):
            base = getattr(self, name).channel_base
            if base < resolution:
                raise ValueError(
                    f"{name}.channel_base is {base}, but must be at least tiles.resolution "
                    f"({resolution}). Use --{name}.channel-base."
                )

    def _check_ramp(self):
        """Raise `ValueError` for a ramp of the classes that does not fit the training."""
        (start, end), num_images = self.training.class_ramp_images, self.training.num_images
        if start > end or end > num_images:
            raise ValueError(
                f"training.class_ramp_images is {start} {end}, but must rise and end within the "
                f"{num_images} images of the training. Use --training.class-ramp-images "
                f"{num_images // 4} {num_images // 2}."
            )
        if end > 0 and not self.discriminator.unconditional_output:
            raise ValueError(
                f"training.class_ramp_images is {start} {end}, but without "
                "discriminator.unconditional_output there is nothing to train before the classes "
                "count. Use --training.class-ramp-images 0 0, or leave the output on."
            )

    def _check_reduction(self):
        """Raise `ValueError` for options of StyleGAN2 in another, and for too large a reduction."""
        generator, resolution = self.generator, self.tiles.resolution
        defaults = {"image_mean": 0, "image_std": 1, "noise_strength": 0, "reduction": 1}
        given = {name: getattr(generator, name) for name in defaults}
        own = [name for name, default in defaults.items() if given[name] != default]
        if own and generator.architecture != "stylegan2":
            values = ", ".join(f"generator.{name} is {given[name]}" for name in own)
            flags = (f"--generator.{name.replace('_', '-')} {defaults[name]}" for name in own)
            raise ValueError(
                f"{values}, but {generator.architecture} has no such option. Use {' '.join(flags)}."
            )
        if resolution // generator.reduction < 8:
            raise ValueError(
                f"generator.reduction is {generator.reduction}, which leaves "
                f"{resolution // generator.reduction} of {resolution} pixels, but 8 or more are "
                "needed. Use --generator.reduction 1."
            )

    @property
    def r1_gamma(self) -> float:
        """Weight of R1 in use."""
        if self.training.r1_gamma is not None:
            return self.training.r1_gamma
        return 0.0002 * self.tiles.resolution**2 / self.training.batch_size
