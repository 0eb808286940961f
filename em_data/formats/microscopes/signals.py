"""What RosettaSciIO reads from a file, as images: their axes, their scale and their name."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from em_data.formats.base import Refusal, Stored
from em_data.metadata import refuse_diffraction, square_pixel_size, unit_to_nm

ENERGY_UNITS = ("ev", "kev", "mev", "cm-1", "1/cm")
ENERGY_NAMES = re.compile(r"energy|wavelength|wavenumber|raman", re.IGNORECASE)
ELEMENTS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se "
    "Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb "
    "Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm"
)
XRAY_MAP = re.compile(rf"({'|'.join(ELEMENTS.split())})([ -]?[KLMN][a-zα-ω]?\d?)?( ?map)?")
XRAY_FORMATS = ("EMD", "JEOL", "Bruker", "Phenom")
MAX_TIA_NM = 1e6  # files of TIA do not say whether their scale is in m or in 1/m
DIFFRACTION = "a diffraction pattern"
MAX_PIXELS = 400_000_000  # of one image
PATTERNS = "a 4D-STEM set of diffraction patterns"
# where RosettaSciIO files what a microscope says: our key, the last part of its own
PLAIN_KEYS = {
    "beam_energy": "voltage_kV",
    "magnification": "magnification",
    "microscope": "instrument",
    "camera_length": "camera_length_mm",
    "exposure": "exposure_s",
    "dwell_time": "dwell_time_s",
    "beam_current": "beam_current_nA",
    "detector": "detector",
    "detector_type": "detector",
    "date": "date",
    "time": "time",
    "authors": "author",
}


@dataclass
class Picture:
    """One image, or one stack of frames, that is not read yet."""

    title: str
    data: Any  # a NumPy or Dask array, [H, W] or [frames, H, W]
    metadata: dict
    pixel_size_nm: float | None

    def read(self, name: str | None, frame_step: int) -> Iterator[Stored]:
        """Yield the image, or every `frame_step`-th frame."""
        if self.data.ndim == 2:
            yield Stored(_compute(self.data), self.metadata, self.pixel_size_nm, name=name)
            return
        notices = self.metadata["notices"]  # said with the first frame
        for i in range(0, len(self.data), frame_step):
            metadata = self.metadata | {"notices": notices}
            yield Stored(_compute(self.data[i]), metadata, self.pixel_size_nm, frame=i, name=name)
            notices = []


def describe(signal: dict, format_name: str) -> Picture:
    """Return the image or the stack of a dictionary of RosettaSciIO.

    Raises:
        Refusal: It is none: a spectrum, a diffraction pattern, a set of more dimensions.
    """
    data, axes = signal["data"], list(signal["axes"])
    metadata: dict = {"format": format_name, "notices": list(signal.get("notices", ()))}
    general = signal["metadata"].get("General", {})
    title = " ".join(str(general.get("title") or "").split())
    if data.dtype.kind == "c":
        raise Refusal("complex values, as of a Fourier transform. Export its amplitude as TIFF.")
    if data.dtype.kind not in "biufV" or (data.dtype.kind == "V" and not data.dtype.names):
        raise Refusal(f"data of type {data.dtype}, which are no grey levels.")
    if data.dtype.names and format_name == "Phenom":
        raise Refusal("a page in colour, not a micrograph.")
    if len(axes) != data.ndim:
        raise Refusal(f"an array of shape {list(data.shape)} without axes, not an image.")
    data, axes = _drop_single(data, axes)
    signal_type = str(signal["metadata"].get("Signal", {}).get("signal_type", ""))
    _refuse_others(data, axes, format_name, signal_type)
    if format_name in XRAY_FORMATS and XRAY_MAP.fullmatch(title):
        raise Refusal(f"an X-ray map ({title}), not a micrograph.")
    data, axes = _put_frames_first(data, axes)
    height, width = data.shape[-2:]
    if height * width > MAX_PIXELS:
        most = MAX_PIXELS // 10**6
        raise Refusal(f"{height} x {width} pixels, more than {most} million. Export it in parts.")
    _refuse_diffraction(axes, format_name)
    sizes = _find_sizes(axes[-2:], format_name)
    if title:
        metadata["title"] = title
    metadata |= _find_facts(signal)
    size = square_pixel_size(sizes, metadata["notices"])
    return Picture(title, data, metadata, size)


def _compute(data):
    """Return the values of a NumPy or Dask array; fields of colours become [H, W, channels]."""
    array = np.asarray(data.compute(scheduler="synchronous") if hasattr(data, "dask") else data)
    if array.dtype.names:
        array = np.stack([array[name] for name in array.dtype.names], axis=-1)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _drop_single(data, axes):
    """Return data and axes without axes of length 1, as long as two axes are left."""
    for i in reversed(range(data.ndim)):
        if data.ndim > 2 and data.shape[i] == 1:
            data, axes = data.squeeze(i), axes[:i] + axes[i + 1 :]
    return data, axes


def _refuse_others(data, axes, format_name, signal_type):
    """Refuse what is no image: spectra, diffraction patterns and sets of more dimensions."""
    shape = " x ".join(map(str, data.shape))
    if data.ndim < 2:
        raise Refusal(f"a spectrum or line profile ({shape} values), not an image.")
    is_energy = [
        _unit(axis) in ENERGY_UNITS or bool(ENERGY_NAMES.search(str(axis.get("name") or "")))
        for axis in axes
    ]
    num_signal = sum(not axis.get("navigate") for axis in axes)
    if any(is_energy) or num_signal == 1:
        what = "a spectrum image" if data.ndim > 2 else "a line of spectra"
        raise Refusal(f"{what} ({shape}), not a micrograph.")
    is_pattern = "diffraction" in signal_type.lower()
    if data.ndim > 3:
        try:
            _refuse_diffraction(axes, format_name)
        except Refusal:
            is_pattern = True
        what = PATTERNS if is_pattern else f"a set of {data.ndim} dimensions"
        raise Refusal(f"{what} ({shape}), not a micrograph.")
    if is_pattern:
        raise Refusal(f"{DIFFRACTION} ({shape}), not a micrograph.")


def _refuse_diffraction(axes, format_name):
    """Refuse an image whose last two axes are not lengths but spatial frequencies or angles."""
    for axis in axes[-2:]:
        refuse_diffraction(axis.get("units"))
    sizes = _find_sizes(axes[-2:], format_name)
    if format_name == "TIA" and sizes and max(sizes[:2]) > MAX_TIA_NM:
        raise Refusal(f"{DIFFRACTION}: its scale of {sizes[0] / 1e9:.3g} per pixel is in 1/m.")


def _unit(axis):
    return str(axis.get("units") or "").strip().lower()


def _put_frames_first(data, axes):
    """Return a stack as [frames, H, W], with its axes.

    Some formats do not say which axis is that of the frames: then names or units must tell.
    """
    if data.ndim == 2:
        return data, axes
    frames = [i for i, axis in enumerate(axes) if axis.get("navigate")]
    if len(frames) != 1:
        names = [str(axis.get("name") or "").lower().removeprefix("r_") for axis in axes]
        lengths = [unit_to_nm(axis.get("units")) is not None for axis in axes]
        plane = [i for i, name in enumerate(names) if name in ("x", "y")]
        frames = [i for i in range(3) if i not in plane]
        if len(frames) != 1:
            frames = [i for i in range(3) if not lengths[i]]
        if len(frames) != 1:
            shape = " x ".join(map(str, data.shape))
            raise Refusal(
                f"a stack ({shape}) whose axes do not say which counts the frames. "
                "Name two axes x and y, or export it as TIFF."
            )
    first = frames[0]
    data = np.moveaxis(data, first, 0) if isinstance(data, np.ndarray) else _move(data, first)
    return data, [axes[first], *axes[:first], *axes[first + 1 :]]


def _move(data, first):
    return data.transpose([first, *(i for i in range(data.ndim) if i != first)])


def _find_sizes(axes, format_name):
    """Return (x_nm, y_nm, field) of the axes y and x of an image, or None."""
    factors = [unit_to_nm(axis.get("units") or "") for axis in axes]
    if None in factors:
        return None
    y, x = (abs(float(axis["scale"])) * factor for axis, factor in zip(axes, factors))
    return x, y, f"{format_name} header"


def _find_facts(signal):
    """Return what a microscope says of an image, under our own plain keys."""
    found = {}
    for part in ("Acquisition_instrument", "General"):
        _collect(signal["metadata"].get(part, {}), found)
    original = signal.get("original_metadata") or {}
    for source, (target, convert) in (signal.get("mapping") or {}).items():
        value = original
        for part in source.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        key = PLAIN_KEYS.get(target.split(".")[-1])
        if value is None or key is None:
            continue
        try:
            found.setdefault(key, _plain(convert(value) if convert else value))
        except Exception:  # a field of an unexpected kind is left out
            continue
    return {key: value for key, value in found.items() if value not in (None, "")}


def _collect(tree, found):
    """Copy the entries of a nested dictionary that have a plain key."""
    for key, value in tree.items():
        if isinstance(value, dict):
            _collect(value, found)
        elif key in PLAIN_KEYS:
            found.setdefault(PLAIN_KEYS[key], _plain(value))


def _plain(value):
    """Return a value that JSON can hold; None if it is no number and no short text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return value.strip()[:200]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float) else None
