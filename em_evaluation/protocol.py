"""The protocol: which sets are compared, how many images of each, against what, and what the numbers allow to say."""

import time

import numpy as np
import torch

from em_data.intensity import to_uint8
from em_evaluation.conclusion import STUDY, compare_models, conclude, warn, weigh_autoencoders
from em_evaluation.environment import describe_environment
from em_evaluation.images import ImageSet, read_images, transform_images
from em_evaluation.measurement import measure_with_extractor
from em_evaluation.memorisation import measure_memorisation
from em_evaluation.memorisation_report import make_gallery
from em_evaluation.metrics import METRICS, refuse_unmeasurable
from em_evaluation.microscopy import measure_microscopy
from em_evaluation.partial_copies import measure_partial_copies
from em_evaluation.pictures import choose_pictures
from em_evaluation.statistics import content_digest
from em_evaluation.surrogates import fraction_outside, phase_randomised_surrogates

FLOORS = ("real", "reconstruction", "surrogates", "noise")
MAX_CURVE_POINTS = 200


def evaluate_models(
    models,
    data_summary,
    reference,
    train,
    *,
    extractor,
    metrics=(),
    floors=FLOORS,
    num_images=1000,
    seed=0,
    reconstruct=None,
    untrained=None,
    transferred=None,
    cache_dir=None,
    use_cache=True,
    batch_size=32,
    num_pictures=16,
    microscopy=True,
    memorisation=True,
    reproduce=(),
    state=None,
    log=print,
):
    """Judge generated images of several models by one protocol; return (report, pictures) for `write_report`.

    extractor: an Extractor or several; the first one's Frechet distance carries the conclusion. metrics: names in
    `em_evaluation.metrics.METRICS`, by default all that apply. state: accelerate's, where several processes call this
    together with the same images and share the features; all but the main one get None.

    models: list of ModelImages. data_summary: `Data.summary`. reference, train: the held-out and the training `Tiles`,
    whose views (all symmetries of training) are drawn each tile once before any twice. floors: which of "real",
    "reconstruction", "surrogates", "noise" to measure beside the models. reconstruct: name -> function, images [B, 1,
    H, W] in [-1, 1] to the autoencoder's images of them. untrained, transferred: model's name -> images of its network before
    this training, with random weights or with those that it was given, one more floor each. microscopy, memorisation: whether
    to add these sections. Every set has the same number of images: `num_images`, or fewer for all where one set has fewer,
    which the report says. `ValueError` for fewer than two images or sets of different size in pixels.
    """
    start = time.perf_counter()
    reconstruct = reconstruct or {}
    extractors = [extractor] if hasattr(extractor, "identity") else list(extractor)
    refuse_names([model.name for model in models])
    refuse_unmeasurable(metrics, extractors)
    unknown = set(floors) - set(FLOORS)
    if unknown:
        raise ValueError(
            f"unknown floors {', '.join(sorted(unknown))}; there are {', '.join(FLOORS)}"
        )
    starts = name_starts(untrained or {}, transferred or {})
    num_images, notes = agree_on_number(num_images, models, reference, train, starts)
    sets = {
        "held_out": read_images(reference, num_images, seed),
        "train": read_images(train, num_images, seed + 1),
    }
    notes += note_few_micrographs(sets["held_out"].groups)
    generated = {model.name: read_images(model.images, num_images) for model in models}
    floor_sets, floor_info = make_floors(sets["train"], floors, reconstruct, seed)
    for key, (name, description, images) in starts.items():
        floor_sets[key] = read_images(images, num_images)
        floor_info[key] = {"name": name, "description": description}
    refuse_sizes({"the micrographs": sets["held_out"], **generated, **floor_sets})

    caching = {
        "batch_size": batch_size,
        "cache_dir": cache_dir,
        "use_cache": use_cache,
        "state": state,
    }
    measured = [
        measure_with_extractor(
            each,
            metrics,
            sets,
            generated,
            floor_sets,
            floor_info,
            models,
            seed=seed,
            log=log,
            **caching,
        )
        for each in extractors
    ]
    if measured[0][0] is None:  # not the main process
        return None
    measurements, (to_held_out, *_), more_notes = zip(*measured)
    notes += list(dict.fromkeys(note for each in more_notes for note in each))
    rows = measurements[0]["rows"]
    origin = {key: images.groups for key, images in {**generated, **floor_sets}.items()}
    report = {
        "format": 1,
        "title": "Synthetic electron micrographs: which generator is closer to the real ones",
        "dataset": to_json(
            {key: value for key, value in data_summary.items() if key != "source"}
        ),  # no paths
        "protocol": describe_protocol(
            extractors,
            measurements,
            num_images,
            seed,
            reference,
            sets,
            data_summary.get("split"),
            notes,
        ),
        "models": [
            {
                **describe_model(model, num_images),
                "metrics": rows[model.name]["held_out"],
                "metrics_against_train": rows[model.name]["train"],
            }
            for model in models
        ],
        "floors": {
            key: {**floor_info[key], "num_images": num_images, "metrics": rows[key]["held_out"]}
            for key in floor_sets
        },
        "measurements": list(measurements),
        "comparisons": compare_models(
            list(generated), list(floor_sets), to_held_out, origin, sets["held_out"].groups, seed
        ),
        "autoencoders": weigh_autoencoders(
            models, floor_info, to_held_out, origin, sets["held_out"].groups, seed
        ),
        "study": STUDY,
        "environment": describe_environment(),
        "reproduce": list(reproduce),
    }
    if microscopy:
        report["microscopy"] = measure_microscopy(
            sets["held_out"],
            {**generated, **floor_sets},
            list(generated),
            list(floor_sets),
            data_summary.get("pixel_size_nm"),
            seed,
            log,
        )
    pairs = []
    if memorisation:
        feature_options = {"batch_size": batch_size, "cache_dir": cache_dir, "use_cache": use_cache}
        bare = {
            m.name: read_images(m.without_grain, num_images)
            for m in models
            if m.without_grain is not None
        }
        searched = generated | bare  # added noise would hide copies
        report["memorisation"], pairs = measure_memorisation(
            searched,
            sets["held_out"],
            train,
            extractor=extractors[0],
            seed=seed,
            log=log,
            **feature_options,
        )
        partial = measure_partial_copies(searched, sets["held_out"], train, log=log)
        if partial is not None:
            report["memorisation"]["partial"] = partial
        if report["memorisation"] is not None:
            report["memorisation"]["without_grain"] = list(bare)
    report["conclusion"] = conclude(report)
    report["warnings"] = warn(report)
    report["evaluation_seconds"] = round(time.perf_counter() - start, 2)
    gallery = make_gallery(pairs, report["memorisation"]) if pairs else []
    return report, choose_pictures(
        sets, generated, floor_sets, floor_info, num_pictures, gallery, seed
    )


