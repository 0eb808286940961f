"""A pipeline -> a folder of images: batched, over processes, resumable; image i depends on the seed and i alone."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import accelerate
import torch
from tqdm.auto import tqdm

from em_diffusion.samplers import SAMPLERS, create_sampler
from em_generation.loading import (
    OTHER_VARIANTS,
    fetch_pipeline_folder,
    load_pipeline,
    read_run_info,
)
from em_generation.sampling import DECODED_PIXELS, Sampling
from em_generation.store import create_store, holds_images, remove_remains
from em_training import create_process_state, default_precision, write_text_atomically

RECORD = "generation.json"
NOISE_MODE = (
    "random"  # fresh noise for each StyleGAN image, as in training, from that image's own generator
)
FORMATS = ("png", "tiff", "arrow")
LDM_OPTIONS = ("decode_batch_size", "compile", "num_inference_steps", "scheduler", "eta", "grain")
GAN_OPTIONS = ("truncation_psi", "class_label")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_WRITERS = 8


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Generate images from a trained model into a folder."""

    model: str
    """A run's folder, a folder with a saved pipeline, or a Hub id (owner/name, owner/name@revision)."""
    out: str
    """Folder for the images and generation.json. A second start with the same settings goes on where the first stopped."""
    num_images: int = 1000
    """How many images the folder holds in the end."""
    seed: int = 0
    """Image i depends on this seed and on i alone, whatever the batch size or the number of processes: bit for bit on the CPU with
    one thread a process and batches of 16 or more, else but for rounding (at most a grey level of 8 bits)."""
    batch_size: int = 50
    """Images at once, per process; halved where the memory does not suffice."""
    decode_batch_size: int | None = None
    """LDM only: images decoded at once; left out, as many as make a million pixels."""
    format: str = "png"
    """png or tiff: a file an image; arrow: a datasets.Dataset in shards, for datasets.load_from_disk."""
    bits: int = 8
    """8 or 16 bits a pixel."""
    precision: str = "auto"
    """auto (bf16 where the hardware has it), bf16, fp16 or no (float32)."""
    compile: bool = False
    """LDM only: torch.compile the U-Net. Measured on a CPU with AVX-512: a step is 1.8 times as fast after a minute of compiling,
    which pays from some thousands of images."""
    num_inference_steps: int | None = None
    """LDM only: denoising steps; the pipeline's own default where it is left out."""
    scheduler: str | None = None
    """LDM only: ddim, ddpm, dpm-solver++, dpm-solver++-karras, dpm-solver++-sde, unipc, unipc-karras, euler or heun, for flow matching
    dpm-solver++, unipc, flow-euler or flow-heun, instead of the scheduler saved with the model; wants --num-inference-steps."""
    eta: float = 0.0
    """LDM with ddim only: 0 is deterministic, 1 is as noisy as DDPM."""
    grain: bool = True
    """LDM only: add the noise of micrographs that the autoencoder leaves out, where the model knows it."""
    truncation_psi: float = 1.0
    """StyleGAN only: below 1 trades variety for typicality. Report distances at 1."""
    class_label: int | None = None
    """StyleGAN only: the class of all images, for a generator that knows classes (one converted from an official checkpoint)."""


def generate_images(config: GenerationConfig, *, refuse_unused: bool = False) -> dict:
    """Generate `config.num_images` images and return the record that generation.json holds.

    The record: {"name", "family", "settings", "num_images", "timed_images", "sample_seconds", "sample_images_per_second"}.
    Seconds are of sampling and writing, without loading; a part that was killed counts neither in `timed_images` nor in
    `sample_seconds`. Raises `ValueError` when the folder holds images of other settings or of another model, when another
    process generates into it, and, with `refuse_unused`, for options that a model of this family does not have.
    """
    _check(config)
    state = create_process_state()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out) if state.is_main_process else contextlib.nullcontext():
        return _generate(config, state, out, refuse_unused)


