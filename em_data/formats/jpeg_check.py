"""Tell whether a JPEG holds all of its image: decoders fill what is missing with grey."""

import math
import re
import struct
from collections.abc import Callable

import numpy as np

from em_data.formats.base import Refusal

CUT = "truncated: the pixel data is cut short. Copy it again."
MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # that ends the data of a scan
RESTART = re.compile(rb"\xff[\xd0-\xd7]")
FRAMES = {0xC0, 0xC1, 0xC2, 0xC3}  # with Huffman codes
FILLER = bytes(np.random.default_rng(0).integers(0, 255, 512, dtype=np.uint8))  # without 255


def refuse_cut_jpeg(data: bytes, array: np.ndarray, decode: Callable[[bytes], np.ndarray]) -> None:
    """Refuse a JPEG that does not hold its whole image.

    All bits of all coefficients must be announced, and the number of restart marks must be right.
    Bytes appended to the data of each scan must not change the image: they do if data is missing.

    Args:
        data: A JPEG file, its tables included.
        array: What `decode` returns for `data`.
        decode: Returns the pixels of a JPEG.

    Raises:
        Refusal: The file is cut short, also if an end marker was appended.
    """
    pieces, position = [], 0
    for end in _find_scans(data):
        pieces += [data[position:end], FILLER]
        position = end
    if pieces and not np.array_equal(array, decode(b"".join([*pieces, data[position:]]))):
        raise Refusal(CUT)


def _find_scans(data):
    """Return where the data of each scan ends; nothing for arithmetic codes and JPEG-LS.

    Raises:
        Refusal: The file ends early, or scans or restart marks are missing.
    """
    ends, frame, interval, missing = [], None, 0, {}
    position = 2
    while True:
        marker = MARKER.search(data, position)
        if marker is None:
            raise Refusal(CUT)
        code, start = data[marker.end() - 1], marker.end()
        if code == 0xD9:  # end of image
            break
        (length,) = struct.unpack(">H", data[start : start + 2].ljust(2, b"\0"))
        body = data[start + 2 : start + length]
        position = start + length
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            if code not in FRAMES:
                return []
            frame = _read_frame(body)
            num = 1 if code == 0xC3 else 64  # lossless: a predictor in place of coefficients
            missing = {name: [True] * num for name in frame["components"]}
        elif code == 0xDD:
            (interval,) = struct.unpack(">H", body[:2])
        elif code == 0xDA and frame:
            names = [body[1 + 2 * i] for i in range(body[0])]
            first, last, bits = body[1 + 2 * body[0] : 4 + 2 * body[0]]
            for name in names:
                if len(missing[name]) == 1:
                    missing[name] = [False]
                for i in range(first, min(last + 1, len(missing[name]))):
                    missing[name][i] = bits & 15 > 0
            end = MARKER.search(data, position)
            if end is None:
                raise Refusal(CUT)
            num = len(RESTART.findall(data, position, end.start()))
            if interval and num + 1 < math.ceil(_count_blocks(frame, names) / interval):
                raise Refusal(CUT)
            position = end.start()
            ends.append(position)
    if not ends or any(any(each) for each in missing.values()):
        raise Refusal(CUT)
    return ends


def _read_frame(body):
    """Return size and components {name: (horizontal, vertical sampling)} of a frame's header."""
    height, width, num = struct.unpack(">HHB", body[1:6])
    parts = {body[6 + 3 * i]: divmod(body[7 + 3 * i], 16) for i in range(num)}
    return {"height": height, "width": width, "components": parts}


def _count_blocks(frame, names):
    """Return the number of units that restart marks count in a scan of some components."""
    parts = frame["components"]
    most = [max(each[i] for each in parts.values()) for i in (0, 1)]
    if len(names) == 1:
        own = parts[names[0]]
        scale = [8 * largest / each for largest, each in zip(most, own)]
    else:
        scale = [8 * largest for largest in most]
    return math.ceil(frame["width"] / scale[0]) * math.ceil(frame["height"] / scale[1])
