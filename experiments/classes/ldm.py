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

from grid import draw_grid

from em_data.files import write_atomically
from em_diffusion.presets import demo
from em_diffusion.train import train_ldm
from em_generation.evaluate import EvaluationConfig, evaluate_runs
from em_training.cli import run_command

KINDS = ("conditional", "unconditional")
RESULTS = Path(__file__).parent / "results"


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
    draw_grid(runs["conditional"], RESULTS / "ldm.png")
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