def name_starts(untrained, transferred):
    """Return {key: (name, description, images)} of what networks drew before their training, by their models' names."""
    starts = {
        "untrained_" + to_key(name): (
            f"untrained {name}",
            f"images of {name} before this training",
            images,
        )
        for name, images in untrained.items()
    }
    return starts | {
        "transferred_" + to_key(name): (
            f"{name} before training (transferred)",
            f"images of {name} with the weights that it was given, before this training",
            images,
        )
        for name, images in transferred.items()
    }


def agree_on_number(num_images, models, reference, train, starts):
    """Return the number of images that every set has, at most `num_images`, and what to say where it is fewer."""
    counts = {"held-out views": len(reference), "training views": len(train)}
    counts |= {f"images of {model.name}": len(model.images) for model in models}
    counts |= {f"images of {name}": len(images) for name, _, images in starts.values()}
    scarcest = min(counts, key=counts.get)
    if counts[scarcest] < 2:
        raise ValueError(
            f"there are {counts[scarcest]} {scarcest}; a distance needs at least two of each set"
        )
    if counts[scarcest] >= num_images:
        return num_images, []
    note = f"{num_images:,} images of each set were asked for; there are only {counts[scarcest]:,} {scarcest}, so every set has that many."
    return counts[scarcest], [note]


def note_few_micrographs(groups, enough=5):
    """Return what to say where the held-out tiles come from too few micrographs for an interval over micrographs."""
    number = len(np.unique(groups)) if groups is not None else enough
    if number >= enough:
        return []
    few = "one held-out micrograph" if number == 1 else f"{number} held-out micrographs"
    return [
        f"The reference is {few}: the intervals show the scatter within {'it' if number == 1 else 'them'}, hardly that "
        "between micrographs, and are too narrow. Hold out more in training (--tiles.held-out-fraction) before believing "
        "a small difference."
    ]


