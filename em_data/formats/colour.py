"""Grey images out of what files store: palettes, colour spaces, equal channels."""

import numpy as np

from em_data.formats.base import Coloured, Refusal
from em_data.spikes import iterate_slabs

JPEG_TOLERANCE = 2  # grey levels by which JPEG compression makes the channels of grey differ
MAX_OVERLAY_COLOURS = 16  # of a palette of greys
MAX_OVERLAY_SHARE = 0.05  # of an image's pixels, the label bar apart
EXPORT = "Export it in grey, without overlays."


def to_grey(array, is_lossy, notices) -> np.ndarray:
    """Return the grey image [H, W] of an array [H, W] or [H, W, 1..4].

    Raises:
        Refusal: The image is coloured or partly transparent.
    """
    if array.ndim == 3 and array.shape[-1] in (2, 4):
        alpha = array[..., -1]
        if alpha.size and alpha.min() != alpha.max():
            raise Refusal("partly transparent. Export it without an alpha channel.")
        array = array[..., :-1]
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        return array
    if array.ndim != 3 or array.shape[-1] != 3:
        raise Refusal(f"shape {list(array.shape)}, but a micrograph is grey [height, width].")
    largest, num_coloured = 0.0, 0
    for rows in iterate_slabs(array[..., 0]):
        slab = array[rows]
        if (slab == slab[..., :1]).all():
            continue
        difference = slab.max(axis=-1).astype(np.float64) - slab.min(axis=-1)
        largest = max(largest, float(difference.max()))
        num_coloured += int(np.count_nonzero(difference))
    if not num_coloured:
        return np.ascontiguousarray(array[..., 0])
    if array.dtype == np.uint8 and is_lossy and largest <= JPEG_TOLERANCE:
        notices.append(
            f"channels differ by up to {largest:.0f} grey levels (JPEG): their median is used"
        )
        grey = np.empty(array.shape[:2], array.dtype)
        for rows in iterate_slabs(grey):
            grey[rows] = np.median(array[rows], axis=-1)
        return grey
    share = 100 * num_coloured / max(1, array[..., 0].size)
    raise Coloured(
        f"a coloured image: its channels differ on {share:.3g} % of the pixels, by up to "
        f"{largest:.5g}. {EXPORT}"
    )


