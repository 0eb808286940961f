"""What decides a latent diffusion run: one frozen dataclass a stage, and the run that holds them."""

from dataclasses import dataclass, field

from em_data import DataConfig
from em_diffusion.denoiser import create_scheduler
from em_diffusion.patch_discriminator import smallest_side
from em_diffusion.perceptual import NETWORKS
from em_diffusion.samplers import create_sampler


@dataclass(frozen=True)
class AutoencoderConfig:
    """The 1-channel autoencoder and its training. Every interval and length counts images."""

    init_from: str | None = None
    """A trained autoencoder to begin with instead of random weights, whose architecture then stands: a run's folder, a
    pipeline's, a model's, or a Hub id. With num_images 0 it is used as it is."""
    family: str = "vq"
    """"vq": latents on the nearest of num_codes vectors (van den Oord et al. 2017); "kl": continuous latents, pulled
    towards a standard normal by kl_weight (latent diffusion's other kind)."""
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    """Channels by level, finest first; each level after the first halves the side (3 levels: f4, 4 levels: f8)."""
    layers_per_block: int = 2
    latent_channels: int = 4
    num_codes: int = 8192
    """vq only: vectors in the codebook, each of latent_channels numbers."""
    norm_num_groups: int = 32
    mid_attention: bool = True
    """Self-attention between encoder and decoder levels; its cost grows with the fourth power of the latent side."""

    l1_weight: float = 1.0
    l2_weight: float = 0.0
    perceptual_weight: float = 0.5
    perceptual_network: str = "efficientnet-lite0"
    """What compares images in the perceptual loss: "efficientnet-lite0", offline, or "lpips" (package lpips, VGG16)."""
    perceptual_layers: int = 3
    """efficientnet-lite0 only: feature levels that are compared: 1 (half the side) to 4 (a sixteenth)."""
    kl_weight: float = 1e-6
    """kl only: weight of the posterior's divergence from a standard normal in nats per pixel."""
    codebook_weight: float = 1.0
    """vq only, as are the next three."""
    commitment_weight: float = 0.25
    """beta of the VQ-VAE paper: weight of ||z_e - sg(e)||^2 relative to ||sg(z_e) - e||^2."""
    codebook_rate_scale: float = 5.0
    """The codes' learning rate over the networks': codes must follow the encoder, which moves under them."""
    revive_after_images: int = 4096
    """A code that was not the nearest one of any latent for so many images is moved onto a recent encoder output; in the
    last tenth of the run none is moved."""

    discriminator_weight: float = 0.0
    """Weight of the adversarial loss beside its adaptive one, which makes it pull as hard as the reconstruction (VQGAN); 0
    trains without a discriminator."""
    discriminator_start_images: int = 250_000
    """Images after which the discriminator begins to learn and to judge: before, everything that it could say is plain."""
    discriminator_channels: int = 64
    """Channels of its first layer; they double from layer to layer, up to eight times."""
    discriminator_layers: int = 3
    """Its layers of stride 2: a patch is 16, 34, 70, 142 pixels a side for 1 to 4."""
    discriminator_learning_rate: float = 2e-4
    """It decays as the autoencoder's."""
    ema_half_life_images: float = 0.0
    """Images after which an old weight counts half in the average that is validated and saved; 0 saves the last weights."""

    num_images: int = 1_000_000
    batch_size: int = 32
    micro_batch_size: int = 0
    """Images of one process computed at once, with accumulated gradients; 0 for its whole batch. Halved by itself when the
    memory runs out. The adaptive weight of the discriminator is then that of each part."""
    learning_rate: float = 2e-4
    warmup_images: int = 5_000
    learning_rate_decay: str = "cosine"
    """"cosine" (to zero at num_images) or "constant"."""
    adam_betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    num_validation_images: int = 256
    log_every: int = 5_000
    validate_every: int = 25_000
    sample_every: int = 50_000
    checkpoint_every: int = 100_000
    seed: int = 0

    def __post_init__(self):
        if self.num_images == 0 and self.init_from is None:
            raise ValueError(
                "autoencoder.num_images is 0; it must be positive, or a trained autoencoder be named by autoencoder.init_from."
            )
        _check_lengths(self, "autoencoder", may_be_zero=("num_images",))
        _check_groups(self.block_out_channels, self.norm_num_groups, "autoencoder")
        _check_choice("autoencoder.family", self.family, ("vq", "kl"))
        _check_choice("autoencoder.perceptual_network", self.perceptual_network, NETWORKS)
        if not 1 <= self.perceptual_layers <= 4:
            raise ValueError(
                f"autoencoder.perceptual_layers is {self.perceptual_layers}; choose 1 to 4."
            )
        for name in (
            "kl_weight",
            "discriminator_weight",
            "discriminator_start_images",
            "ema_half_life_images",
        ):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"autoencoder.{name} is {getattr(self, name)}; it must not be negative."
                )
        for name in (
            "discriminator_channels",
            "discriminator_layers",
            "discriminator_learning_rate",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"autoencoder.{name} is {getattr(self, name)}; it must be positive."
                )

    @property
    def downsampling_factor(self) -> int:
        """Pixels of the image per latent position along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class DenoiserConfig:
    """The U-Net that predicts the noise in latents and its training. Every interval and length counts images."""

    base_channels: int = 256
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4, 4)
    layers_per_block: int = 2
    attention_levels: tuple[int, ...] = (1, 2, 3, 4)
    """Levels with self-attention, 0 the finest; the block between down and up path always has it."""
    attention_head_dim: int = 64
    """Width of one head, the same on every level: the number of heads is channels / attention_head_dim."""
    num_attention_heads: int = 0
    """Heads of every level, each channels / num_attention_heads wide, instead of attention_head_dim; makes the U-Net an
    `EMUNet2DModel`. 0: heads of attention_head_dim, in diffusers' own `UNet2DModel`."""
    norm_num_groups: int = 32

    prediction_type: str = "epsilon"
    """What the U-Net is asked for: "epsilon", the noise (the study's); "v_prediction", sqrt(abar) noise - sqrt(1 - abar)
    latents, which learns an image's layout in fewer steps (Salimans and Ho 2022, arXiv:2202.00512, appendix D); or "flow",
    noise - latents along the straight path between them (Lipman et al. 2023, arXiv:2210.02747), without betas."""
    min_snr_gamma: float = 0.0
    """Weigh the loss of timesteps by min(SNR, gamma) / SNR, or its form for velocity (Hang et al. 2023, arXiv:2303.09556,
    who take 5); 0 weighs all alike. Validation losses are never weighted."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that nothing of the image is left at the last timestep, where sampling begins (Lin et al. 2024,
    arXiv:2305.08891); needs "v_prediction", since noise tells nothing about an image of which nothing is left."""
    timestep_density: str = "uniform"
    """How often each timestep is trained: "uniform", or "logit_normal", the middle of the noise range more often than
    its ends (Esser et al. 2024, arXiv:2403.03206, section 3.1)."""
    num_train_timesteps: int = 1000
    beta_schedule: str = "scaled_linear"
    """"scaled_linear": sqrt(beta) is linear in t (latent diffusion's own), or "linear"."""
    beta_start: float = 0.0015
    beta_end: float = 0.0195

    num_images: int = 5_000_000
    batch_size: int = 64
    learning_rate: float = 1e-4
    micro_batch_size: int = 0
    """Images of one process that are computed at once, with gradients summed over the parts of a batch; 0 for the whole. When
    the memory runs out, the part is halved and the run goes on."""
    gradient_checkpointing: bool = False
    """Compute the U-Net's blocks again in the backward pass instead of keeping what they computed: less memory, a third slower."""
    compile: str = "auto"
    """`torch.compile` of the U-Net's training step: "on", "off", or "auto", measured at the start of a run on a GPU, off on the CPU."""
    warmup_images: int = 50_000
    learning_rate_decay: str = "cosine"
    """"cosine" (to zero at num_images), "constant", or "inverse_sqrt": learning_rate / sqrt(max(1, images seen /
    learning_rate_reference_images)) (as in Karras et al. 2024, arXiv:2312.02696). A run with one of the last two can be
    made longer and is then the longer run."""
    learning_rate_reference_images: int = 500_000
    """Images after which "inverse_sqrt" begins to fall."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    ema_half_life_images: float = 100_000
    posthoc_ema_every: int = 0
    """Keep snapshots of two power-function averages, from which an average of any width can be made after the training (Karras et
    al. 2024, arXiv:2312.02696, section 3; `python -m em_diffusion.posthoc_ema`): interval in images, a sixteenth of the run is
    enough; 0 keeps none. Takes the memory of two more sets of weights."""
    num_validation_images: int = 512
    num_sample_images: int = 16
    num_sample_steps: int = 20
    evaluate_every: int = 0
    """Interval, in images, at which the averaged weights' images are compared with held-out tiles (Frechet distance,
    efficientnet-lite0); the nearest weights are kept as best/unet and go into the pipeline. 0: never, and the last weights do."""
    num_evaluation_images: int = 500
    num_evaluation_steps: int = 20
    evaluation_metrics: tuple[str, ...] = ()
    """Further metrics at these moments, for the curves of the report: kernel_distance, precision, recall, density, coverage,
    frechet_distance_infinite. The weights are chosen by the Frechet distance."""
    log_every: int = 5_000
    validate_every: int = 100_000
    sample_every: int = 100_000
    checkpoint_every: int = 200_000
    seed: int = 0

    def __post_init__(self):
        _check_lengths(
            self,
            "denoiser",
            ("cosine", "constant", "inverse_sqrt"),
            may_be_zero=("posthoc_ema_every", "evaluate_every"),
        )
        _check_groups(self.block_out_channels, self.norm_num_groups, "denoiser")
        _check_choice(
            "denoiser.prediction_type", self.prediction_type, ("epsilon", "v_prediction", "flow")
        )
        _check_choice(
            "denoiser.timestep_density", self.timestep_density, ("uniform", "logit_normal")
        )
        _check_choice("denoiser.beta_schedule", self.beta_schedule, ("scaled_linear", "linear"))
        _check_choice("denoiser.compile", self.compile, ("auto", "on", "off"))
        _check_objective(self)
        if any(not 0 <= level < len(self.channel_multipliers) for level in self.attention_levels):
            raise ValueError(
                f"denoiser.attention_levels is {self.attention_levels}, but there are {len(self.channel_multipliers)} "
                "levels; count them from 0, the finest."
            )
        attending = [self.block_out_channels[level] for level in self.attention_levels] + [
            self.block_out_channels[-1]
        ]
        if self.num_attention_heads < 0:
            raise ValueError(
                f"denoiser.num_attention_heads is {self.num_attention_heads}; it must be at least 1, or 0 for attention_head_dim."
            )
        name = "num_attention_heads" if self.num_attention_heads else "attention_head_dim"
        if any(channels % getattr(self, name) for channels in attending):
            raise ValueError(
                f"denoiser.{name} is {getattr(self, name)}; it must divide the channels of every level with attention, "
                f"{attending}."
            )

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Channels by level, finest first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)


@dataclass(frozen=True)
class LDMConfig:
    """A latent diffusion run: data, where it goes, and its two trained stages."""

    data: str = "synthetic"
    """A folder of micrographs, "synthetic", "hub:owner/name[@revision]" (written by em_data.push), "hub-stream:owner/name[@revision]"
    (the same, read over the network without keeping it: the tiles alone lie on this disk), "damaged-alloys:FOLDER" or
    "datasets:NAME_OR_PATH"."""
    out: str = "runs/ldm"
    """The run's folder; the same command on it resumes."""
    seed: int = 0
    """Weights, data order and noise of both stages; the split has its own seed in tiles."""
    precision: str = "auto"
    """"bf16", "fp16" (GPUs without bf16; the loss is scaled), "no" (float32), or "auto": bf16 where the hardware computes in
    it, else float32."""
    sampler: str | None = None
    """Sampler that the pipeline is saved with, by its name in em_diffusion.samplers: ddim, dpm-solver++, dpm-solver++-sde, ...;
    left out, the fastest one that costs no quality. Another one may be chosen at any time, and in generate.py."""
    num_inference_steps: int | None = None
    """Denoising steps that the pipeline is saved with; left out, those of the sampler that is chosen when `sampler` is left
    out, else 50."""
    grain_images: int = 1000
    """Training views by whose reconstructions the grain is measured that the autoencoder leaves out, and that sampling adds again; 0
    for none; fewer where they would have more than 67 million pixels together. May be changed at any time."""
    last_stage: str = "denoiser"
    """"autoencoder" ends the run after that stage, to look at its reconstructions first: the same command with "denoiser" goes on."""
    tiles: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)

    def __post_init__(self):
        _check_choice("precision", self.precision, ("auto", "bf16", "fp16", "no"))
        _check_choice("last_stage", self.last_stage, ("autoencoder", "denoiser"))
        if self.sampler is not None:
            create_sampler(
                self.sampler, create_scheduler(self.denoiser)
            )  # refuses what does not suit the prediction
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps is {self.num_inference_steps}; it must be at least 1."
            )
        if self.grain_images < 0:
            raise ValueError(
                f"grain_images is {self.grain_images}; it must be at least 1, or 0 for no grain."
            )
        factor = self.autoencoder.downsampling_factor * 2 ** (
            len(self.denoiser.channel_multipliers) - 1
        )
        if self.autoencoder.init_from is None and self.tiles.resolution % factor:
            raise ValueError(
                f"tiles.resolution is {self.tiles.resolution}, but the autoencoder divides the side by "
                f"{self.autoencoder.downsampling_factor} and the denoiser's levels by "
                f"{factor // self.autoencoder.downsampling_factor} more: choose a multiple of {factor}, or fewer levels."
            )
        smallest = smallest_side(self.autoencoder.discriminator_layers)
        if self.autoencoder.discriminator_weight > 0 and self.tiles.resolution < smallest:
            raise ValueError(
                f"autoencoder.discriminator_layers is {self.autoencoder.discriminator_layers}, which needs tiles of "
                f"{smallest} pixels, and tiles.resolution is {self.tiles.resolution}: choose fewer layers."
            )

    @property
    def makes_pipeline(self) -> bool:
        """Whether the run ends in a pipeline, which is what can be published."""
        return self.last_stage == "denoiser"

    @property
    def latent_size(self) -> int:
        """Side of the latents of an autoencoder of our own architecture; one of `init_from` has its own."""
        return self.tiles.resolution // self.autoencoder.downsampling_factor


