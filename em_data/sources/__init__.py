"""Where micrographs come from. One module per kind of source; `open_source` chooses by name."""

import os
from pathlib import Path

from em_data.sources.base import Source
from em_data.sources.damaged_alloys import open_damaged_alloys
from em_data.sources.folder import open_folder
from em_data.sources.rows import is_dataset, open_dataset
from em_data.sources.synthetic import SYNTHETIC, open_synthetic


def open_source(source, config, cache_dir) -> Source:
    """List the micrographs of a source, see `em_data.load_data`; hashes of files are cached."""
    source = os.path.expanduser(str(source))
    kind, _, rest = source.partition(":")
    if source in SYNTHETIC:
        opened = open_synthetic(source, config)
    elif kind == "damaged-alloys" and rest:
        opened = open_damaged_alloys(Path(rest).expanduser(), config, cache_dir)
    elif is_dataset(source):
        opened = open_dataset(source, config)
    elif Path(source).is_dir():
        opened = open_folder(source, config, cache_dir)
    elif Path(source).exists():
        raise ValueError(f"{source} is a file. Give the folder that holds the micrographs.")
    else:
        raise ValueError(
            f"There is no folder {source!r}. Give a folder, 'synthetic', 'synthetic-varied', "
            "'synthetic-materials', 'synthetic-other', 'hub:owner/name', "
            "'hub-stream:owner/name', 'damaged-alloys:FOLDER' or 'datasets:NAME_OR_PATH'."
        )
    num, most = len(opened.entries), config.num_micrographs
    if most is not None and num > most:
        opened.ignored.append(
            f"Only the first {most} of {num} micrographs are used: --tiles.num-micrographs is "
            f"{most}."
        )
        opened.entries = opened.entries[:most]
    return opened
