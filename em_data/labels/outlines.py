"""Masks as polygons along the edges of pixels, which any rasteriser turns back into the mask."""

import numpy as np

Polygon = list[tuple[int, int]]
# steps (dx, dy) after a step: the turn around the own pixel first, so that pixels that touch at a
# corner stay apart
TURNS = {
    (1, 0): ((0, 1), (1, 0), (0, -1)),
    (0, 1): ((-1, 0), (0, 1), (1, 0)),
    (-1, 0): ((0, -1), (-1, 0), (0, 1)),
    (0, -1): ((1, 0), (0, -1), (-1, 0)),
}


def trace_outlines(mask: np.ndarray, origin: tuple[int, int] = (0, 0)) -> list[Polygon]:
    """Return the outlines of the pieces of a mask and of their holes.

    Pixels that touch at a corner only are two pieces. Pieces and holes run in opposite directions.

    Args:
        mask: Bool [h, w].
        origin: (x, y) of its first pixel.

    Returns:
        Corners (x, y) of each outline: the pixel in column 3 reaches from x = 3 to x = 4. No three
        corners in a row lie on a line.
    """
    edges = _list_edges(mask)
    known, outlines = set(edges), []
    left = dict.fromkeys(edges)
    while left:
        first = edge = next(iter(left))
        outline: Polygon = []
        while True:
            left.pop(edge, None)
            x, y, dx, dy = edge
            end = (x + dx, y + dy)
            edge = next(e for turn in TURNS[dx, dy] if (e := (*end, *turn)) in known)
            if edge[2:] != (dx, dy):
                outline.append((end[0] + origin[0], end[1] + origin[1]))
            if edge == first:
                break
        outlines.append(outline)
    return outlines


def join_outlines(outlines: list[Polygon]) -> Polygon:
    """Return one polygon of several outlines: bridges without width lead to each and back.

    Formats with one polygon an object need it. A bridge is passed in both directions, so that
    rasterisers give the same pixels.
    """
    joined = list(outlines[0])
    for outline in outlines[1:]:
        joined += [outlines[0][0], *outline, outline[0]]
    return joined + [outlines[0][0]] * (len(outlines) > 1)


def _list_edges(mask) -> list[tuple[int, int, int, int]]:
    """Return (x, y, dx, dy) of the edges of the mask, which lies to their right."""
    inside = np.pad(np.asarray(mask, bool), 1)
    edges = []
    for step, neighbour, start in (
        ((1, 0), (-1, 0), (0, 0)),
        ((0, 1), (0, 1), (1, 0)),
        ((-1, 0), (1, 0), (1, 1)),
        ((0, -1), (0, -1), (0, 1)),
    ):
        is_edge = inside & ~np.roll(inside, (-neighbour[0], -neighbour[1]), axis=(0, 1))
        for y, x in np.argwhere(is_edge).tolist():
            edges.append((x - 1 + start[0], y - 1 + start[1], *step))
    return edges