def _check_lengths(config, name, decays=("cosine", "constant"), may_be_zero=()):
    positive = [
        "num_images",
        "batch_size",
        "num_validation_images",
        "layers_per_block",
        "learning_rate",
    ]
    positive += [
        name
        for name in vars(config)
        if name.endswith(("_every", "_reference_images", "_steps", "_evaluation_images"))
    ]
    for field_name in positive:
        value = getattr(config, field_name)
        if value < 0 or (value == 0 and field_name not in may_be_zero):
            raise ValueError(f"{name}.{field_name} is {value}; it must be positive.")
    if getattr(config, "micro_batch_size", 0) < 0:
        raise ValueError(
            f"{name}.micro_batch_size is {config.micro_batch_size}; it must be at least 1 image, or 0 for the whole batch."
        )
    _check_choice(f"{name}.learning_rate_decay", config.learning_rate_decay, decays)


def _check_objective(config):
    """Refuse what cannot be trained: weights or schedules that the prediction does not know."""
    if config.min_snr_gamma < 0:
        raise ValueError(
            f"denoiser.min_snr_gamma is {config.min_snr_gamma}; it must be positive, or 0 for no weights."
        )
    if config.zero_terminal_snr and config.prediction_type != "v_prediction":
        reason = (
            "the path of flow ends in pure noise as it is"
            if config.prediction_type == "flow"
            else "noise tells nothing there"
        )
        raise ValueError(
            f'denoiser.zero_terminal_snr needs prediction_type "v_prediction", and it is "{config.prediction_type}": {reason}. '
            "Choose it, or turn zero_terminal_snr off."
        )
    if config.min_snr_gamma and config.prediction_type == "flow":
        raise ValueError(
            'denoiser.min_snr_gamma weighs "epsilon" and "v_prediction"; with "flow" set it to 0 and choose the timestep_density.'
        )
    if config.min_snr_gamma and config.zero_terminal_snr:
        raise ValueError(
            "denoiser.min_snr_gamma gives the last timestep, whose SNR zero_terminal_snr makes 0, the weight 0, and sampling begins "
            "there: turn one of the two off."
        )


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f'{name} is "{value}"; choose {" or ".join(choices)}.')


def _check_groups(block_out_channels, norm_num_groups, name):
    if any(channels % norm_num_groups for channels in block_out_channels):
        raise ValueError(
            f"{name}.norm_num_groups is {norm_num_groups}; it must divide the channels of every level, "
            f"{tuple(block_out_channels)}."
        )
