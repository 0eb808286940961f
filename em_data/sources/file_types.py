"""Names and first bytes of files: what is read, what is not and why, and what is no data at all."""

import re

from em_data.formats import DECODERS
from em_data.formats.microscopes import NOT_MICROGRAPHS, find_format

# folders and files that systems and programs leave among data
NOT_DATA = re.compile(
    r"\..*|@eaDir|@Recycle|@Recently-Snapshot|#recycle|#snapshot|\$RECYCLE\.BIN|RECYCLER"
    r"|System Volume Information|lost\+found|__MACOSX|__pycache__"
    r"|(eh)?Thumbs\.db|desktop\.ini|Icon\r",
    re.IGNORECASE,
)

LABEL_WORDS = r"(masks?|labels?|annotations?|annotated|ground[-_ ]?truth|gt|segmentations?)"
LABEL_FOLDER = re.compile(rf"^{LABEL_WORDS}(\d*|[-_ ].*)$", re.IGNORECASE)
LABEL_FILE = re.compile(rf"[-_ .]{LABEL_WORDS}\d*$", re.IGNORECASE)

LFS_START = b"version https://git-lfs.github.com/spec/"

# suffixes of files that hold no images: they are neither opened nor counted
NOT_IMAGES = re.compile(
    r"\.(txt|md|rst|log|csv|tsv|jsonl?|xml|ya?ml|toml|ini|cfg|hdr|html?|css|js|pyc?|ipynb|m|r|sh"
    r"|bat|tex|bib|license|cff|lock|db|sqlite|pdf|docx?|xlsx?|od[st]|pptx?|rtf|pth?|ckpt"
    r"|safetensors|pkl|pickle|onnx|exe|dll|so)"
)


def _with(remedy, suffixes):
    return dict.fromkeys(suffixes.split(), f"not read. {remedy}")


# suffixes of data that are not read: what a sentence says of them
NOT_READ = {
    **{suffix: f"{what}, not micrographs" for suffix, what in NOT_MICROGRAPHS.items()},
    **_with("Export them as TIFF.", ".czi .nd2 .lif .oib .oif .vsi .zvi .ims .zarr .n5 .raw .dcm"),
    **_with("Save each array as TIFF.", ".npy .npz .mat .nii .nrrd .mha .fits"),
    **_with("Convert them to TIFF or PNG.", ".jp2 .j2k .jpx .webp .gif .heic .avif .pgm .ppm .svg"),
    **_with("Convert them to TIFF or PNG.", ".psd .xcf .tga .exr .ico .pcx .eps .ai .emf .wmf"),
    **_with("Unpack them.", ".zip .tar .gz .tgz .bz2 .xz .7z .rar"),
    **_with("Save their frames as TIFF.", ".avi .mp4 .mov .mkv .wmv .mpg .mpeg .webm"),
    **_with("Use --data datasets:FOLDER.", ".parquet .arrow .tfrecord"),
}


def is_picture(start: bytes) -> bool:
    """Return True if the first bytes of a file are those of a format that is read."""
    if start.startswith(b"BM"):  # two letters with which a text may begin
        return start[6:10] == bytes(4)
    return start.startswith(tuple(DECODERS)) or find_format(start, "") is not None
