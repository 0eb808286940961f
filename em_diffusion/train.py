"""A latent diffusion run from micrographs to a saved pipeline."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from em_data import load_data, warn_if_few
from em_data.files import write_atomically
from em_diffusion.autoencoder import encode
from em_diffusion.autoencoder_loop import train_autoencoder
from em_diffusion.config import LDMConfig
from em_diffusion.denoiser import create_scheduler, load_denoiser
from em_diffusion.denoiser_loop import train_denoiser
from em_diffusion.em_grain import EMGrain
from em_diffusion.grain import MAX_PIXELS, fit_grain
from em_diffusion.latents import Latents, encode_latents, measure_latents, store_latent_statistics
from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_diffusion.samplers import choose_default_sampler, create_sampler
from em_diffusion.validation import choose_validation_views, draw_validation_images, reconstruct
from em_diffusion.weights import hash_weights, save_model
from em_evaluation.feature_metrics import check_metrics
from em_training import (
    create_accelerator,
    list_checkpoints,
    load_config,
    lock_folder,
    read_best,
    refuse_other_data,
    refuse_other_run,
    save_config,
    seed_for,
)


def train_ldm(config: LDMConfig) -> Path:
    """Run every stage of `config` that is not finished: autoencoder, latents, grain, denoiser, pipeline; return `config.out`.

    With `last_stage` "autoencoder", only the first.

    Writes config.json, pipeline/ (load it with `EMLatentDiffusionPipeline.from_pretrained`) and run.json into the run's
    folder. The same call on the same folder goes on where it stopped, to the bit on the same hardware. Several processes
    share the work when they are started by torchrun or `accelerate launch`.

    Raises `ValueError` when the folder holds a run of another configuration or another training is at work in it, and
    `TrainingInterrupted` after saving when asked to stop.
    """
    out = Path(config.out)
    accelerator = create_accelerator(out, config.precision)
    with lock_folder(out, is_main_process=accelerator.is_main_process):
        train_stages(config, accelerator, out)
    return out


def train_stages(config, accelerator, out):
    """What `train_ldm` does, in a folder that nothing else trains in."""
    check_batch_sizes(config, accelerator.num_processes)
    check_metrics(config.denoiser.evaluation_metrics, in_training=True)
    config = replace(config, precision=accelerator.mixed_precision)
    check_same_run(config, out)
    with accelerator.main_process_first():  # the first to come cuts the tiles, others find them
        data = load_data(config.data, config.tiles, log=accelerator.print)
    accelerator.wait_for_everyone()
    warn_if_few(data.summary, len(data.train), config.autoencoder.num_images, accelerator.print)
    if accelerator.is_main_process:
        refuse_other_data(out, data.identity)
        save_config(config, out / "config.json")

    vqvae, autoencoder = run_autoencoder_stage(config, data, accelerator, out)
    if not config.makes_pipeline:
        accelerator.print(
            f"the autoencoder is trained: {out / 'autoencoder'}; --last-stage denoiser goes on from it"
        )
        return
    latents, held_out_latents, encoding = run_latents_stage(config, data, vqvae, accelerator, out)
    grain = run_grain_stage(config, data, vqvae, accelerator, out)
    unet, denoiser = run_denoiser_stage(
        config, data, latents, held_out_latents, vqvae, accelerator, out, grain
    )
    if accelerator.is_main_process:
        scheduler, num_steps = choose_sampler(config)
        pixel_size_nm = data.summary.get("pixel_size_nm")
        pipeline = EMLatentDiffusionPipeline(
            vqvae, unet, scheduler, pixel_size_nm, num_steps, grain
        )
        save_model(
            pipeline, out / "pipeline"
        )  # whole: none of what an earlier end of this run left there
        seconds = {"autoencoder": autoencoder["train_seconds"], "latents": encoding["seconds"]}
        seconds["denoiser"] = denoiser["train_seconds"]
        run = {
            "name": out.name,
            "family": "ldm",
            "train_seconds": sum(seconds.values()),
            "train_seconds_by_stage": seconds,
            "num_images_seen": denoiser["num_images_seen"],
            "num_images_seen_by_stage": {
                "autoencoder": autoencoder["num_images_seen"],
                "denoiser": denoiser["num_images_seen"],
            },
            "denoiser_weights": denoiser["weights"],
            "config": asdict(config),
            "data": data.summary,
        }
        write_atomically(out / "run.json", json.dumps(run, indent=2) + "\n")
    accelerator.wait_for_everyone()


def run_autoencoder_stage(config, data, accelerator, out):
    """The trained autoencoder and its result; trained or loaded."""
    result = read_result(out / "autoencoder", config.autoencoder.num_images)
    if result is None:
        stage = replace(config.autoencoder, seed=seed_for(config.seed, config.autoencoder.seed))
        if stage.init_from is not None:
            check_latent_size(config, accelerator)
        _, seconds = train_autoencoder(
            stage, data.train, data.held_out, accelerator=accelerator, out_dir=out
        )
        result = write_result(out / "autoencoder", stage, seconds, accelerator)
    return load_autoencoder(out / "autoencoder" / "vqvae", device=accelerator.device), result


def check_latent_size(config, accelerator):
    """Refuse tiles that the autoencoder of `init_from` and the denoiser's levels cannot halve, before anything is trained."""
    with accelerator.main_process_first():  # the first to come may download it
        model = load_autoencoder(config.autoencoder.init_from)
    resolution, num_halvings = config.tiles.resolution, len(config.denoiser.channel_multipliers) - 1
    with torch.no_grad():
        try:
            side = encode(model, torch.zeros(1, 1, resolution, resolution)).shape[-1]
        except (RuntimeError, ValueError):  # too small for so many levels
            side = 0
    if side == 0 or resolution % side or side % 2**num_halvings:
        raise ValueError(
            f"tiles.resolution is {resolution}, which the autoencoder of {config.autoencoder.init_from} "
            f"{f'makes latents of {side} x {side} of' if side else 'cannot encode'}, and the denoiser halves latents "
            f"{num_halvings} times: choose another resolution, or fewer levels of the denoiser."
        )


