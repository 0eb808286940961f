"""The pictures that pairs start from, and what is done to the images that become of them."""

from typing import Protocol

import numpy as np
from scipy import ndimage

from em_data.labels.masks import fit_box
from em_data.micrograph import Defect
from em_data.synthetic_imaging import make_background
from em_data.synthetic_micrographs import PIXEL_SIZE_NM, Specimen, draw_defects
from em_generation.pairs.appearance import draw_piece, match_levels
from em_generation.pairs.instances import paste
from em_generation.pairs.labelled import LabelledImages

START, FINISH, REFERENCE = 1, 2, 3  # streams of random numbers
NUM_REFERENCES = 64
PROBE_NM = 0.65  # blur of the simulated picture
NUM_CANDIDATES = 8  # instances of the nearest sizes, of which one is pasted
SIMULATED_KINDS: tuple[str, ...] = ("loop_111", "loop_100", "dot", "line")


class Maker(Protocol):
    """Makes the labels of image `number`, which depend on (seed, number) alone."""

    kinds: tuple[str, ...]
    source: str
    """Where layouts are from, for people."""
    fingerprint: str
    """Of the labelled images; "" without any."""

    def start(self, number: int, shape: tuple[int, int]) -> tuple[np.ndarray, list[Defect]]:
        """Return the picture float32 [H, W] in [-1, 1] to start from, and its defects."""

    def finish(self, number: int, image: np.ndarray, layout: list[Defect]) -> list[Defect]:
        """Change what became of the picture in place; return its defects."""


class Simulated:
    """Micrographs of the embedded simulator, without noise, in the grey levels of the model.

    The levels are those of images that the model draws by itself: a rising map gives all deviations
    from an image's median the model's distribution, and each image gets the median of one of the
    model's.

    Args:
        references: [N, R, R] in [-1, 1], images of the model without grain.
        pixel_size_nm: Of the images; None: that of the simulator's standard.
    """

    kinds = SIMULATED_KINDS
    source, fingerprint = "the simulator", ""

    def __init__(self, references: np.ndarray, pixel_size_nm: float | None, seed: int):
        self.seed, self.pixel_size_nm = seed, pixel_size_nm or PIXEL_SIZE_NM
        self.medians = np.median(references, axis=(1, 2))
        shape = references.shape[1:]
        drawn = np.stack([self._simulate(REFERENCE, i, shape)[0] for i in range(NUM_REFERENCES)])
        self.knots = match_levels(drawn, references - self.medians[:, None, None])

    def start(self, number, shape):
        """Return the picture float32 [H, W] in [-1, 1] to start from, and its defects."""
        picture, layout, rng = self._simulate(START, number, shape)
        picture = np.interp(picture, *self.knots) + rng.choice(self.medians)
        return picture.clip(-1, 1).astype(np.float32), layout

    def finish(self, number, image, layout):
        """Return the layout as it is."""
        return layout

    def _simulate(self, stream, number, shape):
        """Return (log-transmission less its median [H, W], defects, random generator)."""
        rng = np.random.default_rng([self.seed, number, stream])
        specimen, side = Specimen.from_seed(int(rng.integers(2**31))), max(shape)
        log_transmission, visibility = make_background(rng, specimen, side, self.pixel_size_nm)
        contrast, defects = draw_defects(rng, specimen, side, self.pixel_size_nm)
        picture = log_transmission - visibility * specimen.contrast * contrast
        picture = ndimage.gaussian_filter(picture, PROBE_NM / self.pixel_size_nm)
        picture = picture[: shape[0], : shape[1]]
        layout = [each for each in (crop_defect(d, shape) for d in defects) if each is not None]
        return picture - np.median(picture), layout, rng


class LikeLabelled:
    """Layouts like those of labelled images, in the looks of their defects, on their grounds."""

    def __init__(self, labelled: LabelledImages, seed: int):
        self.labelled, self.seed, self.kinds = labelled, seed, labelled.kinds
        self.source = f"{labelled.sampler.config.source}, {labelled.name}"
        self.fingerprint = labelled.fingerprint

    def start(self, number, shape):
        """Return the picture float32 [H, W] in [-1, 1] to start from, and its defects."""
        rng = np.random.default_rng([self.seed, number, START])
        layout = self.labelled.draw_layout(*shape, rng)
        picture = draw_ground(self.labelled, shape, rng)
        picture = picture + self.labelled.appearance.draw(layout, shape, rng)
        return picture.clip(-1, 1).astype(np.float32), layout

    def finish(self, number, image, layout):
        """Return the layout as it is."""
        return layout


class CopyPaste:
    """Real defects, turned and mirrored, at the places of a drawn layout, on drawn grounds.

    At each place of the layout, one of the `NUM_CANDIDATES` instances of the nearest sizes is
    pasted. The defects are then those of the instances.
    """

    def __init__(self, labelled: LabelledImages, seed: int):
        self.labelled, self.seed, self.kinds = labelled, seed, labelled.kinds
        self.source = f"{labelled.sampler.config.source}, {labelled.name}"
        self.fingerprint = labelled.fingerprint
        self.by_kind: dict[str, list] = {}
        for each in labelled.instances:
            self.by_kind.setdefault(each.kind, []).append(each)
        self.areas = {
            kind: np.array([each.mask.sum() for each in found])
            for kind, found in self.by_kind.items()
        }

    def start(self, number, shape):
        """Return a ground float32 [H, W] in [-1, 1]; it has no defects."""
        rng = np.random.default_rng([self.seed, number, START])
        return draw_ground(self.labelled, shape, rng).astype(np.float32), []

    def finish(self, number, image, layout):
        """Paste defects into an image [H, W] in place; return them."""
        rng = np.random.default_rng([self.seed, number, FINISH])
        pasted = []
        for planned in self.labelled.draw_layout(*image.shape, rng):
            found = self.by_kind.get(planned.kind)
            if not found:
                continue
            area = 1 if planned.mask is None else planned.mask.sum()
            distance = np.abs(np.log(self.areas[planned.kind] / max(area, 1)))
            nearest = np.argsort(distance, kind="stable")[:NUM_CANDIDATES]
            instance = found[rng.choice(nearest)].turn(int(rng.integers(8)))
            x0, y0, x1, y1 = planned.box_px
            pasted.append(paste(image, instance, ((y0 + y1) / 2, (x0 + x1) / 2)))
        return [defect for defect in pasted if defect is not None]


def draw_ground(labelled: LabelledImages, shape, rng) -> np.ndarray:
    """Return a piece of the ground of a labelled image, float32 [H, W]."""
    return draw_piece(labelled.grounds[rng.integers(len(labelled.grounds))], shape, rng)


def crop_defect(defect: Defect, shape) -> Defect | None:
    """Return the part of a defect in the first rows and columns of an image; None if outside."""
    x0, y0, x1, y1 = defect.box_px
    box = (x0, y0, min(x1, shape[1]), min(y1, shape[0]))
    if box == defect.box_px:
        return defect
    if box[0] >= box[2] or box[1] >= box[3]:
        return None
    assert defect.mask is not None  # the simulator draws masks
    fitted = fit_box(box, defect.mask[: box[3] - y0, : box[2] - x0])
    if fitted is None:
        return None
    metadata = defect.metadata | {"is_cut_by_border": True}
    return Defect(defect.kind, fitted[0], fitted[1], defect.diameter_nm, defect.length_nm, metadata)
