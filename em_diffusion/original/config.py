"""The yaml beside a checkpoint of taming-transformers or latent-diffusion, as plain dataclasses."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from em_diffusion.original.yaml_values import (
    count,
    counts,
    flag,
    number,
    optional_count,
    resolve,
    section,
)

FIRST_STAGES = {
    "VQModel": "VQ",
    "VQModelInterface": "VQ",
    "VQNoDiscModel": "VQ",
    "VQSegmentationModel": "VQ",
    "EMAVQ": "VQ",
    "GumbelVQ": "Gumbel VQ",
    "AutoencoderKL": "KL",
}
"""Class of an autoencoder in a yaml -> what it is."""
DIFFUSION_MODELS = ("LatentDiffusion", "DDPM")
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@dataclass(frozen=True)
class FirstStage:
    """An autoencoder of the original format. `attn_resolutions` counts from `resolution`, which halves from level to level."""

    kind: str
    """"VQ", "Gumbel VQ" or "KL"."""
    embed_dim: int
    n_embed: int | None
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    resolution: int
    in_channels: int
    out_ch: int
    z_channels: int
    resamp_with_conv: bool = True
    has_attention: bool = True
    tanh_out: bool = False

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels by level, finest first."""
        return tuple(self.ch * multiplier for multiplier in self.ch_mult)

    @property
    def encoder_attends(self) -> tuple[bool, ...]:
        """Whether each level of the encoder has attention, finest first."""
        sides = [self.resolution // 2**level for level in range(len(self.ch_mult))]
        return tuple(self.has_attention and side in self.attn_resolutions for side in sides)

    @property
    def decoder_attends(self) -> tuple[bool, ...]:
        """Whether each level of the decoder has attention, finest first; it counts sides from the smallest up."""
        smallest = self.resolution // 2 ** (len(self.ch_mult) - 1)
        sides = [smallest * 2**level for level in range(len(self.ch_mult))]
        return tuple(
            self.has_attention and side in self.attn_resolutions for side in reversed(sides)
        )


@dataclass(frozen=True)
class OriginalUNet:
    """An unconditional U-Net of latent-diffusion; `attention_resolutions` are factors of downsampling."""

    sample_size: int | tuple[int, int]
    channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    num_heads: int | None
    num_head_channels: int | None
    conv_resample: bool
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool


@dataclass(frozen=True)
class NoiseSchedule:
    """The schedule and target of a diffusion model of latent-diffusion, and the factor that its latents are multiplied by."""

    timesteps: int
    beta_schedule: str
    linear_start: float
    linear_end: float
    cosine_s: float
    prediction_type: str
    scale_factor: float


@dataclass(frozen=True)
class OriginalModel:
    """What a yaml describes: an autoencoder alone, or a diffusion model, with its autoencoder if it has one."""

    path: Path
    first_stage: FirstStage | None
    unet: OriginalUNet | None = None
    schedule: NoiseSchedule | None = None


def find_config(checkpoint) -> Path:
    """The yaml that lies where the original trainings and downloads put it; `ValueError` that says where it was looked for."""
    checkpoint = Path(checkpoint)
    folder = checkpoint.parent
    candidates = [
        checkpoint.with_suffix(".yaml"),
        checkpoint.with_suffix(".yml"),
        folder / "config.yaml",
        folder / "model.yaml",
    ]
    candidates += [
        folder.parent / "configs" / "model.yaml",
        *sorted((folder.parent / "configs").glob("*-project.yaml"))[-1:],
    ]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ValueError(
            f"{checkpoint} needs the yaml that describes its model: there is no {candidates[0].name}, config.yaml or model.yaml "
            "beside it; put it there, or name it with --config."
        )
    return found


def read_config(path) -> OriginalModel:
    """Read a yaml of taming-transformers or latent-diffusion.

    Raises `ValueError` that names the file and what is missing, unknown, or beyond what can be represented exactly.
    """
    path = Path(path)
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a yaml that can be read safely: {' '.join(str(error).split())}"
        ) from error
    try:
        model = contents.get("model", contents) if isinstance(contents, dict) else None
        if not isinstance(model, dict) or "params" not in model or "target" not in model:
            raise ValueError("it describes no model: expected `model` with `target` and `params`")
        return _read_model(path, resolve(model, contents))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}.") from error


def _read_model(path, model):
    name, params = _class_name(model), model["params"]
    if name in FIRST_STAGES:
        return OriginalModel(path, _read_first_stage(model))
    if name == "Net2NetTransformer":  # an autoregressive model over the codes of an autoencoder
        return OriginalModel(path, _read_first_stage(section(params, "first_stage_config")))
    if name not in DIFFUSION_MODELS:
        known = ", ".join([*FIRST_STAGES, *DIFFUSION_MODELS])
        raise ValueError(f"its model is a {model['target']}, and only these are known: {known}")
    first_stage = None
    _refuse_conditions(params)
    if name == "LatentDiffusion":
        first_stage = _read_first_stage(section(params, "first_stage_config"))
    return OriginalModel(path, first_stage, _read_unet(params), _read_schedule(params))


