"""Where micrographs come from. One module per kind of source; `open_source` chooses by name."""

import os
from pathlib import Path

from em_data.sources.base import Source
from em_data.sources.damaged_alloys import open_damaged_alloys
from em_data.sources.folder import open_folder
from em_data.sources.rows import is_dataset, open_dataset
from em_data.sources.synthetic import SYNTHETIC, open_synthetic


def check_source(source: str) -> None:
    """Raise `ValueError` if a source is neither a folder nor a name of other data."""
    kind, _, rest = source.partition(":")
    path = Path(os.path.expanduser(source))
    is_name = source in SYNTHETIC or (kind == "damaged-alloys" and rest) or is_dataset(source)
    if is_name or path.is_dir():
        return
    if path.exists():
        raise ValueError(f"{source} is a file. Give the folder that holds the micrographs.")
    raise ValueError(
        f"There is no folder {source!r}. Give a folder, 'synthetic', 'synthetic-varied', "
        "'synthetic-materials', 'synthetic-other', 'hub:owner/name', "
        "'hub-stream:owner/name', 'damaged-alloys:FOLDER' or 'datasets:NAME_OR_PATH'."
    )


def open_source(source, config, cache_dir) -> Source:
    """List the micrographs of a source, see `em_data.load_data`; hashes of files are cached."""
    source = os.path.expanduser(str(source))
    check_source(source)
    kind, _, rest = source.partition(":")
    if source in SYNTHETIC:
        opened = open_synthetic(source, config)
    elif kind == "damaged-alloys" and rest:
        opened = open_damaged_alloys(Path(rest).expanduser(), config, cache_dir)
    elif is_dataset(source):
        opened = open_dataset(source, config)
    else:
        opened = open_folder(source, config, cache_dir)
    num, most = len(opened.entries), config.num_micrographs
    if most is not None and num > most:
        opened.ignored.append(
            f"Only the first {most} of {num} micrographs are used: --tiles.num-micrographs is "
            f"{most}."
        )
        opened.entries = opened.entries[:most]
    return opened
