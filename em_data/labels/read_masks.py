"""Read mask images: each grey level is an instance, or a kind whose pieces are the instances."""

import re
import warnings
from collections import defaultdict
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import PIL.Image
import tifffile
from scipy import ndimage

from em_data.formats.base import orient
from em_data.formats.pictures import find_orientation
from em_data.label_images import WORDS, list_stems
from em_data.labels.label_set import LabelSet, say_unmatched
from em_data.labels.matching import ImageIndex
from em_data.labels.names_files import list_background, read_names
from em_data.labels.placing import Annotation, BadLabels, place
from em_data.micrograph import Micrograph

KIND = "defect"  # of instances, whose kinds a mask does not tell
MAX_KINDS = 16  # grey levels or colours that are kinds
NUM_TRIED, MAX_TRIED = 8, 64  # masks, and levels of each, that tell what grey levels are
LARGE = 0.6  # share of a mask; a level that covers more may be its background
MIN_WHOLE, MIN_SHARE = 0.9, 0.9  # share of instances in one piece, and the piece's share of one
INSTANCES = re.compile(r"(?<![a-z])(instances?|inst)(?![a-z])", re.IGNORECASE)
KINDS = re.compile(r"(?<![a-z])(semantics?|classes|class|trimaps?)(?![a-z])", re.IGNORECASE)
NEUTRAL_LABELS = re.compile(r"(masks?|labels?|gt)\d*", re.IGNORECASE)
NEIGHBOURS = np.ones((3, 3), bool)  # pixels that touch at a corner are one piece


def find_masks(
    folder: Path, masks: list[Path], files: list[Path], index: ImageIndex, meaning: str
) -> list[LabelSet]:
    """Return the labels of each folder of masks, or of masks with one word in their names.

    Args:
        folder: What all paths are relative to.
        masks: Images that are labels by their names.
        files: Files that may name the kinds.
        meaning: "auto", "instances" or "kinds", as of `DataConfig.masks`.
    """
    groups = defaultdict(list)
    for mask in masks:
        groups[_find_group(mask)].append(mask)
    # data.yaml numbers the classes of YOLO, which has no number for the background
    texts = [each for each in files if each.suffix.lower() not in (".yaml", ".yml")]
    names, sets = read_names(folder, texts), []
    for name, group in groups.items():
        pairs, alone, unclear = defaultdict(list), [], []
        for mask in group:
            images = _find_images(mask, index)
            if len(images) == 1:
                pairs[images[0]].append(mask)
            else:
                (unclear if images else alone).append(mask)
        notes = say_unmatched(f"masks of {name} have no image", alone)
        notes += say_unmatched(f"masks of {name} fit several images", unclear)
        reader = MaskReader(folder, name, pairs, names, meaning)
        recipe = f"{meaning} {sorted(names.items(), key=str)}"
        recipe += " background" if list_background(names) - {0} else ""
        labels = LabelSet(name, "masks", pairs, reader.read, notes, recipe, reader.describe)
        if pairs:
            sets.append(labels)
    return sets


def _find_group(mask):
    """Return the folder of a mask that says that it is one, or a pattern such as *_mask*."""
    for i, part in enumerate(mask.parts[:-1], 1):
        if NEUTRAL_LABELS.fullmatch(part) or WORDS.search(part):
            return f"{Path(*mask.parts[:i]).as_posix()}/"
    word = WORDS.search(mask.stem)
    if word is None:
        return "*"
    return f"{word[0]}*" if word.start() == 0 else f"*{mask.stem[word.start() - 1]}{word[0]}*"


def _find_images(mask, index):
    """Return the images that a mask may belong to: of its name, or of its name without a word."""
    stems = dict.fromkeys((mask.stem, *sorted(list_stems(mask), key=len, reverse=True)))
    for stem in stems:
        if images := index.find_beside(mask, stem):
            return images
    return []


class MaskReader:
    """Reads the masks of images. names: {grey level or #rrggbb: kind}, or empty."""

    def __init__(self, folder: Path, name: str, files, names: dict, meaning: str):
        self.folder, self.name, self.files, self.names = folder, name, files, names
        self.meaning = meaning

    def read(self, path: Path, micrograph: Micrograph):
        """Return the defects of an image."""
        annotations, shapes, are_turned = [], set(), True
        for file in self.files[path]:
            levels, kinds = read_mask(self.folder / file)
            say_large_level(levels, kinds, self.names, micrograph)
            annotations += annotate(levels, kinds, self.names, self.has_instances)
            shapes.add(levels.shape)
            are_turned &= read_orientation(self.folder / file) != 1
        if len(shapes) > 1:
            raise BadLabels(f"its masks have different sizes: {sorted(shapes)}.")
        return place(annotations, micrograph, *shapes, is_turned=are_turned)

    @cached_property
    def has_instances(self) -> bool:
        """Whether grey levels number instances rather than kinds."""
        first = list(chain.from_iterable(self.files.values()))[:NUM_TRIED]
        masks = (lambda file=file: read_mask(self.folder / file) for file in first)
        return find_meaning(self.name, self.meaning, self.names, masks)

    def describe(self) -> str:
        """Return what the masks hold."""
        return f"masks of {'instances' if self.has_instances else 'kinds'}"


