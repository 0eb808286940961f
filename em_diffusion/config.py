"""Configuration of a latent diffusion run: one class a stage, and the run that holds them."""

from dataclasses import field, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AliasChoices, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from em_data import DataConfig
from em_diffusion.config_checks import (
    check_attention,
    check_groups,
    check_objective,
    check_start,
)
from em_training import MAY_CHANGE, strict
from em_training.config import (
    Depth,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Size,
)

Beta = Annotated[float, Ge(0), Lt(1)]
Interval = Annotated[Positive, MAY_CHANGE]
IntervalOrNever = Annotated[NotNegative, MAY_CHANGE]
# configurations of version 0.1 have `family` in place of `kind`
NAMED_FAMILY_IN_0_1 = Field(validation_alias=AliasChoices("kind", "family"))


def _read_old_compile(value):
    """Read the choices of version 0.1: "on", "off" or "auto"."""
    return {"on": True, "off": False, "auto": False}.get(value, value)


@dataclass(frozen=True, config=strict("autoencoder"))
class AutoencoderConfig:
    """The 1-channel autoencoder and its training. Lengths and intervals count images."""

    init_from: str | None = None
    """Start from a trained autoencoder, whose architecture is then used: the folder of a run, a
    pipeline or a model, a model in the package such as em-ldm-64, or a Hub id. With num_images 0 it
    is used unchanged."""
    freeze_encoder: bool = False
    """With init_from: train the decoder and the codes alone, so that a denoiser of the same latents
    can be used further."""
    kind: Annotated[Literal["vq", "kl", "basis"], NAMED_FAMILY_IN_0_1] = "vq"
    """"vq": each latent is the nearest of num_codes vectors (van den Oord et al. 2017); "kl":
    continuous latents, drawn towards a standard normal by kl_weight; "basis": principal components
    of patches with a linear decoder (`EMPatchBasis`), fitted to num_images views in seconds."""
    block_out_channels: tuple[Size, ...] = (128, 256, 256, 512)
    """Channels of each level, finest first; each level after the first halves the side (3 levels:
    f4, 4 levels: f8)."""
    patch_size: Size = 8
    """basis only: side of a patch in pixels, which becomes one latent position."""
    layers_per_block: Depth = 2
    latent_channels: Size = 4
    num_codes: Annotated[int, Gt(0), Le(2**24)] = 8192
    """vq only: vectors in the codebook, each of latent_channels numbers."""
    norm_num_groups: Size = 32
    mid_attention: bool = True
    """Self-attention at the coarsest level. Its cost grows with the fourth power of the side of the
    latents."""

    l1_weight: NotNegativeFloat = 1.0
    l2_weight: NotNegativeFloat = 0.0
    perceptual_weight: NotNegativeFloat = 0.5
    perceptual_network: Literal["efficientnet-lite0", "lpips"] = "efficientnet-lite0"
    """Network of the perceptual loss: "efficientnet-lite0", which needs no download, or "lpips"
    (package lpips, VGG16)."""
    perceptual_layers: Annotated[int, Ge(1), Le(4)] = 3
    """efficientnet-lite0 only: number of feature levels, from half the side to a sixteenth."""
    kl_weight: NotNegativeFloat = 1e-6
    """kl only: weight of the divergence from a standard normal, in nats per pixel."""
    codebook_weight: NotNegativeFloat = 1.0
    """vq only, like the next three."""
    commitment_weight: NotNegativeFloat = 0.25
    """beta of the VQ-VAE paper: weight of ||z_e - sg(e)||^2 relative to ||sg(z_e) - e||^2."""
    codebook_rate_scale: PositiveFloat = 5.0
    """Learning rate of the codes relative to that of the networks: they must follow the encoder."""
    revive_after_images: Positive = 4096
    """A code that was not used for so many images is moved onto a recent output of the encoder. No
    code is moved in the last tenth of the run."""

    discriminator_weight: NotNegativeFloat = 0.0
    """Weight of the adversarial loss, in addition to VQGAN's adaptive weight; 0 trains without a
    discriminator."""
    discriminator_start_images: NotNegative = 250_000
    """Images after which the discriminator starts."""
    discriminator_channels: Size = 64
    """Channels of its first layer; they double from layer to layer, up to eight times."""
    discriminator_layers: Depth = 3
    """Its layers of stride 2: a patch has 16, 34, 70, 142 pixels a side for 1 to 4 layers."""
    discriminator_learning_rate: PositiveFloat = 2e-4
    """Follows the same schedule as learning_rate."""
    ema_half_life_images: NotNegativeFloat = 0.0
    """Half-life of the averaged weights, which are validated and saved; 0 saves the last ones."""

    num_images: NotNegative = 1_000_000
    """Images that the autoencoder is trained on, repetitions counted. Of a basis, the views that it
    is fitted to."""
    batch_size: Size = 32
    """Images of one step, over all processes."""
    micro_batch_size: Annotated[NotNegative, MAY_CHANGE] = 0
    """Images that one process computes at once, with accumulated gradients; 0 for its whole batch.
    Halved automatically when the memory is full. The discriminator's adaptive weight is then
    computed for each part."""
    learning_rate: PositiveFloat = 2e-4
    warmup_images: NotNegative = 5_000
    learning_rate_decay: Literal["cosine", "constant"] = "cosine"
    """"cosine" (to zero at num_images) or "constant"."""
    adam_betas: tuple[Beta, Beta] = (0.9, 0.99)
    max_grad_norm: PositiveFloat = 1.0
    num_validation_images: Size = 256
    log_every: Interval = 5_000
    validate_every: Interval = 25_000
    sample_every: Interval = 50_000
    checkpoint_every: Interval = 100_000
    seed: Annotated[int, Ge(0)] = 0

    def __post_init__(self):
        check_groups(self.block_out_channels, self.norm_num_groups, "autoencoder")

    @property
    def downsampling_factor(self) -> int:
        """Pixels of the image per latent position along a side."""
        is_basis = self.kind == "basis"
        return self.patch_size if is_basis else 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True, config=strict("denoiser"))
