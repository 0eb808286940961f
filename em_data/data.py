"""From the name of a source to the two sides of a split, in one call.

Three kinds of sentence tell the user about the data:

- problems: One per image that cannot be used, from `em_data.cutting.cut`. They are kept with the
  cut. They are logged, or with `on_bad_image="fail"` raised together as a `ValueError`.
- ignored: What the source also holds and what is not looked at, such as label images. It comes from
  `Source.ignored`. `summary["ignored"]` lists the problems first and then these sentences.
- notices: What was done to images that are used, such as a cropped label bar, and warnings about
  the whole. Each micrograph has its own; `summary["notices"]` merges them and adds the warnings.
"""

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from em_data.config import DataConfig
from em_data.cutting import cut, make_cut_key
from em_data.files import find_cache_dir
from em_data.labels.describe import count_labels, describe_found
from em_data.near_copies import MAX_FOR_CROPS
from em_data.series import find_series
from em_data.sources import open_source
from em_data.split import describe_copies, group_micrographs, name_some, split_views
from em_data.tiles import Cut, Tiles


@dataclass(frozen=True)
class Data:
    """Tiles to train on, tiles that training never sees, and a summary for reports."""

    train: Tiles
    held_out: Tiles
    summary: dict

    @property
    def identity(self) -> dict:
        """What must not change in the middle of a run: the tiles and their split.

        `fingerprint` is `Cut.key`, the hash of the whole cut. It is not `Tiles.fingerprint`, which
        also depends on the side of the split and the symmetries.
        """
        return {key: self.summary[key] for key in ("fingerprint", "split_hash", "num_micrographs")}


def load_data(
    source: str | Path, config: DataConfig, *, log: Callable[[str], object] = print
) -> Data:
    """Read, check, cut and split micrographs. Tiles that were cut before come from the cache.

    What is left out, cropped, rescaled or clipped is logged once and listed in the summary.

    Args:
        source: A folder of images, "synthetic", "synthetic-varied", "synthetic-materials",
            "synthetic-other", "hub:owner/name[@revision]", "hub-stream:owner/name[@revision]",
            "damaged-alloys:FOLDER", "datasets:NAME_OR_PATH", or a folder written by
            `Dataset.save_to_disk`.
        config: `DataConfig`.
        log: Called with each line of text.

    Raises:
        ValueError: There is no usable image, there are too few micrographs to hold one out, or both
            sides would share a micrograph. The message says how to fix it.
    """
    opened, cut_tiles, problems = _open_and_cut(source, config, log, compares=True)
    try:
        views = split_views(
            cut_tiles.micrographs, cut_tiles.micrograph_of_tile, config, cut_tiles.near_copies
        )
    except ValueError as error:
        limits = [each for each in opened.ignored if "--tiles.num-micrographs" in each]
        raise ValueError(" ".join([str(error), *limits])) from error
    train, held_out = (Tiles(cut_tiles, view_ids, config.symmetries) for view_ids in views)
    summary = {"name": opened.name, "source": str(source)}
    summary |= _describe(cut_tiles, train, held_out, config)
    summary |= _describe_micrographs(cut_tiles, config) | _describe_labels(cut_tiles)
    summary["notices"] += describe_found(opened, cut_tiles.micrographs)
    summary["notices"] += _list_one_sided(cut_tiles, train, held_out)
    summary["notices"] += _list_uneven(cut_tiles, train, held_out, config)
    summary["ignored"] = cut_tiles.problems + opened.ignored
    for sentence in [*filter(None, [problems]), *opened.ignored, *summary["notices"]]:
        log(sentence)
    log(f"{opened.name}: {_describe_sides(summary)}")
    if summary["held_out"]:
        log(f"held out: {name_some(summary['held_out'])}")
    return Data(train, held_out, summary)


def load_tiles(
    source: str | Path, config: DataConfig, *, log: Callable[[str], object] = print
) -> Tiles:
    """Cut all micrographs of a source into tiles, each as recorded, without a split.

    Args:
        source, config, log: As of `load_data`.

    Raises:
        ValueError: There is no usable image.
    """
    config = replace(config, num_micrographs=None)
    opened, cut_tiles, problems = _open_and_cut(source, config, log, compares=False)
    notices = _list_notices(cut_tiles.micrographs, config)
    for sentence in [*filter(None, [problems]), *opened.ignored, *notices]:
        log(sentence)
    return Tiles(cut_tiles, np.arange(cut_tiles.num_tiles), "none")


def _describe_sides(summary: dict) -> str:
    """Return a sentence about the two sides of the split."""
    num, num_out = summary["num_micrographs"], summary["num_held_out_micrographs"]
    sides = f"{num - num_out} for training, {num_out} held out"
    if summary["split"] == "leaky":
        sides = "both sides show the same ones"
    return (
        f"{num:,} micrographs: {sides}; {summary['num_tiles']:,} tiles of "
        f"{summary['resolution']} px; {summary['num_train_views']:,} views to train on and "
        f"{summary['num_held_out_views']:,} held out (split by {summary['split']})"
    )


