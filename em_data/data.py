"""One call from the name of a source to the two sides of a split."""

import hashlib
import re
import shutil
from dataclasses import dataclass

import numpy as np

from em_data.checks import summarise_problems
from em_data.cutting import cut, make_cut_key
from em_data.files import find_cache_dir
from em_data.sources import open_source
from em_data.split import find_duplicates, name_some, split_views
from em_data.tiles import Cut, Tiles
from em_data.views import SYMMETRIES


@dataclass
class Data:
    """Tiles for training, tiles that training never sees, and a summary that goes into every report."""

    train: Tiles
    held_out: Tiles
    summary: dict

    @property
    def identity(self) -> dict:
        """What must not change in the middle of a run: the tiles and their split."""
        return {key: self.summary[key] for key in ("fingerprint", "split_hash", "num_micrographs")}


def load_data(source, config, *, log=print):
    """Read, check, cut and split micrographs; what was cut before is mapped from the cache.

    source: a folder of images, "synthetic", "hub:owner/name[@revision]", "hub-stream:owner/name[@revision]", "damaged-alloys:FOLDER",
    "datasets:NAME_OR_PATH", or a folder written by `Dataset.save_to_disk`.
    Everything that was left out, cropped, rescaled or clipped is said through `log`, once, and stands in the summary.
    Raises ValueError with the way out: no usable image, too few micrographs to hold one out, the same one on both sides.
    """
    cache_dir = find_cache_dir(config.cache_dir)
    opened = open_source(source, config, cache_dir)
    made = _load_cut(opened, config, cache_dir / "tiles", log)
    problems = summarise_problems(
        made.problems, len(opened.entries), config.on_bad_image, opened.ignored
    )
    num_symmetries = len(SYMMETRIES[config.symmetries])
    train, held_out = split_views(made.micrographs, made.micrograph_of_tile, num_symmetries, config)
    data = Data(Tiles(made, train, config.symmetries), Tiles(made, held_out, config.symmetries), {})
    data.summary = _summarise(source, opened, made, data, config)
    if problems:
        log(problems)
    for sentence in data.summary["ignored"][len(made.problems) :] + data.summary["notices"]:
        log(sentence)
    log(
        f"{opened.name}: {data.summary['num_micrographs']} micrographs, {data.summary['num_tiles']} tiles of "
        f"{config.resolution} px, {data.train.num_views} views to train on and {data.held_out.num_views} held out "
        f"(split by {config.split})"
    )
    return data


def _load_cut(opened, config, folder, log):
    folder = folder / make_cut_key(opened, config)
    if (folder / "cut.json").is_file():
        try:
            return Cut(folder)
        except (OSError, ValueError, KeyError) as error:
            log(f"the cached tiles are damaged ({error}): cutting again")
            shutil.rmtree(folder, ignore_errors=True)
    try:
        cut(opened, config, folder)
    except OSError as error:  # of the cache: an image that cannot be read is a ValueError
        raise ValueError(
            f"the tiles cannot be written to {folder.parent} ({error}); see --tiles.cache-dir"
        ) from error
    return Cut(folder)


def _summarise(source, opened, made, data, config):
    micrographs = made.micrographs
    held_out = sorted(
        {made.micrographs[i]["name"] for i in made.micrograph_of_tile[data.held_out._tiles]}
    )
    sizes = sorted({each["pixel_size_nm"] for each in micrographs if each["pixel_size_nm"]})
    all_known = all(each["pixel_size_nm"] for each in micrographs)
    agree = bool(sizes) and all_known and sizes[-1] - sizes[0] <= 0.01 * sizes[-1]
    specimens = sorted({each["specimen"] for each in micrographs if each["specimen"] is not None})
    clipped = np.average(
        [each["fraction_clipped"] for each in micrographs],
        weights=[n["num_tiles"] for n in micrographs],
    )
    num_views = data.train.num_views + data.held_out.num_views
    return {
        "name": opened.name,
        "source": str(source),
        "num_micrographs": len(micrographs),
        "num_held_out_micrographs": len(held_out),
        "num_tiles": made.num_tiles,
        "num_train_tiles": data.train.num_tiles,
        "num_held_out_tiles": data.held_out.num_tiles,
        "num_views": num_views,
        "num_train_views": data.train.num_views,
        "num_held_out_views": data.held_out.num_views,
        "symmetries": config.symmetries,
        "split": config.split,
        "split_hash": _hash_split(made, data, config),
        "held_out": held_out if config.split != "leaky" else [],
        "resolution": config.resolution,
        "downsample": config.downsample,
        "bits": 8 * made.dtype.itemsize,
        "intensity": config.intensity,
        "fraction_clipped": float(clipped),
        "pixel_size_nm": float(np.median(sizes)) if agree else None,
        "specimens": specimens,
        "fingerprint": made.key,
        "ignored": made.problems + opened.ignored,
        "notices": _list_notices(micrographs, sizes, agree, clipped, config),
    }


def _hash_split(made, data, config):
    """Hash the held-out side by content: its pixels by micrograph, or its views if the split is leaky."""
    digest = hashlib.sha256(config.split.encode())
    if config.split == "leaky":
        digest.update(data.held_out.fingerprint.encode())
    else:
        held_out = np.unique(made.micrograph_of_tile[data.held_out._tiles])
        digest.update("".join(sorted(made.micrographs[i]["pixel_hash"] for i in held_out)).encode())
    return digest.hexdigest()[:16]


def _list_notices(micrographs, sizes, agree, clipped, config):
    """Say once what holds for many micrographs, with their number and an example."""
    by_kind = {}
    for each in micrographs:
        for notice in each["notices"]:
            by_kind.setdefault(re.sub(r"[-+.\d]+", "#", notice), []).append(
                f"{each['name']}: {notice}"
            )
    notices = [
        same[0] + (f" (and {len(same) - 1} more micrographs likewise)" if len(same) > 1 else "")
        for same in by_kind.values()
    ]
    num_16_bit = sum(each["dtype"] == "uint16" for each in micrographs)
    if num_16_bit and config.intensity == "auto":
        notices.append(
            f"{num_16_bit} micrographs of 16 bits: scaled by their own least and largest grey level"
        )
    if 0 < num_16_bit < len(micrographs):
        notices.append(
            f"{len(micrographs) - num_16_bit} micrographs of 8 bits beside them: on their full range 0..255"
        )
    if config.intensity == "percentile":
        low, high = config.percentiles
        notices.append(
            f"scaled by percentiles {low:g} and {high:g} of each micrograph: {100 * clipped:.3g} % clipped"
        )
    if not sizes:
        notices.append("no file states its pixel size: unknown")
    elif not agree:
        notices.append(
            f"pixel sizes differ or are partly unknown ({sizes[0]:.4g} to {sizes[-1]:.4g} nm): unknown"
        )
    duplicates = [" = ".join(names) for names in find_duplicates(micrographs)]
    if duplicates:
        notices.append(
            f"exact duplicates (turned and flipped copies count): {name_some(duplicates)}"
        )
    if config.split == "leaky":
        notices.append(
            "leaky split: training and held-out views show the same micrographs, so that scores flatter"
        )
    return notices
