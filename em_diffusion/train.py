"""A latent diffusion run, from micrographs to a saved pipeline."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from em_data import load_data, warn_if_few
from em_data.files import write_atomically
from em_data.look.tile_size import warn_of_tile_size
from em_diffusion.autoencoder import encode, is_trainable
from em_diffusion.autoencoder_loop import train_autoencoder
from em_diffusion.classes import check_classes, read_classes
from em_diffusion.config import LDMConfig
from em_diffusion.denoiser import create_scheduler, load_denoiser
from em_diffusion.denoiser_loop import train_denoiser
from em_diffusion.grain_stage import run_grain_stage
from em_diffusion.latents import encode_latents, measure_latents, store_latent_statistics
from em_diffusion.layout_stage import run_layout_stage
from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.masks import (
    add_masks,
    check_masks,
    choose_views,
    create_pipeline,
    fit_start,
)
from em_diffusion.samplers import choose_default_sampler, create_sampler
from em_diffusion.start import load_start, record_start
from em_evaluation.feature_metrics import check_metrics
from em_training import (
    ask_main_process,
    check_same_config,
    check_same_tiles,
    create_accelerator,
    describe_preset,
    fail_together,
    fill_cache,
    list_checkpoints,
    load_config,
    lock_run,
    read_best,
    refuse_other_data,
    refuse_other_run,
    save_config,
    seed_for,
)
from em_training.config import is_complete
from em_training.latents import Latents
from em_training.sources import TRAINED_FURTHER, read_starts
from em_training.weights import save_model


def train_ldm(config: LDMConfig) -> Path:
    """Run every stage of `config` that is not finished and return `config.out`.

    The stages are autoencoder, latents, grain, denoiser and pipeline; with `last_stage`
    "autoencoder" only the first. The run's folder gets config.json, pipeline/ (for
    `EMLatentDiffusionPipeline.from_pretrained`) and run.json. The same call on the same folder
    resumes the run; on the same hardware the result is equal to the bit. Several processes share
    the work if they were started by torchrun or `accelerate launch`, on one node or more.

    Raises:
        ValueError: If the folder holds a run with another configuration, or is in use, or if the
            processes do not share it or have other tiles.
        TrainingInterrupted: After saving, if asked to stop.
    """
    out = Path(config.out)
    accelerator = create_accelerator(out, config.precision)
    with lock_run(out, accelerator):
        train_stages(config, accelerator, out)
    return out


def train_stages(config, accelerator, out):
    """Run the stages in a folder that nothing else trains in."""
    config = replace(config, precision=accelerator.mixed_precision)
    check_same_config(config, accelerator)
    with fail_together(accelerator):
        check_batch_sizes(config, accelerator.num_processes)
        check_metrics(config.denoiser.evaluation_metrics, in_training=True)
        check_same_run(config, out)
    start = load_denoiser_start(config, accelerator, out)
    data = fill_cache(
        accelerator, lambda: load_data(config.data, config.tiles, log=accelerator.print)
    )
    classes = {"classes": list(data.train.class_names)} if config.conditional else {}
    identity = data.identity | classes
    check_same_tiles(identity, accelerator)
    with fail_together(accelerator):
        check_data(config, data, accelerator)
        if accelerator.is_main_process:
            refuse_other_data(out, identity)
            save_config(config, out / "config.json")

    if start is not None:
        source = config.denoiser.init_from
        record_start(out, "denoiser", source, start.unet, accelerator, TRAINED_FURTHER)
    vqvae, autoencoder = run_autoencoder_stage(config, data, accelerator, out, start)
    if not config.makes_pipeline:
        accelerator.print(
            f"The autoencoder is trained: {out / 'autoencoder'}. The same command with "
            "--last-stage denoiser continues the run."
        )
        return
    latents, held_out_latents, seconds = run_latents_stage(
        config, data, vqvae, accelerator, out, start
    )
    layout_sampler = run_layout_stage(config, data, accelerator, out)
    latents, held_out_latents = add_masks(config, data, latents, held_out_latents, layout_sampler)
    grain = run_grain_stage(config, data, vqvae, accelerator, out)
    unet, denoiser = run_denoiser_stage(
        config, data, latents, held_out_latents, vqvae, accelerator, out, grain, start
    )
    with fail_together(accelerator):
        if accelerator.is_main_process and not is_complete(out, config):
            save_pipeline(config, data, out, vqvae, unet, grain, layout_sampler)
            run = describe_run(config, data, out, autoencoder, seconds, denoiser)
            write_atomically(out / "run.json", json.dumps(run, indent=2) + "\n")


def check_data(config, data, accelerator):
    """Refuse data that the run cannot use, and say what it does not use or will repeat often."""
    check_masks(config, data, accelerator.print)
    warn_if_few(data.summary, len(data.train), config.autoencoder.num_images, accelerator.print)
    if accelerator.is_main_process:
        warn_of_tile_size(data.train.cut, config.tiles.downsample, config.data, accelerator.print)
    if unused := check_classes(config, data):
        accelerator.print(unused)


def describe_run(config, data, out, autoencoder, latents_seconds, denoiser) -> dict:
    """Return what run.json holds."""
    seconds = {
        "autoencoder": autoencoder["train_seconds"],
        "latents": latents_seconds,
        "denoiser": denoiser["train_seconds"],
    }
    return {
        "name": out.name,
        "family": "mask-ldm" if config.denoiser.mask_conditional else "ldm",
        **describe_preset(out),
        "train_seconds": sum(seconds.values()),
        "train_seconds_by_stage": seconds,
        "num_images_seen": denoiser["num_images_seen"],
        "num_images_seen_by_stage": {
            "autoencoder": autoencoder["num_images_seen"],
            "denoiser": denoiser["num_images_seen"],
        },
        "denoiser_weights": denoiser["weights"],
        **({"started_from": started} if (started := read_starts(out)) else {}),
        "config": asdict(config),
        "data": data.summary,
    }


def save_pipeline(config, data, out, vqvae, unet, grain, layout_sampler=None):
    """Save the pipeline in place of what an earlier end of the run left."""
    scheduler, num_steps = choose_sampler(config)
    pixel_size_nm = data.summary.get("pixel_size_nm")
    names = dict(enumerate(data.train.class_names)) if config.conditional else None
    pipeline = create_pipeline(
        vqvae,
        unet,
        scheduler,
        layout_sampler,
        pixel_size_nm,
        num_steps,
        grain,
        id2label=names,
    )
    save_model(pipeline, out / "pipeline")


def load_denoiser_start(config, accelerator, out):
    """Load the trained denoiser that the run starts from; None without one or if it is not needed.

    It is loaded before anything is written, so that a model that does not fit is refused at once.
    """
    result = find_result(out / "denoiser", config.denoiser, accelerator)
    if config.denoiser.init_from is None or result is not None or not config.makes_pipeline:
        return None
    return load_start(config, accelerator)


def run_autoencoder_stage(config, data, accelerator, out, start=None):
    """Train or load the autoencoder; return it and its result."""
    result = find_result(out / "autoencoder", config.autoencoder, accelerator)
    if result is None:
        stage = replace(config.autoencoder, seed=seed_for(config.seed, config.autoencoder.seed))
        if stage.init_from is not None:
            check_first_autoencoder(config, accelerator, out, start)
        _, seconds = train_autoencoder(
            stage, data.train, data.held_out, accelerator=accelerator, out_dir=out
        )
        result = write_result(out / "autoencoder", stage, seconds, accelerator)
    return load_autoencoder(out / "autoencoder" / "vqvae", device=accelerator.device), result


def check_first_autoencoder(config, accelerator, out, start):
    """Record the autoencoder of `init_from`.

    Refuse tiles that it and the denoiser's levels cannot halve, and one that has changed.
    """
    stage, resolution = config.autoencoder, config.tiles.resolution
    source = stage.init_from
    model = fill_cache(accelerator, lambda: load_autoencoder(source))
    use = "decoder trained further" if stage.freeze_encoder else TRAINED_FURTHER
    if stage.num_images == 0 or not is_trainable(model):
        use = "unchanged"
    record_start(out, "autoencoder", source, model, accelerator, use)
    num_halvings = start.num_halvings if start else len(config.denoiser.channel_multipliers) - 1
    with torch.no_grad():
        try:
            side = encode(model, torch.zeros(1, 1, resolution, resolution)).shape[-1]
        except (RuntimeError, ValueError):  # too small for so many levels
            side = 0
    if side == 0 or resolution % side or side % 2**num_halvings:
        problem = f"makes latents of {side} x {side} of them" if side else "cannot encode them"
        raise ValueError(
            f"tiles.resolution is {resolution}, but the autoencoder of {source} {problem}, and the "
            f"denoiser halves latents {num_halvings} times. Use another --tiles.resolution, or "
            "fewer levels with --denoiser.channel-multipliers."
        )


def run_latents_stage(config, data, vqvae, accelerator, out, start=None):
    """Encode the training views and the validation views, or read their latents.

    Returns both as `Latents`, and the seconds of encoding. Mean and deviation are measured on the
    training side alone; those of a trained denoiser that the run starts from are kept.
    """
    training, validation = choose_views(config, data)
    batch_size, folder = config.autoencoder.batch_size, out / "latents"
    encode_side = partial(encode_latents, vqvae, accelerator=accelerator, batch_size=batch_size)
    train, seconds = encode_side(data.train, folder, name="train", view_ids=training)
    held_out, more = encode_side(data.held_out, folder, name="held_out", view_ids=validation)
    if start is not None:
        mean, std = start.mean, start.std
    elif config.denoiser.init_from is not None:  # a finished run, which has stored them
        mean, std = vqvae.config.latents_mean, vqvae.config.latents_std
    else:
        mean, std = measure_latents(train)
    with fail_together(accelerator):
        if accelerator.is_main_process:
            store_latent_statistics(out / "autoencoder" / "vqvae", mean, std)
    vqvae.register_to_config(latents_mean=mean, latents_std=std)
    latents = [
        Latents(array, mean, std, *(read_classes(tiles, view_ids) if config.conditional else ()))
        for array, tiles, view_ids in (
            (train, data.train, training),
            (held_out, data.held_out, validation),
        )
    ]
    return *latents, seconds + more


def run_denoiser_stage(
    config, data, latents, held_out_latents, vqvae, accelerator, out, grain=None, start=None
):
    """Train or load the denoiser; return it and its result.

    Its weights are the best ones if distances were measured, else those of the last step.
    """
    result = find_result(out / "denoiser", config.denoiser, accelerator)
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
            start=None if start is None else fit_start(start, latents),
        )
        result = write_result(out / "denoiser", stage, seconds, accelerator)
    best = ask_main_process(accelerator, lambda: read_best(out / "denoiser"))
    folder = out / "denoiser" / "best" if best else out / "denoiser"
    result["weights"] = {"of": "the best checkpoint", **best} if best else {"of": "the last step"}
    return load_denoiser(folder / "unet"), result


def choose_sampler(config):
    """Return the scheduler and the number of steps that the pipeline is saved with."""
    scheduler = create_scheduler(config.denoiser)
    if config.sampler is None:
        scheduler, num_steps = choose_default_sampler(scheduler)
    else:
        scheduler, num_steps = create_sampler(config.sampler, scheduler), 50
    return scheduler, config.num_inference_steps or num_steps


def find_result(folder, stage, accelerator) -> dict | None:
    """Return what `read_result` finds on the main process."""
    return ask_main_process(accelerator, lambda: read_result(folder, stage.num_images))


def read_result(folder, num_images: int) -> dict | None:
    """Return the result of a finished stage; None if it is not finished or was shorter."""
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        return result if result["num_images_seen"] >= num_images else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove it; the stage then ends again from its last "
            "checkpoint."
        ) from error


def write_result(folder, config, train_seconds: float, accelerator) -> dict:
    """Mark a stage as finished."""
    num_images_seen = -(-config.num_images // config.batch_size) * config.batch_size
    result = {"num_images_seen": num_images_seen, "train_seconds": train_seconds}
    with fail_together(accelerator):
        if accelerator.is_main_process:
            write_atomically(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def check_batch_sizes(config, num_processes: int):
    """Refuse a batch that the processes cannot share evenly."""
    for name in ("autoencoder", "denoiser"):
        batch_size = getattr(config, name).batch_size
        if batch_size % num_processes:
            raise ValueError(
                f"{name}.batch_size is {batch_size}, but must be a multiple of the number of "
                f"processes, {num_processes}. Use --{name}.batch-size."
            )


def check_same_run(config, out):
    """Refuse to mix two configurations in one folder.

    Fields marked "may change" decide no weight beyond rounding. A stage may also be lengthened as
    long as no later stage has begun and its learning rate does not depend on its end.
    """

    def is_allowed(name, before, after):
        if name == "denoiser.posthoc_ema_every":
            return before > 0 and after > 0  # averages must exist from the start
        if name == "denoiser.num_images":
            return after > before
        has_denoiser = list_checkpoints(out / "denoiser" / "checkpoints")
        return name == "autoencoder.num_images" and after > before and not has_denoiser

    refuse_other_run(out, config, is_allowed)
    refuse_raised_rate(config, out)


def refuse_raised_rate(config, out):
    """Refuse to lengthen a stage that already lowered its learning rate towards its old end.

    The rate would jump up, and the result would be neither the longer run nor two runs. With
    "constant" and "inverse_sqrt", a lengthened stage equals the stage that was long from the start
    to the bit.
    """
    if not (out / "config.json").exists():
        return
    before = load_config(LDMConfig, out / "config.json")
    for name in ("autoencoder", "denoiser"):
        old, new = getattr(before, name), getattr(config, name)
        has_begun = list_checkpoints(out / name / "checkpoints")
        if new.num_images > old.num_images and old.learning_rate_decay == "cosine" and has_begun:
            raise ValueError(
                f"{name}.num_images was {old.num_images}, is now {new.num_images}, but the stage "
                f"in {out} lowers its learning rate towards its old end and would resume at a "
                "higher one. Train the longer run in another folder with --out. A stage with "
                f"--{name}.learning-rate-decay constant (or inverse_sqrt, for the denoiser) can be "
                "lengthened at any time."
            )
