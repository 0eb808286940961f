"""A StyleGAN run from micrographs to a saved pipeline."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from em_data import load_data, warn_if_few
from em_data.files import replace_folder, write_atomically
from em_data.look.tile_size import warn_of_tile_size
from em_stylegan.config import StyleGANConfig
from em_stylegan.gan_loop import check_batch_size, train_stylegan
from em_stylegan.grain import read_tiles, set_grain_of_tiles
from em_stylegan.networks import create_networks, fill_scale, measure_scale
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_stylegan.transfer import adopt_scale, start_from
from em_training import (
    create_accelerator,
    describe_preset,
    load_config,
    lock_folder,
    read_best,
    refuse_other_data,
    refuse_other_run,
    save_config,
)
from em_training.sources import read_starts


def train_gan(config: StyleGANConfig) -> Path:
    """Train the StyleGAN of `config` and save its averaged generator as a pipeline.

    Writes config.json, pipeline/ (load it with `EMStyleGANPipeline.from_pretrained`), run.json and,
    with `save_untrained`, the pipeline of the first weights: untrained/ for random ones, start/ for
    those of `init_from`. The same call resumes the run, to the bit on the same hardware; a finished
    run stays as it is. Start it with torchrun or `accelerate launch` to use several processes.

    Returns:
        The run's folder, `config.out`.

    Raises:
        ValueError: If the folder holds a run of another configuration, or another process is
            training in it.
        TrainingInterrupted: After saving, if the run was asked to stop.
    """
    out = Path(config.out)
    accelerator = create_accelerator(out, config.precision)
    with lock_folder(out, is_main_process=accelerator.is_main_process):
        train_and_save(config, accelerator, out)
    return out


def train_and_save(config, accelerator, out):
    """Train and save in a folder that this process has locked."""
    check_batch_size(config, accelerator)
    config = replace(config, precision=accelerator.mixed_precision)
    check_same_run(config, out)
    with accelerator.main_process_first():  # the first process cuts the tiles, the others find them
        data = load_data(config.data, config.tiles, log=accelerator.print)
    accelerator.wait_for_everyone()
    config = settle_scale(config, data.train, out)
    warn_if_few(data.summary, len(data.train), config.training.num_images, accelerator.print)
    if accelerator.is_main_process:
        warn_of_tile_size(data.train.cut, config.tiles.downsample, config.data, accelerator.print)
        refuse_other_data(out, data.identity)
        save_config(config, out / "config.json")
        if config.save_untrained:
            save_untrained(config, data, accelerator, out)
    if is_finished(config, out):
        accelerator.print(f"The run in {out} is already complete.")
    else:
        path, train_seconds = train_stylegan(
            config, data.train, accelerator=accelerator, out_dir=out, held_out=data.held_out
        )
        if accelerator.is_main_process:
            save_run(config, data, path, train_seconds, out)
        accelerator.wait_for_everyone()


def settle_scale(config, tiles, out):
    """Return `config` with the scale that the run began with, its start's, or a measured one."""
    if (out / "config.json").is_file():
        config = fill_scale(config, load_config(StyleGANConfig, out / "config.json").generator)
    elif config.init_from is not None:
        config = adopt_scale(config)
    if None in (config.generator.image_mean, config.generator.image_std):
        config = measure_scale(config, read_tiles(tiles))
    return config


def is_finished(config, out) -> bool:
    """Return True if the run in `out` has seen all images and has saved its pipeline."""
    if not (out / "pipeline" / "model_index.json").is_file():
        return False
    try:
        run = json.loads((out / "run.json").read_text())
        return run["num_images_seen"] >= config.training.num_images
    except (OSError, ValueError, KeyError, TypeError):  # absent or damaged: written again
        return False


def save_untrained(config, data, accelerator, out):
    """Save the pipeline of the first weights, once."""
    folder = out / ("untrained" if config.init_from is None else "start")
    if (folder / "model_index.json").is_file():
        return
    model, discriminator = create_networks(config)
    if config.init_from is not None:
        start_from(config, model, discriminator, model, accelerator.print)
    set_grain_of_tiles(model, data.train)
    save_pipeline(EMStyleGANPipeline(model.eval(), data.summary.get("pixel_size_nm")), folder)


def save_run(config, data, path, train_seconds, out):
    """Save the pipeline and run.json; the best generator if the run has measured distances."""
    best = read_best(out / "stylegan") if config.training.evaluate_every else None
    if best:
        path = out / "stylegan" / "best" / "generator"
    model = type(create_networks(config)[0]).from_pretrained(path).eval()
    pixel_size_nm = data.summary.get("pixel_size_nm")
    save_pipeline(EMStyleGANPipeline(model, pixel_size_nm), out / "pipeline")
    training = config.training
    run = {
        "name": out.name,
        "family": config.generator.architecture,
        **describe_preset(out),
        "train_seconds": train_seconds,
        "train_seconds_by_stage": {"stylegan": train_seconds},
        "num_images_seen": -(-training.num_images // training.batch_size) * training.batch_size,
        "generator_weights": {"of": "the best checkpoint", **best}
        if best
        else {"of": "the last step"},
        **({"started_from": started} if (started := read_starts(out)) else {}),
        "config": asdict(config),
        "data": data.summary,
    }
    write_atomically(out / "run.json", json.dumps(run, indent=2) + "\n")


def save_pipeline(pipeline, path):
    """Save a pipeline in place of what `path` held."""
    with replace_folder(path) as folder:
        pipeline.save_pretrained(folder)


def check_same_run(config, out):
    """Refuse to mix two configurations in one folder; a run may be made longer."""
    refuse_other_run(
        out, config, lambda name, old, new: name == "training.num_images" and new > old
    )
