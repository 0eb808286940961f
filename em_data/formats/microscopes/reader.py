"""Read a file of a microscope with RosettaSciIO, which is imported at the first such file."""

import importlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import numpy as np

from em_data.formats.base import Refusal, Stored
from em_data.formats.microscopes.checks import check_header
from em_data.formats.microscopes.hdf5 import find_hdf5_format
from em_data.formats.microscopes.mrc import correct_mrc, read_mrc_header
from em_data.formats.microscopes.signals import describe
from em_data.formats.microscopes.tia import find_emi, read_emi

MISSING = (
    'needs RosettaSciIO: pip install "em-synthesis[microscopes]". Or export the image as TIFF.'
)
MAX_WHOLE_BYTES = 2 * 1024**3  # of a file whose frames cannot be read one by one


@dataclass(frozen=True)
class Format:
    """A format that RosettaSciIO reads."""

    name: str
    module: str
    suffix: str  # that the module expects
    is_lazy: bool = True  # frames are read one by one
    options: dict = field(default_factory=dict)


DM = Format("DigitalMicrograph", "digitalmicrograph", ".dm4")
TIA = Format("TIA", "tia", ".ser", is_lazy=False)
# groups are not stacked: images of different sizes would share one scale
EMD_OPTIONS = {"select_type": "images", "load_SI_image_stack": True, "stack_group": False}
EMD = Format("EMD", "emd", ".emd", options=EMD_OPTIONS)
HYPERSPY = Format("HyperSpy", "hspy", ".hspy")
NEXUS = Format("NeXus", "nexus", ".nxs", options={"nxdata_only": True})
MRC = Format("MRC", "mrc", ".mrc")
BRUKER = Format("Bruker", "bruker", ".bcf", is_lazy=False, options={"select_type": "image"})
JEOL = Format("JEOL", "jeol", ".img", is_lazy=False)
PHENOM = Format("Phenom", "phenom", ".elid", is_lazy=False)
TVIPS = Format("TVIPS", "tvips", ".tvips")
SEMPER = Format("Semper", "semper", ".unf", is_lazy=False)
RIPPLE = Format("Ripple", "ripple", ".rpl")
HDF5 = Format("HDF5", "", ".h5")  # its layout says which format it is
HDF5_FORMATS = {each.name: each for each in (EMD, HYPERSPY, NEXUS)}

SUFFIXES = {
    **dict.fromkeys((".dm3", ".dm4"), DM),
    ".ser": TIA,
    **dict.fromkeys((".emd", ".de5", ".hspy", ".nxs", ".h5", ".hdf5"), HDF5),
    **dict.fromkeys((".mrc", ".mrcs", ".rec", ".st", ".ali"), MRC),
    ".bcf": BRUKER,
    ".img": JEOL,
    ".elid": PHENOM,
    ".tvips": TVIPS,
    ".unf": SEMPER,
    ".rpl": RIPPLE,
}
STARTS = {  # first bytes of a file: its format, whatever its name
    b"\0\0\0\3": DM,
    b"\0\0\0\4": DM,
    b"II\x97\x01": TIA,
    b"\x89HDF\r\n\x1a\n": HDF5,
    b"AAMVHFSS": BRUKER,
    b"4\0\0\0JED-2200": JEOL,
}
# suffixes of the field that hold no micrographs: what they hold
NOT_MICROGRAPHS = {
    ".emi": "headers whose .ser files are missing",
    ".blo": "4D-STEM sets of diffraction patterns (export their virtual images as TIFF)",
    ".mib": "sets of diffraction patterns",
    ".app5": "4D-STEM sets of diffraction patterns",
    ".map": "X-ray maps",  # others with this suffix are MRC files by their first bytes
    ".asw": "projects of JEOL, whose images (.img) are read by themselves",
    ".pts": "X-ray spectrum images",
    ".spx": "X-ray spectra",
    ".eds": "X-ray spectra",
    ".msa": "spectra",
    ".emsa": "spectra",
    ".spd": "X-ray spectrum images",
    ".spc": "spectra",
    ".wdf": "Raman spectra",
    ".dens": "heating logs",
    ".zspy": "sets of HyperSpy in many files (save them as .hspy)",
}


def find_format(start: bytes, suffix: str) -> Format | None:
    """Return the format of a file by its first bytes, else by its suffix; None if it is another's.

    Args:
        start: The first 1024 bytes of the file.
        suffix: Of its name, in any case; "" if it has none.
    """
    if start[208:212] in (b"MAP ", b"MAP\0"):
        return MRC
    known = next((each for magic, each in STARTS.items() if start.startswith(magic)), None)
    return known or SUFFIXES.get(suffix.lower())


