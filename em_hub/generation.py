"""A pipeline -> a folder of images: batched, over processes, resumable; image i depends on the seed and i alone."""

import dataclasses
import hashlib
import inspect
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import diffusers
import torch
from tqdm.auto import tqdm

from em_data import write_image
from em_hub.loading import find_pipeline_folder, load_pipeline, read_run_info
from em_training import create_process_state, default_precision, seed_for, write_text_atomically

RECORD = "generation.json"
NOISE_MODE = "random"  # fresh noise for each StyleGAN image, as in training, from that image's own generator
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "ddpm": "DDPMScheduler",
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Generate images from a trained model into a folder."""

    model: str
    """A run's folder, a folder with a saved pipeline, or a Hub id (owner/name)."""
    out: str
    """Folder for the images and generation.json. A second start with the same settings goes on where the first stopped."""
    num_images: int = 1000
    """How many images the folder holds in the end."""
    seed: int = 0
    """Image i depends on this seed and on i alone, whatever the batch size or the number of processes."""
    batch_size: int = 50
    """Images at once, per process."""
    format: str = "png"
    """png or tiff."""
    bits: int = 8
    """8 or 16 bits a pixel."""
    precision: str = "auto"
    """auto (bf16 where the hardware has it), bf16 or no (float32)."""
    num_inference_steps: int | None = None
    """LDM only: denoising steps; the pipeline's own default where it is left out."""
    scheduler: str | None = None
    """LDM only: ddim, dpm-solver++, unipc, euler or ddpm instead of the scheduler saved with the model."""
    eta: float = 0.0
    """LDM with ddim only: 0 is deterministic, 1 is as noisy as DDPM."""
    truncation_psi: float = 1.0
    """StyleGAN only: below 1 trades variety for typicality. Report distances at 1."""


def generate_images(config: GenerationConfig) -> dict:
    """Generate `config.num_images` images and return the record that generation.json holds.

    The record: {"name", "family", "settings", "num_images", "timed_images", "sample_seconds", "sample_images_per_second"}.
    Seconds are of sampling and writing, without loading; a part that was killed counts neither in `timed_images` nor in
    `sample_seconds`. Raises `ValueError` when the folder holds images of other settings or of another model.
    """
    _check(config)
    state = create_process_state()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    info = read_run_info(config.model)
    pipeline = load_pipeline(config.model, device=state.device, dtype=_dtype(config.precision))
    family = "ldm" if hasattr(pipeline, "scheduler") else "stylegan2"
    settings = _settings(config, family, pipeline)
    record = {"name": info.name, "family": family if info.family == "unknown" else info.family, "settings": settings}
    before = _read_matching_record(out, record)
    state.wait_for_everyone()
    if state.is_main_process and before is None:
        write_text_atomically(out / RECORD, json.dumps(record, indent=2) + "\n")

    mine = range(state.process_index, config.num_images, state.num_processes)
    missing = [i for i in mine if not _image_path(out, i, config).exists()]
    seconds = _generate_missing(pipeline, family, missing, config, out, show=state.is_main_process)

    parts = (
        accelerate.utils.gather_object([(len(missing), seconds)])
        if state.num_processes > 1
        else [(len(missing), seconds)]
    )
    before = before or {}
    record["num_images"] = max(config.num_images, before.get("num_images", 0))
    record["timed_images"] = before.get("timed_images", 0) + sum(images for images, _ in parts)
    record["sample_seconds"] = before.get("sample_seconds", 0.0) + max(seconds for _, seconds in parts)
    if record["timed_images"]:
        record["sample_images_per_second"] = record["timed_images"] / record["sample_seconds"]
    if state.is_main_process:
        write_text_atomically(out / RECORD, json.dumps(record, indent=2) + "\n")
    state.wait_for_everyone()
    return record


