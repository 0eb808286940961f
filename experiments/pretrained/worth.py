"""Measure what a start from a model of the package is worth on a folder of micrographs.

    python experiments/pretrained/worth.py FOLDER --name NAME --flags "--tiles.downsample 4"
    python experiments/pretrained/worth.py FOLDER --model em-stylegan2-64 --name NAME

Trains from scratch and from the model, with several seeds, and measures the distance to held-out
tiles during each training. Writes results/NAME.json and results/NAME.png: distance against minutes.
The arms of an LDM are

- scratch: everything is trained,
- autoencoder: the model's autoencoder is used unchanged, the denoiser is trained,
- both: the model's denoiser is trained further, its autoencoder is used unchanged,
- decoder: the same, and the decoder is trained further, too.

The arms of a StyleGAN are scratch and both. Minutes count training alone: the time of an image is
the median between two lines of the log without a measurement in between. The encoding of latents
counts. The same command goes on where it was stopped.
"""

import argparse
import itertools
import json
import shlex
import statistics
from pathlib import Path

import em_diffusion
import em_stylegan
from em_data.files import write_atomically
from em_evaluation.environment import describe_environment
from em_training import read_stats
from em_training.cli import run_command
from em_training.flags import parse_preset

FAMILIES = {
    "ldm": (em_diffusion.PRESETS, em_diffusion.train_ldm, "denoiser"),
    "stylegan": (em_stylegan.PRESETS, em_stylegan.train_gan, "stylegan"),
}
ARMS = {
    "ldm": {
        "scratch": [],
        "autoencoder": ["--autoencoder.init-from", "{model}", "--autoencoder.num-images", "0"],
        "both": ["--init-from", "{model}", "--autoencoder.num-images", "0"],
        "decoder": ["--init-from", "{model}"],
    },
    "stylegan": {"scratch": [], "both": ["--init-from", "{model}"]},
}
DISTANCE = "held_out_frechet_distance"


def find_family(model: str) -> str:
    """Return the family of a model by its name."""
    return "stylegan" if "stylegan" in Path(model).name else "ldm"


def list_words(arm: str, seed: int, arguments) -> list[str]:
    """Return the command line of one training."""
    family = find_family(arguments.model)
    section = {"ldm": "denoiser", "stylegan": "training"}[family]
    out = Path(arguments.runs) / arguments.name / family / f"{arm}-{seed}"
    words = [arguments.preset, "--data", arguments.data, "--out", str(out), "--seed", str(seed)]
    words += [f"--{section}.evaluate-every", str(arguments.evaluate_every)]
    words += [f"--{section}.num-evaluation-images", str(arguments.num_images)]
    words += [] if arguments.cache_dir is None else ["--tiles.cache-dir", arguments.cache_dir]
    words += [word.format(model=arguments.model) for word in ARMS[family][arm]]
    return words + shlex.split(arguments.flags)


def train(arm: str, seed: int, arguments) -> Path:
    """Train one arm with one seed; a finished run is read."""
    presets, train, _ = FAMILIES[find_family(arguments.model)]
    options = {"command": "train", "default": "demo", "description": "", "main_flags": ()}
    config, _ = parse_preset(presets, list_words(arm, seed, arguments), **options)
    return train(config)


def read_curve(run: Path, stage: str) -> list[list[float]]:
    """Return [[images seen, minutes of training, distance], ...] of a run."""
    lines = read_stats(run / stage)
    seconds = json.loads((run / "run.json").read_text())["train_seconds_by_stage"]
    before = sum(value for name, value in seconds.items() if name != stage)
    each = time_image(lines)
    return [
        [line["num_images_seen"], (before + line["num_images_seen"] * each) / 60, line[DISTANCE]]
        for line in lines
        if DISTANCE in line
    ]


def time_image(lines: list[dict]) -> float:
    """Return the seconds that training takes for an image, without the measurements."""
    times = [
        (b["train_seconds"] - a["train_seconds"]) / (b["num_images_seen"] - a["num_images_seen"])
        for a, b in itertools.pairwise(lines)
        if DISTANCE not in b and b["num_images_seen"] > a["num_images_seen"]
    ]
    if not times:
        raise ValueError(
            "The log has no two lines without a measurement in between. Use a smaller log-every "
            "than --evaluate-every in --flags."
        )
    return statistics.median(times)


