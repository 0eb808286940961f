"""Which part of the data training never sees."""

import hashlib
from collections import defaultdict

import numpy as np

from em_data.sampler import make_permutation


def split_views(micrographs, micrograph_of_tile, num_symmetries, config):
    """Split into training and held-out views.

    micrographs: list of dicts with name, group, specimen and pixel_hash. micrograph_of_tile: int [num_tiles], index into it.
    Returns (train, held_out), sorted int64 view ids, where view = tile * num_symmetries + symmetry. By micrograph or by
    specimen, a side holds all views of its tiles; "leaky" draws views at random, as the study did.
    Raises ValueError if the two sides would share a micrograph or its exact duplicate.
    """
    num_views = len(micrograph_of_tile) * num_symmetries
    if config.split == "leaky":
        order = make_permutation(num_views, config.seed)
        num_held_out = min(max(1, round(config.held_out_fraction * num_views)), num_views - 1)
        return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
    held_out_groups = choose_groups(list_groups(micrographs, config.split), config)
    is_held_out = np.array([_group(each, config.split) in held_out_groups for each in micrographs])
    check_split(
        [each for each, out in zip(micrographs, is_held_out) if not out],
        [each for each, out in zip(micrographs, is_held_out) if out],
    )
    views = np.arange(num_views).reshape(-1, num_symmetries)
    out = is_held_out[micrograph_of_tile]
    return views[~out].ravel(), views[out].ravel()


def _group(micrograph, split):
    return micrograph["specimen"] if split == "specimen" else micrograph["group"]


def list_groups(micrographs, split):
    """Return the sorted micrographs or specimens that a split keeps whole; ValueError if there are too few."""
    if split == "specimen":
        unknown = [each["name"] for each in micrographs if each["specimen"] is None]
        if unknown:
            raise ValueError(
                f"the specimen of {name_some(unknown)} is unknown; put each specimen's images in a folder of its own, "
                "give --tiles.specimen-pattern, or use --tiles.split micrograph"
            )
    groups = sorted({_group(each, split) for each in micrographs})
    if len(groups) < 2:
        other = (
            "micrograph or leaky"
            if split == "specimen"
            else "leaky (both sides then see the same micrograph)"
        )
        raise ValueError(
            f"only one {split} ({groups[0]}): none can be held out of training. "
            f"Add micrographs, or use --tiles.split {other}"
        )
    return groups


def choose_groups(groups, config):
    """Choose the groups to hold out: those whose hash with the seed is least, so that a new one changes few others."""
    num_held_out = min(max(1, round(config.held_out_fraction * len(groups))), len(groups) - 1)
    return set(
        sorted(
            groups, key=lambda group: hashlib.sha256(f"{config.seed}:{group}".encode()).digest()
        )[:num_held_out]
    )


def check_split(train, held_out):
    """Raise ValueError, naming the files, if two lists of micrographs share one or an exact duplicate of its pixels."""
    by_name, by_hash = {each["group"] for each in train}, defaultdict(list)
    for each in train:
        by_hash[each["pixel_hash"]].append(each["name"])
    shared = [each["name"] for each in held_out if each["group"] in by_name]
    if shared:
        raise ValueError(
            f"training and held-out data share {name_some(shared)}; hold out whole micrographs"
        )
    pairs = [
        f"{other} = {each['name']}"
        for each in held_out
        for other in by_hash.get(each["pixel_hash"], ())
    ]
    if pairs:
        raise ValueError(
            f"training and held-out data share exact duplicates (turned and flipped copies count): {name_some(pairs, 20)}. "
            "Remove one of each pair, or use --tiles.split leaky and do not trust the scores"
        )


def find_duplicates(micrographs):
    """Return the lists of names of micrographs with the same pixels, turned and flipped copies included."""
    by_hash = defaultdict(list)
    for each in micrographs:
        by_hash[each["pixel_hash"]].append(each["name"])
    return [names for names in by_hash.values() if len(names) > 1]


def name_some(names, most=10):
    """Join names for a message, at most so many, and count the rest."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