class DenoiserConfig:
    """The U-Net that denoises latents and its training. Lengths and intervals count images."""

    init_from: str | None = None
    """Start from the denoiser of a trained model, whose architecture and scale of the latents are
    then used: the folder of a run or a pipeline, a model in the package, or a Hub id. The encoder
    must be that of the same model, see autoencoder.init_from."""
    base_channels: Size = 256
    channel_multipliers: tuple[Size, ...] = (1, 2, 2, 4, 4)
    layers_per_block: Depth = 2
    attention_levels: tuple[NotNegative, ...] = (1, 2, 3, 4)
    """Levels with self-attention, 0 is the finest; the middle block always has it."""
    attention_head_dim: Size = 64
    """Channels of one attention head, the same at all levels."""
    num_attention_heads: Annotated[int, Ge(0), Le(65_536)] = 0
    """Number of heads at all levels, instead of attention_head_dim; makes the U-Net an
    `EMUNet2DModel`. 0: use attention_head_dim and diffusers' `UNet2DModel`."""
    norm_num_groups: Size = 32
    class_dropout: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the training images whose class is hidden, so that the model can also draw without a
    class, and be guided by that. Has no effect without --conditional."""

    prediction_type: Literal["epsilon", "v_prediction", "flow"] = "epsilon"
    """What the U-Net predicts: "epsilon", the noise (the study's choice); "v_prediction",
    sqrt(abar) noise - sqrt(1 - abar) latents, which learns the layout in fewer steps (Salimans and
    Ho 2022, arXiv:2202.00512, appendix D); or "flow", noise - latents (Lipman et al. 2023,
    arXiv:2210.02747), which uses no betas."""
    min_snr_gamma: NotNegativeFloat = 0.0
    """Weight timesteps by min(SNR, gamma) / SNR, or its form for velocity (Hang et al. 2023,
    arXiv:2303.09556, use 5); 0 weights all alike. Validation losses are never weighted."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last timestep is pure noise (Lin et al. 2024,
    arXiv:2305.08891). Needs prediction_type "v_prediction"."""
    timestep_density: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the trained timesteps: "uniform", or "logit_normal", which prefers the middle
    (Esser et al. 2024, arXiv:2403.03206, section 3.1)."""
    num_train_timesteps: Size = 1000
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    """"scaled_linear": sqrt(beta) is linear in t, as in latent diffusion; or "linear"."""
    beta_start: Annotated[float, Gt(0), Le(1)] = 0.0015
    beta_end: Annotated[float, Gt(0), Le(1)] = 0.0195
    num_images: Positive = 5_000_000
    """Latents that the denoiser is trained on, repetitions counted."""
    batch_size: Size = 64
    """Latents of one step, over all processes."""
    learning_rate: PositiveFloat = 1e-4
    micro_batch_size: Annotated[NotNegative, MAY_CHANGE] = 0
    """Images that one process computes at once, with accumulated gradients; 0 for its whole batch.
    Halved automatically when the memory is full."""
    gradient_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Recompute activations in the backward pass: less memory, a third slower."""
    compile: Annotated[bool, BeforeValidator(_read_old_compile), MAY_CHANGE] = False
    """Use `torch.compile` for the U-Net: faster steps on a GPU after minutes of compiling."""
    warmup_images: NotNegative = 50_000
    learning_rate_decay: Literal["cosine", "constant", "inverse_sqrt"] = "cosine"
    """"cosine" (to zero at num_images), "constant", or "inverse_sqrt": learning_rate / sqrt(max(1,
    images seen / learning_rate_reference_images)) (Karras et al. 2024, arXiv:2312.02696). A run
    with one of the last two can be lengthened later."""
    optimizer: Literal["adam", "muon"] = "adam"
    """"adam", or "muon", which orthogonalises the steps of matrices and convolutions (Jordan et al.
    2024) and learns faster in short runs. learning_rate is that of Adam, which vectors keep."""
    learning_rate_reference_images: Positive = 500_000
    """Images after which "inverse_sqrt" starts to decrease."""
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    max_grad_norm: PositiveFloat = 1.0
    ema_half_life_images: NotNegativeFloat = 100_000
    posthoc_ema_every: NotNegative = 0
    """Interval in images for snapshots of two power-function averages, from which an average of any
    width can be made after the training by `python -m em_diffusion.posthoc_ema` (Karras et al.
    2024, arXiv:2312.02696, section 3). A sixteenth of the run is enough; 0 keeps none. Needs the
    memory of two more sets of weights."""
    guide_images: Annotated[NotNegative, MAY_CHANGE] = 500_000
    """Images after which a copy of the averaged weights is kept as the guide, a weaker model for
    guidance (Karras et al. 2024, arXiv:2406.02507; see em_diffusion.choose_guidance). An eighth of
    the run is enough; 0 keeps none."""
    num_validation_images: Size = 512
    num_sample_images: Size = 16
    num_sample_steps: Size = 20
    mask_conditional: bool = False
    """Train on labelled tiles alone, with the masks of their defects as input. Needs init_from."""
    mask_dropout: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of these images whose masks are hidden, for guidance by the mask."""
    evaluate_every: IntervalOrNever = 0
    """Interval in images for comparing the averaged weights' images with held-out tiles (Frechet
    distance, efficientnet-lite0). The best weights are kept in best/unet and go into the pipeline.
    0: never, and the last weights go into the pipeline."""
    num_evaluation_images: Size = 500
    num_evaluation_steps: Size = 20
    evaluation_metrics: Annotated[tuple[str, ...], MAY_CHANGE] = ()
    """More metrics at these moments, for the curves of the report: kernel_distance, precision,
    recall, density, coverage, frechet_distance_infinite. The Frechet distance chooses the
    weights."""
    log_every: Interval = 5_000
    validate_every: Interval = 100_000
    sample_every: Interval = 100_000
    checkpoint_every: Interval = 200_000
    seed: Annotated[int, Ge(0)] = 0

    def __post_init__(self):
        check_groups(self.block_out_channels, self.norm_num_groups, "denoiser")
        check_objective(self)
        check_attention(self)

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)


