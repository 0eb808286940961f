"""Compare autoencoders on micrographs, as the study's Table 1 does; also a command."""

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from tqdm.auto import tqdm

from em_data import DataConfig, load_data, to_uint8
from em_data.files import printable, write_atomically
from em_diffusion.autoencoder import decode, encode, find_codes
from em_diffusion.codebook import CodebookMonitor
from em_diffusion.load_autoencoder import KINDS, load_autoencoder
from em_diffusion.patch_basis import fit_to_tiles
from em_diffusion.reconstruction import psnr, spectrum_difference_db, ssim
from em_diffusion.selection_output import draw_selection, format_table
from em_evaluation import bootstrap_interval, compute_features, get_extractor
from em_evaluation.baselines import read_baselines
from em_evaluation.distances import Distance, frechet_influence
from em_evaluation.environment import describe_environment
from em_evaluation.images import ImageSet, note_few_micrographs, read_images
from em_training import create_process_state
from em_training.cli import run_command
from em_training.family import check_options
from em_training.flags import parse_config
from em_training.weights import hash_weights

DESCRIPTION = """Compare autoencoders on micrographs.

Every candidate encodes and decodes the same random tiles. The Frechet distance between originals
and reconstructions orders the candidates: a perfect diffusion model of their latents would have
this distance. PSNR, SSIM, the error of the power spectrum, the use of the codebook, size,
compression and speed stand beside it. A linear autoencoder with the same latents, fitted in
seconds, is the floor. The command prints a table and writes selection.json and
selection.png."""
Side = Literal["held_out", "train"]
NUM_PICTURES = 8
FLOOR_VIEWS = 4000  # training views that a linear autoencoder is fitted to


@dataclass(frozen=True)
class SelectionConfig:
    """Candidates, the tiles that they reconstruct, and how the reconstructions are measured."""

    candidates: tuple[str, ...]
    """NAME=SOURCE, or SOURCE alone: whatever `load_autoencoder` reads, such as a run, a pipeline or
    a folder saved by diffusers."""
    data: str = "synthetic"
    """Micrographs, as in training."""
    out: str = "runs/selection"
    """Folder for selection.json and selection.png."""
    side: Side = "held_out"
    """Tiles of the held-out micrographs, which a candidate trained on the same split has not seen,
    or of the training micrographs."""
    num_images: int = 1000
    """Random tiles to reconstruct; all if the side has fewer."""
    tiles: DataConfig = field(default_factory=DataConfig)
    extractor: str = "efficientnet-lite0"
    """efficientnet-lite0 (offline) or inception (clean-fid's, the study's network)."""
    resize_mode: str | None = None
    """inception only: clean or legacy_pytorch."""
    input_px: int | None = None
    """efficientnet-lite0 only: side that tiles are resized to. Default: 128 for tiles of up to 128
    pixels, else 224."""
    floor: bool = True
    """Judge a linear autoencoder with each shape of latents, too (`EMPatchBasis`, fitted to
    training tiles in seconds). A trained one that is not better was trained too briefly."""
    weights: str | None = None
    """A local file with the extractor's weights. Default: the published ones."""
    baselines: str | None = None
    """JSON file with published distances of autoencoders to print below the table. Default:
    none."""
    seed: int = 0
    """Seed of the choice of tiles and of the intervals."""
    batch_size: int = 16
    """Images to reconstruct at once. It changes speed and memory, not the numbers."""

    def __post_init__(self):
        if self.side not in get_args(Side):
            raise ValueError(f'--side is "{self.side}"; choose {" or ".join(get_args(Side))}.')
        check_options(self, num_images=(2, float("inf")), batch_size=(1, float("inf")))


@dataclass
class Candidate:
    """An autoencoder's numbers, its distance (see `pair`) and its reconstructions."""

    numbers: dict
    distance: Distance
    reconstructions: ImageSet


