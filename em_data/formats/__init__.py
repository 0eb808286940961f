"""Decoders, one module per group of formats; `decode` chooses by the content of a file."""

from collections.abc import Callable, Iterator
from pathlib import Path

from em_data.formats.base import Refusal, Stored, explain_failure
from em_data.formats.microscopes import decode_microscope, find_format
from em_data.formats.pictures import decode_bmp, decode_jpeg, decode_png
from em_data.formats.tiff import decode_tiff

DECODERS: dict[bytes, Callable[..., Iterator[Stored]]] = {  # first bytes: what decodes the file
    b"II*\0": decode_tiff,
    b"MM\0*": decode_tiff,
    b"II+\0": decode_tiff,
    b"MM\0+": decode_tiff,
    b"\x89PNG\r\n\x1a\n": decode_png,
    b"\xff\xd8": decode_jpeg,
    b"BM": decode_bmp,
}
START_BYTES = 1024


def decode(source: bytes | Path, frame_step: int = 1) -> Iterator[Stored]:
    """Yield the images of a file as they are stored.

    Args:
        source: The path of the file, or its bytes.
        frame_step: Every how many frames of a stack are read.

    Raises:
        Refusal: The file cannot be used.
        OSError: The file cannot be opened.
    """
    if isinstance(source, bytes):
        start, suffix = source[:START_BYTES], ""
    else:
        if source.exists() and not source.is_file():
            raise Refusal("not a regular file but a folder, a pipe or a device.")
        with open(source, "rb") as file:
            start, suffix = file.read(START_BYTES), source.suffix
    if not start:
        raise Refusal("empty file (0 bytes). Copy it again from the microscope.")
    decoders = [each for magic, each in DECODERS.items() if start.startswith(magic)]
    form = None if decoders else find_format(start, suffix)
    try:
        if form and start.strip(b"\0"):
            yield from decode_microscope(source, form, frame_step)
            return
        if decoders and decoders[0] is decode_tiff:
            yield from decode_tiff(source, frame_step)
            return
        data = source if isinstance(source, bytes) else source.read_bytes()
        if decoders:
            yield from decoders[0](data)
            return
    except Refusal:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise explain_failure(error) from error
    if not data.strip(b"\0"):
        raise Refusal("unreadable: nothing but zero bytes. Copy it again.")
    raise Refusal(
        "not a TIFF, PNG, JPEG or BMP file, nor one of a microscope, by its content. "
        "Export it as TIFF."
    )