def run_latents_stage(config, data, vqvae, accelerator, out):
    """Latents of all training views and of the validation views, and the seconds that encoding took.

    Their statistics are measured on the training side alone.
    """
    validation = choose_validation_views(data.held_out, config.denoiser.num_validation_images)
    (train, train_seconds), (held_out, held_out_seconds) = (
        encode_latents(
            vqvae,
            tiles,
            out / "latents",
            accelerator=accelerator,
            batch_size=config.autoencoder.batch_size,
            name=name,
            view_ids=view_ids,
        )
        for name, tiles, view_ids in (
            ("train", data.train, None),
            ("held_out", data.held_out, validation),
        )
    )
    mean, std = measure_latents(train)
    if accelerator.is_main_process:
        store_latent_statistics(out / "autoencoder" / "vqvae", mean, std)
    accelerator.wait_for_everyone()
    vqvae.register_to_config(latents_mean=mean, latents_std=std)
    return (
        Latents(train, mean, std),
        Latents(held_out, mean, std),
        {"seconds": train_seconds + held_out_seconds},
    )


def run_grain_stage(config, data, vqvae, accelerator, out):
    """The grain that the autoencoder leaves out of training views, measured or loaded; None where none is wanted."""
    if not config.grain_images:
        return None
    path, made_for = (
        out / "grain",
        {"num_images": config.grain_images, "autoencoder": hash_weights(vqvae)},
    )
    record = path / "measured.json"
    if accelerator.is_main_process and not (
        record.exists() and json.loads(record.read_text()) == made_for
    ):
        num_images = min(config.grain_images, max(1, MAX_PIXELS // config.tiles.resolution**2))
        images = draw_validation_images(data.train, num_images)
        grain = fit_grain(images, reconstruct(vqvae, images, accelerator))
        accelerator.print(
            f"grain: the autoencoder leaves out noise of {100 * grain.deviations.mean() / 2:.1f} % of the range of grey levels on "
            f"{len(images):,} training views; it is drawn anew for each generated image"
        )
        save_model(grain, path)
        write_atomically(record, json.dumps(made_for) + "\n")
    accelerator.wait_for_everyone()
    return EMGrain.from_pretrained(path).to(accelerator.device)


def run_denoiser_stage(
    config, data, latents, held_out_latents, vqvae, accelerator, out, grain=None
):
    """The trained denoiser and its result; trained or loaded. Averaged weights: the best ones where distances were measured."""
    result = read_result(out / "denoiser", config.denoiser.num_images)
    if result is None:
        stage = replace(config.denoiser, seed=seed_for(config.seed, config.denoiser.seed))
        _, seconds = train_denoiser(
            stage,
            latents,
            held_out_latents,
            vqvae,
            accelerator=accelerator,
            out_dir=out,
            held_out=data.held_out,
            grain=grain,
        )
        result = write_result(out / "denoiser", stage, seconds, accelerator)
    with accelerator.main_process_first():  # which may have to tidy up after a kill
        best = read_best(out / "denoiser")
    folder = out / "denoiser" / "best" if best else out / "denoiser"
    result["weights"] = {"of": "the best checkpoint", **best} if best else {"of": "the last step"}
    return load_denoiser(folder / "unet"), result


def choose_sampler(config):
    """The scheduler and the number of steps that the pipeline is saved with: as `config` says, or the fast default."""
    scheduler = create_scheduler(config.denoiser)
    if config.sampler is None:
        scheduler, num_steps = choose_default_sampler(scheduler)
    else:
        scheduler, num_steps = create_sampler(config.sampler, scheduler), 50
    return scheduler, config.num_inference_steps or num_steps


def read_result(folder, num_images: int) -> dict | None:
    """What a finished stage left, or None when it is not finished or was made for fewer images."""
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else None
    return result if result is not None and result["num_images_seen"] >= num_images else None


def write_result(folder, config, train_seconds: float, accelerator) -> dict:
    """Mark a stage as finished."""
    num_images_seen = -(-config.num_images // config.batch_size) * config.batch_size
    result = {"num_images_seen": num_images_seen, "train_seconds": train_seconds}
    if accelerator.is_main_process:
        write_atomically(folder / "result.json", json.dumps(result, indent=2) + "\n")
    accelerator.wait_for_everyone()
    return result


def check_batch_sizes(config, num_processes: int):
    """Refuse a batch that the processes cannot share evenly."""
    for name in ("autoencoder", "denoiser"):
        batch_size = getattr(config, name).batch_size
        if batch_size % num_processes:
            raise ValueError(
                f"{name}.batch_size is {batch_size}, which {num_processes} processes cannot share evenly; "
                f"choose a multiple of {num_processes}."
            )


def check_same_run(config, out):
    """Refuse to mix two configurations in one folder.

    A stage may be made longer as long as no later stage has begun and its learning rate does not
    aim at its end. The interval of snapshots may change, but they must be kept from the start.
    """

    def is_allowed(name, old, new):
        if name == "denoiser.posthoc_ema_every":
            return old > 0 and new > 0
        return _is_longer(name, old, new, out)

    refuse_raised_rate(config, out)
    refuse_other_run(out, config, is_allowed)


def refuse_raised_rate(config, out):
    """Refuse to lengthen a stage that began to lower its learning rate to zero at its old end.

    Its rate would jump up, and what comes out is neither the longer run nor two runs. "constant" and "inverse_sqrt" do not
    know the end: a stage with them, lengthened, is to the bit the stage that was long from the start.
    """
    if not (out / "config.json").exists():
        return
    before = load_config(LDMConfig, out / "config.json")
    for name in ("autoencoder", "denoiser"):
        old, new = getattr(before, name), getattr(config, name)
        has_begun = list_checkpoints(out / name / "checkpoints")
        if new.num_images > old.num_images and old.learning_rate_decay == "cosine" and has_begun:
            raise ValueError(
                f"{name}.num_images was {old.num_images}, is now {new.num_images}, but the stage in {out} lowers its learning rate "
                "towards its old end, and would go on at a raised one. Train the longer run in another folder with --out; one with "
                f"--{name}.learning-rate-decay constant (or inverse_sqrt, for the denoiser) can be lengthened at any time."
            )


def _is_longer(name, before, after, out) -> bool:
    if name == "denoiser.num_images":
        return after > before
    return (
        name == "autoencoder.num_images"
        and after > before
        and not list_checkpoints(out / "denoiser" / "checkpoints")
    )