def palette_to_grey(indices, palette) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the grey image of an image of palette entries, and its pixels in colours.

    Greys are the palette's: 8 bits if its values are 8-bit greys, also times 256 or 257. A few
    entries in colour are an overlay. They become the grey that their place in the ramp of greys
    has, which is the grey level that the overlay was put on or drawn with.

    Args:
        indices: Unsigned integers [H, W].
        palette: uint8 or uint16 [n, 3].

    Returns:
        uint8 or uint16 [H, W], and bool [H, W] or None if no pixel has a colour.

    Raises:
        Refusal: The palette is one of colours, or too short.
    """
    counts = np.zeros(len(palette), np.int64)
    for rows in iterate_slabs(indices):
        slab = np.bincount(indices[rows].ravel(), minlength=len(palette))
        if len(slab) > len(palette):
            raise Refusal(
                f"pixels ask for colour {len(slab) - 1} of {len(palette)}. Copy it again."
            )
        counts += slab
    used = counts > 0
    palette = _to_8_bits(palette)
    is_grey = (palette == palette[:, :1]).all(axis=1)
    num_colours = np.count_nonzero(used & ~is_grey)
    if not num_colours:
        return look_up(palette[:, 0], indices), None
    places = np.flatnonzero(used & is_grey)
    greys = palette[places, 0].astype(np.float64)
    steps = np.diff(greys)
    is_ramp = len(steps) > 0 and (np.all(steps >= 0) or np.all(steps <= 0))
    if not is_ramp or num_colours > min(MAX_OVERLAY_COLOURS, len(places)):
        share = 100 * counts[~is_grey].sum() / indices.size
        raise Coloured(
            f"a coloured image: its palette has {num_colours} colours that are no greys, on "
            f"{share:.3g} % of the pixels. {EXPORT}"
        )
    table = np.where(is_grey, palette[:, 0], _continue_ramp(places, greys, palette))
    return look_up(table.astype(palette.dtype), indices), look_up(~is_grey, indices)


def look_up(table, indices) -> np.ndarray:
    """Return table[indices] without an index of 64 bits per pixel."""
    values = np.empty(indices.shape, table.dtype)
    for rows in iterate_slabs(indices):
        values[rows] = table[indices[rows]]
    return values


def _continue_ramp(places, greys, palette):
    """Return the grey of each entry on the straight lines through the greys of some entries."""
    entries, slopes = np.arange(len(palette)), np.diff(greys) / np.diff(places)
    ramp = np.interp(entries, places, greys)
    ramp += slopes[0] * np.minimum(entries - places[0], 0)
    ramp += slopes[-1] * np.maximum(entries - places[-1], 0)
    return np.rint(np.clip(ramp, 0, np.iinfo(palette.dtype).max))


def _to_8_bits(palette):
    """Return a palette as uint8 if its values are 8-bit values, also times 256 or 257."""
    if palette.dtype == np.uint8 or palette.max(initial=0) < 256:
        return palette.astype(np.uint8)
    high = palette >> 8
    if np.array_equal(palette, high * np.uint16(257)) or not np.any(palette & 255):
        return high.astype(np.uint8)
    return palette


def refuse_overlay(overlay, notices) -> None:
    """Note the share of an overlay's pixels; refuse an image with too many.

    Args:
        overlay: Bool [H, W], without the label bar.
    """
    share = float(overlay.mean()) if overlay.size else 0.0
    if share > MAX_OVERLAY_SHARE:
        raise Coloured(f"a coloured overlay on {100 * share:.3g} % of the pixels. {EXPORT}")
    if share:
        notices.append(
            f"a coloured overlay on {100 * share:.2g} % of the pixels: read as the grey levels "
            "of its palette entries"
        )


def invert(array, full=None) -> np.ndarray:
    """Return an image whose white is stored as 0 with black as 0, without overflow.

    Args:
        array: [...]; unsigned values lie in 0 to `full`.
        full: The largest value; default: that of the type. Signed values become -1 - x, floats -x.
    """
    if array.dtype.kind == "f":
        return -array
    if array.dtype.kind == "u" and full is not None:
        return array.dtype.type(full) - array
    return ~array


def scale_to_8_bits(array, bits) -> np.ndarray:
    """Return unsigned values of fewer than 8 bits on the range 0 to 255."""
    table = np.rint(np.arange(2**bits) * (255 / (2**bits - 1))).astype(np.uint8)
    return look_up(table, array)


def ycbcr_to_rgb(array, full) -> np.ndarray:
    """Convert YCbCr [H, W, 3] of full range 0 to `full`, as JPEG has it, by ITU-R BT.601."""
    rgb = np.empty(array.shape, array.dtype)
    for rows in iterate_slabs(array):
        y, blue, red = np.moveaxis(array[rows].astype(np.float32), -1, 0)
        blue, red = blue - (full + 1) // 2, red - (full + 1) // 2
        channels = [y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue]
        rgb[rows] = np.rint(np.clip(np.stack(channels, axis=-1), 0, full))
    return rgb


def lab_to_grey(array, neutral) -> np.ndarray:
    """Convert neutral CIE L*a*b* [H, W, 3], as TIFF stores it, to grey of sRGB's gamma.

    Args:
        array: uint8 or uint16; L* of 0 to 100 is 0 to the type's largest value.
        neutral: What is stored for a* = 0 and b* = 0.

    Raises:
        Refusal: The image has colours: a* or b* differ from `neutral` by more than 1.
    """
    bits, full = 8 * array.itemsize, np.iinfo(array.dtype).max
    signed = (array[..., 1:] - array.dtype.type(neutral)).view(f"i{array.itemsize}")
    largest = max(int(signed.max(initial=0)), -int(signed.min(initial=0)))
    if largest > 2 ** (bits - 8):
        raise Coloured(f"a coloured image (Lab): a or b of up to {largest}. {EXPORT}")
    lightness = np.arange(full + 1) * (100 / full)
    linear = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness * 27 / 24389)
    low, high = 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055
    table = np.where(linear > 0.0031308, high, low) * full
    return look_up(np.rint(np.clip(table, 0, full)).astype(array.dtype), array[..., 0])
