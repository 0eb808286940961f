"""Everything that decides tiles and batches, apart from where the micrographs come from."""

import re
from dataclasses import dataclass

CHOICES = {
    "symmetries": ("paper", "d4", "none"),
    "split": ("micrograph", "specimen", "leaky"),
    "intensity": ("auto", "full", "percentile"),
    "on_bad_image": ("skip", "fail"),
    "label_bar": ("crop", "keep", "refuse"),
}


@dataclass(frozen=True)
class DataConfig:
    """How micrographs become tiles and tiles become batches."""

    resolution: int = 256
    """Side of a tile, in pixels."""
    downsample: int = 1
    """Average squares of this many pixels a side before cutting."""
    symmetries: str = "paper"
    """Views of a tile: paper (identity, three quarter turns, two flips), d4 (all eight) or none."""
    split: str = "micrograph"
    """What is held out: whole micrographs, whole specimens, or, as in the study, random views (leaky: both sides then
    see the same micrographs, and the scores flatter)."""
    held_out_fraction: float = 0.1
    """Share of the micrographs (specimens, views) that training never sees; at least one."""
    intensity: str = "auto"
    """Grey levels that become -1 and 1: full (0 to the type's largest), percentile (of each micrograph), or auto (full
    for 8 bits, each micrograph's own least and largest for 16 bits)."""
    percentiles: tuple[float, float] = (0.1, 99.9)
    """The two percentiles of a micrograph that become -1 and 1 with intensity percentile."""
    on_bad_image: str = "skip"
    """An image that cannot be used: skip it and say so, or fail."""
    label_bar: str = "crop"
    """A microscope's label bar at the bottom of an image: crop it, keep it, or refuse the image."""
    num_micrographs: int | None = None
    """Make so many (synthetic), or use only the first so many (elsewhere)."""
    micrograph_size: int = 512
    """Side of a synthetic micrograph, in pixels."""
    specimen_pattern: str | None = None
    """Regular expression whose first group (or whole match) in a file's path names its specimen; otherwise the folder
    that the file lies in does."""
    seed: int = 0
    """Seed of the split and of the synthetic micrographs."""
    cache_dir: str | None = None
    """Where tiles are kept; em-synthesis in the user's cache folder if not given."""

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is one of {', '.join(choices)}, not {getattr(self, name)!r}"
                )
        try:
            re.compile(self.specimen_pattern or "")
        except re.error as error:
            raise ValueError(
                f"specimen_pattern {self.specimen_pattern!r} is no regular expression: {error}"
            ) from error
        for name in ("resolution", "downsample", "micrograph_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is a number of pixels, at least 1, not {getattr(self, name)}"
                )
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(
                f"held_out_fraction lies between 0 and 1, not at {self.held_out_fraction}"
            )
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(
                f"percentiles are two rising numbers between 0 and 100, not {low} and {high}"
            )
        if self.num_micrographs is not None and self.num_micrographs < 1:
            raise ValueError(f"num_micrographs is at least 1, not {self.num_micrographs}")
