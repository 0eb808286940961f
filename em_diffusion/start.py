"""The denoiser that a run starts from, and the record of the models that a run starts from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DModel

from em_diffusion.denoiser import create_denoiser, create_scheduler
from em_diffusion.em_schedulers import is_flow
from em_diffusion.latents import hash_encoder
from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_training import ask_main_process, fail_together, fill_cache
from em_training.config import read_json_object
from em_training.saved_models import check_pipeline, refuse_diverged
from em_training.sources import fetch_pipeline_folder, read_starts, write_starts
from em_training.weights import hash_weights

ARCHITECTURE = (
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "norm_num_groups",
    "attention_head_dim",
    "num_attention_heads",
)


@dataclass(frozen=True, eq=False)
class Start:
    """A trained denoiser, and the mean and deviation of the latents that it was trained on.

    class_names: Names of its classes; () for one without classes.
    """

    unet: UNet2DModel
    mean: list[float]
    std: list[float]
    class_names: tuple[str, ...] = ()

    @property
    def num_halvings(self) -> int:
        """How often the U-Net halves the side of the latents."""
        return len(self.unet.config.block_out_channels) - 1


def load_start(config, accelerator) -> Start:
    """Load the denoiser of `config.denoiser.init_from`, an `LDMConfig`'s.

    It keeps its architecture, whatever the configuration says; differences are printed.

    Raises:
        ValueError: It is no latent diffusion model, was trained on latents of another encoder than
            `config.autoencoder.init_from`'s, or predicts something else than `config.denoiser`.
    """
    source = config.denoiser.init_from

    def load():
        folder = fetch_pipeline_folder(source)
        check_pipeline_class(folder, source)
        check_pipeline(folder, EMLatentDiffusionPipeline)
        pipeline = EMLatentDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        return pipeline, load_autoencoder(config.autoencoder.init_from)

    pipeline, encoder = fill_cache(accelerator, load)
    refuse_diverged(source, pipeline.unet)
    if hash_encoder(encoder) != hash_encoder(pipeline.vqvae):
        raise ValueError(
            f"denoiser.init_from {source} was trained on latents of another encoder than that of "
            f"autoencoder.init_from {config.autoencoder.init_from}. Use --init-from {source} for "
            "both."
        )
    check_prediction(source, pipeline.scheduler, config.denoiser)
    if changes := list_changes(config.denoiser, pipeline.unet):
        accelerator.print(f"the denoiser of {source} keeps its architecture: {', '.join(changes)}")
    mean, std = read_statistics(pipeline)
    names = sorted(pipeline.labels, key=pipeline.labels.__getitem__)
    return Start(pipeline.unet.requires_grad_(True), mean, std, tuple(names))


def check_pipeline_class(folder: Path, source: str):
    """Refuse a saved pipeline of another class."""
    name = read_json_object(folder / "model_index.json").get("_class_name")
    name = name[-1] if isinstance(name, list) and name else name
    if name != EMLatentDiffusionPipeline.__name__:
        raise ValueError(
            f"{source} is an {name}, not a latent diffusion model. Name one with --init-from."
        )


def check_prediction(source: str, scheduler, config):
    """Refuse a U-Net that predicts something else, or for other noise, than the configuration's."""
    theirs, ours = (describe_prediction(each) for each in (scheduler, create_scheduler(config)))
    other = {name: value for name, value in theirs.items() if ours.get(name) != value}
    if other:
        flags = " ".join(f"--denoiser.{to_flag(name, value)}" for name, value in other.items())
        raise ValueError(
            f"The denoiser of {source} was trained with another prediction or noise than this run "
            f"asks for. Use {flags}."
        )


def describe_prediction(scheduler) -> dict:
    """Return the fields of a `DenoiserConfig` that a scheduler states."""
    if is_flow(scheduler):
        return {"prediction_type": "flow"}
    options = scheduler.config
    names = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    known = {name: options[name] for name in names}
    return known | {"zero_terminal_snr": bool(options.get("rescale_betas_zero_snr", False))}


def to_flag(name: str, value) -> str:
    """Return a field and its value as they stand on a command line, without the first hyphens."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    return f"{name} {value}"


def list_changes(config, unet) -> list[str]:
    """Return where a U-Net's architecture differs from the configuration's."""
    with torch.device("meta"):
        ours = create_denoiser(config, unet.config.sample_size, unet.config.in_channels).config
    return [
        f"{name} {plain(unet.config[name])} (not {plain(ours.get(name))})"
        for name in ARCHITECTURE
        if name in unet.config and plain(unet.config[name]) != plain(ours.get(name))
    ]


def plain(value):
    """Return lists as tuples: a configuration that was read from JSON has lists."""
    return tuple(value) if isinstance(value, list) else value


def read_statistics(pipeline) -> tuple[list[float], list[float]]:
    """Return mean and deviation of each channel in which a pipeline's latents are scaled."""
    channels = pipeline.unet.config.in_channels
    ends = torch.stack([torch.zeros(channels, 1, 1), torch.ones(channels, 1, 1)])
    mean, top = pipeline.denormalise_latents(ends).flatten(1).double()  # [C] each
    options = pipeline.vqvae.config
    if options.get("latents_mean") and options.get("latents_std"):  # without a rounding
        return list(options.latents_mean), list(options.latents_std)
    return mean.tolist(), (top - mean).tolist()


def record_start(out: Path, part: str, source: str, model, accelerator, use: str):
    """Write what `part` of a run starts from; refuse a source that has changed since the start.

    Args:
        part: "autoencoder" or "denoiser".
        model: The network as loaded.
        use: What becomes of it, such as "unchanged".
    """
    sha256 = hash_weights(model)

    def record():
        if part not in read_starts(out):
            write_starts(out, source, {part: {"use": use, "weights_sha256": sha256}})
        return read_starts(out)[part]

    started = ask_main_process(accelerator, record)
    with fail_together(accelerator):
        if started.get("weights_sha256", sha256) != sha256:
            raise ValueError(
                f"{source} is not the model that the run in {out} began with: its {part} has other "
                "weights. Restore it, or train in another folder with --out."
            )