def summarise(curves: dict) -> dict:
    """Return for each arm its last distance and when it comes to that of the run from scratch.

    curves: {arm: {seed: curve}}. Minutes are medians over seeds; None if not all seeds get there.
    """
    last = {
        arm: statistics.median(curve[-1][2] for curve in by_seed.values())
        for arm, by_seed in curves.items()
    }
    summary = {arm: {"last_distance": value} for arm, value in last.items()}
    if "scratch" not in curves:
        return summary
    for arm, by_seed in curves.items():
        times = [find_time(curve, last["scratch"]) for curve in by_seed.values()]
        known = [time for time in times if time is not None]
        summary[arm]["minutes_to_scratch"] = (
            statistics.median(known) if len(known) == len(times) else None
        )
    minutes = statistics.median(curve[-1][1] for curve in curves["scratch"].values())
    for arm, values in summary.items():
        there = values["minutes_to_scratch"]
        if arm != "scratch":
            values["times_fewer_minutes"] = minutes / there if there else None
    return summary


def find_time(curve, distance: float) -> float | None:
    """Return the minutes at the first measurement that is no farther than `distance`."""
    return next((minutes for _, minutes, value in curve if value <= distance), None)


def draw(curves: dict, title: str, path: Path) -> None:
    """Draw distance against minutes: a thin line a seed, in a colour an arm."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (arm, by_seed) in enumerate(curves.items()):
        for i, curve in enumerate(by_seed.values()):
            axes.plot(
                [point[1] for point in curve],
                [point[2] for point in curve],
                ".-",
                color=f"C{number}",
                alpha=0.7,
                linewidth=1.2,
                label=arm if i == 0 else None,
            )
    axes.set(title=title, xlabel="minutes of training", ylabel="Frechet distance to held-out tiles")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def measure(arguments) -> dict:
    """Train all arms and seeds that are missing; write and return the content of the JSON file."""
    family = find_family(arguments.model)
    stage = FAMILIES[family][2]
    results, curves = Path(arguments.results), {}
    results.mkdir(parents=True, exist_ok=True)
    data = {}
    for seed in arguments.seeds:  # all arms of a seed first: a stopped comparison is a fair one
        for arm in arguments.arms or ARMS[family]:
            run = train(arm, seed, arguments)
            curves.setdefault(arm, {})[str(seed)] = read_curve(run, stage)
            data = json.loads((run / "run.json").read_text())["data"]
            result = {
                "model": arguments.model,
                "preset": arguments.preset,
                "flags": arguments.flags,
                "data": {
                    key: data[key]
                    for key in ("num_micrographs", "num_train_tiles", "num_held_out_tiles")
                },
                "num_images": arguments.num_images,
                "columns": ["num_images_seen", "minutes", "frechet_distance"],
                "curves": curves,
                "summary": summarise(curves),
                "environment": describe_environment(),
            }
            text = json.dumps(result, indent=1) + "\n"
            write_atomically(results / f"{arguments.name}-{family}.json", text)
            draw(curves, arguments.name, results / f"{arguments.name}-{family}.png")
    return result


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a folder of micrographs, or another source as of --data")
    parser.add_argument("--name", required=True, help="of the set, for the names of the files")
    parser.add_argument("--model", default="em-ldm-64", help="the model to start from")
    parser.add_argument("--arms", nargs="+", help="default: all of the model's family")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", default="demo", help="of the trainings")
    parser.add_argument("--flags", default="", help="more flags of the trainings, in one text")
    parser.add_argument("--evaluate-every", type=int, default=2_000, help="interval in images")
    parser.add_argument("--num-images", type=int, default=500, help="of each measurement")
    parser.add_argument("--runs", default="runs/worth")
    parser.add_argument("--results", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--cache-dir", help="of the tiles")
    arguments = parser.parse_args(argv)
    known = ARMS[find_family(arguments.model)]
    unknown = [arm for arm in arguments.arms or () if arm not in known]
    if unknown:
        raise ValueError(f"--arms is {unknown[0]}; choose some of {', '.join(known)}.")
    return arguments


def main():
    print(json.dumps(measure(parse_arguments())["summary"], indent=1))


if __name__ == "__main__":
    run_command(main)
