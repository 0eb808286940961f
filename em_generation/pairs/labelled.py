"""Labelled tiles as material: layouts, looks, grounds and instances of real defects."""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch

from em_data import Tiles
from em_data.micrograph import Defect
from em_diffusion.em_layout_sampler import EMLayoutSampler
from em_diffusion.layouts import draw_layout, fit_layout_sampler
from em_generation.pairs.appearance import Appearance, estimate_ground, measure_appearance
from em_generation.pairs.instances import Instance, choose_instances, collect_instances


class LabelledImages:
    """Labelled images of one size, and what is measured on them when it is needed.

    Args:
        images: [N, H, W] in [-1, 1].
        layouts: The defects of each.
        kinds: Kinds of defects in a fixed order.
        pixel_size_nm: Of all; None if unknown.
        name: What they are, for people.
        fingerprint: Tells them from others.
        seed: Of what is drawn while measuring.
        say: Gets sentences about what is missing.
    """

    def __init__(
        self,
        images: np.ndarray,
        layouts: Sequence[Sequence[Defect]],
        kinds: Sequence[str],
        *,
        pixel_size_nm: float | None = None,
        name: str = "labelled images",
        fingerprint: str = "",
        seed: int = 0,
        say: Callable[[str], object] = print,
    ):
        self.images, self.layouts, self.kinds = images, list(layouts), tuple(kinds)
        self.pixel_size_nm, self.name, self.fingerprint = pixel_size_nm, name, fingerprint
        self.seed, self.say = seed, say

    @cached_property
    def appearance(self) -> Appearance:
        """How the defects look."""
        return measure_appearance(list(self.images), self.layouts)

    @cached_property
    def grounds(self) -> list[np.ndarray]:
        """Each image without its defects."""
        return [estimate_ground(*each) for each in zip(self.images, self.layouts)]

    @cached_property
    def instances(self) -> list[Instance]:
        """The defects that are whole and can be pasted."""
        found = [
            each for pair in zip(self.images, self.layouts) for each in collect_instances(*pair)
        ]
        found = choose_instances(found)
        lost = set(self.kinds) - {each.kind for each in found}
        if lost:
            self.say(
                f"{self.name}: no {' and no '.join(sorted(lost))} is whole in any tile, so none is "
                "pasted"
            )
        if not found:
            raise ValueError(
                f"{self.name} has no defect that is whole in a tile, so none can be pasted. Give "
                "more labelled micrographs with --labelled, or use --pairs simulated."
            )
        return found

    @cached_property
    def sampler(self) -> EMLayoutSampler:
        """Draws layouts like theirs."""
        shapes = [image.shape for image in self.images]
        return fit_layout_sampler(
            self.layouts, shapes, self.pixel_size_nm, self.kinds, seed=self.seed, say=self.say
        )

    def draw_layout(self, height: int, width: int, rng: np.random.Generator) -> list[Defect]:
        """Draw a layout like theirs."""
        torch_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return draw_layout(self.sampler, height, width, torch_rng)


def read_labelled(
    tiles: Tiles,
    *,
    name: str,
    seed: int,
    say: Callable[[str], object],
    max_pixels: int = 2**24,
) -> LabelledImages:
    """Return the labelled tiles of one side of a split, not turned.

    Raises:
        ValueError: No micrograph is labelled, or none has a defect.
    """
    views = [
        view
        for view, (tile, symmetry) in enumerate(zip(*tiles.locate(range(len(tiles)))))
        if symmetry == 0 and tiles.is_labelled[tile]
    ]
    if not views or not tiles.kinds:
        raise ValueError(
            f"{name} has no labelled defects. Give labelled micrographs with --labelled, or use "
            "--pairs simulated without it."
        )
    max_images = max(16, max_pixels // tiles.resolution**2)
    if len(views) > max_images:
        rng = np.random.default_rng([seed, len(views)])
        views = sorted(rng.permutation(views)[:max_images].tolist())
        say(f"{name}: {max_images:,} labelled tiles are used, drawn at random")
    layouts = [tiles.defects(view) for view in views]
    sizes = {size for size in tiles.rows["pixel_size_nm"] if size}
    return LabelledImages(
        tiles.batch(views)[:, 0].numpy(),
        layouts,
        tiles.kinds,
        pixel_size_nm=sizes.pop() if len(sizes) == 1 else None,
        name=name,
        fingerprint=tiles.fingerprint,
        seed=seed,
        say=say,
    )
