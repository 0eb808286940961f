"""Labelled images from tiles, and which kinds the detector tells apart."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from em_data.split import group_micrographs
from em_data.tiles import Tiles
from em_evaluation.detector.labelled import LabelledImage


def parse_kinds(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Return {kind in the labels: kind for the detector}.

    Args:
        words: KIND, or NEW=KIND+KIND for kinds that count as one, such as
            loop=loop_111+loop_100. Empty: all known kinds, each by itself.
        known: Kinds in the labels of the micrographs. A join may also name kinds that only
            generated images have: see `compare_kinds`.

    Raises:
        ValueError: The micrographs have no kind of a word, or a kind is named twice.
    """
    kinds: dict[str, str] = {}
    for word in words or known:
        name, _, parts = word.partition("=")
        names = (parts or name).split("+")
        if not set(names) & set(known):
            raise ValueError(
                f"--kinds has {word}, but the labels of the micrographs, which the detector learns "
                f"from, have no kind {' or '.join(map(repr, names))}. Name or join some of "
                f"{', '.join(known) or 'none: the data have no labels'}."
            )
        for part in names:
            if part in kinds:
                raise ValueError(f"--kinds names {part!r} twice. Name each kind once.")
            kinds[part] = name
    return kinds


def compare_kinds(
    kinds: Mapping[str, str], real: Sequence[str], generated: Mapping[str, Collection[str]]
) -> list[str]:
    """Return sentences that say which kinds each side lacks, and which are not looked for.

    Args:
        kinds: {kind in the labels: kind for the detector}.
        real: Kinds in the labels of the micrographs.
        generated: {name of a set of generated images: kinds in its labels}. There, a defect may
            also be labelled as the detector's kind.

    Raises:
        ValueError: There are generated images, and no side has a kind.
    """
    sides = {"the micrographs": real, **generated}
    for kind in kinds if generated else ():
        if not any(kind in own for own in sides.values()):
            known = "; ".join(f"{', '.join(own)} in {name}" for name, own in sides.items())
            raise ValueError(
                f"--kinds names {kind!r}, but no labels have this kind. There are {known}."
            )
    sentences = []
    for name, own in sides.items():
        lacks = [
            kind
            for kind, new in kinds.items()
            if kind not in own and not (name in generated and new in own)
        ]
        others = [kind for kind in own if kind not in {*kinds, *kinds.values(), *real}]
        if lacks:
            sentences.append(f"{name} have no {' or '.join(lacks)}")
        if others:
            sentences.append(f"{name} also have {' and '.join(others)}, which are not looked for")
    return sentences


def list_labelled(tiles: Tiles, kinds: Mapping[str, str], split="specimen") -> list[LabelledImage]:
    """Return the labelled tiles; tiles of micrographs that nobody has labelled are left out.

    Args:
        tiles: Tiles; their symmetries are not used.
        kinds: {kind in the labels: kind for the detector}; defects of other kinds are left out.
        split: What was drawn independently: "specimen" or "micrograph". Near copies count as one.
            Where no specimen is known, each micrograph is its own.
    """
    cut = tiles.cut
    has_specimens = all(each["specimen"] is not None for each in cut.micrographs)
    split = split if has_specimens else "micrograph"
    specimens = group_micrographs(cut.micrographs, split, cut.near_copies or ())
    rows, labelled = tiles.rows, []
    index = np.asarray(rows["micrograph_index"])
    position = [np.asarray(rows[name]) for name in ("row_px", "col_px")]
    pixel_sizes = rows["pixel_size_nm"]
    for tile in np.flatnonzero(tiles.is_labelled).tolist():
        facts = cut.micrographs[int(index[tile])]
        found = tiles.defects(tile * tiles.num_symmetries)
        found = [each for each in found if each.kind in kinds]
        row, col = (int(each[tile]) for each in position)
        labelled.append(
            LabelledImage(
                image=tiles.raw([tile])[0],
                defects=[replace(each, kind=kinds[each.kind]) for each in found],
                name=f"{facts['name']} at {row}, {col}",
                micrograph=facts["name"],
                specimen=specimens[int(index[tile])],
                pixel_size_nm=pixel_sizes[tile],
            )
        )
    return labelled
