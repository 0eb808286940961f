"""The distance reached in the same training time: our denoiser stage against the plain loop.

    python benchmarks/training_budget.py --seconds 600 [--autoencoder RUN] [--out FOLDER]

Both train the U-Net of the preset `demo` on the embedded micrographs for the same seconds, on the
latents of one autoencoder. It is trained once (--autoencoder-images), or taken from --autoencoder,
and counts for neither side. Then both draw the same number of images by the same sampler, and the
Frechet distance to held-out tiles is measured.

Ours is `train_denoiser` with the preset's settings. The time to encode all views once counts, and
so do log and checkpoints. Its learning rate falls to zero at an end that is counted in images, so
the speed is measured first, in steps that do not count. A run that is slower than that is stopped
when the time is up.

The plain loop (plain_loop.py) is what a user would write from diffusers' unconditional training
example with the study's settings: noise prediction, independent uniform timesteps, PNG tiles
decoded and encoded in every step, float32 and eager mode, Adam at a constant 1e-4, the last
weights and no average. It gets our normalisation of the latents and the preset's batch size.

Ours draws images with the grain that the autoencoder does not reproduce, measured within its
budget; the plain loop has none. "ratio_grain_in_neither" compares the two without it,
"ratio_grain_in_both" with it on both sides.

On one thread of a CPU (--threads 1) the budget is the process's own time, which other programs do
not disturb; otherwise it is wall time. Everything that is finished is kept in --out: a second
start does only what is missing. The results are one JSON line, with the ratio and its interval,
and report.html, report.json and report.png (both grids) in --out.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from data_loading import write_png_tiles
from plain_loop import PlainLoop
from sampler_points import choose_clock
from tqdm.auto import tqdm
from train_step import LoopInSteps

from em_data import load_data, read_image_folder
from em_data.files import write_atomically
from em_diffusion import PRESETS, EMLatentDiffusionPipeline, denoiser_loop
from em_diffusion.autoencoder import decode, encode
from em_diffusion.denoiser import create_denoiser, create_scheduler
from em_diffusion.family import LDMOptions
from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.samplers import DEFAULT_SAMPLERS, SAMPLERS
from em_diffusion.train import run_autoencoder_stage, run_grain_stage, run_latents_stage
from em_evaluation import (
    ModelImages,
    Protocol,
    compute_features,
    evaluate_models,
    get_extractor,
    write_report,
)
from em_evaluation.distances import Distance, difference_interval, frechet_influence
from em_evaluation.evaluator import RealImages
from em_evaluation.images import read_images
from em_evaluation.wording import find_metric
from em_generation.generate import GenerationConfig, generate_images
from em_training import (
    TrainingRun,
    create_accelerator,
    list_checkpoints,
    load_checkpoint,
    make_generator,
    seed_for,
)
from em_training.cli import run_command
from em_training.weights import save_model

OURS, PLAIN = "ours", "plain loop"
OURS_BARE, PLAIN_GRAINY = "ours without grain", "plain loop with our grain"
SETS = {
    OURS: ("ours", True),
    PLAIN: ("plain", False),
    OURS_BARE: ("ours", False),
    PLAIN_GRAINY: ("plain", True),
}
RATIOS = {
    "ratio": (OURS, PLAIN),
    "ratio_grain_in_neither": (OURS_BARE, PLAIN),
    "ratio_grain_in_both": (OURS, PLAIN_GRAINY),
}
PLAIN_LEARNING_RATE = 1e-4  # the study's, and the example's
# of the images that the measured speed allows: a run should reach its end and not be cut off
MARGIN = 0.97
SPEED_SECONDS = 5.0  # of steps by which the speed is measured
FAR = 1_000_000  # images: an end that steps to measure the speed do not reach


@dataclass
class Shared:
    """What both sides have in common."""

    config: object  # LDMConfig
    data: object
    vqvae: torch.nn.Module
    latents: object
    held_out_latents: object
    grain: object  # EMGrain
    encode_seconds: float  # of all views, and to measure the grain
    accelerator: object
    clock: object  # () -> seconds


def say(text):
    print(text, file=sys.stderr)


class BudgetSpent(Exception):
    """Ends our training when its time is up."""


def prepare(arguments) -> Shared:
    """Make or find data, autoencoder and cached latents in `out`/shared."""
    folder = Path(arguments.out) / "shared"
    config = PRESETS[arguments.preset]()
    config = replace(
        config, data=arguments.data, seed=arguments.seed, grain_images=config.grain_images or 1000
    )
    if arguments.autoencoder_images:
        config = replace(
            config, autoencoder=replace(config.autoencoder, num_images=arguments.autoencoder_images)
        )
    accelerator = create_accelerator(folder, config.precision)
    config = replace(config, out=str(folder), precision=accelerator.mixed_precision)
    refuse_other_settings(folder, {"config": asdict(config), "autoencoder": arguments.autoencoder})
    data = load_data(config.data, config.tiles, log=say)
    path = folder / "autoencoder" / "vqvae"
    if arguments.autoencoder is None:
        vqvae, _ = run_autoencoder_stage(config, data, accelerator, folder)
    else:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_model(load_autoencoder(arguments.autoencoder), path)
        vqvae = load_autoencoder(path, device=accelerator.device)
    clock, record = choose_clock(accelerator.device), folder / "encoding.json"
    started = clock()
    latents, held_out_latents, _ = run_latents_stage(config, data, vqvae, accelerator, folder)
    grain = run_grain_stage(config, data, vqvae, accelerator, folder)
    if not record.exists():  # of a second start, which finds both
        write_atomically(record, json.dumps({"seconds": clock() - started}) + "\n")
    seconds = json.loads(record.read_text())["seconds"]
    return Shared(
        config, data, vqvae, latents, held_out_latents, grain, seconds, accelerator, clock
    )


def refuse_other_settings(folder, settings):
    """Refuse to mix two benchmarks in one folder."""
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ValueError(
            f"{folder} was made with another preset, data, seed or autoencoder. Use another --out."
        )
    write_atomically(path, json.dumps(settings, indent=2) + "\n")


# ---------------------------------------------------------------- ours


def train_ours(shared, seconds, out):
    """Train our denoiser within the budget; one that was stopped starts again."""
    if (out / "result.json").exists():
        return json.loads((out / "result.json").read_text())
    shutil.rmtree(out / "denoiser", ignore_errors=True)
    plan = make_plan(shared, seconds, out)
    config = plan_config(shared.config.denoiser, plan["num_images"])
    limit, started = seconds - shared.encode_seconds, shared.clock()

    class BudgetedRun(TrainingRun):
        def step(self, num_images_seen):
            super().step(num_images_seen)
            if shared.clock() - started >= limit:
                self.save(num_images_seen)
                raise BudgetSpent

    try:
        with mock.patch.object(denoiser_loop, "TrainingRun", BudgetedRun):
            train_denoiser(config, shared, out)
    except BudgetSpent:
        pass
    elapsed = shared.clock() - started
    checkpoint = load_checkpoint(list_checkpoints(out / "denoiser" / "checkpoints")[-1])
    unet = create_unet(config, shared)
    unet.load_state_dict(checkpoint["state"]["ema"])
    save_pipeline(unet, config, shared, out)
    result = {
        **plan,
        "num_images_seen": checkpoint["num_images_seen"],
        "train_seconds": elapsed,
        "encode_seconds": shared.encode_seconds,
    }
    write_atomically(out / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def make_plan(shared, seconds, out):
    """Return how many images the budget allows, by the speed of some steps; decided once."""
    path = out / "plan.json"
    if path.exists():
        return json.loads(path.read_text())
    if shared.encode_seconds >= seconds:
        raise ValueError(
            f"Encoding all views takes {shared.encode_seconds:.0f} s, more than --seconds "
            f"{seconds:g}. Give more."
        )
    batch_size = shared.config.denoiser.batch_size
    with tempfile.TemporaryDirectory() as folder:
        rate = measure_speed(shared, folder)
    num_steps = int(MARGIN * rate * (seconds - shared.encode_seconds) / batch_size)
    plan = {"images_per_second": rate, "num_images": max(1, num_steps) * batch_size}
    write_atomically(path, json.dumps(plan, indent=2) + "\n")
    return plan


def measure_speed(shared, folder):
    """Images per second of our training loop, after a warm-up."""
    config = plan_config(shared.config.denoiser, FAR)
    loop = LoopInSteps(lambda: train_denoiser(config, shared, folder), torch.get_num_threads())
    for _ in range(3):
        loop.step()
    started, num_steps = shared.clock(), 0
    while shared.clock() - started < SPEED_SECONDS or num_steps < 3:
        loop.step()
        num_steps += 1
    rate = num_steps * config.batch_size / (shared.clock() - started)
    loop.stop()
    return rate


def plan_config(config, num_images):
    """Return the preset's denoiser for so many images; grids and validation only at the end."""
    once = {"validate_every": num_images, "sample_every": num_images, "evaluate_every": 0}
    return replace(config, num_images=num_images, num_sample_images=1, num_sample_steps=1, **once)


