"""Layouts of defects, drawn as they lie in labelled micrographs."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from em_training.em_saved_model import OwnLayers

NUM_TRIES = 16  # places that are tried for each defect, and again while all of them are bad
MAX_ROUNDS = 8
GOOD_WEIGHT = 0.3  # product of pair correlations
LEAST_WEIGHT = 1e-4  # of a place: even where everything is full, the better place wins


class EMLayoutSampler(OwnLayers, ModelMixin, ConfigMixin):
    """Draws layouts: the kinds, places and masks of the defects of an image.

    A layout takes its numbers per area from one labelled image, so that kinds that come together
    stay together, and draws Poisson numbers of that mean. Each defect is a real instance, turned by
    any angle, mirrored or not, and scaled by up to `max_scaling`. Of `NUM_TRIES` random places, one
    is drawn by the product of the pair correlations with the defects that already lie there, so
    that defects keep the distances that real ones keep. Places reach beyond the border, and what
    lies outside the image is cut. `em_diffusion.layouts.fit_layout_sampler` measures all of it.

    Args:
        kinds: Names of the kinds of defects, K of them.
        num_layouts, num_shapes, num_bytes, num_bins: Sizes of the tensors below.
        bin_width: Of the pair correlation, in squared sums of two radii.
        max_scaling: 0.1 scales lengths by 0.9 to 1.1.
        pixel_size_nm: Of the masks; None if unknown.
        source: What the instances were taken from, for people.

    Attributes:
        densities: [num_layouts, K], defects per pixel of each labelled image, without the share of
            their variance that is the Poisson noise of counting.
        layout_weights: [num_layouts], how often each is drawn.
        pair_correlation: [K, K, num_bins], by the square of the distance of two centres over the
            sum of their radii, which are those of discs of the same area. Beyond the last bin it
            is 1.
        shape_kinds: int64 [num_shapes].
        shape_weights: [num_shapes], how often each is drawn among those of its kind. Large
            instances are seldom whole in an image, and count more.
        shape_sizes: int64 [num_shapes, 2], height and width of each mask.
        shape_bits: uint8 [num_bytes], the masks row by row, each packed by `numpy.packbits`.
    """

    @register_to_config
    def __init__(
        self,
        kinds: Sequence[str] = ("defect",),
        num_layouts: int = 1,
        num_shapes: int = 0,
        num_bytes: int = 0,
        num_bins: int = 16,
        bin_width: float = 0.25,
        max_scaling: float = 0.1,
        pixel_size_nm: float | None = None,
        source: str = "",
    ):
        super().__init__()
        k = len(kinds)
        tensors = {
            "densities": torch.zeros(num_layouts, k),
            "layout_weights": torch.ones(num_layouts),
            "pair_correlation": torch.ones(k, k, num_bins),
            "shape_kinds": torch.zeros(num_shapes, dtype=torch.int64),
            "shape_weights": torch.ones(num_shapes),
            "shape_sizes": torch.ones(num_shapes, 2, dtype=torch.int64),
            "shape_bits": torch.zeros(num_bytes, dtype=torch.uint8),
        }
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    @torch.no_grad()
    def sample(
        self, height: int, width: int, rng: torch.Generator | None = None
    ) -> list[tuple[str, tuple[int, int, int, int], np.ndarray]]:
        """Draw a layout for an image of `height` x `width` pixels.

        Args:
            rng: Decides the layout.

        Returns:
            (kind, box_px, mask) of each defect. The box is (x0, y0, x1, y1) inside the image, x1
            and y1 exclusive; the mask is bool [y1 - y0, x1 - x0]. Later defects lie on top.
        """
        kinds, shapes, margins = self._draw_defects(height, width, rng)
        placed = np.empty((0, 4))  # kind, radius, y, x
        layout = []
        for kind, shape, margin in zip(kinds, shapes, margins):
            mask = self._transform(self.read_shape(shape), rng)
            radius = math.sqrt(mask.sum() / math.pi)
            centre = self._find_place((height, width), margin, kind, radius, placed, rng)
            placed = np.concatenate([placed, [[kind, radius, *centre]]])
            found = _cut(mask, centre, height, width)
            if found is not None:
                layout.append((self.config.kinds[kind], *found))
        return layout

    def read_shape(self, index: int) -> np.ndarray:
        """Return the mask of an instance as it was labelled, bool [h, w]."""
        sizes = self.shape_sizes.cpu()
        num_bytes = (sizes.prod(dim=1) + 7) // 8
        start = int(num_bytes[:index].sum())
        height, width = sizes[index].tolist()
        packed = self.shape_bits[start : start + int(num_bytes[index])].cpu().numpy()
        return np.unpackbits(packed, count=height * width).reshape(height, width).astype(bool)

    def _draw_defects(self, height, width, rng):
        """Draw kinds, shapes and margins of places of the defects, in random order."""
        layout = _draw_index(self.layout_weights.cpu().double().numpy(), rng)
        densities, drawn = self.densities[layout].tolist(), []
        for kind, (density, margin) in enumerate(zip(densities, self._find_reach())):
            own = torch.nonzero(self.shape_kinds.cpu() == kind)[:, 0]
            area = (height + 2 * margin) * (width + 2 * margin)
            number = _draw_poisson(density * area, rng) if len(own) else 0
            weights = self.shape_weights.cpu().double()[own].numpy()
            drawn += [(kind, int(own[_draw_index(weights, rng)]), margin) for _ in range(number)]
        order = np.argsort(_draw_uniform((len(drawn),), rng), kind="stable").tolist()
        return zip(*(drawn[i] for i in order)) if drawn else ((), (), ())

    def _find_reach(self):
        """Return how far from its centre a defect of each kind may reach, in pixels [K]."""
        diagonals = self.shape_sizes.cpu().double().square().sum(dim=1).sqrt()
        kinds = self.shape_kinds.cpu()
        scale = (1 + self.config.max_scaling) / 2
        longest = [diagonals[kinds == k] for k in range(len(self.config.kinds))]
        return [float(each.max()) * scale if len(each) else 0.0 for each in longest]

    def _find_place(self, shape, margin, kind, radius, placed, rng):
        """Draw the centre (y, x) of a defect, given those that lie there [N, 4]."""
        places, weights = np.empty((0, 2)), np.empty(0)
        for _ in range(MAX_ROUNDS):
            tries = _draw_uniform((NUM_TRIES, 2), rng) * (np.array(shape) + 2 * margin) - margin
            places = np.concatenate([places, tries])
            weights = np.concatenate([weights, self._weigh(tries, kind, radius, placed)])
            if weights.max() >= GOOD_WEIGHT:
                break
        return places[_draw_index(weights, rng)]

    def _weigh(self, tries, kind, radius, placed):
        """Return the product of pair correlations of each place [T, 2] with what lies there."""
        kinds, radii, centres = placed[:, 0].astype(int), placed[:, 1], placed[:, 2:]
        squares = ((tries[:, None] - centres) ** 2).sum(axis=-1)  # [T, N]
        bins = (squares / (radii + radius) ** 2 / self.config.bin_width).astype(int)
        table = self.pair_correlation[kind].cpu().double().numpy()  # [K, bins]
        table = np.concatenate([table, np.ones((len(table), 1))], axis=1)
        correlation = table[kinds, np.minimum(bins, table.shape[1] - 1)]
        return np.maximum(correlation, LEAST_WEIGHT).prod(axis=1) + 1e-300

    def _transform(self, mask, rng):
        """Turn, mirror and scale a mask [h, w]; return it in its new box."""
        turn, mirror, scale = _draw_uniform((3,), rng).tolist()
        angle = 2 * math.pi * turn
        scale = 1 + self.config.max_scaling * (2 * scale - 1)
        if mirror < 0.5:
            mask = mask[:, ::-1].copy()
        return turn_mask(mask, angle, scale)


def turn_mask(mask, angle: float, scale: float = 1.0) -> np.ndarray:
    """Return a bool mask [h, w] turned by `angle` in radians and scaled, in its new box.

    A pixel belongs to the mask if the bilinear interpolation there is at least a half. A mask that
    would vanish is returned as it is.
    """
    height, width = mask.shape
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    sides = [abs(cos) * height + abs(sin) * width, abs(sin) * height + abs(cos) * width]
    new_height, new_width = (math.ceil(each - 1e-6) + 2 for each in sides)
    y, x = np.mgrid[:new_height, :new_width].astype(float)
    y, x = y - (new_height - 1) / 2, x - (new_width - 1) / 2
    # where each new pixel was, from -1 to 1 between the outer edges of the mask
    back = scale**2
    old = np.stack([(cos * x + sin * y) / back / width, (cos * y - sin * x) / back / height])
    grid = torch.from_numpy(2 * np.moveaxis(old, 0, -1)[None])
    image = torch.from_numpy(mask.astype(float))[None, None]
    shares = F.grid_sample(image, grid, padding_mode="zeros", align_corners=False)[0, 0]
    turned = shares.numpy() >= 0.5
    rows, columns = np.flatnonzero(turned.any(axis=1)), np.flatnonzero(turned.any(axis=0))
    if len(rows) == 0:
        return mask
    return turned[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _cut(mask, centre, height, width):
    """Return (box, mask) of what lies inside the image; None if nothing does."""
    rows, columns = mask.shape
    top, left = round(centre[0] - rows / 2), round(centre[1] - columns / 2)
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + rows, height), min(left + columns, width)
    if y0 >= y1 or x0 >= x1:
        return None
    seen = mask[y0 - top : y1 - top, x0 - left : x1 - left]
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    if len(rows) == 0:
        return None
    inside = seen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
    box = (x0 + columns[0], y0 + rows[0], x0 + columns[-1] + 1, y0 + rows[-1] + 1)
    return tuple(int(edge) for edge in box), inside


def _draw_uniform(shape, rng):
    """Draw float64 numbers from 0 to 1, on the device of the generator."""
    device = "cpu" if rng is None else rng.device
    return torch.rand(shape, generator=rng, device=device, dtype=torch.float64).cpu().numpy()


def _draw_index(weights, rng):
    """Draw an index by weights [N]; their sum is positive."""
    total = np.cumsum(weights)
    return int(np.searchsorted(total, _draw_uniform((), rng) * total[-1], side="right"))


def _draw_poisson(mean, rng):
    """Draw a Poisson number."""
    device = "cpu" if rng is None else rng.device
    rate = torch.tensor(float(mean), dtype=torch.float64, device=device)
    return int(torch.poisson(rate, generator=rng))
