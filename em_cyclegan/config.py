"""Configuration of a translation run: two sources, networks, training."""

from dataclasses import field, fields, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass

from em_data import DataConfig
from em_training import MAY_CHANGE, strict
from em_training.config import (
    Depth,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Size,
)

STRIDE, MIN_SIDE = 4, 8  # of the generators, see `em_cyclegan.em_resnet_generator`
SAME_PIXEL_SIZE = 0.1  # relative difference of two pixel sizes that is not told
PAPER_RESOLUTION = 256  # from here on, the paper's generator has 9 blocks and not 6


@dataclass(frozen=True, config=strict("source_tiles"))
class SourceTilesConfig:
    """How the source's tiles differ from the target's; None where they do not."""

    downsample: Annotated[int, Gt(0), Le(65_536)] | None = None
    """Average squares of this many pixels a side of the source. Default: as `tiles`."""
    intensity: Literal["auto", "full", "percentile"] | None = None
    """Grey levels of the source that become -1 and 1. Default: as `tiles`."""
    label_bar: Literal["crop", "keep", "refuse"] | None = None
    """The label bar below an image of the source. Default: as `tiles`."""
    num_micrographs: Annotated[int, Gt(0), Le(10_000_000)] | None = None
    """Use only the first so many micrographs of the source. Default: as `tiles`."""
    num_synthetic: Annotated[int, Gt(0), Le(10_000_000)] | None = None
    """Number of simulated micrographs, if the source is simulated. Default: as `tiles`."""
    micrograph_size: Annotated[int, Gt(0), Le(65_536)] | None = None
    """Side of a simulated micrograph in pixels. Default: as `tiles`."""
    frame_step: Annotated[int, Gt(0), Le(1_000_000)] | None = None
    """Use every k-th frame of a stack of the source. Default: as `tiles`."""
    pixel_size_nm: Annotated[float, Gt(0)] | None = None
    """Side of a pixel in nm of the source's micrographs that do not state it. Default: as
    `tiles`."""
    pixel_size_pattern: str | None = None
    """Regular expression that finds the pixel size in the paths of the source. Default: as
    `tiles`."""

    def complete(self, tiles: DataConfig) -> DataConfig:
        """Return the tiling of the source: the target's `tiles` with what is given here."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(tiles, **{name: each for name, each in given.items() if each is not None})


@dataclass(frozen=True, config=strict("generator"))
class GeneratorConfig:
    """The two generators."""

    base_channels: Size = 64
    """Feature maps at full resolution; four times as many at a quarter of it."""
    num_blocks: Depth | None = None
    """Residual blocks. Default: 9 from 256 x 256 pixels on, else 6, as in the paper."""
    adds_input: bool = False
    """The network computes what is added to an image, and begins near the identity. It learns
    faster and keeps grey levels better than the paper's, which computes the whole image."""


@dataclass(frozen=True, config=strict("discriminator"))
class DiscriminatorConfig:
    """The discriminators of images and of log power spectra."""

    base_channels: Size = 64
    num_layers: Annotated[int, Gt(0), Le(6)] = 3
    """Layers of stride 2: 1, 2, 3 for patches of 16, 34, 70 pixels. The paper has 70."""


