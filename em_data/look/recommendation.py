"""Which tiles suit a source: recommended flags, each with its reason."""

import re
import shlex
from collections import Counter
from dataclasses import dataclass, fields

import numpy as np

from em_data.config import DataConfig
from em_data.look.survey import Survey
from em_data.series import SERIES_PATTERN, find_series, strip_frame

RESOLUTIONS = (64, 128, 256)
LARGEST_DOWNSAMPLE = 64
SHARES = (1 / 16, 1 / 3)  # of a tile's side that a typical structure may take
BEST_SHARE = 1 / 7
FEW_TILES = 200
ALIKE = 0.95  # correlation of frames that show hardly anything new
FEWEST_FRAMES = 8  # that a frame step leaves of a stack
FIELD_PATTERN = r"(?i)(?:fov|hfw)[-_ ]?(?P<fov>\d+(?:\.\d+)?)[-_ ]?(?P<unit>nm|um|µm)"
FEWEST_SPECIMENS = 3  # for a split by specimen
SAME_SIZE = 0.01  # pixel sizes that differ by less are the same


@dataclass
class Advice:
    """Recommended settings.

    Attributes:
        flags: {name of the field of `DataConfig`: value}, in the order of the command line.
        reasons: [(flag, sentence)]; the flag is "" for what no flag changes.
        warnings: Sentences.
        size_px: Median, least and largest diameter of structures, or None if none stands out.
        num_tiles: With the recommended settings.
    """

    flags: dict
    reasons: list[tuple[str, str]]
    warnings: list[str]
    size_px: tuple[float, float, float] | None
    num_tiles: int

    @property
    def words(self) -> str:
        """The flags as they are pasted after a training command."""
        return " ".join(
            f"--tiles.{name.replace('_', '-')} {shlex.quote(_show(value))}"
            for name, value in self.flags.items()
        )

    def apply(self, config: DataConfig) -> DataConfig:
        """Return a configuration with the recommended flags."""
        values = {each.name: getattr(config, each.name) for each in fields(config)}
        return DataConfig(**(values | self.flags))


