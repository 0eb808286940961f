"""The command: what micrographs hold, and which tiles suit them."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro
from tqdm.auto import tqdm

from em_data.config import DataConfig
from em_data.files import find_cache_dir, make_folder_name, write_atomically
from em_data.look.page import render_page
from em_data.look.recommendation import advise
from em_data.look.survey import survey_source
from em_data.look.text import describe_advice, describe_survey
from em_data.sources import open_source


@dataclasses.dataclass(frozen=True)
class LookConfig:
    """Look at micrographs before training.

    Reads all files once, prints a summary and writes a page: what was read and what was not, pixel
    sizes, grey levels, near copies, the size of structures, sample tiles, and the flags that suit
    them. The data are not changed.
    """

    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")]
    """A folder of micrographs, or another source as of --data."""
    out: str | None = None
    """Folder for the page, look.html. Default: runs/look-NAME."""
    tiles: DataConfig = dataclasses.field(default_factory=DataConfig)
    """How files are read and specimens are named. Resolution, downsampling and split are what the
    command recommends."""


def look(config: LookConfig, *, say=print) -> Path:
    """Survey a source, print what it holds and write the page.

    Returns:
        The page's path.

    Raises:
        ValueError: No image can be used, or the page would lie inside the data.
    """
    folder = find_folder(config.source)
    name = folder.resolve().name if folder else config.source
    out = Path(config.out or f"runs/look-{make_folder_name(name)}").expanduser()
    if folder and folder.resolve() in [out.resolve(), *out.resolve().parents]:
        raise ValueError(f"{out} lies in the data folder. Use --out with a folder elsewhere.")
    source = open_source(config.source, config.tiles, find_cache_dir(config.tiles.cache_dir))
    survey = survey_source(source, config.tiles, show_progress)
    advice = advise(survey, config.tiles)
    command = f"python train_ldm.py small --data {shlex.quote(config.source)} "
    command += advice.words
    for line in [*describe_survey(survey, advice), "", *describe_advice(survey, advice)]:
        say(line)
    page = out / "look.html"
    write_atomically(page, render_page(survey, advice, config.source, command))
    say(f"\nThe page is {page}. Next, on one line:\n{command}")
    return page


def find_folder(source: str) -> Path | None:
    """Return the folder on the disk that a source reads, or None."""
    for path in (source, source.partition(":")[2]):
        if path and Path(path).expanduser().is_dir():
            return Path(path).expanduser()
    return None


def show_progress(entries):
    """Show a bar while entries are read."""
    is_quiet = not sys.stderr.isatty()
    return tqdm(entries, desc="reading", unit="file", disable=is_quiet, leave=False)


def run() -> None:
    """Read the command line and look."""
    flags = (tyro.conf.PositionalRequiredArgs,)
    look(tyro.cli(LookConfig, prog="python -m em_data.look", config=flags))