def make_floors(train: ImageSet, floors, reconstruct, seed):
    """Make the floors' images from training tiles; return them and a name and a description of each, by key."""
    sets, info = {}, {}
    if "real" in floors:
        sets["real"] = train
        info["real"] = {
            "name": "real training tiles",
            "description": "real against real: the distance that a perfect generator would have",
        }
    if "reconstruction" in floors:
        for name, function in reconstruct.items():
            key = "reconstruction" if len(reconstruct) == 1 else "reconstruction_" + to_key(name)
            sets[key] = transform_images(train, function)
            info[key] = {
                "name": f"reconstructions by the {name}",
                "description": "training tiles through the autoencoder and back: "
                "what a diffusion model on its latents cannot undercut by much",
            }
    if "surrogates" in floors:
        surrogates = phase_randomised_surrogates(train.batch(range(len(train))), seed)
        clipped = fraction_outside(surrogates)
        sets["surrogates"] = ImageSet(to_uint8(surrogates), train.groups)
        info["surrogates"] = {
            "name": "phase-randomised surrogates",
            "description": "training tiles with their power spectrum and random phases: texture without structure, the level to beat; "
            f"{100 * clipped:.2f} % of the pixels clipped at black or white",
            "fraction_clipped": clipped,
        }
    if "noise" in floors:
        noise = np.random.default_rng([seed, 3]).normal(
            train.levels.mean(), train.levels.std(), train.levels.shape
        )
        sets["noise"] = ImageSet(noise.round().clip(0, 255).astype(np.uint8))
        info["noise"] = {
            "name": "white noise",
            "description": "Gaussian noise with the mean and variance of the training tiles",
        }
    return sets, info


def to_key(name):
    return name.lower().replace(" ", "_")


def refuse_names(names):
    """Refuse two models of one name, and names that floors have."""
    reserved = [
        name
        for name in names
        if name in FLOORS or name in ("held_out", "train") or names.count(name) > 1
    ]
    if reserved:
        raise ValueError(f"models need names of their own, not {', '.join(sorted(set(reserved)))}")


def refuse_sizes(sets):
    """Refuse sets whose images differ in pixels."""
    sizes = {name: images.resolution for name, images in sets.items()}
    expected = sizes["the micrographs"]
    wrong = [f"{name} ({h} x {w})" for name, (h, w) in sizes.items() if (h, w) != expected]
    if wrong:
        raise ValueError(
            f"the micrographs' tiles are {expected[0]} x {expected[1]} pixels, but not {', '.join(wrong)}: "
            "evaluate at the resolution of the generated images (--tiles resolution=...), or generate at that of the tiles"
        )


def describe_protocol(extractors, measurements, num_images, seed, reference, sets, split, notes):
    """Return what two reports must have in common to be compared, and what a reader must know of the measurement."""
    trained_on = "no view of them was trained on"
    if split == "leaky":
        trained_on = "other views of the same micrographs were trained on (leaky split), so that all distances flatter"
    micrographs = sets["held_out"].groups
    num_tiles = min(num_images, getattr(reference, "num_tiles", num_images))
    origin = f", {len(np.unique(micrographs))} micrographs" if micrographs is not None else ""
    return {
        "extractor": extractors[0].identity,
        "num_features": extractors[0].num_features,
        "num_images": num_images,
        "resolution": sets["held_out"].resolution[0],
        "grey_levels": "8 bit, generated and real alike",
        "reference": f"{num_images:,} views of {num_tiles:,} held-out tiles{origin}; {trained_on}",
        "reference_num_tiles": num_tiles,
        "reference_num_micrographs": len(np.unique(micrographs))
        if micrographs is not None
        else None,
        "train_reference": f"{num_images:,} views of training tiles, as the study has it",
        "reference_digest": content_digest(sets["held_out"])[:16],
        "train_digest": content_digest(sets["train"])[:16],
        "distances": {
            name: METRICS[name].definition for each in measurements for name in each["metrics"]
        },
        "intervals": "95 %, over generated images and over micrographs: linearised bootstrap of the distances, half-samples for "
        "precision, recall, density and coverage; they do not hold the scatter between training runs",
        "seed": seed,
        "notes": notes,
    }


def describe_model(model, num_images):
    rate = model.sample_images_per_second
    if rate is None and model.sample_seconds:
        rate = len(model.images) / model.sample_seconds
    return {
        "name": model.name,
        "family": model.family,
        "train_seconds": model.train_seconds,
        "num_images_seen": model.num_images_seen,
        "num_images": num_images,
        "sample_seconds": model.sample_seconds,
        "sample_images_per_second": rate,
        "sample_seconds_50000": 50_000 / rate if rate else None,
        "info": to_json(model.info),
        "curves": {stage: thin_out(to_json(lines)) for stage, lines in model.curves.items()},
    }


def thin_out(lines, most=MAX_CURVE_POINTS):
    """Keep at most `most` lines of a curve, the last one among them."""
    if len(lines) <= most:
        return lines
    return [lines[i] for i in np.linspace(0, len(lines) - 1, most).round().astype(int)]


def to_json(value):
    """Return `value` in plain JSON types: numpy and torch scalars become numbers, NaN and infinity None."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set) or np.ndim(value) > 0:
        return [to_json(item) for item in value]
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