def _open_and_cut(source, config, log, compares):
    """Return the source, its tiles and a summary of the images that cannot be used, or None."""
    cache_dir = find_cache_dir(config.cache_dir)
    opened = open_source(source, config, cache_dir)
    cut_tiles = _load_cut(opened, config, cache_dir / "tiles", log, compares)
    if cut_tiles.labels:
        opened.ignored.append(
            f"{len(cut_tiles.labels)} images that look like labels by their pixels (two grey "
            "levels, or large regions of one level) are not used: "
            f"{name_some(cut_tiles.labels, 5)}"
        )
    return opened, cut_tiles, _summarise_problems(cut_tiles, opened, config.on_bad_image)


def _load_cut(opened, config, folder, log, compares):
    folder = folder / make_cut_key(opened, config)
    if (folder / "cut.json").is_file():
        try:
            cut_tiles = Cut(folder)
            if cut_tiles.near_copies is not None or not compares:
                return cut_tiles
        except (OSError, ValueError, KeyError, TypeError) as error:
            log(f"the cached tiles are damaged ({error}): cutting again")
        shutil.rmtree(folder, ignore_errors=True)
    try:
        cut(opened, config, folder, compares)
    except OSError as error:  # of the cache; an image that cannot be read is a ValueError
        raise ValueError(
            f"The tiles cannot be written to {folder.parent} ({error.strerror or error}). Repair "
            "that or free space there, or use another folder with --tiles.cache-dir."
        ) from error
    return Cut(folder)


def _summarise_problems(cut_tiles, opened, on_bad_image) -> str | None:
    """Return a summary of the images that cannot be used; raise it if they may not be skipped."""
    problems = cut_tiles.problems
    if not problems and cut_tiles.micrographs:
        return None
    num = len(cut_tiles.micrographs) + len(cut_tiles.labels) + len(problems)
    text = "\n  ".join([f"{len(problems)} of {num} images cannot be used:", *problems])
    if not cut_tiles.micrographs:
        others = "".join(f"\n  not looked at: {each}" for each in opened.ignored)
        raise ValueError(f"{text}{others}\nNothing is left. The reasons are listed above.")
    if on_bad_image == "fail":
        raise ValueError(f"{text}\nRepair or remove them, or use --tiles.on-bad-image skip.")
    return text


def _describe(cut_tiles, train, held_out, config) -> dict:
    """Return what the summary says about the tiles and the split."""
    micrographs = [cut_tiles.micrographs[i] for i in held_out.micrograph_ids]
    is_leaky = config.split == "leaky"
    hashes = sorted(each["pixel_hash"] for each in micrographs)
    held = config.split + (held_out.fingerprint if is_leaky else "".join(hashes))
    names = ("symmetries", "split", "resolution", "downsample", "intensity")
    return {name: getattr(config, name) for name in names} | {
        "num_micrographs": len(cut_tiles.micrographs),
        "num_held_out_micrographs": len(micrographs),
        "num_tiles": cut_tiles.num_tiles,
        "num_train_tiles": train.num_tiles,
        "num_held_out_tiles": held_out.num_tiles,
        "num_views": train.num_views + held_out.num_views,
        "num_train_views": train.num_views,
        "num_held_out_views": held_out.num_views,
        "split_hash": hashlib.sha256(held.encode()).hexdigest()[:16],
        "held_out": [] if is_leaky else sorted({each["name"] for each in micrographs}),
        "bits": 8 * cut_tiles.dtype.itemsize,
        "fingerprint": cut_tiles.key,
    }


def _describe_labels(cut_tiles) -> dict:
    """Return what the summary says about defects and classes, by micrograph."""
    kinds, classes = count_labels(cut_tiles.micrographs)
    return {
        "kinds": kinds,
        "classes": classes,
        "num_labelled_micrographs": sum(
            each["defects"] is not None for each in cut_tiles.micrographs
        ),
    }


def _list_one_sided(cut_tiles, train, held_out) -> list[str]:
    """Return a sentence per kind or class that only one side of the split has."""
    sides = [
        count_labels([cut_tiles.micrographs[i] for i in side.micrograph_ids])
        for side in (train, held_out)
    ]
    return [
        f"{what} only in {side}: {name_some(sorted(own), 5)}. Use another --tiles.seed or a larger "
        "--tiles.held-out-fraction if both sides need them."
        for i, what in enumerate(("kinds of defects", "classes"))
        for side, (here, there) in (("training", sides), ("held-out data", sides[::-1]))
        if (own := set(here[i]) - set(there[i]))
    ]


