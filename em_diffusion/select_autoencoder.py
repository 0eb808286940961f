"""Which autoencoder to take: the protocol of the study's Table 1 over any list of candidates.

    python -m em_diffusion.select_autoencoder --candidates NAME=SOURCE [NAME=SOURCE ...] --data FOLDER --out DIR

Random tiles go through each candidate and back, and the Frechet distance between originals and reconstructions orders the
candidates: it is what a perfect diffusion model on their latents would be left with. PSNR, SSIM, the error of the power
spectrum, the use of the codebook, size, compression and speed stand beside it.
"""

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm

from em_data import DataConfig, load_data, to_uint8
from em_data.files import write_atomically
from em_diffusion.autoencoder import decode, encode, find_codes
from em_diffusion.codebook import CodebookMonitor
from em_diffusion.load_autoencoder import KINDS, load_autoencoder
from em_diffusion.reconstruction import psnr, spectrum_difference_db, ssim
from em_diffusion.selection_output import draw_selection, format_table
from em_diffusion.weights import hash_weights
from em_evaluation import bootstrap_interval, compute_features, get_extractor
from em_evaluation.baselines import read_baselines
from em_evaluation.distances import Distance, frechet_influence
from em_evaluation.environment import describe_environment
from em_evaluation.images import ImageSet, note_few_micrographs, read_images
from em_training import create_process_state
from em_training.cli import run_command

SIDES = ("held_out", "train")
NUM_PICTURES = 8


@dataclass(frozen=True)
class SelectionConfig:
    """Compare autoencoders on micrographs: reconstruct random tiles with each, print a table, write selection.json and
    selection.png."""

    candidates: tuple[str, ...]
    """NAME=SOURCE, or SOURCE alone: whatever `load_autoencoder` reads, such as a run, a pipeline or a folder saved by diffusers."""
    data: str = "synthetic"
    """Micrographs, as in training."""
    out: str = "runs/selection"
    """Folder for selection.json and selection.png."""
    side: str = "held_out"
    """held_out: tiles that a candidate trained on the same split has not seen; train: the others."""
    num_images: int = 1000
    """Random tiles to reconstruct; fewer where the side has fewer views."""
    tiles: DataConfig = field(default_factory=DataConfig)
    extractor: str = "efficientnet-lite0"
    """efficientnet-lite0 (offline) or inception (clean-fid's, the study's network)."""
    resize_mode: str | None = None
    """inception only: clean or legacy_pytorch."""
    input_px: int | None = None
    """efficientnet-lite0 only: side that tiles are resized to; left out, 128 for tiles of up to 128 px, else 224."""
    weights: str | None = None
    """A local file with the extractor's weights instead of the published ones."""
    baselines: str | None = None
    """JSON file with published distances of autoencoders to print below the table. Default: none."""
    seed: int = 0
    """Seed of the tiles and of the intervals."""
    batch_size: int = 16
    """Images at once; it decides the speed and the memory, not the numbers."""

    def __post_init__(self):
        if self.side not in SIDES:
            raise ValueError(f'--side is "{self.side}"; choose {" or ".join(SIDES)}.')
        if self.num_images < 2 or self.batch_size < 1:
            raise ValueError("--num-images is at least 2 and --batch-size at least 1.")


def select_autoencoder(config: SelectionConfig, *, log=print) -> dict:
    """Judge every candidate on the same tiles; write selection.json and selection.png, print the table, return the result.

    A candidate that cannot be loaded or run is named with its reason, and the others go on. Raises `ValueError` when none
    is left.
    """
    sources = name_candidates(config.candidates)
    baselines = read_baselines(config.baselines)
    device = create_process_state().device
    data = load_data(config.data, config.tiles, log=log)
    extractor = get_extractor(
        config.extractor,
        resize_mode=config.resize_mode,
        weights=config.weights,
        input_px=config.input_px,
        resolution=data.summary["resolution"],
        device=device,
    )
    tiles = data.held_out if config.side == "held_out" else data.train
    num_images = min(config.num_images, len(tiles))
    originals = read_images(tiles, num_images, config.seed)
    original_features = compute_features(originals, extractor, cache_dir=config.tiles.cache_dir)

    judged, failed = [], []
    for name, source in sources.items():
        try:
            model = load_autoencoder(source, device=device)
            judged.append(judge(name, model, originals, original_features, extractor, config))
        except Exception as error:  # whatever is wrong with one candidate must not stop the others
            if "EM_TRACEBACK" in os.environ:
                traceback.print_exc()
            failed.append(
                {"name": name, "error": f"{error}".replace(source, Path(source).name)}
            )  # no paths in the file
            log(f"{name} cannot be judged: {error}")
    if not judged:
        raise ValueError(
            "no candidate could be judged: "
            + "; ".join(f"{f['name']}: {f['error']}" for f in failed)
        )

    judged.sort(key=lambda each: each.distance.value)
    selection = {
        "format": 1,
        "dataset": {key: value for key, value in data.summary.items() if key != "source"},
        "protocol": describe_protocol(config, extractor, originals, data.summary),
        "candidates": [each.facts for each in judged],
        "comparisons": compare_with_best(judged, originals.groups, config.seed),
        "failed": failed,
        "study": None if baselines is None else baselines["autoencoders"],
        "environment": describe_environment(),
    }
    selection["conclusion"] = conclude(selection)
    text = json.dumps(selection, indent=1, allow_nan=False, ensure_ascii=False)
    out = Path(config.out)
    write_atomically(out / "selection.json", text + "\n")
    pictures = {each.facts["name"]: each.reconstructions.levels for each in judged}
    draw_selection(selection, originals.levels, pictures, out / "selection.png", NUM_PICTURES)
    log(f"{format_table(selection)}\n\n{out / 'selection.json'}\n{out / 'selection.png'}")
    return selection


