"""What a micrograph is: pixels, and what is known of them."""

from dataclasses import dataclass, field

import numpy as np

# kinds of the simulator and of Damaged Alloys; labels of users have kinds of their own
DEFECT_KINDS = ("loop_111", "loop_100", "dot", "line", "loop")
IS_CUT = "is_cut_by_border"  # metadata of a defect: a part of it lies outside of the picture


@dataclass(eq=False)
class Defect:
    """One labelled defect of a micrograph.

    Args:
        kind: What it is: any name. DEFECT_KINDS are a loop with Burgers vector 1/2<111> or <100>, a
            black dot, a dislocation line, and a loop of unknown Burgers vector.
        box_px: (x0, y0, x1, y1) in pixels of the micrograph; x1 and y1 are exclusive.
        mask: Bool [y1 - y0, x1 - x0] inside the box, or [H, W] of the whole micrograph.
        diameter_nm: Long axis of a loop or diameter of a dot in nm; None for a line.
        length_nm: Projected length of a line in nm; None otherwise.
        metadata: Anything else, such as orientation or contrast.
    """

    kind: str
    box_px: tuple[int, int, int, int]
    mask: np.ndarray | None = None
    diameter_nm: float | None = None
    length_nm: float | None = None
    metadata: dict = field(default_factory=dict)

    def __post_init__(self):
        if not (isinstance(self.kind, str) and self.kind.strip() and self.kind.isprintable()):
            raise ValueError(
                f"the kind of a defect is {self.kind!r}, but must be a name of printable "
                "characters. Name it in the labels."
            )


@dataclass(eq=False)
class Micrograph:
    """One grey electron micrograph.

    Args:
        image: uint8 or uint16 [H, W], as recorded: neither stretched nor clipped.
        name: Unique in its source, such as the path of the file.
        pixel_size_nm: Side of a pixel in nm; None if unknown.
        specimen: What the micrograph shows; None if unknown.
        metadata: What the file says about itself. "notices" lists what the reader did to the image.
        defects: Labelled defects; None if nobody has labelled them.
        class_name: What kind of micrograph it is, such as its material; None if unknown.
    """

    image: np.ndarray
    name: str
    pixel_size_nm: float | None = None
    specimen: str | None = None
    metadata: dict = field(default_factory=dict)
    defects: list[Defect] | None = None
    class_name: str | None = None

    def __post_init__(self):
        if self.image.ndim != 2 or self.image.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"{self.name}: the image is {self.image.dtype} {list(self.image.shape)}, but must "
                "be uint8 or uint16 [H, W]; read files with em_data.read_micrograph."
            )
