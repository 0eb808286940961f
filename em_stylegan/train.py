"""A StyleGAN run from micrographs to a saved pipeline."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from em_data import load_data, warn_if_few
from em_data.files import replace_folder, write_atomically
from em_data.look.tile_size import warn_of_tile_size
from em_stylegan.config import StyleGANConfig
from em_stylegan.gan_loop import check_batch_size, train_stylegan
from em_stylegan.grain import read_tiles, set_grain_of_tiles
from em_stylegan.networks import count_classes, create_networks, fill_scale, measure_scale
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_stylegan.transfer import adopt_scale, start_from
from em_training import (
    ask_main_process,
    check_same_config,
    check_same_tiles,
    create_accelerator,
    describe_preset,
    fail_together,
    fill_cache,
    load_config,
    lock_run,
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
            training in it, or if several processes do not share it or have other tiles.
        TrainingInterrupted: After saving, if the run was asked to stop.
    """
    out = Path(config.out)
    accelerator = create_accelerator(out, config.precision)
    with lock_run(out, accelerator):
        train_and_save(config, accelerator, out)
    return out


def train_and_save(config, accelerator, out):
    """Train and save in a folder that this process has locked."""
    config = replace(config, precision=accelerator.mixed_precision)
    check_same_config(config, accelerator)
    with fail_together(accelerator):
        check_batch_size(config, accelerator)
        check_same_run(config, out)
    data = fill_cache(
        accelerator, lambda: load_data(config.data, config.tiles, log=accelerator.print)
    )
    check_same_tiles(data.identity, accelerator)
    with fail_together(accelerator):
        check_classes(config, data, accelerator.print)
    config = ask_main_process(accelerator, partial(settle_scale, config, data.train, out))
    warn_if_few(data.summary, len(data.train), config.training.num_images, accelerator.print)
    with fail_together(accelerator):
        if accelerator.is_main_process:
            begin_run(config, data, accelerator, out)
    if ask_main_process(accelerator, lambda: is_finished(config, out)):
        accelerator.print(f"The run in {out} is already complete.")
    else:
        path, train_seconds = train_stylegan(
            config, data.train, accelerator=accelerator, out_dir=out, held_out=data.held_out
        )
        with fail_together(accelerator):
            if accelerator.is_main_process:
                save_run(config, data, path, train_seconds, out)


def begin_run(config, data, accelerator, out):
    """Record what a new run begins with; refuse one that began with other data."""
    warn_of_tile_size(data.train.cut, config.tiles.downsample, config.data, accelerator.print)
    refuse_other_data(out, data.identity)
    save_config(config, out / "config.json")
    if config.save_untrained:
        save_untrained(config, data, accelerator, out)


def check_classes(config, data, say=print):
    """Say if classes are not used; raise `ValueError` if the run needs some that are missing."""
    names = data.train.class_names
    if not config.conditional:
        if names:
            say(
                f"the micrographs have {len(names)} classes ({', '.join(names)}), which this run "
                "does not use. Use --conditional to draw images of a class."
            )
        return
    if len(names) < 2:
        found = f"all micrographs are of the class {names[0]}" if names else "there are no classes"
        raise ValueError(f"conditional is True, but {found}. Leave --conditional out.")
    numbers = data.train.class_labels(range(data.train.num_views))
    counts = torch.bincount(numbers + 1, minlength=len(names) + 1).tolist()
    if counts[0]:
        facts = [data.train.cut.micrographs[i] for i in data.train.micrograph_ids]
        unknown = [each["name"] for each in facts if each["class_name"] is None]
        raise ValueError(
            f"conditional is True, but {len(unknown)} micrographs have no class, such as "
            f"{unknown[0]}. A conditional StyleGAN needs the class of each. Name it, or leave the "
            "micrographs out."
        )
    if missing := [name for name, count in zip(names, counts[1:], strict=True) if count == 0]:
        raise ValueError(
            f"conditional is True, but no micrograph of {', '.join(missing)} is on the training "
            "side of the split. Add some, or choose another split with --tiles.seed."
        )


def name_classes(config, data):
    """Return {number: name} of the classes that the run trains with; None if it has none."""
    return dict(enumerate(data.train.class_names)) if config.conditional else None


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
    model, discriminator = create_networks(config, count_classes(config, data.train))
    if config.init_from is not None:
        start_from(config, model, discriminator, model, accelerator.print)
    set_grain_of_tiles(model, data.train)
    pixel_size_nm, names = data.summary.get("pixel_size_nm"), name_classes(config, data)
    save_pipeline(EMStyleGANPipeline(model.eval(), pixel_size_nm, names), folder)


def save_run(config, data, path, train_seconds, out):
    """Save the pipeline and run.json; the best generator if the run has measured distances."""
    best = read_best(out / "stylegan") if config.training.evaluate_every else None
    if best:
        path = out / "stylegan" / "best" / "generator"
    model = type(create_networks(config)[0]).from_pretrained(path).eval()
    pixel_size_nm = data.summary.get("pixel_size_nm")
    names = name_classes(config, data)
    save_pipeline(EMStyleGANPipeline(model, pixel_size_nm, names), out / "pipeline")
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
