"""What decides tiles and batches, apart from where the micrographs come from."""

import re
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(title="tiles", extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """How micrographs become tiles and tiles become batches."""

    resolution: Annotated[int, Gt(0), Le(65_536)] = 256
    """Side of a tile in pixels."""
    downsample: Annotated[int, Gt(0), Le(65_536)] = 1
    """Average squares of this many pixels a side before cutting."""
    symmetries: Literal["paper", "d4", "none"] = "paper"
    """Views of each tile: "paper" (identity, three quarter turns, two flips), "d4" (all eight
    symmetries of the square) or "none"."""
    split: Literal["micrograph", "specimen", "leaky"] = "micrograph"
    """What is held out: whole micrographs, whole specimens, or random views (leaky). With "leaky",
    as in the study, both sides see the same micrographs, and the scores look too good."""
    held_out_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of the micrographs (specimens, views) that training never sees; at least one."""
    intensity: Literal["auto", "full", "percentile"] = "auto"
    """Grey levels that become -1 and 1: "full" (0 and the type's largest value), "percentile" (of
    each micrograph) or "auto" (full for 8 bits; for 16 bits the least and largest level of each
    micrograph without spikes, which are isolated outliers such as hot pixels)."""
    percentiles: tuple[float, float] = (0.1, 99.9)
    """The two percentiles of a micrograph that become -1 and 1 with intensity "percentile"."""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """What to do with an image that cannot be used: skip it with a message, or fail."""
    label_bar: Literal["crop", "keep", "refuse"] = "crop"
    """The label bar below an image: crop it, keep it, or refuse the image."""
    num_micrographs: Annotated[int, Gt(0), Le(10_000_000)] | None = None
    """Use only the first so many micrographs. Default: all."""
    num_synthetic: Annotated[int, Gt(0), Le(10_000_000)] | None = None
    """Number of synthetic micrographs to draw. Default: `num_micrographs` if that is given, else
    400 of "synthetic-varied" and 48 of the others."""
    frame_step: Annotated[int, Gt(0), Le(1_000_000)] = 1
    """Use every k-th frame of a stack. All frames of a stack lie on one side of the split."""
    micrograph_size: Annotated[int, Gt(0), Le(65_536)] = 512
    """Side of a synthetic micrograph in pixels."""
    pixel_size_nm: Annotated[float, Gt(0)] | None = None
    """Side of a pixel in nm, before downsampling, of micrographs that do not state it."""
    pixel_size_pattern: str | None = None
    """Regular expression that finds the pixel size in the paths of such micrographs: a group `fov`
    is the width of the field of view, a group `pixel` the pixel size, and a group `unit` its unit
    (default nm). Example: "fov(?P<fov>\\d+)(?P<unit>nm|um)"."""
    specimen_pattern: str | None = None
    """Regular expression whose first group (or whole match) in a file's path names its specimen.
    Default: the file's folder is its specimen."""
    labels: str = "auto"
    """Labels of defects: "auto" (COCO before YOLO, masks and metadata.jsonl), "none", or the name
    of a file, folder or column of labels, such as "annotations/test.json" or "masks"."""
    masks: Literal["auto", "instances", "kinds"] = "auto"
    """What the grey levels of mask images are: numbers of instances, kinds of defects, or "auto"
    (instances if nearly each level is in one piece)."""
    classes: str = "auto"
    """Class of each micrograph: "auto" (a column such as class or label of metadata.csv or of the
    data set), "none", "folder" (the uppermost folder), or the name of a column."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the split and of the synthetic micrographs."""
    cache_dir: Annotated[str | None, "may change"] = None
    """Folder for the cut tiles. Default: em-synthesis in the user's cache folder."""

    def __post_init__(self):
        for name in ("specimen_pattern", "pixel_size_pattern"):
            pattern, flag = getattr(self, name), f"--tiles.{name.replace('_', '-')}"
            try:
                groups = set(re.compile(pattern or "").groupindex)
            except re.error as error:
                raise ValueError(
                    f"tiles.{name} is {pattern!r}, which is not a regular expression: {error}. "
                    f"Correct {flag}."
                ) from error
            if name == "pixel_size_pattern" and pattern and len(groups & {"fov", "pixel"}) != 1:
                raise ValueError(
                    f"tiles.{name} is {pattern!r}, but must have one group named fov or pixel. "
                    f'Use {flag} such as "fov(?P<fov>\\d+)nm".'
                )
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(
                f"tiles.percentiles is {low} {high}, but must be two increasing numbers between 0 "
                "and 100. Use --tiles.percentiles."
            )
