"""A LoRA run, from a base and micrographs to a saved pipeline."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from em_data import load_data, warn_if_few
from em_data.files import write_atomically
from em_data.look.tile_size import warn_of_tile_size
from em_evaluation.feature_metrics import check_metrics
from em_stable_diffusion.adapters import find_layers, import_peft
from em_stable_diffusion.base_source import find_base
from em_stable_diffusion.bases import Base, open_base
from em_stable_diffusion.config import CLASS, LoRAConfig
from em_stable_diffusion.em_adapters import EMAdapters
from em_stable_diffusion.lora_loop import STAGE, train_adapters
from em_stable_diffusion.pipeline_em_lora import EMLoRAPipeline
from em_stable_diffusion.prompts import encode_prompts, make_texts
from em_training import (
    Latents,
    ask_main_process,
    check_same_config,
    check_same_tiles,
    create_accelerator,
    describe_preset,
    fail_together,
    fill_cache,
    lock_run,
    read_best,
    read_stats,
    refuse_other_data,
    refuse_other_run,
    save_config,
)
from em_training.config import is_complete
from em_training.latents import encode_latents
from em_training.sources import read_starts, write_starts
from em_training.weights import hash_weights, save_model

REMEDY = "use --precision no (float32)."
ENCODING_BATCH = 8


def train_lora(config: LoRAConfig) -> Path:
    """Tune the base of `config` and save its averaged adapters as a pipeline.

    Writes config.json, prompts/, latents/, pipeline/ (load it with
    `EMLoRAPipeline.from_pretrained`) and run.json. The same call resumes the run, to the bit on the
    same CPU; a finished run stays as it is. Start it with torchrun or `accelerate launch` to
    use several processes.

    Returns:
        The run's folder, `config.out`.

    Raises:
        ValueError: If the folder holds a run of another configuration or base, another process is
            training in it, the base cannot be loaded, peft is not installed, or several processes
            do not share the folder or have other tiles.
        TrainingInterrupted: After saving, if the run was asked to stop.
    """
    out = Path(config.out)
    import_peft()
    accelerator = create_accelerator(out, config.precision)
    with lock_run(out, accelerator):
        train_and_save(config, accelerator, out)
    return out


def train_and_save(config, accelerator, out):
    """Train and save in a folder that this process has locked."""
    config = replace(config, precision=accelerator.mixed_precision)
    check_same_config(config, accelerator)
    with fail_together(accelerator):
        check_batch_size(config, accelerator.num_processes)
        check_metrics(config.training.evaluation_metrics, in_training=True)
        refuse_other_run(out, config)
    # the data first: a mistake in them shows before gigabytes are fetched
    data = fill_cache(
        accelerator, lambda: load_data(config.data, config.tiles, log=accelerator.print)
    )
    base = fill_cache(accelerator, lambda: open_fitting_base(config, out))
    accelerator.print(base.source.describe())
    classes = {"classes": list(data.train.class_names)} if config.is_conditional else {}
    identity = data.identity | classes
    check_same_tiles(identity, accelerator)
    with fail_together(accelerator):
        texts = make_texts(config, data.train.class_names)
        if accelerator.is_main_process:
            say_what_to_know(config, base, data, accelerator.print)
            refuse_other_data(out, identity)
            record_base(base, out)
            save_config(config, out / "config.json")
    if ask_main_process(accelerator, lambda: is_complete(out, config)):
        accelerator.print(f"The run in {out} is already complete.")
        return
    prompts = fill_cache(
        accelerator, lambda: encode_prompts(base, texts, out / "prompts", accelerator.print)
    )
    vae = base.load_vae()
    latents, held_out_latents, seconds = encode_both_sides(
        config, base, vae, data, accelerator, out
    )
    path, train_seconds = train_adapters(
        config,
        base,
        latents,
        held_out_latents,
        prompts,
        vae,
        accelerator=accelerator,
        out_dir=out,
        held_out=data.held_out,
    )
    seconds_by_stage = {"latents": seconds, STAGE: train_seconds}
    with fail_together(accelerator):
        if accelerator.is_main_process:
            save_run(config, base, data, prompts, vae, path, seconds_by_stage)


def check_batch_size(config, num_processes: int) -> None:
    """Raise `ValueError` if the processes do not divide the batch."""
    batch_size = config.training.batch_size
    if batch_size % num_processes:
        raise ValueError(
            f"training.batch_size is {batch_size}, but must be a multiple of the {num_processes} "
            "processes. Use --training.batch-size."
        )


def open_fitting_base(config, out: Path) -> Base:
    """Find the base, at the commit that a run in `out` began with.

    Raises `ValueError` if it cannot draw images of a tile's size, or lacks a target of adapters.
    """
    started = read_starts(out).get("base", {})
    base = open_base(find_base(config.base, started.get("commit")))
    resolution, factor = config.tiles.resolution, base.factor
    if resolution % factor:
        raise ValueError(
            f"tiles.resolution is {resolution}, but must be a multiple of {factor} for this base. "
            "Use --tiles.resolution."
        )
    if config.lora.targets:  # before anything is encoded
        find_layers(base.outline_denoiser(), config.lora.targets)
    return base


def say_what_to_know(config, base: Base, data, say) -> None:
    """Say what is not used, what will be repeated often, and what does not suit a training."""
    warn_if_few(data.summary, len(data.train), config.training.num_images, say)
    warn_of_tile_size(data.train.cut, config.tiles.downsample, config.data, say)
    if (names := data.train.class_names) and not config.is_conditional:
        say(
            f"The micrographs have the classes {', '.join(names)}, which are not used. Put {CLASS} "
            "into --prompt to draw images of a class."
        )
    if base.is_distilled:
        say(
            f"Warning: {config.base} is distilled for few steps, which a training undoes. Use the "
            "model that it was distilled from."
        )


def record_base(base: Base, out: Path) -> None:
    """Write what the run starts from; refuse a base that has changed since the start."""
    identity, started = base.source.identify(), read_starts(out).get("base")
    if started is None:
        facts = {"use": "tuned by LoRA", "class": base.model.title, **identity}
        write_starts(out, base.source.name, {"base": facts})
    elif started | identity != started:
        raise ValueError(
            f"{base.source.name} is not the model that the run in {out} began with: it has "
            "other weights. Restore it, or train in another folder with --out."
        )


def encode_both_sides(config, base: Base, vae, data, accelerator, out):
    """Encode the training views and the validation views, or read their latents.

    Returns both as `Latents` in the denoiser's scale, and the seconds of encoding.
    """
    vae.to(accelerator.device)
    num_views = data.held_out.num_views
    count = min(config.training.num_validation_images, num_views)
    sides = {
        "train": (data.train, np.arange(data.train.num_views)),
        "held_out": (data.held_out, np.linspace(0, num_views - 1, count).astype(np.int64)),
    }
    latents, total = [], 0.0
    for name, (tiles, view_ids) in sides.items():
        array, seconds = encode_latents(
            partial(base.encode, vae),
            tiles,
            out / "latents",
            weights=hash_weights(vae),
            remedy=REMEDY,
            accelerator=accelerator,
            batch_size=ENCODING_BATCH,
            name=name,
            view_ids=view_ids,
        )
        classes = (tiles.class_names, tiles.class_labels(view_ids)) if config.is_conditional else ()
        latents.append(Latents(array, *base.find_scale(vae), *classes))
        total += seconds
    return *latents, total


def save_run(config, base: Base, data, prompts, vae, path, seconds_by_stage):
    """Save the pipeline and run.json; the best adapters if the run has measured distances."""
    out, training = Path(config.out), config.training
    best = read_best(out / STAGE) if training.evaluate_every else None
    if best:
        path = out / STAGE / "best" / "adapters"
    adapters = EMAdapters.from_pretrained(path).eval()
    measured = [
        line["colourfulness"] for line in read_stats(out / STAGE) if "colourfulness" in line
    ]
    adapters.register_to_config(colourfulness=measured[-1] if measured else None)
    names = dict(enumerate(data.train.class_names)) if config.is_conditional else None
    pipeline = EMLoRAPipeline(
        adapters,
        prompts,
        base.load_scheduler(),
        adapters.merge_into(base.load_denoiser()),
        vae.cpu(),
        resolution=config.tiles.resolution,
        pixel_size_nm=data.summary.get("pixel_size_nm"),
        default_num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        id2label=names,
    )
    save_model(pipeline, out / "pipeline")
    run = {
        "name": out.name,
        "family": base.source.kind,
        **describe_preset(out),
        "train_seconds": sum(seconds_by_stage.values()),
        "train_seconds_by_stage": seconds_by_stage,
        "num_images_seen": -(-training.num_images // training.batch_size) * training.batch_size,
        "adapter_weights": {"of": "the best checkpoint", **best}
        if best
        else {"of": "the last step"},
        "started_from": read_starts(out),
        "config": asdict(config),
        "data": data.summary,
    }
    write_atomically(out / "run.json", json.dumps(run, indent=2) + "\n")