@dataclass
class Judged:
    """A candidate's numbers, its distance as one of pairs, and its reconstructions."""

    facts: dict
    distance: Distance
    reconstructions: ImageSet


def judge(name, model, originals, original_features, extractor, config) -> Judged:
    """Reconstruct all originals with one autoencoder and measure what came back."""
    reconstructed, facts = reconstruct_all(name, model, originals, config)
    features = compute_features(reconstructed, extractor, use_cache=False)
    distance = pair(frechet_influence(features, original_features))
    interval = bootstrap_interval(distance, groups_a=originals.groups, seed=config.seed)
    metric = {"value": interval.value, "low": max(interval.low, 0.0), "high": interval.high}
    facts = {"name": name, "frechet_distance": metric, **measure(originals, reconstructed), **facts}
    return Judged(facts, distance, reconstructed)


def name_candidates(texts) -> dict[str, str]:
    """Return {name: source} of NAME=SOURCE texts; a source without a name is called by the last part of its path."""
    if not texts:
        raise ValueError("no candidate was named; give at least one with --candidates NAME=SOURCE")
    sources = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            name, source = Path(text).name, text
        if not name or not source:
            raise ValueError(
                f"--candidates takes NAME=SOURCE, such as ours=runs/demo/ldm, not {text!r}"
            )
        if name in sources:
            raise ValueError(f"two candidates are called {name}; tell them apart with NAME=SOURCE")
        sources[name] = source
    return sources


@torch.no_grad()
def reconstruct_all(name, model, originals: ImageSet, config) -> tuple[ImageSet, dict]:
    """Send all originals through an autoencoder; return the reconstructions and facts about the network.

    Encoding and decoding are timed apart, after one batch to warm up. A KL autoencoder decodes the mean of its posterior.
    """
    num_codes, device = model.config.get("num_vq_embeddings"), model.device
    monitor = None if num_codes is None else CodebookMonitor(num_codes, 0)
    batches = torch.arange(len(originals)).split(config.batch_size)
    decode(model, encode(model, originals.batch(batches[0].tolist()).to(device)))  # warm-up
    levels, seconds = [], {"encode": 0.0, "decode": 0.0}
    bar = {
        "unit": "batch",
        "leave": False,
        "dynamic_ncols": True,
        "mininterval": 0.5 if sys.stderr.isatty() else 15,
    }
    for ids in tqdm(batches, desc=name, **bar):
        images = originals.batch(ids.tolist()).to(device)
        began = read_clock(device)
        latents = encode(model, images)
        encoded = read_clock(device)
        decoded = decode(model, latents)  # [B, 1, R, R]
        seconds["decode"] += read_clock(device) - encoded
        seconds["encode"] += encoded - began
        if decoded.shape != images.shape:
            raise ValueError(
                f"it gives {list(decoded.shape)} for images {list(images.shape)}: choose another resolution"
            )
        levels.append(to_uint8(decoded.clamp(-1, 1)))
        if monitor is not None:
            monitor.count(find_codes(model, latents).cpu())
    facts = describe(model, latents, originals.resolution) | {
        "codes_used": None if monitor is None else int((monitor.counts > 0).sum()),
        "perplexity": None if monitor is None else float(monitor.perplexity()),
        "encode_images_per_second": len(originals) / seconds["encode"],
        "decode_images_per_second": len(originals) / seconds["decode"],
    }
    return ImageSet(np.concatenate(levels), originals.groups), facts