@dataclass(frozen=True, config=strict("training"))
class TranslationTrainingConfig:
    """The training. Lengths and intervals count images of the target."""

    method: Literal["cycle", "contrastive"] = "cycle"
    """"cycle" (CycleGAN): two generators, each undoes the other. "contrastive" (CUT): one generator
    and a loss on patches. It is faster, but nothing leads back to the source: it invents more, and
    labels hold less well."""
    num_images: Positive = 400_000
    """Images of each side that are shown."""
    constant_images: NotNegative | None = None
    """Images until the learning rate begins to fall, linearly to 0 at the end. Default: half of
    num_images, as in the paper."""
    batch_size: Size = 1
    """Images of each side in one step, over all processes."""
    learning_rate: PositiveFloat = 2e-4
    cycle_weight: NotNegativeFloat = 10.0
    """Weight of |F(G(x)) - x|, the image that went there and back. Only for "cycle"."""
    identity_weight: NotNegativeFloat = 0.5
    """Weight of |G(y) - y|, the image that is of the target already, as a share of cycle_weight.
    It keeps grey levels. For "contrastive": weight of the contrastive loss of such images, as a
    share of contrastive_weight."""
    spectrum_weight: NotNegativeFloat = 1.0
    """Weight of the second discriminator, on the log power spectrum, which carries noise and blur;
    the first one has 1. 0: none, as in the paper."""
    contrastive_weight: NotNegativeFloat = 1.0
    """Weight of the contrastive loss. Only for "contrastive"."""
    num_patches: Size = 256
    """Places of an image that the contrastive loss compares."""
    temperature: Annotated[float, Gt(0), Le(1000)] = 0.07
    """Temperature of the contrastive loss."""
    pool_size: Annotated[int, Ge(0), Le(65_536)] = 50
    """Generated images that are kept to be shown to the discriminators again; 0 for none."""
    ema_half_life_images: NotNegativeFloat = 10_000
    """Images after which the generators' old weights count half in the saved average; 0 for the
    last weights."""
    ema_ramp_up: PositiveFloat | None = 0.05
    """The EMA's half-life is at most this share of the images seen; None for no such limit."""
    evaluate_every: Annotated[NotNegative, MAY_CHANGE] = 0
    """Interval in images for comparing translated held-out tiles of the source with held-out tiles
    of the target (Frechet distance, efficientnet-lite0). The best weights are kept and go into the
    pipeline. 0: never, and the last weights go into the pipeline."""
    num_evaluation_images: Size = 500
    evaluation_metrics: Annotated[tuple[str, ...], MAY_CHANGE] = ()
    """More metrics at these moments, for the curves of the report: kernel_distance, precision,
    recall, density, coverage, frechet_distance_infinite. The Frechet distance chooses the
    weights."""
    num_sample_images: Size = 8
    """Held-out tiles of the source in a sample grid, each beside its translation."""
    log_every: Annotated[Positive, MAY_CHANGE] = 1_000
    sample_every: Annotated[NotNegative, MAY_CHANGE] = 10_000
    checkpoint_every: Annotated[Positive, MAY_CHANGE] = 20_000

    def __post_init__(self):
        if self.constant_images is not None and self.constant_images > self.num_images:
            raise ValueError(
                f"training.constant_images is {self.constant_images}, but must be at most "
                f"training.num_images ({self.num_images}). Use --training.constant-images."
            )


@dataclass(frozen=True, config=strict())
class CycleGANConfig:
    """A translation run: source, target, output folder, networks and training."""

    source: str = "synthetic"
    """What is translated: a folder of micrographs, or "synthetic" for the embedded ones with their
    labels. Also all other sources that `data` can be."""
    data: str = "synthetic-other"
    """The target, whose style the translated images get: a folder of micrographs, or an embedded
    source. Also "hub:owner/name[@revision]" (written by em_data.push),
    "hub-stream:owner/name[@revision]", "damaged-alloys:FOLDER" and "datasets:NAME_OR_PATH"."""
    out: Annotated[str, MAY_CHANGE] = "runs/cyclegan"
    """Folder of the run. The same command on it resumes the run."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the weights and of the order of the data; the splits have tiles.seed."""
    precision: Literal["auto", "bf16", "no"] = "auto"
    """Number format: auto (bf16 where the hardware computes in it), bf16 or no (float32)."""
    tiles: DataConfig = field(default_factory=lambda: DataConfig(symmetries="d4"))
    source_tiles: SourceTilesConfig = field(default_factory=SourceTilesConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    training: TranslationTrainingConfig = field(default_factory=TranslationTrainingConfig)

    def __post_init__(self):
        resolution, layers = self.tiles.resolution, self.discriminator.num_layers
        smallest = max(MIN_SIDE, 3 * 2**layers)  # for one score
        if resolution % STRIDE or resolution < smallest:
            raise ValueError(
                f"tiles.resolution is {resolution}, but must be a multiple of {STRIDE} and at "
                f"least {smallest} for discriminators of {layers} layers. Use --tiles.resolution, "
                "or --discriminator.num-layers."
            )

    @property
    def num_blocks(self) -> int:
        """Residual blocks of a generator."""
        if self.generator.num_blocks is not None:
            return self.generator.num_blocks
        return 9 if self.tiles.resolution >= PAPER_RESOLUTION else 6

    @property
    def tiles_of_source(self) -> DataConfig:
        """How the source is cut."""
        return self.source_tiles.complete(self.tiles)