def find_meaning(name: str, meaning: str, names: dict, masks) -> bool:
    """Return True if the grey levels of masks number instances, False if they are kinds.

    Args:
        name: Name of the folder or the column; a word such as instances or semantic decides.
        meaning: "instances", "kinds" or "auto", as of `DataConfig.masks`.
        names: Names of the kinds; only kinds have names.
        masks: Functions that read a mask, see `read_mask`. Instances are in one piece each.
    """
    if meaning != "auto":
        return meaning == "instances"
    if len(names) > len(list_background(names)) or KINDS.search(name):
        return False
    if INSTANCES.search(name):
        return True
    num_levels, num_whole, most, is_numbered = 0, 0, 0, True
    for read in masks:
        try:
            levels, kinds = read()
        except BadLabels:
            continue
        if kinds:
            return False
        found = np.unique(levels[levels > 0])
        is_numbered &= not len(found) or len(found) >= 0.9 * found[-1]
        most, tried = max(most, len(found)), found[:MAX_TRIED].tolist()
        num_levels += len(tried)
        num_whole += sum(_is_whole(levels == level) for level in tried)
    if most > MAX_KINDS:  # too many for kinds; smoothed edges are in many pieces
        return num_whole >= 0.5 * num_levels
    return num_levels > 0 and is_numbered and num_whole >= MIN_WHOLE * num_levels


def _is_whole(mask):
    pieces, num = ndimage.label(mask, NEIGHBOURS)
    return num == 1 or np.bincount(pieces.ravel())[1:].max() >= MIN_SHARE * mask.sum()


def annotate(
    levels: np.ndarray, colours: dict[int, str] | None, names: dict, has_instances: bool
) -> list[Annotation]:
    """Return the labels of a mask as of `read_mask`. names: {grey level or #rrggbb: kind}."""
    background = list_background(names)
    if has_instances:
        if background and not colours:
            levels = np.where(np.isin(levels, list(background)), 0, levels)
        return list_instances(levels)
    kinds = colours or {each: str(each) for each in np.unique(levels).tolist() if each}
    kinds = {key: each for key, each in kinds.items() if _to_key(each) not in background}
    if len(kinds) > MAX_KINDS and not names:
        raise BadLabels(
            f"the mask has {len(kinds)} grey levels, but at most {MAX_KINDS} can be kinds. Save it "
            "without smoothing, or use --tiles.masks instances if they number instances."
        )
    return list_pieces(levels, {level: _name(each, names) for level, each in kinds.items()})


