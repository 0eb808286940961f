"""Colours of kinds of defects."""

from collections.abc import Iterable

KIND_COLOURS = {
    "loop_111": "#4cc9f0",
    "loop_100": "#ffb703",
    "dot": "#80ed99",
    "line": "#ff5d8f",
    "loop": "#b197fc",
}
OTHER_COLOURS = (
    *("#f8961e", "#00bbf9", "#f15bb5", "#fee440", "#90be6d", "#9b5de5", "#00f5d4", "#e56b6f"),
    *("#b5e48c", "#c77dff", "#ffafcc", "#a98467"),
)


def choose_colours(kinds: Iterable[str]) -> dict[str, str]:
    """Return {kind: colour as #rrggbb}, the same for the same kinds; after 12 they repeat."""
    kinds = sorted(set(kinds))
    others = [kind for kind in kinds if kind not in KIND_COLOURS]
    chosen = {kind: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, kind in enumerate(others)}
    return {kind: KIND_COLOURS.get(kind) or chosen[kind] for kind in kinds}
