"""Decode TIFF files: which of their images are micrographs, and their frames."""

import io
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from em_data.formats.base import (
    MAX_PAGES,
    Coloured,
    Refusal,
    Stored,
    explain_failure,
)
from em_data.formats.channels import find_planes
from em_data.formats.colour import to_grey
from em_data.formats.tiff_pages import COLOURS, check_page, read_page
from em_data.metadata import read_tiff_metadata, square_pixel_size

REDUCED, MASK = 1, 4  # bits of NewSubfileType
MIN_SIDE_SHARE = 0.5  # of a grey image beside one in colours, else it is the latter's thumbnail


@dataclass
class Group:
    """Images of a file with the same size and type: one micrograph, or the frames of a stack."""

    height: int
    width: int
    is_colour: bool
    itemsize: int
    pages: list = field(default_factory=list)  # (number, number of the SubIFD or None)

    @property
    def rank(self):
        """The best group has the least rank: large before small, grey before colours."""
        return -self.height * self.width, self.is_colour, -self.itemsize


def decode_tiff(source: bytes | Path, frame_step: int = 1) -> Iterator[Stored]:
    """Yield the largest grey image of a TIFF, or every `frame_step`-th frame of the largest stack.

    Thumbnails, other reduced images, masks and previews in colours are named in a notice.
    """
    notices: list[str] = []
    warnings: list[str] = []
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with _collect_warnings(warnings), tifffile.TiffFile(file) as tif:
        num_pages = len(tif.pages)
        if not num_pages:
            raise Refusal("a TIFF without an image. Copy it again.")
        if num_pages > MAX_PAGES:
            raise Refusal(f"{num_pages:,} pages, but at most {MAX_PAGES:,} are read. Split it.")
        tif.pages.cache = False  # a page is read again when its turn comes
        group = _choose_group(tif, notices)
        first = _get_page(tif, group.pages[0])
        frames = _find_frames(tif, first, group)
        numbers = [page for page, _ in group.pages]
        if len(numbers) != len(frames):  # several frames lie in one page
            numbers = list(range(len(frames)))
        planes = find_planes(tif, numbers, notices)
        num_frames = len({frame for _, frame in planes})
        if num_frames > 1:
            notices.append(
                f"stack of {num_frames} frames: each is a micrograph; no split parts them"
            )
        told = (tif.imagej_metadata or {}).get("images", 1)
        if isinstance(told, int) and told > len(frames) and len(group.pages) == num_pages:
            notices.append(f"the header tells {told} frames, but {len(frames)} are in the file")
        if any("invalid page offset" in each for each in warnings):
            warnings.clear()
            notices.append(
                f"truncated: images after the first {num_pages} are missing. Copy the file again"
            )
        metadata, sizes = read_tiff_metadata(tif, first)
        pixel_size = square_pixel_size(sizes, notices)
        for (channel, i), read in zip(planes, frames):
            if i % frame_step:
                continue
            stored = Stored(np.empty(0), metadata | {"notices": notices}, pixel_size)
            stored.frame = i if num_frames > 1 else None
            stored.name = f"C{channel}" if channel else None
            try:
                read(stored)
            except Exception as error:  # the other frames go on
                stored.array = explain_failure(error)
            stored.metadata["notices"] += warnings
            warnings.clear()
            yield stored
            del stored
            notices = []


def _get_page(tif, address) -> Any:
    number, part = address
    page = tif.pages[number]
    return page if part is None else page.pages[part]


def _choose_group(tif, notices):
    """Return the group of images to read, and note the others."""
    groups, others = _group_pages(tif)
    coloured = None
    for group in sorted(groups, key=lambda each: each.rank):
        if coloured and (
            group.height < MIN_SIDE_SHARE * coloured.height
            or group.width < MIN_SIDE_SHARE * coloured.width
        ):
            break
        if not group.is_colour or len(groups) == 1 or _is_grey(tif, group):
            for each in groups:
                if each is not group:
                    kind = "image in colours" if each.is_colour else "image"
                    others[f"{kind} of {each.height} x {each.width}"] += len(each.pages)
            if others:
                names = ", ".join(f"{num} {name}" for name, num in others.items())
                notices.append(
                    f"the file holds more than the image of {group.height} x {group.width}; "
                    f"not used: {names}"
                )
            return group
        coloured = coloured or group
    if coloured is None:
        raise Refusal("a TIFF that holds only a mask. Remove it from the micrographs.")
    return coloured