def _generate_missing(
    pipeline, family: str, missing: list[int], config: GenerationConfig, out: Path, *, show: bool
) -> float:
    """Sample and write the images numbered `missing`; return the seconds that took."""
    pipeline.set_progress_bar_config(disable=True)
    call = {"output_type": "pt"}
    if family == "ldm":
        call["eta"] = config.eta
        if config.num_inference_steps is not None:
            call["num_inference_steps"] = config.num_inference_steps
    else:
        call |= {"truncation_psi": config.truncation_psi, "noise_mode": NOISE_MODE}
    pixel_size_nm = getattr(pipeline.config, "pixel_size_nm", None)
    started = time.monotonic()
    with (
        ThreadPoolExecutor(1) as writer,
        tqdm(total=len(missing), unit="img", desc=f"sampling {family}", disable=not show) as bar,
    ):
        pending = []
        for first in range(0, len(missing), config.batch_size):
            numbers = missing[first : first + config.batch_size]
            generators = [torch.Generator(pipeline.device).manual_seed(seed_for(config.seed, i)) for i in numbers]
            images = pipeline(batch_size=len(numbers), generator=generators, **call).images
            images = images.float().cpu() * 2 - 1
            for job in pending:
                job.result()
            pending = [writer.submit(_write_batch, images, numbers, config, out, pixel_size_nm)]
            bar.update(len(numbers))
        for job in pending:
            job.result()
    return time.monotonic() - started


def _write_batch(images, numbers: list[int], config: GenerationConfig, out: Path, pixel_size_nm) -> None:
    for image, number in zip(images, numbers):
        path = _image_path(out, number, config)
        temporary = path.with_name("." + path.name)
        write_image(image, temporary, bits=config.bits, pixel_size_nm=pixel_size_nm)
        temporary.replace(path)


def _image_path(out: Path, number: int, config: GenerationConfig) -> Path:
    return out / f"{number:06d}.{'tif' if config.format == 'tiff' else 'png'}"


def _settings(config: GenerationConfig, family: str, pipeline) -> dict:
    """Return what decides an image's content, so that a folder never mixes two kinds; an LDM's scheduler is put in place here."""
    weights = _hash_weights(config.model)
    settings = {
        **({"weights_sha256": weights} if weights else {"model": config.model}),
        "seed": config.seed,
        "format": config.format,
        "bits": config.bits,
        "precision": "bf16" if _dtype(config.precision) == torch.bfloat16 else "no",
    }
    if family != "ldm":
        return settings | {"truncation_psi": config.truncation_psi, "noise_mode": NOISE_MODE}
    if config.scheduler is not None:
        scheduler = getattr(diffusers, SCHEDULERS[config.scheduler])
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    name = type(pipeline.scheduler).__name__
    default_steps = inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
    return settings | {
        "scheduler": name,
        "num_inference_steps": config.num_inference_steps or default_steps,
        "eta": config.eta,
    }


def _hash_weights(model: str) -> str | None:
    """Return the SHA-256 of a local pipeline's weight files, so that a retrained model is another model; None for a Hub id."""
    folder = find_pipeline_folder(model)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _read_matching_record(out: Path, record: dict) -> dict | None:
    path = out / RECORD
    if not path.exists():
        if any(out.glob("[0-9]" * 6 + ".*")):
            raise ValueError(f"{out} holds images of unknown origin (no {RECORD}); choose another folder with --out")
        return None
    before = json.loads(path.read_text())
    if before.get("settings") != record["settings"]:
        changed = [k for k, v in record["settings"].items() if before.get("settings", {}).get(k) != v]
        raise ValueError(
            f"{out} holds images made with other settings ({', '.join(changed)} differ); choose another folder with --out"
        )
    return before


def _dtype(precision: str) -> torch.dtype:
    precision = default_precision() if precision == "auto" else precision
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _check(config: GenerationConfig) -> None:
    if config.num_images < 1 or config.batch_size < 1:
        raise ValueError("--num-images and --batch-size must be at least 1")
    if config.format not in ("png", "tiff"):
        raise ValueError(f"--format {config.format} is unknown; choose png or tiff")
    if config.bits not in (8, 16):
        raise ValueError(f"--bits {config.bits}: an image has 8 or 16")
    if config.precision not in ("auto", "bf16", "no"):
        raise ValueError(f"--precision {config.precision} is unknown; choose auto, bf16 or no")
    if config.scheduler is not None and config.scheduler not in SCHEDULERS:
        raise ValueError(f"--scheduler {config.scheduler} is unknown; choose {', '.join(SCHEDULERS)}")
