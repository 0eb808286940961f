"""The Damaged Alloys set as a source: STEM micrographs of irradiated FeCrAl with dislocation loops.

The set is that of Li, Field & Morgan, npj Computational Materials 4, 36 (2018). Two layouts of its
folders are known, those of the authors' two programs. What else lies in a folder is counted and
left out.
"""

import re
from collections import Counter
from pathlib import Path

import PIL.Image

from em_data.reading import SUFFIXES, natural_key, read_micrograph
from em_data.sources.base import Entry, Source
from em_data.sources.damaged_alloys_labels import find_labels, read_defects
from em_data.sources.folder import hash_files

STUDY_SIZES = {(1024, 1024): 442, (2048, 2048): 52}  # micrographs of the study by (H, W)
# by magnification / 1000
PIXEL_SIZES_NM = {"70": 0.8805, "100": 0.8691, "300": 0.4785, "500": 0.2832}
ON_ZONE_NM = 0.1416
MAX_DEPTH = 4  # folders below the given one in which a layout is looked for


def pixel_size_from_name(name) -> float | None:
    """Return the pixel size in nm by the magnification in a file's name, such as "BF X500K, 06"."""
    if re.search(r"on[-_ ]?zone", name, re.IGNORECASE):
        return ON_ZONE_NM
    found = re.search(r"(?<!\d)(\d+)\s*kx|x\s*(\d+)\s*k", name, re.IGNORECASE)
    return PIXEL_SIZES_NM.get(found.group(1) or found.group(2)) if found else None


def open_damaged_alloys(folder, config, cache_dir) -> Source:
    """List the micrographs of the set below a folder, with boxes and pixel sizes.

    `ignored` says what is not used (augmented copies, negatives, crops, names without a file) and
    how the set differs from the 494 micrographs of the study.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is no folder; give that of the Damaged Alloys set, or download it: "
            "python -m em_data.damaged_alloys FOLDER --download"
        )
    paths, labels, ignored = find_layout(Path(folder))
    entries = []
    for path, key in zip(paths, hash_files(paths, cache_dir)):
        name = path.relative_to(folder).as_posix()
        label = labels.get(path)
        if label is not None and config.labels != "none":  # other labels make another entry
            key += f"-{label.stat().st_size}-{label.stat().st_mtime_ns}"

        def frames(path=path, name=name, label=label):
            micrograph = read_micrograph(path, label_bar=config.label_bar, name=name)
            micrograph.pixel_size_nm = pixel_size_from_name(path.stem) or micrograph.pixel_size_nm
            if label is not None and config.labels != "none":
                micrograph.defects = read_defects(label, micrograph)
            yield micrograph

        entries.append(Entry(name, key, frames))
    ignored += compare_with_study(paths, labels)
    labels = {} if config.labels == "none" else labels
    found = f"Damaged Alloys' own files ({len(labels)} images)" if labels else ""
    return Source("damaged-alloys", entries, ignored, found)


def find_layout(folder):
    """Return (paths of the micrographs, {path: label file}, sentences on what is left out)."""
    below = sorted(p for p in folder.rglob("*") if p.is_dir())
    folders = [folder, *(p for p in below if len(p.relative_to(folder).parts) <= MAX_DEPTH)]
    for parent in folders:
        if (parent / "images.txt").is_file() and (parent / "images").is_dir():
            return _find_listed(parent)
    for parent in folders:
        if (parent / "positive").is_dir() and _list_images(parent / "positive"):
            return _find_positive(parent)
    inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{folder} has no known layout of the Damaged Alloys set: neither images.txt beside images/"
        f" nor a folder positive/ with images, but {inside}. If it holds micrographs and nothing "
        f"else, give the folder itself: --data {folder}"
    )


def _list_images(folder):
    paths = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()]
    return sorted(paths, key=lambda path: natural_key(path.name))


def _find_listed(parent):
    """Layout of the Faster R-CNN program: images.txt names the micrographs in images/."""
    lines = [line.strip() for line in (parent / "images.txt").read_text().splitlines()]
    listed = list(dict.fromkeys(filter(None, lines)))
    images = _list_images(parent / "images")
    there = {path.stem: path for path in images} | {path.name: path for path in images}
    found = {name: there.get(name) or there.get(Path(name).stem) for name in listed}
    paths = list(dict.fromkeys(filter(None, found.values())))
    if not paths:
        raise ValueError(
            f"{parent}: none of the {len(listed)} names in images.txt has an image in images/. "
            "Copy the set again."
        )
    missing = [name for name, path in found.items() if path is None]
    num_extra = len(set(images) - set(paths))
    ignored = [
        f"layout of the Faster R-CNN program: {len(paths)} of {len(listed)} names in images.txt "
        "have an image"
    ]
    if missing:
        ignored.append(
            f"{len(missing)} names in images.txt without an image in images/, such as {missing[0]}"
        )
    if num_extra:
        what = "that images.txt does not list: augmented copies or others"
        ignored.append(f"{num_extra} images in images/ {what}")
    ignored += _count_elsewhere(parent, parent / "images")
    return paths, find_labels(paths, [parent / "bounding_boxes"]), ignored


def _find_positive(parent):
    """Layout of the MATLAB program: the micrographs are in positive/, labels anywhere."""
    paths = _list_images(parent / "positive")
    ignored = [f"layout of the MATLAB program: {len(paths)} images in positive/"]
    ignored += _count_elsewhere(parent, parent / "positive")
    folders = [parent, *(p for p in parent.rglob("*") if p.is_dir())]
    return paths, find_labels(paths, folders), ignored


def _count_elsewhere(parent, used):
    """Return a sentence per folder below `parent` with images, except for `used`."""
    counts = Counter(
        path.parent.relative_to(parent).as_posix()
        for path in parent.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.parent != used
    )
    return [
        f"{num} images in {name}/: negatives, augmented copies or crops"
        for name, num in sorted(counts.items())
    ]


def compare_with_study(paths, labels) -> list[str]:
    """Return sentences on how the micrographs differ from the study's, and on what is unknown."""
    sizes, unreadable, notes = Counter(), [], []
    for path in paths:
        try:
            with PIL.Image.open(path) as image:
                sizes[image.size[::-1]] += 1
        except OSError:
            unreadable.append(path.name)
    if dict(sizes) != STUDY_SIZES or unreadable:
        parts = [
            f"{sizes.pop((h, w), 0)} of {num} with {h} x {w} pixels"
            for (h, w), num in STUDY_SIZES.items()
        ]
        for (h, w), num in sorted(sizes.items()):
            parts.append(f"{num} with {h} x {w}, which the study has not")
        if unreadable:
            parts.append(f"{len(unreadable)} unreadable, such as {unreadable[0]}")
        num = sum(STUDY_SIZES.values())
        notes.append(f"{len(paths)} micrographs, the study has {num}: {'; '.join(parts)}")
    if len(labels) < len(paths):
        num = len(paths) - len(labels)
        notes.append(f"{num} micrographs without a label file: no boxes for them")
    num_unknown = sum(pixel_size_from_name(path.stem) is None for path in paths)
    if num_unknown:
        notes.append(
            f"{num_unknown} micrographs with no known magnification in their names: pixel size "
            "unknown unless the file has it"
        )
    return notes
