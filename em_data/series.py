"""Which files are frames of one series, by their names."""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePath

LONG_RUN = 20  # numbered files of one size that may be frames of one recording
_NUMBERED = r"[-_ ]*(?:frame|(?<![a-z])(?:hour|minute|second|time))[-_ ]*\d+"
# its group is the name without the time and the number of a frame. Gatan's in-situ recordings are
# NAME/Hour_00/Minute_00/Second_03/NAME_Hour_00_Minute_00_Second_03_Frame_0012.dm4
SERIES_PATTERN = (
    rf"(?i)^(.*?)(?:(?:^|/)(?:hour|minute|second)[-_ ]*\d+/.*|(?:{_NUMBERED})*(?:\.\w+)?)$"
)
FRAME_NAME = re.compile(rf"(?i)^.*?{_NUMBERED}(?:\.\w+)?$")
TIME_FOLDER = re.compile(r"(?i)^(?:hour|minute|second|time|frame)[-_ ]*\d+$")
RUN_NAME = re.compile(r"^(?P<run>.*?)\d+(?P<suffix>\.\w+)$")


@dataclass(frozen=True, eq=False)
class Series:
    """Files that look like frames of one series.

    Attributes:
        name: What their names begin with.
        files: Their names, in the order of the micrographs.
        numbers: Of their micrographs.
        is_named: True if the names say that they are frames, False if they are only numbered.
    """

    name: str
    files: list[str]
    numbers: list[int]
    is_named: bool

    def describe(self) -> str:
        """Return a clause such as "12 micrographs look like frames of one series (heat*)"."""
        num = len(self.files)
        if self.is_named:
            return f"{num} micrographs look like frames of one series ({self.name}*)"
        first, last = self.files[0], self.files[-1].rpartition("/")[2]
        return f"{num} micrographs of one size have numbered names ({first} to {last})"


def strip_frame(name: str) -> str:
    """Return the name of a micrograph without suffix, time and number of a frame."""
    match = re.match(SERIES_PATTERN, name.partition("#")[0])
    return match[1] if match else name


def find_series(micrographs: list[dict]) -> list[Series]:
    """Return the series of files: names that tell a frame or a time, and long numbered runs.

    Args:
        micrographs: Dictionaries with name and shape.
    """
    found: dict[tuple, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, micrograph in enumerate(micrographs):
        file = micrograph["name"].partition("#")[0]
        if FRAME_NAME.match(file):
            found[strip_frame(file), True][file].append(number)
        elif run := RUN_NAME.match(file):
            key = run["run"], False, run["suffix"].lower(), tuple(micrograph["shape"])
            found[key][file].append(number)
    return [
        Series(name, list(files), [each for numbers in files.values() for each in numbers], named)
        for (name, named, *_), files in found.items()
        if len(files) >= (2 if named else LONG_RUN)
    ]


def drop_time_folders(path: PurePath) -> list[str]:
    """Return the folders of a file without those that only tell when a frame was recorded.

    A folder such as Hour_24 alone may name a specimen: it is dropped beside another such folder, or
    if the file's name tells a time or a frame, too.
    """
    folders = path.parts[:-1]
    are_times = [TIME_FOLDER.match(each) for each in folders]
    if sum(map(bool, are_times)) < 2 and not FRAME_NAME.match(path.name):
        return list(folders)
    return [folder for folder, is_time in zip(folders, are_times) if not is_time]