def select_autoencoder(config: SelectionConfig, *, log=print) -> dict:
    """Judge every candidate on the same tiles and order them by distance.

    Prints the table and writes selection.json, which holds the result, and selection.png. A
    candidate that cannot be loaded or run is listed with the error; the others are judged.

    Raises:
        ValueError: If no candidate can be judged.
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
    originals = read_images(tiles, min(config.num_images, len(tiles)), config.seed)
    features = compute_features(originals, extractor, cache_dir=config.tiles.cache_dir)
    candidates, failed, reasons = [], [], []
    for name, source in sources.items():
        try:
            model = load_autoencoder(source, device=device)
            candidates.append(judge(name, model, originals, features, extractor, config))
        except Exception as error:  # one bad candidate must not stop the others
            if "EM_TRACEBACK" in os.environ:
                traceback.print_exc()
            # selection.json holds no local paths
            failed.append({"name": name, "error": f"{error}".replace(source, Path(source).name)})
            reasons.append(printable(f"{name} cannot be judged: {error}"))
    for name, model in fit_floors(candidates, data.train, log) if config.floor else ():
        candidates.append(judge(name, model.to(device), originals, features, extractor, config))
    if not candidates:
        raise ValueError("; ".join(reasons))

    candidates.sort(key=lambda each: each.distance.value)
    selection = {
        "format": 1,
        "dataset": {key: value for key, value in data.summary.items() if key != "source"},
        "protocol": describe_protocol(config, extractor, originals, data.summary["split"]),
        "candidates": [each.numbers for each in candidates],
        "comparisons": compare_with_best(candidates, originals.groups, config.seed),
        "failed": failed,
        "study": None if baselines is None else baselines["autoencoders"],
        "environment": describe_environment(),
    }
    selection["conclusion"] = conclude(selection)
    text = json.dumps(selection, indent=1, allow_nan=False, ensure_ascii=False)
    out = Path(config.out)
    write_atomically(out / "selection.json", text + "\n")
    pictures = {each.numbers["name"]: each.reconstructions.levels for each in candidates}
    draw_selection(selection, originals.levels, pictures, out / "selection.png", NUM_PICTURES)
    files = [f"{out / name}" for name in ("selection.json", "selection.png")]
    log("\n".join([*reasons, format_table(selection), "", *files]))
    return selection


def fit_floors(candidates, tiles, log):
    """Return [(name, `EMPatchBasis`)] for each shape of the candidates' latents."""
    floors, numbers = [], [each.numbers for each in candidates]
    shapes = {(round(each["downsampling_factor"]), each["latent_shape"][0]) for each in numbers}
    for factor, channels in sorted(shapes):
        if channels > factor**2 or tiles.resolution % factor:
            log(f"no linear autoencoder has {channels} channels per {factor} x {factor} pixels")
            continue
        model = fit_to_tiles(tiles, FLOOR_VIEWS, factor, channels)
        floors.append((f"linear, f{factor} x {channels}", model))
    return floors


def name_candidates(texts) -> dict[str, str]:
    """Return {name: source} of NAME=SOURCE texts. The default name is the last part of a path."""
    if not texts:
        raise ValueError("there is no candidate; give at least one with --candidates NAME=SOURCE")
    sources = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            name, source = Path(text).name, text
        name = printable(name)
        if not name or not source:
            raise ValueError(
                f"--candidates takes NAME=SOURCE, such as ours=runs/demo/ldm, not {text!r}"
            )
        if name in sources:
            raise ValueError(f"two candidates are called {name}; tell them apart with NAME=SOURCE")
        sources[name] = source
    return sources


def judge(name, model, originals: ImageSet, original_features, extractor, config) -> Candidate:
    """Reconstruct all originals with one autoencoder and measure the reconstructions."""
    reconstructions, facts = reconstruct_all(name, model, originals, config.batch_size)
    features = compute_features(reconstructions, extractor, use_cache=False)
    distance = pair(frechet_influence(features, original_features))
    interval = bootstrap_interval(distance, groups_a=originals.groups, seed=config.seed)
    images, decoded = (each.batch(range(len(each))) for each in (originals, reconstructions))
    difference = spectrum_difference_db(images, decoded)
    numbers = {
        "name": name,
        "frechet_distance": interval.limited(lowest=0.0).to_json(),
        "psnr_db": float(psnr(images, decoded).mean()),
        "ssim": float(ssim(images, decoded).mean()),
        "spectrum_error_db": float(difference.abs().mean()),
        "spectrum_difference_db": [round(value, 3) for value in difference.tolist()],
    }
    return Candidate(numbers | facts, distance, reconstructions)


