"""Fitting a layout sampler to labelled images, and what its layouts become."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from em_data.micrograph import Defect
from em_data.synthetic_micrographs import PIXEL_SIZE_NM, synthesise_micrographs
from em_data.tile_labels import IS_CUT
from em_data.tiles import Tiles
from em_diffusion.em_layout_sampler import EMLayoutSampler
from em_training.seeding import seed_for

FEWEST_INSTANCES = 30  # fewer whole instances than that say nothing of sizes and distances
SIMULATED = ("loop_111", "loop_100", "dot", "line")  # kinds that the simulator draws
NUM_SIMULATED = 8  # micrographs of 512 x 512
MAX_SHAPES = 4096
MOST_WEIGHT = 20.0  # of an instance that is nearly as large as its image
# of the pair correlation: equal areas, so that random places have equally many pairs in each
NUM_BINS, BIN_WIDTH = 16, 0.25
NUM_SHUFFLES = 20
PRIOR_PAIRS = 1.0  # pairs at random places that each bin has in advance: little data says little
CORE_PAIRS = 5.0  # where so many are expected and none is seen, there is a hard core

Layout = Sequence[Defect]


def fit_layout_sampler(
    layouts: Sequence[Layout],
    shapes: Sequence[tuple[int, int]],
    pixel_size_nm: float | None,
    kinds: Sequence[str],
    *,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> EMLayoutSampler:
    """Measure counts, shapes and distances of labelled defects.

    Instances that touch the border of their image may be cut: they count for distances, but are
    not drawn again. The whole ones are weighted by the number of places that an instance of their
    size has (Miles 1974), so that counts and sizes are unbiased. With fewer than
    `FEWEST_INSTANCES` whole instances, layouts of the simulator are measured instead, if it draws
    these kinds.

    Args:
        layouts: Defects of each labelled image; one without a mask fills its box.
        shapes: Height and width of each image in pixels.
        pixel_size_nm: Of all images; None if unknown.
        kinds: Which kinds to draw, in the order of the masks' channels.
        seed: Decides what is drawn at random while measuring.
        say: Gets a sentence about each kind that cannot be drawn, and about few instances.

    Raises:
        ValueError: There is no whole instance, and the simulator does not draw these kinds.
    """
    source = f"{len(layouts)} labelled images"
    num_whole = sum(len(find_whole(*each)) for each in zip(layouts, shapes))
    if num_whole < FEWEST_INSTANCES:
        known = [kind for kind in kinds if kind in (*SIMULATED, "loop")]
        if len(known) == len(kinds):
            say(
                f"layouts: {len(layouts)} labelled images have {num_whole} whole defects, fewer "
                f"than {FEWEST_INSTANCES}; layouts are those of the simulator"
            )
            layouts, shapes = simulate_layouts(kinds, pixel_size_nm, seed)
            source = "the simulator"
        elif num_whole == 0:
            raise ValueError(
                f"{len(layouts)} labelled images have no whole defect, so no layout can be drawn. "
                "Label more images, or use larger tiles with --tiles.resolution."
            )
        else:
            say(
                f"layouts: {len(layouts)} labelled images have only {num_whole} whole defects; "
                "sizes and distances of drawn layouts are uncertain"
            )
    sampler = measure_layouts(layouts, shapes, pixel_size_nm, kinds, seed, source)
    for number, kind in enumerate(kinds):
        if not (sampler.shape_kinds == number).any():
            say(f"layouts: no {kind} is whole in any labelled image, so layouts have none")
    return sampler


def measure_layouts(layouts, shapes, pixel_size_nm, kinds, seed, source) -> EMLayoutSampler:
    """Measure layouts as they are, see `fit_layout_sampler`."""
    whole = [find_whole(*each) for each in zip(layouts, shapes)]
    instances = [
        (kinds.index(layout[i].kind), weigh_instance(layout[i], shape), get_mask(layout[i]))
        for layout, shape, ids in zip(layouts, shapes, whole)
        for i in ids
        if layout[i].kind in kinds
    ]
    if len(instances) > MAX_SHAPES:
        rng = np.random.default_rng(seed_for(seed, "instances of layouts"))
        instances = [instances[i] for i in sorted(rng.permutation(len(instances))[:MAX_SHAPES])]
    packed = [np.packbits(mask) for _, _, mask in instances]
    areas = np.array([math.prod(shape) for shape in shapes], dtype=float)
    sampler = EMLayoutSampler(
        kinds=tuple(kinds),
        num_layouts=len(layouts),
        num_shapes=len(instances),
        num_bytes=sum(map(len, packed)),
        num_bins=NUM_BINS,
        bin_width=BIN_WIDTH,
        pixel_size_nm=pixel_size_nm,
        source=source,
    )
    values = {
        "densities": measure_densities(layouts, shapes, whole, kinds),
        "layout_weights": areas / areas.mean(),
        "pair_correlation": correlate_pairs(layouts, shapes, kinds, seed),
        "shape_kinds": np.array([kind for kind, _, _ in instances], dtype=np.int64),
        "shape_weights": np.array([weight for _, weight, _ in instances]),
        "shape_sizes": np.array([mask.shape for _, _, mask in instances]).reshape(-1, 2),
        "shape_bits": np.concatenate(packed) if packed else np.empty(0, np.uint8),
    }
    sampler.load_state_dict({name: torch.as_tensor(value) for name, value in values.items()})
    return sampler.eval()


def get_mask(defect: Defect) -> np.ndarray:
    """Return the mask of a defect inside its box, bool [h, w]."""
    x0, y0, x1, y1 = defect.box_px
    if defect.mask is None:
        return np.ones((y1 - y0, x1 - x0), dtype=bool)
    if defect.mask.shape != (y1 - y0, x1 - x0):
        return defect.mask[y0:y1, x0:x1]
    return defect.mask


def find_whole(layout, shape) -> list[int]:
    """Return the indices of defects that have pixels and are not cut by the border of the image."""
    height, width = shape
    whole = []
    for i, defect in enumerate(layout):
        x0, y0, x1, y1 = defect.box_px
        is_inside = x0 > 0 and y0 > 0 and x1 < width and y1 < height
        if is_inside and not defect.metadata.get(IS_CUT) and get_mask(defect).any():
            whole.append(i)
    return whole


def weigh_instance(defect, shape) -> float:
    """Return over how many images of `shape` a defect of this size is seen whole in one."""
    x0, y0, x1, y1 = defect.box_px
    places = (shape[0] - (y1 - y0) - 1) * (shape[1] - (x1 - x0) - 1)
    return min(MOST_WEIGHT, math.prod(shape) / max(places, 1))


def measure_densities(layouts, shapes, whole, kinds):
    """Return defects per pixel of each image, shrunk towards their mean [N, K].

    A count has its own noise, which a sampler that draws Poisson numbers adds again. What is kept
    of the deviations from the mean is the part of their variance that exceeds this noise.
    """
    areas = np.array([math.prod(shape) for shape in shapes], dtype=float)
    counts, noise = np.zeros((2, len(layouts), len(kinds)))
    for row, (layout, shape, ids) in enumerate(zip(layouts, shapes, whole)):
        for defect in (layout[i] for i in ids if layout[i].kind in kinds):
            weight = weigh_instance(defect, shape)
            counts[row, kinds.index(defect.kind)] += weight
            noise[row, kinds.index(defect.kind)] += weight**2
    mean = counts.sum(axis=0) / areas.sum()  # [K]
    shares = areas[:, None] / areas.sum()
    densities = counts / areas[:, None]
    variance = (shares * (densities - mean) ** 2).sum(axis=0)
    own = (shares * noise / areas[:, None] ** 2).sum(axis=0)
    kept = np.sqrt(np.clip(1 - own / np.maximum(variance, 1e-300), 0, 1))
    return mean + kept * (densities - mean)


def correlate_pairs(layouts, shapes, kinds, seed):
    """Return the pair correlation of kinds [K, K, bins], see `EMLayoutSampler`.

    Observed pairs are divided by those of the same defects at random places of the same images,
    which takes the border into account. It is 0 where `CORE_PAIRS` are expected and none is seen.
    """
    rng = np.random.default_rng(seed_for(seed, "pairs of layouts"))
    observed, expected = np.zeros((2, len(kinds), len(kinds), NUM_BINS))
    for layout, shape in zip(layouts, shapes):
        found = [each for each in layout if each.kind in kinds and get_mask(each).any()]
        if len(found) < 2:
            continue
        number = np.array([kinds.index(each.kind) for each in found])
        radius = np.array([math.sqrt(get_mask(each).sum() / math.pi) for each in found])
        _count_pairs(observed, number, radius, np.stack([find_centre(each) for each in found]))
        for _ in range(NUM_SHUFFLES):
            places = rng.random((len(found), 2)) * shape
            _count_pairs(expected, number, radius, places, 1 / NUM_SHUFFLES)
    is_core = (observed == 0) & (expected >= CORE_PAIRS)
    return np.where(is_core, 0.0, (observed + PRIOR_PAIRS) / (expected + PRIOR_PAIRS))


def _count_pairs(counts, kinds, radii, centres, weight=1.0):
    """Add `weight` for each ordered pair of defects to counts [K, K, bins]."""
    squares = ((centres[:, None] - centres) ** 2).sum(axis=-1)
    bins = (squares / (radii[:, None] + radii) ** 2 / BIN_WIDTH).astype(int)
    is_pair = (bins < NUM_BINS) & ~np.eye(len(kinds), dtype=bool)
    first, second = np.nonzero(is_pair)
    np.add.at(counts, (kinds[first], kinds[second], bins[is_pair]), weight)


def find_centre(defect) -> np.ndarray:
    """Return the centre of a defect's box as (y, x) in pixels."""
    x0, y0, x1, y1 = defect.box_px
    return np.array([(y0 + y1) / 2, (x0 + x1) / 2])