def _generate(config: GenerationConfig, state, out: Path, refuse_unused: bool) -> dict:
    info = read_run_info(config.model)
    pipeline = load_pipeline(config.model, device=state.device, dtype=DTYPES[_precision(config)])
    family = "ldm" if hasattr(pipeline, "scheduler") else "stylegan2"
    if refuse_unused:
        _refuse_unused(config, family)
    settings = _settings(config, family, pipeline)
    record = {
        "name": info.name,
        "family": family if info.family == "unknown" else info.family,
        "settings": settings,
    }
    before = _read_matching_record(out, record)
    state.wait_for_everyone()
    if state.is_main_process:
        remove_remains(out)
        if before is None:
            write_text_atomically(out / RECORD, json.dumps(record, indent=2) + "\n")

    store = create_store(
        out, config.format, config.bits, getattr(pipeline.config, "pixel_size_nm", None)
    )
    missing = store.find_missing(config.num_images)
    state.wait_for_everyone()  # all have seen the same folder before any writes to it
    mine = store.share(missing, state.process_index, state.num_processes)
    started = time.monotonic()
    _generate_missing(pipeline, family, mine, config, store, state)
    parts = [(len(mine), time.monotonic() - started)]
    if state.num_processes > 1:
        parts = accelerate.utils.gather_object(parts)

    before = before or {}
    record["num_images"] = max(config.num_images, before.get("num_images", 0))
    record["timed_images"] = before.get("timed_images", 0) + sum(images for images, _ in parts)
    record["sample_seconds"] = before.get("sample_seconds", 0.0) + max(
        seconds for _, seconds in parts
    )
    if record["timed_images"]:
        record["sample_images_per_second"] = record["timed_images"] / record["sample_seconds"]
    if state.is_main_process:
        store.finish()
        write_text_atomically(out / RECORD, json.dumps(record, indent=2) + "\n")
    state.wait_for_everyone()
    return record


def _generate_missing(
    pipeline, family: str, numbers: list[int], config: GenerationConfig, store, state
) -> None:
    """Sample and write the images `numbers`, under a bar that shows images/s and the time left of this process."""
    if not numbers:
        return
    sampling = create_sampling(pipeline, family, config)
    which = (
        f" (process {state.process_index + 1} of {state.num_processes})"
        if state.num_processes > 1
        else ""
    )
    with tqdm(
        total=len(numbers),
        unit="img",
        desc=f"sampling {family}{which}",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15,
        disable=not state.is_main_process,
    ) as bar:
        sampling.say = lambda text: tqdm.write(text, file=sys.stderr)
        sampling.generate(
            numbers, store.write, num_writers=_count_writers(state), progress=bar.update
        )


def create_sampling(pipeline, family: str, config: GenerationConfig) -> Sampling:
    """Prepare a loaded pipeline for speed, in place, and say how `config` has it called."""
    pipeline.set_progress_bar_config(disable=True)
    call, decode_batch_size = {"output_type": "pt"}, config.batch_size
    if family == "ldm":
        call = {"eta": config.eta, "num_inference_steps": config.num_inference_steps}
        for model in (pipeline.unet, pipeline.vqvae):
            model.to(memory_format=torch.channels_last)
        decode_batch_size = config.decode_batch_size or choose_decode_batch_size(
            pipeline, config.batch_size
        )
        if config.compile:
            frozen = (
                {"freezing": True} if pipeline.device.type == "cpu" else None
            )  # packs the weights as the CPU reads them
            pipeline.unet = torch.compile(pipeline.unet, options=frozen)
    else:
        call |= {
            "truncation_psi": config.truncation_psi,
            "noise_mode": NOISE_MODE,
            "class_labels": config.class_label,
        }
    return Sampling(
        pipeline,
        family,
        config.seed,
        config.batch_size,
        decode_batch_size,
        call,
        pad=config.compile and family == "ldm",
        add_grain=config.grain,
    )


