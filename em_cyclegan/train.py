"""A translation run from two sources of micrographs to a saved pipeline."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from em_cyclegan.config import SAME_PIXEL_SIZE, CycleGANConfig
from em_cyclegan.networks import Translators
from em_cyclegan.pipeline_em_translation import EMTranslationPipeline
from em_cyclegan.translation_loop import (
    STAGE,
    Domains,
    check_batch_size,
    train_translation,
)
from em_data import load_data, warn_if_few
from em_data.files import replace_folder, write_atomically
from em_training import (
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

KINDS = {"cycle": "cyclegan", "contrastive": "cut"}  # training.method -> kind of model


def train_cyclegan(config: CycleGANConfig) -> Path:
    """Train the translation of `config` and save its averaged generators as a pipeline.

    Writes config.json, pipeline/ (load it with `EMTranslationPipeline.from_pretrained`) and
    run.json. The same call resumes the run, to the bit on the same CPU; a finished run stays
    as it is. Start it with torchrun or `accelerate launch` to use several processes.

    Returns:
        The run's folder, `config.out`.

    Raises:
        ValueError: If the folder holds a run of another configuration, another process is training
            in it, source and target are the same, or several processes do not share the folder or
            have other tiles.
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
        refuse_other_run(out, config)
    source, target = fill_cache(accelerator, lambda: load_sources(config, accelerator.print))
    identity = {"source": source.identity, "target": target.identity}
    check_same_tiles(identity, accelerator)
    with fail_together(accelerator):
        check_sources(source.summary, target.summary, accelerator.print)
        for data in (source, target):
            views = len(data.train)
            warn_if_few(data.summary, views, config.training.num_images, accelerator.print)
        if accelerator.is_main_process:
            refuse_other_data(out, identity)
            save_config(config, out / "config.json")
    if ask_main_process(accelerator, lambda: is_finished(config, out)):
        accelerator.print(f"The run in {out} is already complete.")
        return
    path, train_seconds = train_translation(
        config,
        Domains(source.train, target.train),
        accelerator=accelerator,
        out_dir=out,
        held_out=Domains(source.held_out, target.held_out),
    )
    with fail_together(accelerator):
        if accelerator.is_main_process:
            save_run(config, source, target, path, train_seconds, out)


def load_sources(config, say):
    """Return the data of the source and of the target."""
    say("Source:")
    source = load_data(config.source, config.tiles_of_source, log=say)
    say("Target:")
    return source, load_data(config.data, config.tiles, log=say)


def check_sources(source: dict, target: dict, say) -> None:
    """Refuse a source that is the target; say where their pixel sizes differ.

    Args:
        source, target: `Data.summary` of both.
    """
    if source["fingerprint"] == target["fingerprint"]:
        raise ValueError(
            f"Source and target are the same tiles ({source['name']}), so there is nothing to "
            "translate. Give another target with --data."
        )
    sizes = [each["pixel_size_nm"] for each in (source, target) if each.get("pixel_size_nm")]
    if len(sizes) < 2:
        say(
            "The pixel size of the source or of the target is unknown. Structures should have the "
            "same size in pixels in both: a translation does not change sizes. Use "
            "--tiles.downsample and --source-tiles.downsample."
        )
    elif abs(sizes[0] - sizes[1]) > SAME_PIXEL_SIZE * min(sizes):
        say(
            f"Warning: a pixel of the source is {sizes[0]:.3g} nm, one of the target "
            f"{sizes[1]:.3g} nm. A translation does not change sizes. Bring them together with "
            "--tiles.downsample and --source-tiles.downsample."
        )


def is_finished(config, out) -> bool:
    """Return True if the run in `out` has seen all images and has saved its pipeline."""
    if not (out / "pipeline" / "model_index.json").is_file():
        return False
    try:
        run = json.loads((out / "run.json").read_text())
        return run["num_images_seen"] >= config.training.num_images
    except (OSError, ValueError, KeyError, TypeError):  # absent or damaged: written again
        return False


def save_run(config, source, target, path, train_seconds, out):
    """Save the pipeline and run.json; the best generators if the run has measured distances."""
    training = config.training
    best = read_best(out / STAGE) if training.evaluate_every else None
    if best:
        path = out / STAGE / "best" / "generators"
        lines = [
            line for line in read_stats(out / STAGE) if "untranslated_frechet_distance" in line
        ]
        if lines:
            best["untranslated_frechet_distance"] = lines[-1]["untranslated_frechet_distance"]
    # images keep the pixels of the source
    size = source.summary.get("pixel_size_nm") or target.summary.get("pixel_size_nm")
    save_pipeline(make_pipeline(Translators.from_pretrained(path), size), out / "pipeline")
    run = {
        "name": out.name,
        "family": KINDS[training.method],
        **describe_preset(out),
        "train_seconds": train_seconds,
        "train_seconds_by_stage": {STAGE: train_seconds},
        "num_images_seen": -(-training.num_images // training.batch_size) * training.batch_size,
        "generator_weights": {"of": "the best checkpoint", **best}
        if best
        else {"of": "the last step"},
        "config": asdict(config),
        "data": target.summary,
        "source_data": source.summary,
    }
    write_atomically(out / "run.json", json.dumps(run, indent=2) + "\n")


def make_pipeline(models: Translators, pixel_size_nm: float | None) -> EMTranslationPipeline:
    """Return the pipeline of generators."""
    parts = {f"generator_{direction}": model.eval() for direction, model in models.items()}
    return EMTranslationPipeline(**parts, pixel_size_nm=pixel_size_nm)


def save_pipeline(pipeline, path):
    """Save a pipeline in place of what `path` held."""
    with replace_folder(path) as folder:
        pipeline.save_pretrained(folder)
