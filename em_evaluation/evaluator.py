"""Judge generated images of several models by one protocol."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from em_evaluation.classes import measure_classes
from em_evaluation.conclusions import conclude
from em_evaluation.environment import describe_environment
from em_evaluation.feature_cache import content_digest
from em_evaluation.feature_metrics import check_metrics
from em_evaluation.images import ImageSet, ModelImages, note_few_micrographs, read_images
from em_evaluation.interval import to_json
from em_evaluation.levels import LEVELS, LevelName, Sets, make_levels
from em_evaluation.measure_features import measure_features
from em_evaluation.memorisation import measure_memorisation
from em_evaluation.memorisation_report import make_gallery
from em_evaluation.microscopy import measure_microscopy
from em_evaluation.partial_copies import measure_partial_copies
from em_evaluation.pictures import choose_pictures
from em_evaluation.repeats import compare_repeats, summarise_repeats

FORMAT = 2
TITLE = "Synthetic electron micrographs compared with real ones"
MAX_CURVE_POINTS = 200
HIDDEN = ("source",)  # of the data's summary: a path


@dataclass(frozen=True)
class Protocol:
    """What decides the numbers of an evaluation, and which sections it has.

    metrics: names in `em_evaluation.feature_metrics.METRICS`; empty for all that apply.
    levels: reference levels to measure. num_images: images of each set, or fewer for all sets if
    one has fewer. seed: of drawn views, surrogates and intervals. num_pictures: images in each
    grid of the page. batch_size, use_cache, cache_dir: of `compute_features`.
    """

    metrics: tuple[str, ...] = ()
    levels: tuple[LevelName, ...] = LEVELS
    num_images: int = 1000
    seed: int = 0
    microscopy: bool = True
    memorisation: bool = True
    num_pictures: int = 16
    batch_size: int = 32
    use_cache: bool = True
    cache_dir: str | None = None

    def __post_init__(self):
        unknown = sorted(set(self.levels) - set(LEVELS))
        if unknown:
            raise ValueError(
                f"Unknown reference levels: {', '.join(unknown)}. Choose from {', '.join(LEVELS)}."
            )


@dataclass(frozen=True)
class RealImages:
    """The real images that models are compared with.

    held_out: `em_data.Views` such as held-out `Tiles`, or any `em_data.Images`: the reference.
    train: the training `Tiles`, or None if they are not known: then what needs them is left out.
    summary: what the report says about the data, `Data.summary`.
    notes: sentences on the sets, for the report.
    """

    held_out: Any
    train: Any
    summary: dict
    notes: tuple[str, ...] = ()


def evaluate_models(
    models: Sequence[ModelImages],
    real: RealImages,
    extractors: Sequence,
    protocol: Protocol | None = None,
    *,
    baselines: dict | None = None,
    reproduce: Sequence[str] = (),
    state: Any = None,
    log: Callable[[str], object] = print,
) -> tuple[dict, list[dict]] | None:
    """Compare models with held-out real images and with each other.

    Args:
        models, real: The generated images and the real ones.
        extractors: One `Extractor` or more; the conclusions rest on the first one.
        protocol: What is measured, and how.
        baselines: Published numbers to show beside these, from `read_baselines`.
        reproduce: Commands that make this report again.
        state: accelerate's, if several processes call this together and share the work.
        log: Gets a line per step.

    Returns:
        The arguments of `write_report`: the report and the pictures. None on all processes but
        the main one.

    Raises:
        ValueError: Names are not unique, or sets have too few images or different sizes.
    """
    start = time.perf_counter()
    protocol = protocol or Protocol()
    check_metrics(protocol.metrics, extractors)
    sets, notes = gather_sets(models, real, protocol)
    options = {name: getattr(protocol, name) for name in ("batch_size", "use_cache", "cache_dir")}
    options |= {"seed": protocol.seed, "log": log}
    measure = partial(measure_features, sets=sets, metrics=protocol.metrics, state=state)
    found = [measure(extractor, **options) for extractor in extractors]
    if found[0] is None:  # not the main process
        return None
    measurements, distances, remarks = zip(*found)
    notes += dict.fromkeys(note for each in remarks for note in each)
    sections, grids = measure_parts(models, real, sets, extractors[0], protocol, notes, **options)
    report = {
        "format": FORMAT,
        "title": TITLE,
        "dataset": {key: value for key, value in real.summary.items() if key not in HIDDEN},
        "protocol": describe_protocol(measurements[0], sets, real, protocol, notes),
        "models": [describe_model(model, len(sets.held_out)) for model in models],
        "levels": [level.to_json() for level in sets.levels],
        "measurements": measurements,
        **conclude_all(models, measurements, distances[0], sets, sections, protocol.seed),
        **sections,
        "baselines": baselines,
        "environment": describe_environment(),
        "reproduce": list(reproduce),
        "evaluation_seconds": round(time.perf_counter() - start, 2),
    }
    pictures = choose_pictures(sets, protocol.num_pictures, grids, protocol.seed)
    return to_json(report), pictures


def conclude_all(models, measurements, distances, sets: Sets, sections, seed: int) -> dict:
    """Return the conclusions on models, and on trainings that differ in the seed alone."""
    conclusions = conclude(measurements[0], distances, sets, sections["microscopy"], seed)
    repeats = summarise_repeats(models, measurements)
    names = [model.name for model in models]
    compared = compare_repeats(conclusions["comparisons"], repeats, names)
    return conclusions | {"repeats": repeats, "comparisons_of_repeats": compared}


def gather_sets(models, real: RealImages, protocol: Protocol) -> tuple[Sets, list[str]]:
    """Read all sets at one number of images; return them and notes for the reader."""
    num_images, notes = agree_on_number(models, real, protocol.num_images)
    held_out = read_images(real.held_out, num_images, protocol.seed)
    notes += [*real.notes, *note_few_micrographs(held_out.groups)]
    train = other = None
    if real.train is not None:
        other = train = read_images(real.train, num_images, protocol.seed + 1)
    elif len(real.held_out) >= 2 * num_images:
        other = read_images(real.held_out, num_images, first=num_images)
    elif "real" in protocol.levels:
        notes.append(
            f"Real images are not compared with real images: the reference has "
            f"{len(real.held_out):,} images, and {2 * num_images:,} are needed. Without this level "
            "there are no verdicts. Use a larger reference or fewer images (--num-images)."
        )
    generated = {model.name: read_images(model.images, num_images) for model in models}
    if protocol.memorisation and train is None:
        notes.append("Memorisation is not measured: the training images are not known (--data).")
    base = held_out if train is None else train
    levels = make_levels(protocol.levels, models, other, base, num_images, protocol.seed)
    refuse_names([model.name for model in models], [level.key for level in levels])
    sets = Sets(held_out, train, generated, tuple(levels))
    refuse_sizes(held_out.resolution, sets.judged)
    return sets, notes


def agree_on_number(models, real: RealImages, num_images: int) -> tuple[int, list[str]]:
    """Return the number of images of every set, and a note if it is smaller than asked for."""
    counts = {"reference images": len(real.held_out)}
    if real.train is not None:
        counts["training views"] = len(real.train)
    for model in models:
        counts[f"images of {model.name}"] = len(model.images)
        for kind in ("untrained", "transferred"):
            if getattr(model, kind) is not None:
                counts[f"images of {model.name} ({kind})"] = len(getattr(model, kind))
    scarcest = min(counts, key=lambda name: counts[name])
    if counts[scarcest] < 2:
        raise ValueError(
            f"There are {counts[scarcest]} {scarcest}, but a distance needs at least 2 of each set."
        )
    if counts[scarcest] >= num_images:
        return num_images, []
    note = (
        f"Every set has {counts[scarcest]:,} images instead of {num_images:,}, since there are "
        f"only {counts[scarcest]:,} {scarcest}."
    )
    return counts[scarcest], [note]


def refuse_names(names: list[str], reserved: list[str]) -> None:
    """Raise `ValueError` for two models of one name, and for names of other sets."""
    taken = {"held_out", "train", *LEVELS, *reserved}
    wrong = sorted({name for name in names if name in taken or names.count(name) > 1})
    if wrong:
        raise ValueError(
            f"Each model needs a name of its own, not {', '.join(wrong)}. Use --models NAME=MODEL."
        )


def refuse_sizes(expected: tuple[int, int], sets: dict[str, ImageSet]) -> None:
    """Raise `ValueError` for sets whose images differ from the reference in size."""
    sizes = {key: images.resolution for key, images in sets.items()}
    wrong = [f"{key} ({h} x {w})" for key, (h, w) in sizes.items() if (h, w) != expected]
    if wrong:
        raise ValueError(
            f"The real images have {expected[0]} x {expected[1]} pixels, but not "
            f"{', '.join(wrong)}. Cut the micrographs to the size of the generated images "
            "(--tiles resolution=...), or generate images of the size of the tiles."
        )


def measure_parts(
    models, real: RealImages, sets: Sets, extractor, protocol, notes: list, *, log, **options
):
    """Return the sections, None if left out, and grids of images; add notes for the reader.

    Copies of models with grain are sought without it, since it would hide them.
    """
    microscopy, memorisation, pairs = None, None, []
    if protocol.microscopy:
        pixel_size_nm = real.summary.get("pixel_size_nm")
        microscopy = measure_microscopy(sets, pixel_size_nm, seed=protocol.seed, log=log)
    if protocol.memorisation and real.train is not None:
        bare = {
            model.name: read_images(model.without_grain, len(sets.held_out))
            for model in models
            if model.without_grain is not None
        }
        images = (sets.generated | bare, sets.held_out, real.train)
        memorisation, pairs = measure_memorisation(*images, extractor=extractor, log=log, **options)
        if memorisation is not None:
            memorisation["partial"] = measure_partial_copies(*images, log=log)
            memorisation["without_grain"] = list(bare)
    classes, grids, remarks = measure_classes(models, real, extractor, log=log, **options)
    notes += remarks
    sections = {"microscopy": microscopy, "memorisation": memorisation, "classes": classes}
    return sections, [*make_gallery(pairs), *grids]


def describe_protocol(measurement, sets: Sets, real: RealImages, protocol, notes) -> dict:
    """Return what two reports must share to be compared, and what the reader must know."""
    number, groups = len(sets.held_out), sets.held_out.num_groups
    split = real.summary.get("split")
    num_tiles = min(number, getattr(real.held_out, "num_tiles", number))
    origin = "" if groups is None else f" of {groups} micrographs"
    if split is None:
        reference = f"{number:,} real images{origin}; whether models trained on them is not known"
    else:
        reference = f"{number:,} views of {num_tiles:,} held-out tiles{origin}, " + (
            "of micrographs that were trained on (leaky split): every distance is too good"
            if split == "leaky"
            else "never trained on"
        )
    return {
        "extractor": measurement["identity"],
        "num_features": measurement["num_features"],
        "num_images": number,
        "resolution": sets.held_out.resolution[0],
        "grey_levels": "8 bit, generated and real alike",
        "reference": reference,
        "reference_num_tiles": num_tiles,
        "reference_num_micrographs": groups,
        "reference_digest": content_digest(sets.held_out)[:16],
        "train_digest": None if sets.train is None else content_digest(sets.train)[:16],
        "intervals": "95 %, over generated images and over micrographs: linearised bootstrap of "
        "the distances, half-samples for precision, recall, density and coverage; they do not "
        "contain the scatter between training runs",
        "seed": protocol.seed,
        "notes": notes,
    }


def describe_model(model: ModelImages, num_images: int) -> dict:
    """Return what the report says about a model beside its metrics."""
    rate = model.sample_images_per_second
    if rate is None and model.sample_seconds:
        rate = len(model.images) / model.sample_seconds
    names = ("name", "family", "family_title", "train_seconds", "num_images_seen", "sample_seconds")
    return {name: getattr(model, name) for name in names} | {
        "num_images": num_images,
        "sample_images_per_second": rate,
        "sample_seconds_50000": 50_000 / rate if rate else None,
        "info": model.info,
        "curves": {stage: thin_out(lines) for stage, lines in model.curves.items()},
    }


def thin_out(lines: list, most=MAX_CURVE_POINTS) -> list:
    """Keep at most `most` lines of a curve, the last one among them."""
    if len(lines) <= most:
        return lines
    return [lines[i] for i in np.linspace(0, len(lines) - 1, most).round().astype(int)]