def find_companions(path: Path) -> list[Path]:
    """Return the other files that belong to a file: without them, or if they change, it changes.

    These are the header `NAME.emi` of `NAME_1.ser`, the pixels `NAME.raw` of `NAME.rpl` and the
    later parts of a TVIPS series.
    """
    suffix = path.suffix.lower()
    if suffix == ".ser":
        emi = find_emi(path)
        return [emi] if emi else []
    if suffix == ".rpl":
        return [each for each in (path.with_suffix(".raw"),) if each.is_file()]
    if suffix == ".tvips" and path.stem.endswith("_000"):
        parts = (path.with_name(f"{path.stem[:-3]}{i:03d}{path.suffix}") for i in range(1, 1000))
        return list(takewhile(Path.is_file, parts))
    return []


def decode_microscope(source: bytes | Path, form: Format, frame_step: int = 1) -> Iterator[Stored]:
    """Yield the images of a file of a microscope: 2-D images, and the frames of stacks.

    Spectra, diffraction patterns and sets of more dimensions beside an image are named in its
    notices.

    Args:
        source: The file, or its bytes.
        form: Its format, as `find_format` tells it.
        frame_step: Every how many frames of a stack are read.

    Raises:
        Refusal: The file holds no image, or RosettaSciIO is not installed.
    """
    with _as_file(source, form) as path:
        form = HDF5_FORMATS[find_hdf5_format(path, MISSING)] if form is HDF5 else form
        remarks = check_header(path, form.name)
        emi = find_emi(source) if form is TIA and isinstance(source, Path) else None
        facts = read_emi(emi) if emi else {}
        pictures, others = [], []
        for signal in _read_signals(path, form):
            try:
                pictures.append(describe(signal, form.name))
            except Refusal as refusal:
                others.append(str(refusal))
        if not pictures:
            raise Refusal(others[0] if others else f"no image in this {form.name} file.")
        pictures[0].metadata["notices"] += [*remarks] + [
            f"not used: {other.removesuffix('.')}" for other in dict.fromkeys(others)
        ]
        names = _make_names(pictures)
        if len(pictures) > 1:
            pictures[0].metadata["notices"].append(
                f"{len(names)} images ({', '.join(names)}): each is a micrograph; to train on one "
                "of them, save it as a file of its own"
            )
        for picture, name in zip(pictures, names):
            picture.metadata |= facts
            yield from picture.read(name, frame_step)


def _make_names(pictures):
    """Return a name for each image of a file: its title, with a number if others have it, too."""
    if len(pictures) == 1:
        return [None]
    titles = [picture.title or "image" for picture in pictures]
    counts = {title: titles.count(title) for title in titles}
    seen = dict.fromkeys(titles, 0)
    names = []
    for title in titles:
        seen[title] += 1
        names.append(f"{title}-{seen[title]}" if counts[title] > 1 else title)
    return names


def _read_signals(path, form):
    """Return what RosettaSciIO reads from a file: dictionaries with data, axes and metadata."""
    try:
        module = importlib.import_module(f"rsciio.{form.module}")
    except ModuleNotFoundError as error:
        raise Refusal(MISSING) from error
    size = path.stat().st_size
    if not form.is_lazy and size > MAX_WHOLE_BYTES:
        raise Refusal(
            f"{size / 1024**3:.3g} GB, but {form.name} files are read as a whole, up to 2 GB. "
            "Export it in parts."
        )
    if form is MRC:
        header = read_mrc_header(path, size)
        with quiet():
            (signal,) = module.file_reader(str(path), lazy=True, endianness=header.order)
        return [correct_mrc(signal, header)]
    with quiet():
        try:
            return module.file_reader(str(path), lazy=form.is_lazy, **form.options)
        except (ValueError, NotImplementedError) as error:
            if "object dtype" in str(error):
                raise Refusal("texts or objects, which are no grey levels.") from error
            # colour images, and some older files, are not read lazily
            if not form.is_lazy or ("azy" not in str(error) and "dask" not in str(error)):
                raise
            return module.file_reader(str(path), lazy=False, **form.options)


@contextmanager
def quiet():
    """Let neither warnings nor log lines of RosettaSciIO reach the terminal."""
    logger = logging.getLogger("rsciio")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _as_file(source, form):
    """Give the path of a file with a suffix that RosettaSciIO's module for the format accepts."""
    if not isinstance(source, bytes):
        suffix = source.suffix.lower()
        if form.module not in ("tia", "jeol", "bruker") or suffix == form.suffix:
            yield source
            return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder, f"image_000{form.suffix}")
        if isinstance(source, bytes):
            path.write_bytes(source)
        else:
            shutil.copyfile(source, path)
        yield path
