"""What a source of micrographs holds, in one pass over all of its files."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from em_data.cutting import average_area, find_pixel_size, read_all
from em_data.intensity import FULL_RANGE, find_levels
from em_data.label_images import is_label_image
from em_data.labels.describe import describe_found
from em_data.look.labels import LabelTally
from em_data.look.pixels import to_display
from em_data.look.structure_size import StructureSize, measure_structure_size, subtract_background
from em_data.micrograph import Micrograph
from em_data.near_copies import (
    MAX_FOR_CROPS,
    Signature,
    find_near_copies,
    make_signature,
    pair_equals,
)
from em_data.sources.base import Source
from em_data.split import group_micrographs, name_some
from em_data.views import hash_pixels

MIN_SIDE_PX = 32  # smaller images cannot become tiles
MOST_MEASURED = 32  # micrographs whose structures are measured; up to twice as many at the end
MOST_KEPT = 6  # micrographs whose pixels are kept for pictures of tiles; up to twice as many
KEPT_SIDE_PX = 4096
MOST_FRAMES = 256  # of a stack, which are compared
REDUCED_PX = 64
THUMBNAIL_PX = 192
HISTOGRAM_BINS = 64
HISTOGRAM_PIXELS = 65_536  # of a micrograph, at most


@dataclass
class Sampled:
    """A micrograph whose structures are measured. `image` is kept of few, `thumbnail` of all."""

    number: int  # in `Survey.micrographs`
    size: StructureSize | None
    thumbnail: np.ndarray  # uint8 [h, w], on the grey levels that a model sees
    image: np.ndarray | None = None  # uint8 or uint16 [H, W]
    levels: tuple[int, int] = (0, 255)


@dataclass
class Survey:
    """What a source holds.

    Attributes:
        name: Name of the source.
        num_files: Number of entries, read or not.
        micrographs: One dictionary per micrograph: name, folder, group, specimen, frame, shape,
            bits, pixel_size_nm, pixel_hash, share_darkest and share_brightest (of pixels at the
            ends of the type), share_clipped, defects ({kind: number} or None), class_name, notices.
        problems: One sentence per image that cannot be used.
        ignored: Sentences on what else the source holds.
        histogram: float64 [HISTOGRAM_BINS], share of pixels over the range that a model sees.
        samples: Micrographs spread over the source.
        similarity: {k: median correlation of frames of a stack that are k apart}.
        copies: Lists of names of micrographs that are copies of each other.
        found: Sentences on the labels and classes that were found.
        labels: Their numbers, sizes and pictures.
    """

    name: str
    num_files: int
    micrographs: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(HISTOGRAM_BINS))
    samples: list[Sampled] = field(default_factory=list)
    similarity: dict[int, float] = field(default_factory=dict)
    copies: list[list[str]] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    labels: LabelTally = field(default_factory=LabelTally)


def survey_source(source: Source, config, progress: Callable = lambda entries: entries) -> Survey:
    """Read all micrographs of a source once.

    Args:
        source: As of `em_data.sources.open_source`.
        config: `DataConfig`.
        progress: Wraps the list of entries, as tqdm does.

    Raises:
        ValueError: No image can be used. The message lists the reasons.
    """
    survey = Survey(source.name, len(source.entries), ignored=source.ignored)
    measured, kept, stacks = Spread(MOST_MEASURED), Spread(MOST_KEPT), defaultdict(list)
    signatures, labels, with_points = [], [], len(source.entries) <= MAX_FOR_CROPS
    for entry, micrograph in read_all(progress(source.entries), MIN_SIDE_PX, survey.problems):
        if is_label_image(micrograph.image, micrograph.name):
            labels.append(micrograph.name)
            continue
        signatures.append(make_signature(micrograph.image, with_points))
        micrograph.pixel_size_nm = find_pixel_size(source, micrograph, config)
        number = len(survey.micrographs)
        levels = find_levels(micrograph.image, config.intensity, config.percentiles)
        survey.micrographs.append(_list_facts(entry, micrograph, levels[2]))
        survey.labels.add(micrograph, levels[:2])
        survey.histogram += _count_levels(micrograph.image, levels)
        stack = entry.group, micrograph.name.rpartition("#")[0]  # of one channel
        if "frame" in micrograph.metadata and len(stacks[stack]) < MOST_FRAMES:
            stacks[stack].append(_reduce(micrograph.image))
        if measured.take(number):
            is_kept = kept.take(number)
            survey.samples.append(_sample(number, micrograph.image, levels[:2], is_kept))
            survey.samples = [each for each in survey.samples if each.number % measured.step == 0]
            for each in survey.samples:
                if each.number % kept.step:
                    each.image = None
    if labels:
        survey.ignored.append(
            f"{len(labels)} images that look like labels by their pixels: {name_some(labels, 5)}"
        )
    if not survey.micrographs:
        reasons = "".join(f"\n  {each}" for each in [*survey.problems, *survey.ignored])
        raise ValueError(f"{source.name}: no image can be used.{reasons}")
    survey.histogram /= len(survey.micrographs)
    survey.similarity = compare_frames(stacks.values())
    survey.copies = find_copies(survey.micrographs, signatures)
    survey.found = describe_found(source, survey.micrographs)
    return survey


def find_copies(micrographs: list[dict], signatures: list[Signature]) -> list[list[str]]:
    """Return the names of micrographs that are exact or near copies of each other.

    Frames of one stack are kept together anyway and are listed only with copies elsewhere.
    """
    known = [pair_equals(each[key] for each in micrographs) for key in ("group", "pixel_hash")]
    pairs = find_near_copies(signatures, chain(*known))
    by_group = defaultdict(list)
    for micrograph, group in zip(micrographs, group_micrographs(micrographs, "micrograph", pairs)):
        by_group[group].append(micrograph)
    return [
        [each["name"] for each in members]
        for members in by_group.values()
        if len({each["group"] for each in members}) > 1
    ]


class Spread:
    """Chooses evenly spread numbers of a series whose length is not known beforehand."""

    def __init__(self, most: int):
        self.most, self.step = most, 1

    def take(self, number: int) -> bool:
        """Return True if a number is taken; those that are no multiple of `step` are dropped."""
        if number % self.step:
            return False
        if number // self.step >= 2 * self.most:
            self.step *= 2
        return number % self.step == 0


def _list_facts(entry, micrograph: Micrograph, share_clipped) -> dict:
    image, metadata = micrograph.image, micrograph.metadata
    name = micrograph.name.partition("#")[0]
    return {
        "name": micrograph.name,
        "folder": Path(name).parent.as_posix(),
        "group": entry.group,
        "specimen": entry.specimen or micrograph.specimen,
        "frame": metadata.get("frame"),
        "shape": image.shape,
        "bits": 8 * image.itemsize,
        "pixel_size_nm": micrograph.pixel_size_nm,
        "pixel_hash": hash_pixels(image),
        "share_darkest": float((image == 0).mean()),
        "share_brightest": float((image == FULL_RANGE[image.dtype]).mean()),
        "share_clipped": share_clipped + metadata.get("num_spikes", 0) / image.size,
        "defects": None
        if micrograph.defects is None
        else dict(Counter(each.kind for each in micrograph.defects)),
        "class_name": micrograph.class_name,
        "notices": list(metadata.get("notices", ())),
    }


def _count_levels(image, levels):
    """Return the share of pixels in each bin of the range of levels, float64 [HISTOGRAM_BINS]."""
    low, high, _ = levels
    step = max(1, int(np.ceil(np.sqrt(image.size / HISTOGRAM_PIXELS))))
    pixels = np.clip(image[::step, ::step], low, high)
    counts, _ = np.histogram(pixels, bins=HISTOGRAM_BINS, range=(low, max(high, low + 1)))
    return counts / pixels.size


def _sample(number, image, levels, is_kept):
    size = measure_structure_size(image)
    factor = max(1, min(max(image.shape) // THUMBNAIL_PX, min(image.shape)))
    thumbnail = to_display(average_area(image, factor), levels)
    sample = Sampled(number, size, thumbnail, levels=levels)
    if is_kept:
        top, left = (max(0, length - KEPT_SIDE_PX) // 2 for length in image.shape)
        sample.image = image[top : top + KEPT_SIDE_PX, left : left + KEPT_SIDE_PX].copy()
    return sample


def _reduce(image):
    """Return an image of about REDUCED_PX a side without background, flat and of unit length."""
    factor = max(1, min(image.shape) // REDUCED_PX)
    flat = subtract_background(average_area(image, factor).astype(np.float32)).ravel()
    flat -= flat.mean()
    return flat / (np.linalg.norm(flat) + 1e-9)


def compare_frames(stacks) -> dict[int, float]:
    """Return {k: median correlation of frames k apart} for k = 1, 2, 4, ... over all stacks."""
    similarity, step = {}, 1
    while True:
        pairs = [
            float(first @ second)
            for stack in stacks
            for first, second in zip(stack, stack[step:])
            if len(first) == len(second)
        ]
        if not pairs:
            return similarity
        similarity[step] = float(np.median(pairs))
        step *= 2