@torch.no_grad()
def reconstruct_all(name, model, originals: ImageSet, batch_size) -> tuple[ImageSet, dict]:
    """Encode and decode all originals; return the reconstructions and facts about the model.

    Encoding and decoding are timed separately, after a warm-up. A KL autoencoder decodes the mean
    of its posterior.
    """
    num_codes, device = model.config.get("num_vq_embeddings"), model.device
    monitor = None if num_codes is None else CodebookMonitor(num_codes, 0)
    batches = torch.arange(len(originals)).split(batch_size)
    decode(model, encode(model, originals.batch(batches[0].tolist()).to(device)))  # warm-up
    levels, encode_seconds, decode_seconds = [], 0.0, 0.0
    interval = 0.5 if sys.stderr.isatty() else 15
    for ids in tqdm(
        batches, name, leave=False, unit="batch", dynamic_ncols=True, mininterval=interval
    ):
        images = originals.batch(ids.tolist()).to(device)  # [B, 1, R, R]
        began = read_clock(device)
        latents = encode(model, images)  # [B, C, h, w]
        encoded = read_clock(device)
        decoded = decode(model, latents)  # [B, 1, R, R]
        decode_seconds += read_clock(device) - encoded
        encode_seconds += encoded - began
        if decoded.shape != images.shape:
            raise ValueError(
                f"images {list(images.shape)} are decoded to {list(decoded.shape)}. Use another "
                "--tiles.resolution."
            )
        levels.append(to_uint8(decoded.clamp(-1, 1)))
        if monitor is not None:
            monitor.count(find_codes(model, latents).cpu())
    channels, height, width = latents.shape[1:]
    facts = {
        "kind": KINDS[type(model)],
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights_sha256": hash_weights(model),
        "num_codes": num_codes,
        "downsampling_factor": originals.resolution[0] / height,
        "latent_shape": [channels, height, width],
        "pixels_per_latent_value": images[0].numel() / latents[0].numel(),
        "codes_used": None if monitor is None else int((monitor.counts > 0).sum()),
        "perplexity": None if monitor is None else float(monitor.perplexity()),
        "encode_images_per_second": len(originals) / encode_seconds,
        "decode_images_per_second": len(originals) / decode_seconds,
    }
    return ImageSet(np.concatenate(levels), originals.groups), facts


def read_clock(device) -> float:
    """Return the time in seconds when the device has finished its queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def pair(distance: Distance) -> Distance:
    """Return a distance between originals and reconstructions whose images are drawn in pairs.

    Drawing the two sides separately would count the scatter that they have in common twice,
    although it cancels.
    """
    joint = distance.influence_a + distance.influence_b
    return Distance(distance.value, joint, np.zeros_like(joint))


def compare_with_best(candidates, groups, seed) -> list[dict]:
    """Return how much farther each candidate is than the first, the best, with intervals."""
    best, *others = candidates
    comparisons = []
    for other in others:
        difference = Distance(
            other.distance.value - best.distance.value,
            other.distance.influence_a - best.distance.influence_a,
            np.zeros_like(best.distance.influence_a),
        )
        interval = bootstrap_interval(difference, groups_a=groups, seed=seed)
        comparisons.append(
            {
                "first": other.numbers["name"],
                "second": best.numbers["name"],
                "frechet_distance_difference": interval.to_json(),
                "first_is": "farther" if interval.low > 0 else "undecided",
            }
        )
    return comparisons


def describe_protocol(config, extractor, originals, split) -> dict:
    """Return what two selections must have in common to be compared, and notes on it."""
    num_micrographs = None if originals.groups is None else len(np.unique(originals.groups))
    origin = "" if num_micrographs is None else f" of {num_micrographs} micrographs"
    side = "held-out" if config.side == "held_out" else "training"
    notes = note_few_micrographs(originals.groups) if config.side == "held_out" else []
    if len(originals) < config.num_images:
        notes.append(
            f"--num-images is {config.num_images:,}, but there are only {len(originals):,} {side} "
            "views. All are used."
        )
    if config.side == "train":
        notes.append("Candidates that were trained on these tiles have an advantage.")
    elif split == "leaky":
        notes.append(
            "The split is leaky: a candidate trained on it has seen other views of the same "
            "micrographs."
        )
    return {
        "tiles": f"{len(originals):,} random {side} tiles{origin}",
        "side": config.side,
        "num_images": len(originals),
        "num_micrographs": num_micrographs,
        "resolution": originals.resolution[0],
        "extractor": extractor.identity,
        "distance": "Frechet distance between originals and their reconstructions, comparable only "
        "at this number of images",
        "intervals": "95 %, linearised bootstrap over micrographs; an original and its "
        "reconstruction are drawn together",
        "grey_levels": "8 bit, originals and reconstructions alike",
        "precision": "float32",
        "batch_size": config.batch_size,
        "seed": config.seed,
        "notes": notes,
    }


def conclude(selection) -> list[str]:
    """Return what the numbers say, in sentences."""
    best = selection["candidates"][0]
    sentences = [
        f"{best['name']} has the smallest distance, {best['frechet_distance']['value']:.4g}."
    ]
    equal = [each["first"] for each in selection["comparisons"] if each["first_is"] == "undecided"]
    if equal:
        sentences.append(
            f"The difference to {', '.join(equal)} is not significant (the 95 % interval holds 0)."
        )
    return [*sentences, *selection["protocol"]["notes"]]


def main():
    select_autoencoder(
        parse_config(SelectionConfig, "em_diffusion.select_autoencoder", DESCRIPTION)
    )


if __name__ == "__main__":
    run_command(main)