def stitch_layouts(tiles: Tiles, downsample: int = 1):
    """Put the labels of tiles together again, micrograph by micrograph.

    Parts of one kind that touch across the edge between two tiles are one defect.

    Args:
        tiles: One side of a split; a micrograph of which it has tiles is taken whole.
        downsample: Pixels of the micrographs per pixel of a tile, along one side.

    Returns:
        Layouts and shapes of the labelled micrographs, in pixels of tiles, as `fit_layout_sampler`
        takes them. Tiles that were left out are empty.
    """
    cut, side = tiles.cut, tiles.resolution
    if cut.tile_labels is None:
        return [], []
    places: dict[int, list[tuple[int, int, int]]] = {}
    rows = cut.dataset.select_columns(["micrograph_index", "row_px", "col_px"]).to_dict()
    for tile, (micrograph, row, column) in enumerate(zip(*rows.values())):
        place = (tile, row // downsample, column // downsample)
        places.setdefault(micrograph, []).append(place)
    layouts, shapes = [], []
    for micrograph in tiles.micrograph_ids.tolist():
        if cut.micrographs[micrograph]["defects"] is None:
            continue
        mine = places[micrograph]
        parts = [
            (tile, _shift(each, row, column))
            for tile, row, column in mine
            for each in cut.tile_labels.defects(tile)
        ]
        layouts.append(_merge_parts(parts, side))
        shapes.append((max(r for _, r, _ in mine) + side, max(c for _, _, c in mine) + side))
    return layouts, shapes


def _shift(defect, row, column):
    """Return a defect of a tile with this upper left corner, in pixels of the micrograph."""
    x0, y0, x1, y1 = defect.box_px
    return replace(defect, box_px=(x0 + column, y0 + row, x1 + column, y1 + row))


def _merge_parts(parts, side):
    """Merge (tile, defect) parts that touch across edges of tiles of `side` pixels."""
    groups, edges = list(range(len(parts))), {}

    def find(i):
        while groups[i] != i:
            i = groups[i]
        return i

    for i, (tile, part) in enumerate(parts):
        if not part.metadata.get(IS_CUT):
            continue
        x0, y0, _, _ = part.box_px
        y, x = np.nonzero(get_mask(part))
        y, x = y + y0, x + x0
        at_edge = (
            (y % side == 0) | (y % side == side - 1) | (x % side == 0) | (x % side == side - 1)
        )
        what = (part.kind, part.diameter_nm, part.length_nm)
        for row, column in zip(y[at_edge].tolist(), x[at_edge].tolist()):
            for near in ((row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                for other, other_tile in edges.get((what, *near), ()):
                    if other_tile != tile:
                        groups[find(other)] = find(i)
            edges.setdefault((what, row, column), []).append((i, tile))
    merged = {}
    for i, (_, part) in enumerate(parts):
        merged.setdefault(find(i), []).append(part)
    return [_unite(each) if len(each) > 1 else each[0] for each in merged.values()]


def _unite(parts):
    """Return several parts as one defect, which is whole as far as is known."""
    boxes = np.array([each.box_px for each in parts])
    (x0, y0), (x1, y1) = boxes[:, :2].min(axis=0).tolist(), boxes[:, 2:].max(axis=0).tolist()
    mask = np.zeros((y1 - y0, x1 - x0), dtype=bool)
    for part in parts:
        left, top, right, bottom = part.box_px
        mask[top - y0 : bottom - y0, left - x0 : right - x0] |= get_mask(part)
    return replace(parts[0], box_px=(x0, y0, x1, y1), mask=mask, metadata={})


def simulate_layouts(kinds, pixel_size_nm, seed):
    """Return layouts of simulated micrographs with defects of these kinds, and their shapes."""
    size_nm = pixel_size_nm or PIXEL_SIZE_NM
    layouts, shapes = [], []
    for micrograph in synthesise_micrographs(NUM_SIMULATED, seed, pixel_size_nm=size_nm):
        layout = []
        for each in micrograph.defects or []:
            is_loop = each.kind not in kinds and each.kind.startswith("loop_") and "loop" in kinds
            kind = "loop" if is_loop else each.kind
            if kind in kinds:
                layout.append(Defect(kind, each.box_px, each.mask))
        layouts.append(layout)
        shapes.append(micrograph.image.shape)
    return layouts, shapes


def draw_layout(
    sampler: EMLayoutSampler, height: int, width: int, rng: torch.Generator | None = None
) -> list[Defect]:
    """Draw a layout with `EMLayoutSampler.sample`, as defects with their size in nm if known."""
    return [
        make_defect(*each, sampler.config.pixel_size_nm)
        for each in sampler.sample(height, width, rng)
    ]


def make_defect(kind, box_px, mask, pixel_size_nm) -> Defect:
    """Return a drawn defect; the diameter is that of a disc of the same area."""
    diameter = None
    if pixel_size_nm is not None and kind != "line":
        diameter = 2 * math.sqrt(mask.sum() / math.pi) * pixel_size_nm
    return Defect(kind, box_px, mask, diameter)