def _list_uneven(cut_tiles, train, held_out, config) -> list[str]:
    """Return a sentence if much more than asked for is held out, as a large group is."""
    share = held_out.num_views / (train.num_views + held_out.num_views)
    num, num_all = len(held_out.micrograph_ids), len(cut_tiles.micrographs)
    if config.split == "leaky" or num == 1 or share < 2 * config.held_out_fraction:
        return []
    return [
        f"{share:.0%} of the views are held out, not {config.held_out_fraction:.0%}: {num} of "
        f"{num_all} micrographs. Stacks, specimens, near copies and large micrographs stay whole; "
        "another --tiles.seed holds out others."
    ]


def _describe_micrographs(cut_tiles, config) -> dict:
    """Return what the summary says about all micrographs together."""
    micrographs = cut_tiles.micrographs
    sizes = sorted({each["pixel_size_nm"] for each in micrographs if each["pixel_size_nm"]})
    all_known = all(each["pixel_size_nm"] for each in micrographs)
    agree = bool(sizes) and all_known and sizes[-1] - sizes[0] <= 0.01 * sizes[-1]
    notices = _list_notices(micrographs, config)
    if not sizes:
        notices.append(
            "no file states its pixel size; give it with --tiles.pixel-size-nm, or with "
            "--tiles.pixel-size-pattern if the paths hold it"
        )
    elif not agree:
        notices.append(
            f"pixel sizes differ or are partly unknown ({sizes[0]:.4g} to {sizes[-1]:.4g} nm): "
            "unknown"
        )
    notices += describe_copies(micrographs, cut_tiles.near_copies, config.split)
    if len(micrographs) > MAX_FOR_CROPS:
        notices.append(
            f"near copies among more than {MAX_FOR_CROPS:,} micrographs: crops are not looked for"
        )
    if config.split != "leaky":
        notices += _list_series_notices(micrographs, cut_tiles.near_copies, config.split)
    if config.split == "leaky":
        notices.append(
            "leaky split: training and held-out views show the same micrographs, so scores are "
            "too good"
        )
    return {
        "fraction_clipped": _average_clipped(micrographs),
        "pixel_size_nm": float(np.median(sizes)) if agree else None,
        "specimens": sorted({each["specimen"] for each in micrographs} - {None}),
        "notices": notices,
    }


def _list_series_notices(micrographs, near_copies, split) -> list[str]:
    """Return a hint per series of files that the split may part.

    A series whose frames are all near copies of one another stays on one side and needs no hint.
    """
    groups = group_micrographs(micrographs, split, near_copies)
    counts = {each: len({groups[i] for i in each.numbers}) for each in find_series(micrographs)}
    if split == "specimen":
        return [
            f"{series.describe()}, but lie in {num} specimens. If they are one series, give them "
            "one specimen with --tiles.specimen-pattern or one folder."
            for series, num in counts.items()
            if num > 1
        ]
    return [
        f"{series.describe()}; {_describe_joined(series, num)}. If they are one series, held-out "
        "frames resemble those of training: use --tiles.split specimen, with "
        "--tiles.specimen-pattern."
        for series, num in counts.items()
        if num > 1
    ]


def _describe_joined(series, num_groups) -> str:
    """Say how far near copies keep a series together."""
    if num_groups == len(series.files):
        return "no near copies were found among them"
    return f"near copies keep some of them together, in {num_groups} groups"


def merge_notices(micrographs) -> list[str]:
    """Return notices of single micrographs; those that differ only in numbers are merged."""
    by_kind = {}
    for each in micrographs:
        for notice in each["notices"]:
            kind = re.sub(r"[-+.\d]+", "#", notice)
            by_kind.setdefault(kind, []).append(f"{each['name']}: {notice}")
    return [
        same[0] + (f" (and {len(same) - 1} more micrographs likewise)" if len(same) > 1 else "")
        for same in by_kind.values()
    ]


def _average_clipped(micrographs) -> float:
    weights = [each["num_tiles"] for each in micrographs]
    return float(np.average([each["fraction_clipped"] for each in micrographs], weights=weights))


def _list_notices(micrographs, config) -> list[str]:
    """Return sentences on how the micrographs were read and scaled."""
    notices, clipped = merge_notices(micrographs), _average_clipped(micrographs)
    num_16_bit = sum(each["dtype"] == "uint16" for each in micrographs)
    if num_16_bit and config.intensity == "auto":
        notices.append(
            f"{num_16_bit} micrographs of 16 bits: each scaled by its least and largest grey "
            f"level, spikes apart ({100 * clipped:.2g} % of the pixels clipped)"
        )
    if 0 < num_16_bit < len(micrographs):
        num_8_bit = len(micrographs) - num_16_bit
        notices.append(f"{num_8_bit} micrographs of 8 bits beside them: on their full range 0..255")
    if config.intensity == "percentile":
        low, high = config.percentiles
        notices.append(
            f"scaled by percentiles {low:g} and {high:g} of each micrograph: "
            f"{100 * clipped:.3g} % clipped"
        )
    return notices