def say_large_level(levels, colours, names: dict, micrograph: Micrograph) -> None:
    """Add a notice if one level that counts as a defect covers most of a mask."""
    level = int(np.partition(levels.ravel(), levels.size // 2)[levels.size // 2])
    share = float((levels == level).mean())
    key = _to_key(colours[level] if colours and level else str(level))
    if level == 0 or share <= LARGE or key in list_background(names):
        return
    micrograph.metadata.setdefault("notices", []).append(
        f"level {key} covers {share:.0%} of the mask and counts as a defect: if it is the "
        f'background, save it as 0, or add the line "{key} background" to classes.txt'
    )


def _to_key(level: str):
    return level if level.startswith("#") else int(level)


def _name(level: str, names) -> str:
    key = _to_key(level)
    if names and key not in names:
        raise BadLabels(
            f"the mask has the grey level or colour {level}, but the file of names has only "
            f"{', '.join(map(str, names))}. Add its name."
        )
    return names.get(key, level)


def list_instances(levels: np.ndarray) -> list[Annotation]:
    """Return one label per grey level above 0 of a mask [H, W]."""
    found = np.unique(levels[levels > 0]).tolist()
    if levels.dtype == np.uint8 and len(found) == 255:
        raise BadLabels(
            "the mask uses all 255 numbers of 8 bits for its instances, so some are lost. Save it "
            "with 16 bits."
        )
    boxes = ndimage.find_objects(levels)
    annotations = []
    for level in found:
        rows, columns = boxes[level - 1]
        box = columns.start, rows.start, columns.stop, rows.stop
        mask = levels[rows, columns] == level
        annotations.append(Annotation(KIND, f"instance {level}", mask=mask, mask_box=box))
    return annotations


def list_pieces(levels: np.ndarray, kinds: dict[int, str]) -> list[Annotation]:
    """Return one label per connected piece of each grey level of a mask [H, W]."""
    annotations = []
    for level, kind in kinds.items():
        pieces, _ = ndimage.label(levels == level, NEIGHBOURS)
        for k, (rows, columns) in enumerate(ndimage.find_objects(pieces), 1):
            box = columns.start, rows.start, columns.stop, rows.stop
            mask = pieces[rows, columns] == k
            where = f"piece {k} of {kind}"
            annotations.append(Annotation(kind, where, mask=mask, mask_box=box))
    return annotations


def read_mask(source) -> tuple[np.ndarray, dict[int, str] | None]:
    """Return the grey levels of a mask, uint8, uint16 or int32 [H, W], and names of its colours.

    A mask of up to 16 colours gets the levels 1, 2, ... and their names as {1: "#ff0000"}; grey
    pixels are its background, as where colours are painted over a micrograph. Of a palette image,
    the numbers of the colours are the levels. A mask is turned as its orientation tag says.

    Args:
        source: A path, or a file in memory.

    Raises:
        BadLabels: It is no mask: it is lossy, or has too many colours.
    """
    image = _decode(source)
    if image.ndim == 3 and image.shape[2] in (2, 4):
        image = image[..., :-1]
    if image.ndim == 3 and (image == image[..., :1]).all():
        image = image[..., 0]
    if image.ndim == 2:
        return _check_levels(image), None
    if image.ndim != 3 or image.dtype != np.uint8:
        raise BadLabels(f"the mask has the shape {list(image.shape)}. Save it in grey, as [H, W].")
    colours = image.astype(np.int32) @ np.array([65536, 256, 1])
    is_grey = (image == image[..., :1]).all(axis=-1)
    found = np.unique(colours[~is_grey]).tolist()
    if len(found) > MAX_KINDS:
        raise BadLabels(
            f"the mask has {len(found)} colours, but at most {MAX_KINDS} can be kinds. Save it in "
            "grey, one level a kind, without smoothing."
        )
    levels = np.zeros(colours.shape, np.uint8)
    for i, colour in enumerate(found, 1):
        levels[colours == colour] = i
    return levels, {i: f"#{colour:06x}" for i, colour in enumerate(found, 1)}


def read_orientation(source) -> int:
    """Return how a mask is turned by its own tag, 1 to 8; 1 if it has none or cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if getattr(source, "suffix", "").lower() in (".tif", ".tiff"):
                with tifffile.TiffFile(source) as file:
                    tag = file.pages.first.tags.get("Orientation")
                    return int(tag.value) if tag and tag.value in range(2, 9) else 1
            with PIL.Image.open(source) as image:
                return find_orientation(image)
    except Exception:  # a damaged file is refused where its pixels are read
        return 1
    finally:
        if hasattr(source, "seek"):
            source.seek(0)


def _decode(source):
    name = getattr(source, "suffix", "").lower()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name in (".tif", ".tiff"):
                return orient(tifffile.imread(source), read_orientation(source))
            with PIL.Image.open(source) as image:
                if image.format == "PNG":
                    image.verify()  # its checksums, which decoding does not compare
            if hasattr(source, "seek"):
                source.seek(0)
            with PIL.Image.open(source) as image:
                if image.format == "JPEG":
                    raise BadLabels(
                        "the mask is a JPEG, which blurs its grey levels. Save it as PNG."
                    )
                tag, pixels = find_orientation(image), np.asarray(image)
                return pixels if image.format == "TIFF" else orient(pixels, tag)  # PIL turns TIFF
    except BadLabels:
        raise
    except Exception as error:  # of a damaged file
        raise BadLabels(f"the mask cannot be read ({str(error)[:80]}). Copy it again.") from error


def _check_levels(image):
    """Return whole levels; a mask of floats is read if it has whole numbers only."""
    if image.dtype == np.bool_:
        return image.astype(np.uint8)
    if image.dtype.kind == "f" and not (np.isfinite(image) & (image == np.rint(image))).all():
        raise BadLabels("the mask has levels that are no whole numbers. Save it as integers.")
    if image.dtype in (np.uint8, np.uint16):
        return image
    image = image.astype(np.int64)
    if image.min() < 0 or image.max() >= 2**31:
        raise BadLabels(f"the mask has levels from {image.min()} to {image.max()}. Begin at 0.")
    return image.astype(np.uint16 if image.max() < 2**16 else np.int32)
