"""Which part of the data training never sees."""

import hashlib
from collections import defaultdict

import numpy as np

from em_data.sampler import make_permutation
from em_data.views import SYMMETRIES


def split_views(micrographs, micrograph_of_tile, config):
    """Return the training and the held-out views, sorted ids = tile * num_symmetries + symmetry.

    By micrograph or by specimen, a side holds all views of its tiles. The leaky split draws views
    at random, as the study did.
    """
    num_symmetries = len(SYMMETRIES[config.symmetries])
    num_views = len(micrograph_of_tile) * num_symmetries
    if config.split == "leaky":
        order = make_permutation(num_views, config.seed)
        num_held_out = count_held_out(num_views, config)
        return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
    held_out_groups = choose_groups(list_groups(micrographs, config.split), config)
    is_held_out = np.array([_group(each, config.split) in held_out_groups for each in micrographs])
    sides = ([m for m, out in zip(micrographs, is_held_out) if out == side] for side in (0, 1))
    check_split(*sides)
    views = np.arange(num_views).reshape(-1, num_symmetries)
    out = is_held_out[micrograph_of_tile]
    return views[~out].ravel(), views[out].ravel()


def count_held_out(num, config) -> int:
    """Return how many of `num` groups or views are held out: at least one, and not all."""
    return min(max(1, round(config.held_out_fraction * num)), num - 1)


def _group(micrograph, split):
    return micrograph["specimen"] if split == "specimen" else micrograph["group"]


def list_groups(micrographs, split) -> list[str]:
    """Return the sorted micrographs or specimens that a split keeps whole; there must be two."""
    if split == "specimen":
        unknown = [each["name"] for each in micrographs if each["specimen"] is None]
        if unknown:
            raise ValueError(
                f"The specimen of {name_some(unknown)} is unknown. Put the images of each specimen "
                "into a folder of its own, or use --tiles.specimen-pattern or "
                "--tiles.split micrograph."
            )
    groups = sorted({_group(each, split) for each in micrographs})
    if len(groups) < 2:
        other = "leaky (both sides then see the same micrograph)"
        other = "micrograph or leaky" if split == "specimen" else other
        num, kind = len(micrographs), split
        if split == "micrograph" and num > 1:
            kind = f"stack of {num} frames, which no split parts,"
        raise ValueError(
            f"There is only one {kind} ({groups[0]}), so none can be held out of training. Add "
            f"micrographs, or use --tiles.split {other}."
        )
    return groups


def choose_groups(groups, config) -> set[str]:
    """Choose the groups to hold out: the least hashes, so that a new group changes few others."""

    def hash_group(group):
        return hashlib.sha256(f"{config.seed}:{group}".encode()).digest()

    return set(sorted(groups, key=hash_group)[: count_held_out(len(groups), config)])


def check_split(train, held_out) -> None:
    """Raise a ValueError if two lists of micrographs share one or its exact duplicate."""
    groups, by_hash = {each["group"] for each in train}, defaultdict(list)
    for each in train:
        by_hash[each["pixel_hash"]].append(each["name"])
    shared = [each["name"] for each in held_out if each["group"] in groups]
    if shared:
        raise ValueError(
            f"Training and held-out data share {name_some(shared)}; hold out whole micrographs."
        )
    pairs = [
        f"{other} = {each['name']}"
        for each in held_out
        for other in by_hash.get(each["pixel_hash"], ())
    ]
    if pairs:
        raise ValueError(
            "Training and held-out data share exact duplicates (rotated and flipped copies count): "
            f"{name_some(pairs, 20)}. Remove one of each pair, or use --tiles.split leaky and do "
            "not trust the scores."
        )


def find_duplicates(micrographs) -> list[list[str]]:
    """Return the names of micrographs with the same pixels, also rotated or flipped."""
    by_hash = defaultdict(list)
    for each in micrographs:
        by_hash[each["pixel_hash"]].append(each["name"])
    return [names for names in by_hash.values() if len(names) > 1]


def name_some(names, most=10) -> str:
    """Join at most `most` names and count the rest."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