def _read_first_stage(model):
    name = _class_name(model)
    if name not in FIRST_STAGES:
        raise ValueError(
            f"its autoencoder is a {model.get('target')}, and only these are known: {', '.join(FIRST_STAGES)}"
        )
    kind, params = FIRST_STAGES[name], section(model, "params")
    dd = section(params, "ddconfig")
    if dd.get("use_linear_attn") or dd.get("attn_type", "vanilla") not in ("vanilla", "none"):
        raise ValueError(
            f"attention of the type {dd.get('attn_type', 'linear')!r} is not supported, only 'vanilla' and 'none'"
        )
    if dd.get("give_pre_end"):
        raise ValueError("give_pre_end, a decoder without its last layers, is not supported")
    double_z = flag(dd, "double_z", True)
    if double_z != (kind == "KL"):
        raise ValueError(f"double_z is {double_z}, which a {name} cannot have")
    return FirstStage(
        kind=kind,
        embed_dim=count(params, "embed_dim"),
        n_embed=None if kind == "KL" else count(params, "n_embed"),
        ch=count(dd, "ch"),
        ch_mult=counts(dd, "ch_mult", (1, 2, 4, 8)),
        num_res_blocks=count(dd, "num_res_blocks", 64),
        attn_resolutions=counts(dd, "attn_resolutions"),
        resolution=count(dd, "resolution"),
        in_channels=count(dd, "in_channels"),
        out_ch=count(dd, "out_ch"),
        z_channels=count(dd, "z_channels"),
        resamp_with_conv=flag(dd, "resamp_with_conv", True),
        has_attention=dd.get("attn_type", "vanilla") == "vanilla",
        tanh_out=flag(dd, "tanh_out", False),
    )


def _refuse_conditions(params):
    condition, key = params.get("cond_stage_config"), params.get("conditioning_key")
    if condition == "__is_unconditional__" or (condition is None and key is None):
        return
    target = condition.get("target") if isinstance(condition, dict) else condition
    what = f"conditioning_key: {key}" if condition is None else f"cond_stage_config: {target}"
    raise ValueError(f"its model is conditional ({what}); only unconditional ones are supported")


def _read_unet(params):
    model = section(params, "unet_config")
    if _class_name(model) != "UNetModel":
        raise ValueError(
            f"its U-Net is a {model.get('target')}; only latent-diffusion's UNetModel is supported"
        )
    unet = section(model, "params")
    for key, what in (
        ("use_spatial_transformer", "spatial transformers"),
        ("context_dim", "cross attention"),
        ("num_classes", "class conditioning"),
        ("n_embed", "prediction of codebook indices"),
    ):
        if unet.get(key) not in (None, False):
            raise ValueError(
                f"its U-Net has {what} ({key}: {unet[key]}), which an unconditional U-Net cannot represent"
            )
    if unet.get("dims", 2) != 2:
        raise ValueError(f"its U-Net has dims: {unet['dims']}; only images (2) are supported")
    heads, width = (optional_count(unet, key) for key in ("num_heads", "num_head_channels"))
    if heads is None and width is None:
        raise ValueError("its U-Net has neither num_heads nor num_head_channels")
    upsample = optional_count(unet, "num_heads_upsample")
    if width is None and flag(unet, "legacy", True) and upsample not in (None, heads):
        raise ValueError(
            f"its U-Net has other heads on the way up (num_heads_upsample: {upsample}), which is not supported"
        )
    blocks = unet.get("num_res_blocks")
    if isinstance(blocks, list) and len(set(blocks)) == 1:
        unet = unet | {"num_res_blocks": blocks[0]}
    multipliers = counts(unet, "channel_mult", (1, 2, 4, 8))
    if multipliers[0] != 1:
        raise ValueError(
            f"channel_mult begins with {multipliers[0]}, which the original U-Net itself cannot run"
        )
    channels = count(unet, "in_channels")
    if count(unet, "out_channels") != channels:
        raise ValueError(
            f"its U-Net takes {channels} channels and gives {unet['out_channels']}: a conditional one, not supported"
        )
    size = params.get("image_size", unet.get("image_size"))
    return OriginalUNet(
        sample_size=tuple(size)
        if isinstance(size, list)
        else count({"image_size": size}, "image_size"),
        channels=channels,
        model_channels=count(unet, "model_channels"),
        channel_mult=multipliers,
        num_res_blocks=count(unet, "num_res_blocks", 64),
        attention_resolutions=counts(unet, "attention_resolutions"),
        num_heads=None if width is not None else heads,
        num_head_channels=width,
        conv_resample=flag(unet, "conv_resample", True),
        use_scale_shift_norm=flag(unet, "use_scale_shift_norm", False),
        resblock_updown=flag(unet, "resblock_updown", False),
        use_new_attention_order=flag(unet, "use_new_attention_order", False),
    )


def _read_schedule(params):
    parameterization = params.get("parameterization", "eps")
    if parameterization not in PREDICTION_TYPES:
        raise ValueError(
            f"parameterization is {parameterization!r}; known are {', '.join(PREDICTION_TYPES)}"
        )
    beta_schedule = params.get("beta_schedule", "linear")
    if beta_schedule not in ("linear", "cosine", "sqrt_linear", "sqrt"):
        raise ValueError(
            f"beta_schedule is {beta_schedule!r}; known are linear, cosine, sqrt_linear and sqrt"
        )
    return NoiseSchedule(
        timesteps=count({"timesteps": params.get("timesteps", 1000)}, "timesteps"),
        beta_schedule=beta_schedule,
        linear_start=number(params, "linear_start", 1e-4),
        linear_end=number(params, "linear_end", 2e-2),
        cosine_s=number(params, "cosine_s", 8e-3),
        prediction_type=PREDICTION_TYPES[parameterization],
        scale_factor=number(params, "scale_factor", 1.0),
    )


def _class_name(section):
    target = section.get("target") if isinstance(section, dict) else None
    if not isinstance(target, str):
        raise ValueError("a model in it has no `target`")
    return target.rpartition(".")[2]
