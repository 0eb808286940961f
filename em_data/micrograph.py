"""What a micrograph is: pixels, and what is known of them."""

from dataclasses import dataclass, field

import numpy as np

DEFECT_KINDS = ("loop_111", "loop_100", "dot", "line", "loop")


@dataclass(eq=False)
class Defect:
    """One labelled defect of a micrograph.

    kind: one of DEFECT_KINDS: a loop with Burgers vector 1/2<111> or <100>, a black dot, a dislocation line, or a loop
        of which nobody has said the Burgers vector.
    box_px: (x0, y0, x1, y1) in pixels of the micrograph, x1 and y1 exclusive: image[y0:y1, x0:x1] holds the defect.
    mask: bool [y1 - y0, x1 - x0] inside the box, or [H, W] of the whole micrograph.
    diameter_nm: the long axis of a loop or the diameter of a dot, in nanometres; None for a line.
    length_nm: the projected length of a line, in nanometres; None otherwise.
    metadata: anything else that is known (orientation, axis ratio, contrast, depth).
    """

    kind: str
    box_px: tuple[int, int, int, int]
    mask: np.ndarray | None = None
    diameter_nm: float | None = None
    length_nm: float | None = None
    metadata: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in DEFECT_KINDS:
            raise ValueError(f"a defect is one of {', '.join(DEFECT_KINDS)}, not {self.kind!r}")


@dataclass(eq=False)
class Micrograph:
    """One grey electron micrograph.

    image: uint8 or uint16 [H, W], as recorded: never stretched, never clipped.
    name: the file's path inside its source (or the number of a synthetic one); unique in a source.
    pixel_size_nm: the side of one pixel, in nanometres; None where the file does not say.
    specimen: what the micrograph was taken of; None where unknown.
    metadata: what the file says of itself, and under "notices" what the reader did to it (cropped, rescaled).
    defects: the labelled defects; None where nobody has labelled them.
    """

    image: np.ndarray
    name: str
    pixel_size_nm: float | None = None
    specimen: str | None = None
    metadata: dict = field(default_factory=dict)
    defects: list[Defect] | None = None

    def __post_init__(self):
        if self.image.ndim != 2 or self.image.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"{self.name}: a micrograph is uint8 or uint16 [H, W], not {self.image.dtype} "
                f"{list(self.image.shape)}; read files with em_data.read_micrograph"
            )
