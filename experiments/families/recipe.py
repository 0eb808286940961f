"""Compare all families of models after the same wall time of training.

    python experiments/families/recipe.py                  # embedded micrographs
    python experiments/families/recipe.py --data FOLDER --tiles resolution=64 downsample=4

1. A short training of each family measures its speed, and so how many images it sees in --minutes.
2. Each family trains from scratch with preset demo, with several seeds. A CycleGAN also sees the
   labelled micrographs of a simulation (--source), which it translates.
3. The guidance of the LDMs is chosen on their training tiles.
4. `evaluate.py` compares all of them, and the simulation before translation, in one report. Its
   main numbers go to results/NAME.json.

--base adds a Stable Diffusion tuned by LoRA; give it larger tiles (--tiles resolution=256), since
such models draw small images badly. A second start goes on where the first was stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from em_data.files import write_atomically
from em_training import read_stats


@dataclass(frozen=True)
class Family:
    """How a family is trained: its script, the section that has its length, and flags of its own.

    {num} in a flag is the number of images, {eighth} an eighth of it, and {base} the value of
    --base. Runs have the time of each stage; `stage` is the one whose images are counted.
    """

    script: str
    section: str
    stage: str
    probe: int  # images of the short training
    words: tuple[str, ...] = ()


FAMILIES = {
    "LDM": Family(
        "train_ldm.py", "denoiser", "denoiser", 3_200, ("--denoiser.guide-images", "{eighth}")
    ),
    "StyleGAN2": Family("train_gan.py", "training", "stylegan", 1_600),
    "CycleGAN": Family("train_cyclegan.py", "training", "cyclegan", 960, ("--source", "{source}")),
    "LoRA": Family("train_lora.py", "training", "lora", 64, ("--base", "{base}")),
}


def main(argv=None):
    """Do all steps; print the minutes of each."""
    arguments = parse_arguments(argv)
    start = time.perf_counter()
    names = [name for name in FAMILIES if name != "LoRA" or arguments.base]
    lengths = measure_lengths(names, arguments)
    print(f"images in {arguments.minutes:g} minutes: {lengths}", flush=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:  # all families of a seed before the next
        trainings = [(name, seed) for seed in range(arguments.seeds) for name in names]
        runs = list(
            pool.map(
                lambda each: train(*each, lengths[each[0]], arguments),
                trainings,
            )
        )
    say_minutes("all trainings", start)
    models = [f"{name}={run}" for (name, _), run in zip(trainings, runs, strict=True)]
    simulation = draw_simulation(runs[names.index("CycleGAN")], arguments)
    words = ["evaluate.py", "--models", *models, f"simulation={simulation}"]
    words += ["--out", str(Path(arguments.runs) / "report")]
    words += ["--num-images", str(arguments.num_images)]
    call("report", words, arguments)
    path = write_results(lengths, arguments)
    say_minutes("everything", start)
    print(f"The report is {arguments.runs}/report/report.html, its main numbers are in {path}.")


def measure_lengths(names, arguments) -> dict[str, int]:
    """Return how many images each family sees in --minutes; measure that unless it is known."""
    path = Path(arguments.runs) / "lengths.json"
    lengths = json.loads(path.read_text()) if path.is_file() else {}
    unknown = [name for name in names if name not in lengths]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        seconds = list(pool.map(lambda name: time_image(name, arguments), unknown))
    for name, each in zip(unknown, seconds, strict=True):
        lengths[name] = max(100, round(60 * arguments.minutes / each / 100) * 100)
    write_atomically(path, json.dumps(lengths) + "\n")
    return lengths


def time_image(name, arguments) -> float:
    """Train for a moment; return the seconds of an image."""
    family = FAMILIES[name]
    out = Path(arguments.runs) / "speed" / name
    more = [f"--{family.section}.log-every", str(family.probe // 4)]  # 4 lines; the first warms up
    call(f"speed of {name}", list_words(name, out, 0, family.probe, arguments) + more, arguments)
    first, *_, last = read_stats(out / family.stage)
    images = last["num_images_seen"] - first["num_images_seen"]
    return (last["train_seconds"] - first["train_seconds"]) / images


def train(name, seed, num_images, arguments) -> Path:
    """Train a family with a seed, and choose its guidance if it has some; return the run."""
    out = Path(arguments.runs) / f"{name.lower()}-{seed}"
    if not (out / "run.json").is_file():
        call(out.name, list_words(name, out, seed, num_images, arguments), arguments)
    if name == "LDM" and not (out / "guidance.json").is_file():
        words = ["-m", "em_diffusion.choose_guidance", str(out), "--num-images", "300"]
        call(f"guidance of {out.name}", [*words, "--scales", "1", "1.5", "2", "2.5"], arguments)
    return out


def list_words(name, out, seed, num_images, arguments) -> list[str]:
    """Return the command line of a training."""
    family = FAMILIES[name]
    words = [family.script, "demo", "--data", arguments.data, "--out", str(out)]
    words += ["--seed", str(seed), f"--{family.section}.num-images", str(num_images)]
    values = {"base": arguments.base, "source": arguments.source, "eighth": num_images // 8}
    words += [word.format(**values) for word in family.words]
    tiles = {"symmetries": "d4", "resolution": "64"}
    tiles |= dict(pair.split("=", 1) for pair in arguments.tiles)
    for key, value in tiles.items():
        words += [f"--tiles.{key.replace('_', '-')}", value]
    if name == "CycleGAN" and int(tiles.get("downsample", 1)) > 1:
        words += ["--source-tiles.downsample", "1"]  # the simulation has the target's pixel size
    return words


def draw_simulation(run, arguments) -> Path:
    """Write the images that a CycleGAN translates, as they are."""
    out = Path(arguments.runs) / "simulation"
    if not (out / "generation.json").is_file():
        words = ["generate.py", "--model", str(run), "--untranslated", "--out", str(out)]
        call("simulation", [*words, "--num-images", str(arguments.num_images)], arguments)
    return out


def write_results(lengths, arguments) -> Path:
    """Write the main numbers of the report; return the path of the JSON file."""
    report = json.loads((Path(arguments.runs) / "report" / "report.json").read_text())
    of_model = ("name", "family", "train_seconds", "num_images_seen", "sample_images_per_second")
    results = {
        "date": date.today().isoformat(),
        "data": report["dataset"]["name"],
        "tiles": arguments.tiles,
        "minutes": arguments.minutes,
        "lengths": lengths,
        "models": [{key: model[key] for key in of_model} for model in report["models"]],
        "levels": [{key: level[key] for key in ("key", "title")} for level in report["levels"]],
        "measurements": [
            {key: each[key] for key in ("extractor", "rows")} for each in report["measurements"]
        ],
        **{key: report[key] for key in ("protocol", "repeats", "comparisons_of_repeats")},
        **{key: report[key] for key in ("verdicts", "environment")},
    }
    path = Path(arguments.results) / f"{arguments.name or report['dataset']['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(results, indent=1) + "\n")
    return path


def call(title, words, arguments) -> None:
    """Run a command; end with the last lines of its log if it fails."""
    log = Path(arguments.runs) / "logs" / f"{title.replace(' ', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{title}: {log}\n", end="", flush=True)  # one text: threads call this
    environment = {"OMP_NUM_THREADS": str(arguments.threads), **os.environ}
    with log.open("w") as file:
        process = subprocess.run(
            [sys.executable, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    if process.returncode != 0:
        lines = log.read_text().splitlines()[-5:]
        raise SystemExit("\n".join([*lines, f"error: a step failed; see {log}"]))


def say_minutes(what, start):
    print(f"{what}: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="synthetic-other", help="micrographs: a folder or another source")
    add("--tiles", nargs="*", default=[], help="KEY=VALUE of the tiles of --data")
    add("--source", default="synthetic", help="what the CycleGAN translates")
    add("--base", help="base of a LoRA training; without it there is none")
    add("--runs", default="runs/families", help="folder for everything that is made")
    add("--name", help="of the file of results; default: that of the data")
    add("--results", default=str(Path(__file__).parent / "results"), help="folder for results")
    add("--minutes", type=float, default=6, help="of one training")
    add("--seeds", type=int, default=3, help="trainings of each family")
    add("--num-images", type=int, default=1_000, help="images of each set in the report")
    add("--jobs", type=int, default=2, help="processes at once; use 1 on a GPU")
    add("--threads", type=int, default=1, help="of each process")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
