"""Decoders, one module per group of formats; `decode` chooses by the content of a file."""

from collections.abc import Iterator

from em_data.formats.base import Refusal, Stored
from em_data.formats.pictures import decode_bmp, decode_jpeg, decode_png
from em_data.formats.tiff import decode_tiff

DECODERS = {  # first bytes of a file: what decodes it
    b"II*\0": decode_tiff,
    b"MM\0*": decode_tiff,
    b"II+\0": decode_tiff,
    b"MM\0+": decode_tiff,
    b"\x89PNG\r\n\x1a\n": decode_png,
    b"\xff\xd8": decode_jpeg,
    b"BM": decode_bmp,
}


def decode(data: bytes) -> Iterator[Stored]:
    """Yield the images of the bytes of a file as they are stored.

    Raises:
        Refusal: The file cannot be used.
    """
    if not data:
        raise Refusal("empty file (0 bytes). Copy it again from the microscope.")
    decoders = [each for start, each in DECODERS.items() if data.startswith(start)]
    if not decoders:
        if not data.strip(b"\0"):
            raise Refusal("unreadable: nothing but zero bytes. Copy it again.")
        raise Refusal("not a TIFF, PNG, JPEG or BMP file by its content. Export it as TIFF.")
    try:
        yield from decoders[0](data)
    except Refusal:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        first = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
        raise Refusal(f"unreadable or truncated ({first}). Copy it again.") from error