def choose_decode_batch_size(pipeline, batch_size: int) -> int:
    """Return how many images make `DECODED_PIXELS`, at most `batch_size`; for an unknown autoencoder as if it were f8."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    factor = 2 ** (len(pipeline.vqvae.config.get("block_out_channels", range(4))) - 1)
    return max(1, min(batch_size, DECODED_PIXELS // (height * width * factor**2)))


def _count_writers(state) -> int:
    """Threads that encode and write: what cores are left beside those that compute."""
    cores = (os.cpu_count() or 1) // state.num_processes
    return max(
        1, min(MAX_WRITERS, cores - (1 if state.device.type == "cuda" else torch.get_num_threads()))
    )


@contextlib.contextmanager
def _lock(out: Path):
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process generates into {out}; wait for it, or choose another folder with --out"
            ) from error
        yield


def _settings(config: GenerationConfig, family: str, pipeline) -> dict:
    """Return what decides an image's content, so that a folder never mixes two kinds; an LDM's scheduler is put in place here."""
    settings = {
        "weights_sha256": hash_weights(config.model),
        "seed": config.seed,
        "format": config.format,
        "bits": config.bits,
        "precision": _precision(config),
    }
    if family != "ldm":
        classes = {} if config.class_label is None else {"class_label": config.class_label}
        return settings | {
            "truncation_psi": config.truncation_psi,
            "noise_mode": NOISE_MODE,
            **classes,
        }
    if config.scheduler is not None:
        pipeline.scheduler = create_sampler(config.scheduler, pipeline.scheduler)
    scheduler = pipeline.scheduler
    defaults = dict(type(scheduler)().config)
    options = {
        k: v for k, v in scheduler.config.items() if not k.startswith("_") and v != defaults.get(k)
    }
    if getattr(pipeline, "grain", None) is not None:
        settings["grain"] = config.grain
    return settings | {
        "scheduler": type(scheduler).__name__,
        "scheduler_options": json.dumps(options, sort_keys=True),
        "num_inference_steps": config.num_inference_steps
        or pipeline.config.default_num_inference_steps,
        "eta": config.eta,
    }


def hash_weights(model: str) -> str:
    """Return the SHA-256 of a pipeline's weight files, so that a retrained model, or another revision, is another model."""
    folder = fetch_pipeline_folder(model)
    index = json.loads((folder / "model_index.json").read_text())
    unused = {
        name for name, value in index.items() if isinstance(value, list) and value[-1] is None
    }
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        if (
            any(path.match(pattern) for pattern in OTHER_VARIANTS)
            or path.relative_to(folder).parts[0] in unused
        ):
            continue
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _read_matching_record(out: Path, record: dict) -> dict | None:
    path = out / RECORD
    if not path.exists():
        if holds_images(out):
            raise ValueError(
                f"{out} holds images of unknown origin (no {RECORD}); choose another folder with --out"
            )
        return None
    before = json.loads(path.read_text())
    if before.get("settings") != record["settings"]:
        ours, theirs = record["settings"], before.get("settings", {})
        changed = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        raise ValueError(
            f"{out} holds images made with other settings ({', '.join(changed)} differ); choose another folder with --out"
        )
    return before


def _precision(config: GenerationConfig) -> str:
    return default_precision() if config.precision == "auto" else config.precision


def _refuse_unused(config: GenerationConfig, family: str) -> None:
    unused = GAN_OPTIONS if family == "ldm" else LDM_OPTIONS
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = [
        f"--{name.replace('_', '-')}" for name in unused if getattr(config, name) != defaults[name]
    ]
    if given:
        other = "a StyleGAN" if family == "ldm" else "an LDM"
        raise ValueError(
            f"{', '.join(given)}: only {other} has that, and {config.model} is none; leave it out"
        )


def _check(config: GenerationConfig) -> None:
    if min(config.num_images, config.batch_size) < 1 or (
        config.decode_batch_size is not None and config.decode_batch_size < 1
    ):
        raise ValueError("--num-images, --batch-size and --decode-batch-size must be at least 1")
    if config.format not in FORMATS:
        raise ValueError(f"--format {config.format} is unknown; choose png, tiff or arrow")
    if config.bits not in (8, 16):
        raise ValueError(f"--bits {config.bits}: an image has 8 or 16")
    if config.precision not in ("auto", *DTYPES):
        raise ValueError(
            f"--precision {config.precision} is unknown; choose auto, bf16, fp16 or no"
        )
    if config.num_inference_steps is not None and config.num_inference_steps < 1:
        raise ValueError("--num-inference-steps must be at least 1")
    if config.scheduler is not None and config.scheduler not in SAMPLERS:
        raise ValueError(f"--scheduler {config.scheduler} is unknown; choose {', '.join(SAMPLERS)}")
    if config.scheduler is not None and config.num_inference_steps is None:
        raise ValueError(
            f"--scheduler {config.scheduler} wants --num-inference-steps: the default number belongs to the scheduler saved with the model"
        )
