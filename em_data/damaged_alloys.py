"""Say what a folder holds of the Damaged Alloys set, or download it first.

The command: python -m em_data.damaged_alloys FOLDER [--download]

`--data damaged-alloys:FOLDER` trains on it.
"""

import argparse
from pathlib import Path

from em_data.config import DataConfig
from em_data.files import find_cache_dir
from em_data.sources.damaged_alloys import open_damaged_alloys
from em_data.sources.damaged_alloys_download import INDEX_URL, SERVER_URL, download_damaged_alloys


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m em_data.damaged_alloys", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--download", action="store_true", help="download the set into the folder")
    parser.add_argument("--search-url", default=INDEX_URL, help="search index to ask")
    parser.add_argument("--server-url", default=SERVER_URL, help="server of the files")
    args = parser.parse_args(arguments)
    try:
        if args.download:
            urls = {"index_url": args.search_url, "server_url": args.server_url}
            download_damaged_alloys(args.folder, **urls)
        source = open_damaged_alloys(args.folder, DataConfig(), find_cache_dir())
    except (ValueError, ConnectionError) as error:
        parser.error(str(error))
    print(f"{args.folder}: {len(source.entries)} micrographs")
    print("\n".join(f"  {sentence}" for sentence in source.ignored))


if __name__ == "__main__":
    main()