def _show(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def advise(survey: Survey, config: DataConfig) -> Advice:
    """Recommend settings for the micrographs of a survey; flags that the user gave are kept."""
    advice = Advice({}, [], [], measure_range(survey), 0)
    _advise_scale(survey, advice)
    _advise_split(survey, config, advice)
    _advise_frame_step(survey, config, advice)
    _advise_pixel_size(survey, config, advice)
    default = DataConfig()
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name not in advice.flags and value != getattr(default, each.name):
            advice.flags[each.name] = value
    return advice


def measure_range(survey: Survey) -> tuple[float, float, float] | None:
    """Return the median, the least and the largest diameter of structures in pixels."""
    sizes = [each.size.diameter_px for each in survey.samples if each.size is not None]
    return (float(np.median(sizes)), min(sizes), max(sizes)) if sizes else None


def count_tiles(shapes, resolution: int, downsample: int) -> int:
    """Return how many tiles micrographs of shapes (H, W) give."""
    side = resolution * downsample
    return sum((height // side) * (width // side) for height, width in shapes)


def choose_scale(size_px: float, largest_px: float, shapes) -> tuple[int, int]:
    """Return the resolution and the downsampling at which structures span a good part of a tile.

    Args:
        size_px: Diameter of a typical structure in pixels of the micrographs.
        largest_px: That of large ones; they should fit into a tile, too.
        shapes: (H, W) of the micrographs.
    """
    settings = [
        (resolution, factor)
        for resolution in RESOLUTIONS
        for factor in range(1, LARGEST_DOWNSAMPLE + 1)
        if count_tiles(shapes, resolution, factor)
    ]

    def judge(setting):
        resolution, factor = setting
        side = resolution * factor
        num_used = sum(min(shape) >= side for shape in shapes)
        num_tiles = count_tiles(shapes, resolution, factor)
        is_outside = not SHARES[0] <= size_px / side <= SHARES[1]
        misses = (num_used < 0.9 * len(shapes)) + is_outside + (largest_px > side / 2)
        few = max(0.0, np.log2(FEW_TILES / max(num_tiles, 1))) / 2
        loses_detail = 0.7 * (factor > 1 and resolution < RESOLUTIONS[-1])
        cost = abs(np.log2(size_px / side / BEST_SHARE)) + few + loses_detail
        return misses, cost, -resolution

    return min(settings or [(RESOLUTIONS[0], 1)], key=judge)


def _advise_scale(survey, advice):
    shapes = [each["shape"] for each in survey.micrographs]
    if advice.size_px is None:
        resolution = next((r for r in RESOLUTIONS[::-1] if count_tiles(shapes, r, 1)), 64)
        factor, shown = 1, "no size stands out in these micrographs; look at the tiles"
    else:
        typical = advice.size_px[0]
        sizes = [each.size.diameter_px for each in survey.samples if each.size is not None]
        large = float(np.percentile(sizes, 90))
        resolution, factor = choose_scale(typical, large, shapes)
        share = typical / (resolution * factor)
        shown = (
            f"structures of about {format_size(typical)} px take {describe_share(share)} of the "
            f"side of a tile of {resolution * factor} px"
        )
    advice.flags |= {"resolution": resolution, "downsample": factor}
    advice.num_tiles = count_tiles(shapes, resolution, factor)
    advice.reasons.append(("resolution", f"{shown[0].upper()}{shown[1:]}."))
    if factor == 1:
        text = "The micrographs keep their pixels."
    else:
        text = (
            f"Squares of {factor} x {factor} pixels are averaged, so that a tile of {resolution} "
            f"px shows {resolution * factor} px of the micrograph."
        )
    advice.reasons.append(("downsample", text))
    tiles = f"{advice.num_tiles:,} tiles of {len(shapes):,} micrograph{'s' * (len(shapes) > 1)}"
    advice.reasons.append(("", f"This gives {tiles}."))
    if not advice.num_tiles:
        advice.warnings.append(
            f"No micrograph has {resolution} x {resolution} px, so that there is nothing to train "
            "on. Use larger ones, or, if these are all there is, a smaller --tiles.resolution."
        )
        return
    if advice.num_tiles < FEW_TILES:
        advice.warnings.append(
            f"Only {tiles}: a model will copy them rather than learn from them. Add micrographs."
        )
    num_small = sum(min(shape) < resolution * factor for shape in shapes)
    if num_small:
        advice.warnings.append(
            f"{num_small} micrographs are smaller than a tile and are not used at this setting."
        )
    if advice.size_px and advice.size_px[2] > 3 * advice.size_px[1]:
        advice.warnings.append(
            f"Sizes differ much between micrographs ({format_size(advice.size_px[1])} to "
            f"{format_size(advice.size_px[2])} px). If they show different things or "
            "magnifications, train on folders of one kind."
        )


def format_size(size: float) -> str:
    """Return a length without its unit, with two digits or more."""
    return f"{size:.0f}" if size >= 10 else f"{size:.2g}"


def describe_share(share: float) -> str:
    """Return a share of a length as words, such as "a sixth"."""
    if share > 0.9:
        return f"{share:.2g} times the length"
    words = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth", 7: "a seventh"}
    number = round(1 / share)
    return words.get(number, f"1/{number}") if number > 1 else "most"


def _advise_split(survey, config, advice):
    """Recommend what is held out: specimens, micrographs, or last of all random views."""
    micrographs = survey.micrographs
    group_of, series = _join_copies(survey), find_series(micrographs)
    specimens = Counter(each["specimen"] for each in micrographs)
    by_name = Counter(strip_frame(each["name"]) for each in micrographs)
    if config.specimen_pattern is not None:
        advice.flags["specimen_pattern"] = config.specimen_pattern
    if None not in specimens and _are_specimens(specimens):
        split, text = (
            "specimen",
            f"{len(specimens)} specimens are named by folder, file name or data set",
        )
    elif any(each.is_named for each in series) and _are_specimens(by_name):
        split, text = "specimen", f"Names without the number of a frame give {len(by_name)} series"
        advice.flags["specimen_pattern"] = SERIES_PATTERN
    elif len(set(group_of.values())) > 1:
        split, text = "micrograph", "Whole micrographs are held out"
    else:
        split, text = "leaky", "All images belong together, so that no independent one is left"
        advice.warnings.append(
            "Training and held-out views will show the same micrographs, so that scores look too "
            "good. Add images of another area or specimen before you trust them."
        )
    parted = [
        each
        for each in series
        if len({group_of[micrographs[number]["name"]] for number in each.numbers}) > 1
    ]
    if split == "micrograph" and parted:
        longest = max(parted, key=lambda each: (each.is_named, len(each.files)))
        advice.warnings.append(
            f"{longest.describe()}. If they are one series, held-out frames resemble those of "
            "training, and scores look too good: add another area or specimen."
        )
    if split == "micrograph" and None not in specimens and len(specimens) > 1:
        text += (
            f"; if the images of each of the {len(specimens)} folders show one specimen, "
            "--tiles.split specimen is stricter"
        )
    advice.flags["split"] = split
    place = next(i for i, each in enumerate(advice.reasons) if each[0] == "")
    advice.reasons.insert(place, ("split", f"{text}."))
    if split == "specimen" and "specimen_pattern" in advice.flags:
        text = "A file's name without the number of its frame is its specimen."
        advice.reasons.insert(place + 1, ("specimen_pattern", text))
    order = ["resolution", "downsample", "split", "specimen_pattern"]
    advice.flags = {name: advice.flags[name] for name in order if name in advice.flags}


def _are_specimens(counts) -> bool:
    """Return True if a grouping is fit for a split: enough groups, none with most of the images."""
    num = sum(counts.values())
    return FEWEST_SPECIMENS <= len(counts) < num and max(counts.values()) <= 0.6 * num


def _join_copies(survey) -> dict[str, str]:
    """Return {name of a micrograph: its group}, with the groups of copies joined."""
    group_of = {each["name"]: each["group"] for each in survey.micrographs}
    for copies in survey.copies:
        joined = {group_of[name] for name in copies}
        first = min(joined)
        group_of = {name: first if group in joined else group for name, group in group_of.items()}
    return group_of


def _advise_frame_step(survey, config, advice):
    """Recommend to skip frames of stacks whose neighbours are almost equal."""
    if survey.similarity.get(1, 0) < ALIKE or config.frame_step > 1:
        return
    framed = [each["name"] for each in survey.micrographs if each["frame"] is not None]
    num_frames = max(Counter(each.rpartition("#")[0] for each in framed).values())
    steps = [step for step in survey.similarity if num_frames // step >= FEWEST_FRAMES]
    step = next((step for step in steps if survey.similarity[step] < ALIKE), max(steps, default=1))
    alike = f"{survey.similarity[1]:.2f}"
    text = f"Neighbouring frames of stacks are almost equal (correlation {alike})"
    if step > 1:
        advice.flags["frame_step"] = step
        advice.reasons.append(("frame_step", f"{text}. Every {step}th is as good as all."))
    else:
        advice.warnings.append(f"{text}: they count as little more than one micrograph.")


def list_pixel_sizes(micrographs: list[dict]) -> list[tuple[float | None, int]]:
    """Return [(pixel size in nm or None, number of micrographs)], sizes within 1 % together."""
    counts = Counter(each["pixel_size_nm"] for each in micrographs)
    known = sorted((size, num) for size, num in counts.items() if size)
    merged = []
    for size, num in known:
        if merged and size <= merged[-1][0] * (1 + SAME_SIZE):
            merged[-1] = (merged[-1][0], merged[-1][1] + num)
        else:
            merged.append((size, num))
    return merged + ([(None, counts[None])] if None in counts else [])


def _advise_pixel_size(survey, config, advice):
    sizes = list_pixel_sizes(survey.micrographs)
    unknown = [each["name"] for each in survey.micrographs if not each["pixel_size_nm"]]
    stated = [re.search(FIELD_PATTERN, f"{survey.name}/{name}") for name in unknown]
    if any(stated) and config.pixel_size_pattern is None:
        advice.flags["pixel_size_pattern"] = FIELD_PATTERN
        example, num = next(filter(None, stated)).group(), sum(map(bool, stated))
        text = f'The paths of {num} micrographs state a field of view, such as "{example}".'
        advice.reasons.append(("pixel_size_pattern", text))
    elif sizes[0][0] is None:
        advice.warnings.append(
            "No file states its pixel size: lengths will be in pixels. Add --tiles.pixel-size-nm "
            "NUMBER, or --tiles.pixel-size-pattern if the names tell it."
        )
    elif len(sizes) > 1:
        known = [size for size, _ in sizes if size]
        most = max((each for each in sizes if each[0]), key=lambda each: each[1])
        rest = f", {len(unknown)} unknown" if unknown else ""
        if len(known) == 1:
            advice.warnings.append(
                f"{len(unknown)} of {len(survey.micrographs)} micrographs do not state their "
                f"pixel size; the others have {known[0]:.4g} nm. If they have it, too, add "
                f"--tiles.pixel-size-nm {known[0]:.4g}."
            )
            return
        advice.warnings.append(
            f"Pixel sizes differ ({known[0]:.4g} to {known[-1]:.4g} nm{rest}): the same "
            "structure has several sizes in the tiles, and lengths will be in pixels. Better train "
            f"on one magnification: a folder with the {most[1]} micrographs of {most[0]:.4g} nm."
        )
