"""What a source holds of labels: counts and sizes by kind, classes, and pictures with outlines."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import PIL.ImageColor
from scipy import ndimage

from em_data.figures import make_data_uri
from em_data.labels.colours import choose_colours
from em_data.labels.masks import crop_mask
from em_data.look.pixels import to_display
from em_data.micrograph import Defect, Micrograph

MOST_PICTURES = 6  # up to twice as many while micrographs are read
WINDOW_PX = 256  # side of the part of a micrograph that a picture shows


@dataclass(eq=False)
class Window:
    """A part of a labelled micrograph, uint8 [h, w], with its defects in its pixels."""

    number: int  # of the labelled micrograph
    name: str
    corner: tuple[int, int]
    pixels: np.ndarray
    defects: list[Defect]


@dataclass(eq=False)
class LabelTally:
    """Counts labels of micrographs, one after another.

    Attributes:
        areas_px: {kind: areas of its defects in pixels}; of a box, its area.
        areas_nm2: The same in nm², of micrographs with a known pixel size.
        num_micrographs: {kind: micrographs that have it}.
        num_boxes: {kind: defects that are labelled by a box only}.
        classes: {class: micrographs}.
        num_labelled: Micrographs.
        windows: Parts of micrographs for pictures.
    """

    areas_px: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    areas_nm2: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_micrographs: Counter = field(default_factory=Counter)
    num_boxes: Counter = field(default_factory=Counter)
    classes: Counter = field(default_factory=Counter)
    num_labelled: int = 0
    windows: list[Window] = field(default_factory=list)
    step: int = 1

    def add(self, micrograph: Micrograph, levels: tuple[int, int]) -> None:
        """Count a micrograph. levels: its grey levels that a model sees as -1 and 1."""
        if micrograph.class_name:
            self.classes[micrograph.class_name] += 1
        if micrograph.defects is None:
            return
        size = micrograph.pixel_size_nm
        for each in micrograph.defects:
            x0, y0, x1, y1 = each.box_px
            mask = crop_mask(each, micrograph.image.shape)
            area = (x1 - x0) * (y1 - y0) if mask is None else int(np.count_nonzero(mask))
            self.areas_px[each.kind].append(area)
            self.num_boxes[each.kind] += mask is None
            if size:
                self.areas_nm2[each.kind].append(area * size**2)
        self.num_micrographs.update({each.kind for each in micrograph.defects})
        if micrograph.defects and self.num_labelled % self.step == 0:
            self.windows.append(cut_window(self.num_labelled, micrograph, levels))
            if len(self.windows) > 2 * MOST_PICTURES:
                self.step *= 2
                self.windows = [each for each in self.windows if each.number % self.step == 0]
        self.num_labelled += 1

    def list_kinds(self) -> list[dict]:
        """Return a row per kind: name, colour, numbers, and diameters as text."""
        colours = choose_colours(self.areas_px)
        return [
            {
                "kind": kind,
                "colour": colours[kind],
                "num": len(areas),
                "num_micrographs": self.num_micrographs[kind],
                "num_boxes": self.num_boxes[kind],
                "px": format_diameters(areas),
                "nm": format_diameters(self.areas_nm2[kind]),
            }
            for kind, areas in sorted(self.areas_px.items())
        ]

    def draw_pictures(self) -> list[dict]:
        """Return parts of micrographs with the outlines of their defects, as data URIs."""
        colours, pictures = choose_colours(self.areas_px), []
        for each in self.windows[:: -(-len(self.windows) // MOST_PICTURES) or 1]:
            drawn = draw_outlines(each.pixels, each.defects, colours)
            row, col = each.corner
            place = f"{each.name}, from row {row} and column {col}"
            uri, size = make_data_uri(drawn), {"width": drawn.shape[1], "height": drawn.shape[0]}
            pictures.append({"uri": uri, "caption": place, "num": len(each.defects), **size})
        return pictures


def format_diameters(areas) -> str:
    """Return the median and the 5th and 95th percentile of diameters of discs of these areas."""
    if not areas:
        return "–"
    diameters = np.sqrt(np.asarray(areas, float) * 4 / np.pi)
    low, median, high = (f"{each:.3g}" for each in np.percentile(diameters, (5, 50, 95)))
    return f"{median} ({low} to {high})"


def cut_window(number, micrograph, levels) -> Window:
    """Return the part of a micrograph, WINDOW_PX a side, that holds the most defects."""
    boxes = np.array([each.box_px for each in micrograph.defects])
    centres = (boxes[:, 1::2].mean(axis=1), boxes[:, ::2].mean(axis=1))  # rows, columns
    starts = [range(0, max(1, n - WINDOW_PX + 1), WINDOW_PX // 2) for n in micrograph.image.shape]

    def count(corner):
        inside = [(c >= start) & (c < start + WINDOW_PX) for c, start in zip(centres, corner)]
        return np.count_nonzero(inside[0] & inside[1])

    top, left = max(((row, col) for row in starts[0] for col in starts[1]), key=count)
    image = micrograph.image[top : top + WINDOW_PX, left : left + WINDOW_PX]
    part = to_display(image, levels)
    height, width = part.shape
    defects = []
    for each in micrograph.defects:
        x0, y0, x1, y1 = each.box_px
        x0, y0, x1, y1 = x0 - left, y0 - top, x1 - left, y1 - top
        if x1 > 0 and y1 > 0 and x0 < width and y0 < height:
            mask = crop_mask(each, micrograph.image.shape)
            defects.append(replace(each, box_px=(x0, y0, x1, y1), mask=mask))
    return Window(number, micrograph.name, (top, left), part, defects)


def draw_outlines(
    pixels: np.ndarray, defects: list[Defect], colours: dict[str, str], factor: int = 2
) -> np.ndarray:
    """Return an image, magnified, uint8 [h, w, 3], with a line along the edge of each defect.

    The line lies on the outermost pixels of the magnified mask, so that the mask's own pixels stay
    visible. Defects may reach beyond the image. A defect without a mask gets its box.

    Args:
        pixels: uint8 [H, W].
        defects: With masks inside their boxes.
        colours: {kind: "#rrggbb"}, as of `choose_colours`.
        factor: Magnification, a whole number.
    """
    drawn = np.repeat(pixels.repeat(factor, axis=0).repeat(factor, axis=1)[..., None], 3, axis=2)
    height, width = pixels.shape
    for each in defects:
        x0, y0, x1, y1 = each.box_px
        mask = np.ones((y1 - y0, x1 - x0), bool) if each.mask is None else each.mask
        large = mask.repeat(factor, axis=0).repeat(factor, axis=1)
        edge = large & ~ndimage.binary_erosion(large, np.ones((3, 3), bool))
        left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        inside = np.s_[
            factor * (top - y0) : factor * (bottom - y0),
            factor * (left - x0) : factor * (right - x0),
        ]
        part = drawn[factor * top : factor * bottom, factor * left : factor * right]
        part[edge[inside]] = PIL.ImageColor.getrgb(colours[each.kind])
    return drawn
