"""Train a model of the package and put it there, in half precision, with card, log and report.

    python experiments/pretrained/recipe.py em-ldm-64
    python experiments/pretrained/recipe.py em-stylegan2-64
    python experiments/pretrained/recipe.py em-ldm-64 --run FOLDER     (a finished run)

Trains on embedded micrographs of another seed than the demo's, chooses the guidance of an LDM,
exports the weights into em_pretrained/NAME, and judges the exported model with its own held-out
micrographs. results/NAME gets report.json, images.png and the curves of the training. The same
command goes on where it was stopped.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import em_diffusion
import em_pretrained
import em_stylegan
from em_data.files import write_atomically
from em_diffusion.choose_guidance import GuidanceConfig, choose_guidance
from em_generation.evaluate import EvaluationConfig, evaluate_runs
from em_generation.loading import read_model
from em_hub.export import export_model, write_card
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.transfer import load_run_networks
from em_training.cli import run_command

DATA, MICROGRAPH_SEED, NUM_MICROGRAPHS = "synthetic", 1000, 300  # the demo has those of seed 0
STYLEGAN2_IMAGES = 168_000
LICENSE = "apache-2.0"


def make_ldm(preset="demo") -> em_diffusion.LDMConfig:
    """The demo's networks, trained four times as long."""
    config = em_diffusion.PRESETS[preset]()
    if preset == "test":
        return config
    return replace(
        config,
        autoencoder=replace(config.autoencoder, num_images=20_000),
        denoiser=replace(
            config.denoiser,
            num_images=256_000,
            guide_images=32_000,
            ema_half_life_images=8_000,
            warmup_images=4_000,
            log_every=5_000,
            validate_every=20_000,
            sample_every=64_000,
            checkpoint_every=32_000,
        ),
    )


def make_stylegan2(preset="demo") -> em_stylegan.StyleGANConfig:
    """The demo's networks with twice the feature maps, trained longer."""
    config = em_stylegan.PRESETS[preset]()
    if preset == "test":
        return config
    return replace(
        config,
        generator=replace(config.generator, max_channels=128),
        discriminator=replace(config.discriminator, max_channels=128),
        training=replace(
            config.training,
            num_images=STYLEGAN2_IMAGES,
            ema_half_life_images=3_000,
            log_every=1_600,
            sample_every=20_000,
            checkpoint_every=10_000,
        ),
    )


def train(name: str, arguments) -> Path:
    """Train the model of this name and return the run's folder."""
    make, train = {
        "em-ldm-64": (make_ldm, em_diffusion.train_ldm),
        "em-stylegan2-64": (make_stylegan2, em_stylegan.train_gan),
    }[name]
    config = make(arguments.preset)
    tiles = {"seed": MICROGRAPH_SEED, "cache_dir": arguments.cache_dir}
    if arguments.preset != "test":
        tiles |= {"num_micrographs": NUM_MICROGRAPHS, "held_out_fraction": 0.1}
    return train(
        replace(
            config,
            data=DATA,
            out=str(Path(arguments.runs) / name),
            tiles=replace(config.tiles, **tiles),
        )
    )


def export(run: Path, name: str, arguments) -> Path:
    """Write the run into the package, and a StyleGAN's last discriminator beside its generator."""
    parts = {}
    if read_model(str(run)).family.name == "stylegan":
        found, _ = load_run_networks(run, StyleGAN2Generator)
        parts = {"discriminator": found["discriminator"]}
    return export_model(str(run), Path(arguments.box) / name, LICENSE, parts=parts)


def judge(folder: Path, name: str, run: Path, arguments) -> Path:
    """Measure the exported model, write its card and the results; return their folder."""
    out = Path(arguments.runs) / f"{name}-report"
    page = evaluate_runs(
        EvaluationConfig(
            models=(f"{name}={folder}",),
            out=str(out),
            num_images=arguments.num_images,
            microscopy=arguments.preset != "test",
            memorisation=arguments.preset != "test",
            cache_dir=arguments.cache_dir,
        )
    )
    report = Path(page).parent / "report.json"
    write_card(folder, LICENSE, report)
    results = Path(arguments.results) / name
    results.mkdir(parents=True, exist_ok=True)
    shutil.copy(report, results / "report.json")
    shutil.copy(folder / "samples.png", results / "images.png")
    for stage in read_model(str(run)).family.stages:
        log = run / stage / "stats.jsonl"
        if log.is_file():
            write_atomically(results / f"{stage}.jsonl", log.read_text())
    if (run / "guidance.json").is_file():
        shutil.copy(run / "guidance.json", results / "guidance.json")
        shutil.copy(run / "guidance.png", results / "guidance.png")
    return results


def make_model(arguments) -> Path:
    """Do all steps; return the folder in the package."""
    name = arguments.name
    run = Path(arguments.run) if arguments.run else train(name, arguments)
    if (run / "denoiser" / "guide").is_dir() and not (run / "guidance.json").is_file():
        choose_guidance(
            GuidanceConfig(str(run), num_images=arguments.num_images, cache_dir=arguments.cache_dir)
        )
    folder = export(run, name, arguments)
    results = judge(folder, name, run, arguments)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    print(f"{folder} holds {name}, {size:.1f} MB; its report and curves are in {results}")
    return folder


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=em_pretrained.NAMES)
    parser.add_argument("--run", help="a finished run to export instead of training one")
    parser.add_argument("--preset", choices=("demo", "test"), default="demo")
    parser.add_argument("--num-images", type=int, default=1000, help="of each measured set")
    parser.add_argument("--runs", default="runs/pretrained")
    parser.add_argument("--results", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--box", default=str(em_pretrained.FOLDER), help="folder to export to")
    parser.add_argument("--cache-dir", help="of the tiles")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: make_model(parse_arguments()))
