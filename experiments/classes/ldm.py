"""Measure what classes cost a latent diffusion model that is called without them.

    python experiments/classes/ldm.py [--runs runs/classes] [--num-images 1000]

Trains two models on `synthetic-materials`, both from em-ldm-64 and alike but for `--conditional`.
Compares images of both, drawn without a class, with held-out tiles, and draws images of each class
beside held-out tiles of it.

Writes results/ldm.json (distances and their difference, with intervals) and results/ldm.png, and
resumes where it stopped.
"""

import argparse
import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch

from em_data import load_data, to_uint8
from em_data.files import write_atomically
from em_data.images import encode_png
from em_diffusion import EMLatentDiffusionPipeline
from em_diffusion.presets import demo
from em_diffusion.train import train_ldm
from em_generation.evaluate import EvaluationConfig, evaluate_runs
from em_training import make_image_rng
from em_training.cli import run_command

KINDS = ("conditional", "unconditional")
RESULTS = Path(__file__).parent / "results"
SHOWN = 8  # images of a class


def make_config(kind, arguments):
    """Return the demo's configuration from em-ldm-64, with classes or without."""
    config = demo()
    denoiser = replace(
        config.denoiser, num_images=arguments.train_images, guide_images=arguments.train_images // 8
    )
    return replace(
        config,
        data="synthetic-materials",
        out=str(Path(arguments.runs) / kind),
        init_from="em-ldm-64",
        conditional=kind == "conditional",
        tiles=replace(config.tiles, cache_dir=arguments.cache_dir),
        denoiser=denoiser,
    )


def compare(runs, arguments) -> dict:
    """Evaluate both models without a class; return distances and the difference of the two."""
    out = Path(arguments.runs) / "without-class"
    config = EvaluationConfig(
        models=tuple(f"{kind}={runs[kind]}" for kind in KINDS),
        out=str(out),
        num_images=arguments.num_images,
        levels=("real",),
        microscopy=False,
        memorisation=False,
        cache_dir=arguments.cache_dir,
    )
    evaluate_runs(config)
    report = json.loads((out / "report.json").read_text())
    rows = report["measurements"][0]["rows"]
    names = ("frechet_distance", "precision", "recall")
    (difference,) = (
        each["difference"]
        for each in report["comparisons"]
        if (each["first"], each["second"]) in (KINDS, KINDS[::-1])
    )
    return {
        "held_out": {
            key: {name: row["held_out"][name] for name in names if name in row["held_out"]}
            for key, row in rows.items()
        },
        "difference": difference,
        "extractor": report["measurements"][0]["extractor"],
    }


def draw_grid(run, config, path):
    """Draw a row of generated images of each class, and below it one of held-out tiles."""
    data = load_data(config.data, config.tiles, log=lambda line: None)
    pipe = EMLatentDiffusionPipeline.from_pretrained(Path(run) / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    rows, titles = [], []
    all_views = np.arange(data.held_out.num_views)
    classes = data.held_out.class_labels(all_views)
    for name, number in pipe.labels.items():
        rngs = [make_image_rng(0, i) for i in range(SHOWN)]
        rows.append(pipe(generator=rngs, class_labels=[name] * SHOWN, output_type="pt").images)
        views = all_views[np.asarray(classes == number)]
        spaced = np.linspace(0, len(views) - 1, SHOWN).astype(int)
        rows.append(torch.as_tensor(data.held_out.batch(views[spaced])) / 2 + 0.5)
        titles += [f"{name}, generated", f"{name}, held out"]
    enlarged = [row.repeat_interleave(2, -1).repeat_interleave(2, -2) for row in rows]
    side, gap, head = enlarged[0].shape[-1], 4, 24
    page = PIL.Image.new("L", (SHOWN * (side + gap) - gap, len(rows) * (side + head)), 255)
    pen, font = PIL.ImageDraw.Draw(page), PIL.ImageFont.load_default(size=16)
    for i, (row, title) in enumerate(zip(enlarged, titles, strict=True)):
        pen.text((2, i * (side + head) + 2), title, fill=0, font=font)
        for j, levels in enumerate(to_uint8(row * 2 - 1)[:, 0]):
            page.paste(PIL.Image.fromarray(levels), (j * (side + gap), i * (side + head) + head))
    write_atomically(path, encode_png(np.asarray(page)))


def run():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", default="runs/classes", help="folder of the trainings (default: %(default)s)")
    add("--train-images", type=int, default=64_000, help="of each training")
    add("--num-images", type=int, default=1000, help="of each set")
    add("--hardware", default="2 cores of a server CPU", help="as it is recorded")
    add("--cache-dir", help="folder of the cut tiles")
    arguments = parser.parse_args()
    configs = {kind: make_config(kind, arguments) for kind in KINDS}
    RESULTS.mkdir(exist_ok=True)
    runs = {"conditional": train_ldm(configs["conditional"])}
    draw_grid(runs["conditional"], configs["conditional"], RESULTS / "ldm.png")
    runs["unconditional"] = train_ldm(configs["unconditional"])
    result = compare(runs, arguments) | {
        "command": f"python experiments/classes/ldm.py --train-images {arguments.train_images} "
        f"--num-images {arguments.num_images}",
        "hardware": arguments.hardware,
        "date": date.today().isoformat(),
        "num_images": arguments.num_images,
        "train_images": arguments.train_images,
        "train_seconds": {
            kind: json.loads((each / "run.json").read_text())["train_seconds"]
            for kind, each in runs.items()
        },
    }
    write_atomically(RESULTS / "ldm.json", json.dumps(result, indent=1) + "\n")
    print(f"{RESULTS}/ldm.json and ldm.png")


if __name__ == "__main__":
    run_command(run)
