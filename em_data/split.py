"""Which part of the data training never sees."""

import hashlib
from collections import defaultdict

import numpy as np

from em_data.near_copies import Groups, pair_equals
from em_data.sampler import make_permutation
from em_data.views import SYMMETRIES


def split_views(micrographs, micrograph_of_tile, config, near_copies=()):
    """Return the training and the held-out views, sorted ids = tile * num_symmetries + symmetry.

    By micrograph or by specimen, a side holds all views of its tiles. The leaky split draws views
    at random, as the study did. near_copies: pairs of numbers of micrographs.
    """
    num_symmetries = len(SYMMETRIES[config.symmetries])
    num_views = len(micrograph_of_tile) * num_symmetries
    if config.split == "leaky":
        order = make_permutation(num_views, config.seed)
        num_held_out = count_held_out(num_views, config)
        return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
    groups = group_micrographs(micrographs, config.split, near_copies)
    classes = {group: each.get("class_name") for group, each in zip(groups, micrographs)}
    names = list_groups(groups, micrographs, config.split)
    held_out_groups = choose_groups(names, config, classes)
    is_held_out = np.array([group in held_out_groups for group in groups])
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


def group_micrographs(micrographs, split, near_copies=()) -> list[str]:
    """Return the name of each micrograph's group, which a split keeps whole.

    That is the micrograph or its specimen. Groups that share near copies or exact duplicates become
    one, which has the first of their names.
    """
    if split == "specimen":
        unknown = [each["name"] for each in micrographs if each["specimen"] is None]
        if unknown:
            raise ValueError(
                f"The specimen of {name_some(unknown)} is unknown. Put the images of each specimen "
                "into a folder of its own, or use --tiles.specimen-pattern or "
                "--tiles.split micrograph."
            )
    names = [_group(each, split) for each in micrographs]
    merged, first = Groups(len(names)), {}
    for i, j in [*pair_equals(names), *_pair_copies(micrographs, near_copies)]:
        merged.join(i, j)
    for i, name in enumerate(names):
        root = merged.find(i)
        first[root] = min(name, first.get(root, name))
    return [first[merged.find(i)] for i in range(len(names))]


def _pair_copies(micrographs, near_copies):
    """Return pairs of exact duplicates and of near copies."""
    return [*pair_equals(each["pixel_hash"] for each in micrographs), *map(tuple, near_copies)]


def list_groups(groups, micrographs, split) -> list[str]:
    """Return the sorted groups of micrographs; there must be two."""
    names = sorted(set(groups))
    if len(names) < 2:
        other = "leaky (both sides then see the same micrograph)"
        other = "micrograph or leaky" if split == "specimen" else other
        separate, num = {_group(each, split) for each in micrographs}, len(micrographs)
        least = f"There is only one {split} ({names[0]})"
        if len(separate) > 1:
            what = f"All {len(separate)} {split}s ({name_some(sorted(separate), 4)})"
            least = f"{what} show one scene, as near copies or exact duplicates"
        elif split == "micrograph" and num > 1:
            stack = f"stack of {num} frames, which no split parts,"
            least = f"There is only one {stack} ({names[0]})"
        raise ValueError(
            f"{least}, so none can be held out of training. Add micrographs, or use --tiles.split "
            f"{other}."
        )
    return names


def choose_groups(groups, config, classes=None) -> set[str]:
    """Choose the groups to hold out: the least hashes, so that a new group changes few others.

    The classes, {group: class}, take turns. The last group of a class is held out only if there is
    no other.
    """

    def hash_group(group):
        return hashlib.sha256(f"{config.seed}:{group}".encode()).digest()

    by_class = defaultdict(list)
    for group in sorted(groups, key=hash_group):
        by_class[(classes or {}).get(group)].append(group)
    ranked = [
        (turn == len(each) - 1, turn, hash_group(group), group)
        for each in by_class.values()
        for turn, group in enumerate(each)
    ]
    return {group for *_, group in sorted(ranked)[: count_held_out(len(groups), config)]}


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


def describe_copies(micrographs, near_copies, split) -> list[str]:
    """Return a sentence each on exact duplicates and on near copies, if there are any."""
    what = (
        "both sides of the leaky split show them"
        if split == "leaky"
        else "each group stays on one side of the split"
    )
    sentences = []
    exact = [" = ".join(names) for names in find_duplicates(micrographs)]
    if exact:
        kind = "exact duplicates (rotated and flipped copies count)"
        sentences.append(f"{kind}, {what}: {name_some(exact)}")
    if near_copies:
        merged = Groups(len(micrographs))
        for i, j in _pair_copies(micrographs, near_copies):
            merged.join(i, j)
        groups = defaultdict(list)
        for i, each in enumerate(micrographs):
            groups[merged.find(i)].append(each["name"])
        roots = dict.fromkeys(merged.find(i) for i, _ in near_copies)
        near = [" ~ ".join(groups[root][:6]) + _count_more(groups[root], 6) for root in roots]
        num = sum(len(groups[root]) for root in roots)
        sentences.append(
            f"{num} micrographs are near copies of others (compressed, filtered, rescaled, turned, "
            f"cropped, or frames of one series), {what}: {'; '.join(near[:10])}"
            + _count_more(near, 10, " groups")
        )
    return sentences


def _count_more(items, most, what=""):
    return f" and {len(items) - most} more{what}" if len(items) > most else ""


def name_some(names, most=10) -> str:
    """Join at most `most` names and count the rest."""
    return ", ".join(names[:most]) + _count_more(names, most)
