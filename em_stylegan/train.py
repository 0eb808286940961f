"""A StyleGAN run from micrographs to a saved pipeline."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from em_data import load_data, warn_if_few
from em_data.files import write_atomically
from em_stylegan.config import StyleGANConfig
from em_stylegan.loop import check_batch_size, create_networks, train_stylegan
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_stylegan.transfer import start_from
from em_training import (
    create_accelerator,
    lock_folder,
    read_best,
    refuse_other_data,
    refuse_other_run,
    save_config,
)


def train_gan(config: StyleGANConfig) -> Path:
    """Train the StyleGAN of `config` and save its averaged generator as a pipeline; return `config.out`.

    Writes config.json, pipeline/ (load it with `EMStyleGANPipeline.from_pretrained`), run.json and, with `save_untrained`,
    the pipeline of the first weights into the run's folder: untrained/ for random ones, start/ for those of `init_from`. The same
    call on the same folder goes on where it stopped, to the bit on the same hardware. Several processes share the work when they
    are started by torchrun or `accelerate launch`.

    Raises `ValueError` when the folder holds a run of another configuration or another training is at work in it, and
    `TrainingInterrupted` after saving when asked to stop.
    """
    out = Path(config.out)
    accelerator = create_accelerator(out, config.precision)
    with lock_folder(out, is_main_process=accelerator.is_main_process):
        train_and_save(config, accelerator, out)
    return out


def train_and_save(config, accelerator, out):
    """What `train_gan` does, in a folder that nothing else trains in."""
    check_batch_size(config, accelerator)
    config = replace(config, precision=accelerator.mixed_precision)
    check_same_run(config, out)
    with accelerator.main_process_first():  # the first to come cuts the tiles, others find them
        data = load_data(config.data, config.tiles, log=accelerator.print)
    accelerator.wait_for_everyone()
    warn_if_few(data.summary, len(data.train), config.training.num_images, accelerator.print)
    pixel_size_nm = data.summary.get("pixel_size_nm")
    if accelerator.is_main_process:
        refuse_other_data(out, data.identity)
        save_config(config, out / "config.json")
        if config.save_untrained:
            generator, discriminator = create_networks(config)
            folder = out / ("untrained" if config.init_from is None else "start")
            if config.init_from is not None:
                start_from(config, generator, discriminator, generator, accelerator.print)
            EMStyleGANPipeline(generator.eval(), pixel_size_nm=pixel_size_nm).save_pretrained(
                folder
            )

    generator, num_images_seen, train_seconds = train_stylegan(
        config, data.train, accelerator=accelerator, out_dir=out, held_out=data.held_out
    )
    if accelerator.is_main_process:
        best = read_best(out / "stylegan") if config.training.evaluate_every else None
        if best:
            generator = (
                type(generator).from_pretrained(out / "stylegan" / "best" / "generator").eval()
            )
        EMStyleGANPipeline(generator, pixel_size_nm=pixel_size_nm).save_pretrained(out / "pipeline")
        run = {
            "name": out.name,
            "family": config.generator.architecture,
            "train_seconds": train_seconds,
            "train_seconds_by_stage": {"stylegan": train_seconds},
            "num_images_seen": num_images_seen,
            "generator_weights": {"of": "the best checkpoint", **best}
            if best
            else {"of": "the last step"},
            "config": asdict(config),
            "data": data.summary,
        }
        write_atomically(out / "run.json", json.dumps(run, indent=2) + "\n")
    accelerator.wait_for_everyone()


def check_same_run(config, out):
    """Refuse to mix two configurations in one folder; a run may be made longer."""
    refuse_other_run(
        out, config, lambda name, old, new: name == "training.num_images" and new > old
    )