def _group_pages(tif):
    """Return groups of full images (of reduced ones, if there are no others), and what is no image.

    The latter is a count of names.
    """
    groups, reduced, others = {}, {}, Counter()
    for address, page in _iterate_pages(tif):
        height, width, kind = page.imagelength, page.imagewidth, int(page.subfiletype)
        if kind & MASK or page.photometric == COLOURS.MASK:
            others[f"mask of {height} x {width}"] += 1
            continue
        is_colour = page.samplesperpixel > 2 or page.photometric == COLOURS.PALETTE
        itemsize = page.dtype.itemsize if page.dtype else 0
        found = reduced if kind & REDUCED else groups
        key = (height, width, is_colour, page.samplesperpixel, str(page.dtype))
        group = found.setdefault(key, Group(height, width, is_colour, itemsize))
        group.pages.append(address)
    if not groups:
        return list(reduced.values()), others
    for each in reduced.values():
        others[f"reduced image of {each.height} x {each.width}"] += len(each.pages)
    return list(groups.values()), others


def _iterate_pages(tif):
    """Yield ((number, number of the SubIFD or None), page) of all images of a file."""
    for number in range(len(tif.pages)):
        page = tif.pages[number]
        yield (number, None), page
        if page.subifds:
            with suppress(tifffile.TiffFileError, ValueError):
                for part in range(min(len(page.pages), MAX_PAGES)):
                    yield (number, part), page.pages[part]


def _is_grey(tif, group):
    """Return False if the first image of a group has true colours; damage is told later."""
    stored = Stored(np.empty(0), {"notices": []})
    try:
        page = _get_page(tif, group.pages[0])
        check_page(page, tif.filehandle.size)
        read_page(page, stored)
        to_grey(stored.array, stored.is_lossy, [])
    except Coloured:
        return False
    except Exception:
        return True
    return True


def _find_frames(tif, first, group):
    """Return a function per frame that reads it into a `Stored`."""
    if len(group.pages) > 1:
        return [lambda stored, a=each: _read(_get_page(tif, a), stored) for each in group.pages]
    if first.imagedepth > 1:  # a volume in one page
        return _slice_volume(first)
    if len(tif.pages) == 1 and first.compression == 1 and first.samplesperpixel == 1:
        # ImageJ and others write one page for many frames, one after the other
        num, offsets = _count_told_frames(tif, first), first.dataoffsets
        return [lambda stored, i=i: _read_behind(first, offsets, stored, i) for i in range(num)]
    return [lambda stored: _read(first, stored)]


def _count_told_frames(tif, page):
    """Return how many frames the header of a file tells; at least 1."""
    told = (tif.imagej_metadata or {}).get("images", 1)
    if isinstance(told, int) and told > 1:
        return min(told, MAX_PAGES)
    if not (tif.is_shaped or tif.is_stk):  # a series of OME would span several files
        return 1
    return min(max(1, tif.series[0].size // max(1, page.size)), MAX_PAGES)


def _read(page, stored):
    """Read the image of a page."""
    check_page(page, page.parent.filehandle.size)
    tag = page.tags.get("Orientation")
    stored.orientation = int(tag.value) if tag and tag.value in range(2, 9) else 1
    read_page(page, stored)


def _slice_volume(page):
    """Return a function per slice of a volume in one page; the first reads the page."""
    volume = Stored(np.empty(0), {"notices": []})

    def read_slice(stored, i):
        if not volume.array.size:
            _read(page, volume)
            stored.metadata["notices"] += volume.metadata["notices"]
        stored.array, stored.orientation = volume.array[i].copy(), volume.orientation
        stored.is_lossy = volume.is_lossy

    return [lambda stored, i=i: read_slice(stored, i) for i in range(page.imagedepth)]


def _read_behind(page, offsets, stored, i):
    """Read the i-th frame of those that lie one after the other at the offsets of one page."""
    page.dataoffsets = tuple(offset + i * page.nbytes for offset in offsets)
    _read(page, stored)


_COLLECTED: list[list[str]] = []  # of the files that are being read; the last one is at work


@contextmanager
def _collect_warnings(notices):
    """Append what tifffile logs to `notices` instead of printing it."""
    _COLLECTED.append(notices)
    try:
        yield
    finally:
        _COLLECTED[:] = [each for each in _COLLECTED if each is not notices]


def _collect(record):
    """Keep a message of tifffile from its handlers while a file is read."""
    if _COLLECTED:
        _COLLECTED[-1].append(f"tifffile: {record.getMessage()}")
    return not _COLLECTED


logging.getLogger("tifffile").addFilter(_collect)