def read_clock(device) -> float:
    """Seconds, after all that was queued on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def describe(model, latents, resolution) -> dict:
    """Return kind, size and compression of an autoencoder that gave latents [B, C, h, w] for images of `resolution`."""
    channels, height, width = latents.shape[1:]
    return {
        "kind": KINDS[type(model)],
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights_sha256": hash_weights(model),
        "num_codes": model.config.get("num_vq_embeddings"),
        "downsampling_factor": resolution[0] / height,
        "latent_shape": [channels, height, width],
        "pixels_per_latent_value": resolution[0] * resolution[1] / (channels * height * width),
    }


def measure(originals: ImageSet, reconstructed: ImageSet) -> dict:
    """Return PSNR and SSIM (means over images) and the error of the power spectrum, of 8-bit images both."""
    images, others = (each.batch(range(len(each))) for each in (originals, reconstructed))
    difference = spectrum_difference_db(images, others)
    return {
        "psnr_db": float(psnr(images, others).mean()),
        "ssim": float(ssim(images, others).mean()),
        "spectrum_error_db": float(difference.abs().mean()),
        "spectrum_difference_db": [round(value, 3) for value in difference.tolist()],
    }


def pair(distance: Distance) -> Distance:
    """Return a distance between originals and their own reconstructions as one of pairs, which are drawn together.

    Resampling the two sides apart would count the scatter that they share, twice, where it cancels.
    """
    joint = distance.influence_a + distance.influence_b
    return Distance(distance.value, joint, np.zeros_like(joint))


def compare_with_best(judged, groups, seed) -> list[dict]:
    """Return the distance of every other candidate less that of the best, the first, with intervals; same tiles."""
    best, *others = judged
    comparisons = []
    for other in others:
        value = other.distance.value - best.distance.value
        influence = other.distance.influence_a - best.distance.influence_a
        interval = bootstrap_interval(
            Distance(value, influence, np.zeros_like(influence)), groups_a=groups, seed=seed
        )
        difference = {"value": interval.value, "low": interval.low, "high": interval.high}
        verdict = "farther" if interval.low > 0 else "undecided"
        names = {"first": other.facts["name"], "second": best.facts["name"]}
        comparisons.append(
            {**names, "frechet_distance_difference": difference, "first_is": verdict}
        )
    return comparisons


def describe_protocol(config, extractor, originals, summary) -> dict:
    """Return what two selections must have in common to be compared."""
    num_micrographs = None if originals.groups is None else len(np.unique(originals.groups))
    origin = "" if num_micrographs is None else f" of {num_micrographs} micrographs"
    side = "held-out" if config.side == "held_out" else "training"
    notes = note_few_micrographs(originals.groups) if config.side == "held_out" else []
    if len(originals) < config.num_images:
        notes.append(
            f"{config.num_images:,} tiles were asked for; there are only {len(originals):,} {side} views, all of which are used."
        )
    if config.side == "train":
        notes.append("A candidate that was trained on these very tiles is flattered.")
    elif summary["split"] == "leaky":
        notes.append(
            "The split is leaky: a candidate trained on it has seen other views of the same micrographs."
        )
    return {
        "tiles": f"{len(originals):,} random {side} tiles{origin}",
        "side": config.side,
        "num_images": len(originals),
        "num_micrographs": num_micrographs,
        "resolution": originals.resolution[0],
        "extractor": extractor.identity,
        "distance": "Frechet distance between originals and their reconstructions, comparable only at this number of images",
        "intervals": "95 %, linearised bootstrap over micrographs, an original and its reconstruction drawn together",
        "grey_levels": "8 bit, originals and reconstructions alike",
        "precision": "float32",
        "batch_size": config.batch_size,
        "seed": config.seed,
        "notes": notes,
    }


def conclude(selection) -> list[str]:
    """Return the sentences that the numbers allow."""
    best = selection["candidates"][0]
    equal = [each["first"] for each in selection["comparisons"] if each["first_is"] == "undecided"]
    sentence = f"{best['name']} has the least distance, {best['frechet_distance']['value']:.4g}"
    if equal:
        sentence += f"; {', '.join(equal)} cannot be told apart from it (the interval of the difference holds 0)"
    return [sentence + ".", *selection["protocol"]["notes"]]


def main():
    select_autoencoder(tyro.cli(SelectionConfig, description=__doc__))


if __name__ == "__main__":
    run_command(main)