@dataclass(frozen=True, config=strict())
class LDMConfig:
    """A latent diffusion run: data, output folder, and the two stages that are trained."""

    data: str = "synthetic"
    """A folder of micrographs, or "synthetic" for the embedded ones. Also "synthetic-varied" (a
    wide variety of them), "synthetic-materials" (three classes), "synthetic-other" (another
    microscope), "hub:owner/name[@revision]" (written by em_data.push),
    "hub-stream:owner/name[@revision]" (the same, read over the network; only the tiles are kept on
    disk), "damaged-alloys:FOLDER" and "datasets:NAME_OR_PATH"."""
    out: Annotated[str, MAY_CHANGE] = "runs/ldm"
    """Folder of the run. The same command on it resumes the run."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the weights, the order of the data and the noise; the split has tiles.seed."""
    precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """Number format: auto (bf16 where the hardware computes in it), bf16, fp16 or no (float32).
    fp16 is for GPUs without bf16, with loss scaling."""
    sampler: Annotated[str | None, MAY_CHANGE] = None
    """Sampler that the pipeline is saved with: ddim, dpm-solver++, dpm-solver++-sde, ... (see
    em_diffusion.samplers). Default: the fastest one without loss of quality. generate.py can use
    another one."""
    num_inference_steps: Annotated[Size | None, MAY_CHANGE] = None
    """Denoising steps that the pipeline is saved with. Default: those of the default sampler, or 50
    for another sampler."""
    grain_images: IntervalOrNever = 1000
    """Training views used to measure the grain: the fine noise that the autoencoder removes and
    that sampling adds again. Fewer are used if they have more than 67 million pixels; 0 for no
    grain. May change at any time."""
    init_from: str | None = None
    """Start from a trained model. Both networks come from it, such as from em-ldm-64: the same as
    autoencoder.init_from and denoiser.init_from, with autoencoder.freeze_encoder."""
    conditional: bool = False
    """Train with the classes of the micrographs, such as materials: the model then draws images of
    a class that is asked for."""
    last_stage: Annotated[Literal["autoencoder", "denoiser"], MAY_CHANGE] = "denoiser"
    """"autoencoder" ends the run after that stage. Look at its reconstructions. The same command
    with "denoiser" continues it."""
    tiles: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)

    def __post_init__(self):
        self._fill_init_from()
        if self.sampler is not None:
            self._check_sampler()
        first = self.autoencoder.downsampling_factor
        factor = first * 2 ** (len(self.denoiser.channel_multipliers) - 1)
        resolution = self.tiles.resolution
        if self.autoencoder.init_from is None and resolution % factor:
            raise ValueError(
                f"tiles.resolution is {resolution}, but must be a multiple of {factor}: the "
                f"autoencoder divides the side by {first}, the denoiser by {factor // first}. "
                "Use --tiles.resolution, or fewer levels."
            )
        num_layers = self.autoencoder.discriminator_layers
        smallest = 3 * 2**num_layers  # em_diffusion.patch_discriminator.smallest_side
        if self.autoencoder.discriminator_weight > 0 and resolution < smallest:
            raise ValueError(
                f"autoencoder.discriminator_layers is {num_layers}, which needs tiles of at least "
                f"{smallest} pixels, but tiles.resolution is {resolution}. Use fewer with "
                "--autoencoder.discriminator-layers."
            )

    def _fill_init_from(self):
        """Give both stages the common model to start from, and check what they start from."""
        if self.init_from is not None:
            both = {"init_from": self.init_from}
            autoencoder = replace(self.autoencoder, **both, freeze_encoder=True)
            object.__setattr__(self, "autoencoder", autoencoder)
            object.__setattr__(self, "denoiser", replace(self.denoiser, **both))
        check_start(self.autoencoder, self.denoiser)

    def _check_sampler(self):
        """Refuse an unknown sampler, or one that does not suit the prediction."""
        from em_diffusion.denoiser import create_scheduler  # imports torch: only when needed
        from em_diffusion.samplers import create_sampler

        create_sampler(self.sampler, create_scheduler(self.denoiser))

    @property
    def makes_pipeline(self) -> bool:
        """Whether the run ends in a pipeline, which can be published."""
        return self.last_stage == "denoiser"

    @property
    def latent_size(self) -> int:
        """Side of the latents of our own autoencoder; that of `init_from` has its own."""
        return self.tiles.resolution // self.autoencoder.downsampling_factor