def train_denoiser(config, shared, out):
    config = replace(config, seed=seed_for(shared.config.seed, config.seed))  # as train_ldm has it
    denoiser_loop.train_denoiser(
        config,
        shared.latents,
        shared.held_out_latents,
        shared.vqvae,
        accelerator=shared.accelerator,
        out_dir=out,
    )


# ---------------------------------------------------------------- the plain loop


def train_plain(shared, seconds, out):
    """Train the plain loop within the budget; one that was stopped starts again."""
    if (out / "result.json").exists():
        return json.loads((out / "result.json").read_text())
    config = replace(
        shared.config.denoiser,
        prediction_type="epsilon",
        zero_terminal_snr=False,
        min_snr_gamma=0.0,
    )
    (out / "png").mkdir(parents=True, exist_ok=True)
    tiles = shared.data.train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(shared.config.seed, "plain"))
        unet = create_unet(config, shared)
    loop = PlainLoop(
        unet,
        shared.vqvae,
        create_scheduler(config),
        tiles,
        write_png_tiles(tiles, out / "png"),
        batch_size=config.batch_size,
        learning_rate=PLAIN_LEARNING_RATE,
        latents_mean=shared.latents.mean,
        latents_std=shared.latents.std,
        generator=make_generator(shared.config.seed, stream="plain"),
    )
    losses, num_images_seen = [], 0
    started = shared.clock()
    with tqdm(desc=PLAIN, unit="img", unit_scale=True, dynamic_ncols=True, mininterval=5) as bar:
        while shared.clock() - started < seconds:
            losses.append(loop.step())
            num_images_seen += config.batch_size
            bar.update(config.batch_size)
    elapsed = shared.clock() - started
    save_pipeline(unet.eval(), config, shared, out)
    last = torch.stack(losses[-len(losses) // 10 - 1 :]).mean().item()
    result = {"num_images_seen": num_images_seen, "train_seconds": elapsed, "last_loss": last}
    write_atomically(out / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def create_unet(config, shared):
    channels, size = shared.latents.shape[0], shared.latents.shape[-1]
    return create_denoiser(config, size, channels)


def save_pipeline(unet, config, shared, out):
    pipeline = EMLatentDiffusionPipeline(
        shared.vqvae, unet, create_scheduler(config), grain=shared.grain
    )
    pipeline.save_pretrained(out / "pipeline")


# ---------------------------------------------------------------- evaluation


def evaluate(shared, results, arguments, out):
    """Sample from both, measure, write the report; return the line of the benchmark."""
    data, models = shared.data, []
    for name, (key, with_grain) in SETS.items():
        images = out / key / ("images" if with_grain else "images-without-grain")
        record = generate_images(
            GenerationConfig(
                model=str(out / key),
                out=str(images),
                num_images=arguments.num_images,
                seed=arguments.seed,
                options=LDMOptions(
                    scheduler=arguments.sampler,
                    num_inference_steps=arguments.num_inference_steps,
                    grain=with_grain,
                ),
            )
        )
        result = results[OURS if key == "ours" else PLAIN]
        models.append(
            ModelImages(
                name,
                read_image_folder(images),
                "ldm",
                train_seconds=result["train_seconds"] + result.get("encode_seconds", 0.0),
                num_images_seen=result["num_images_seen"],
                sample_seconds=record["sample_seconds"],
                sample_images_per_second=record.get("sample_images_per_second"),
            )
        )
    extractor = get_extractor(
        resolution=data.summary["resolution"], device=shared.accelerator.device
    )

    @torch.no_grad()
    def reconstruct(images):
        decoded = decode(
            shared.vqvae, encode(shared.vqvae, images.to(shared.accelerator.device))
        ).clamp(-1, 1)
        return shared.grain(decoded, noise).clamp(-1, 1).cpu()

    noise = make_generator(arguments.seed, stream="grain")

    models[0].reconstructions = {"autoencoder and grain": reconstruct}  # the same for both
    report, pictures = evaluate_models(
        models,
        RealImages(data.held_out, data.train, data.summary),
        [extractor],
        Protocol(
            levels=("real", "reconstruction"),
            num_images=arguments.num_images,
            seed=arguments.seed,
            microscopy=False,
            memorisation=False,
        ),
        log=say,
    )
    write_report(report, pictures, out)
    return make_figure(
        report, find_ratios(models, data.held_out, extractor, report, arguments.seed)
    )


def find_ratios(models, held_out, extractor, report, seed):
    """The ratios of `RATIOS` with their 95 % intervals, in which the common reference cancels."""
    num_images = report["protocol"]["num_images"]
    reference = read_images(held_out, num_images, seed)
    reference_features = compute_features(reference, extractor)
    logarithms = {}
    for model in models:
        features = compute_features(read_images(model.images, num_images), extractor)
        logarithms[model.name] = take_logarithm(frechet_influence(features, reference_features))
    ratios = {}
    for key, (first, second) in RATIOS.items():
        interval = difference_interval(
            logarithms[first], logarithms[second], groups_reference=reference.groups, seed=seed
        )
        value, *ends = (
            round(float(np.exp(x)), 3) for x in (interval.value, interval.low, interval.high)
        )
        ratios |= {key: value, f"{key}_interval": ends}
    return ratios


def take_logarithm(distance: Distance) -> Distance:
    """The logarithm of a distance with its influences, to first order: d log x = dx / x."""
    value = max(distance.value, 1e-12)
    return Distance(
        float(np.log(value)), distance.influence_a / value, distance.influence_b / value
    )


def make_figure(report, ratios):
    """The line of the benchmark."""
    distances = {model["name"]: find_metric(report, model["name"]) for model in report["models"]}
    levels = {
        level["kind"]: find_metric(report, level["key"])["value"] for level in report["levels"]
    }

    def shorten(metric):
        return [round(metric["low"], 1), round(metric["high"], 1)]

    return {
        "name": "Frechet distance on the same budget of training time",
        "ours": round(distances[OURS]["value"], 1),
        "baseline": round(distances[PLAIN]["value"], 1),
        **ratios,
        "ours_interval": shorten(distances[OURS]),
        "baseline_interval": shorten(distances[PLAIN]),
        "real_against_real": round(levels["real"], 1),
        "autoencoder_and_grain_alone": round(levels["reconstruction"], 1),
        "num_images": report["protocol"]["num_images"],
        "extractor": report["protocol"]["extractor"].split(",")[0],
        "baseline_is": "noise prediction, uniform timesteps, PNG decoded and encoded in every "
        "step, float32, Adam 1e-4, no average",
    }


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="of training for each side")
    parser.add_argument(
        "--out",
        default="runs/training-budget",
        help="folder for everything; a second start goes on",
    )
    parser.add_argument(
        "--autoencoder",
        help="a run or folder whose autoencoder to take; trained where it is left out",
    )
    parser.add_argument(
        "--autoencoder-images",
        type=int,
        help="images to train the autoencoder for; the preset's number",
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="demo", help="whose networks and settings"
    )
    parser.add_argument(
        "--data", default="synthetic", help="micrographs; 'synthetic' are the embedded ones"
    )
    parser.add_argument(
        "--num-images", type=int, default=1000, help="sampled from each, and as many real ones"
    )
    parser.add_argument(
        "--sampler", choices=list(SAMPLERS), default=DEFAULT_SAMPLERS[False][0], help="for both"
    )
    parser.add_argument(
        "--num-inference-steps", type=int, default=DEFAULT_SAMPLERS[False][1], help="for both"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="of the CPU; 0 for torch's own number"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.seconds <= 0 or arguments.num_images < 2:
        parser.error("--seconds is positive and --num-images at least 2")
    if arguments.autoencoder and arguments.autoencoder_images:
        parser.error("--autoencoder is a trained one: leave --autoencoder-images out")
    return arguments


def main():
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shared = prepare(arguments)
    out = Path(arguments.out) / f"{arguments.seconds:g}s"
    results = {OURS: train_ours(shared, arguments.seconds, out / "ours")}
    results[PLAIN] = train_plain(shared, arguments.seconds, out / "plain")
    figure = evaluate(shared, results, arguments, out)
    for name, key in ((OURS, "ours"), (PLAIN, "baseline")):
        figure[f"{key}_images_seen"] = results[name]["num_images_seen"]
        figure[f"{key}_seconds"] = round(
            results[name]["train_seconds"] + results[name].get("encode_seconds", 0.0), 1
        )
    figure |= {
        "encode_seconds": round(shared.encode_seconds, 1),
        "budget_seconds": arguments.seconds,
    }
    figure |= {"sampler": arguments.sampler, "num_inference_steps": arguments.num_inference_steps}
    figure |= {
        "preset": arguments.preset,
        "num_threads": torch.get_num_threads(),
        "seed": arguments.seed,
    }
    figure["clock"] = "CPU time, one thread" if shared.clock is time.process_time else "wall time"
    figure["device"] = shared.accelerator.device.type
    write_atomically(out / "figure.json", json.dumps(figure) + "\n")
    print(json.dumps(figure))


if __name__ == "__main__":
    run_command(main)
