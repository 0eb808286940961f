"""What every source gives: a list of micrographs that are read later, one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from em_data.micrograph import Micrograph
from em_data.refusal import STACK


class SourceLost(ValueError):
    """The source as a whole cannot be read any more; skipping one image does not help."""


@dataclass
class Entry:
    """One micrograph, or one stack of frames, that is not read yet."""

    name: str  # unique in its source
    key: str  # hash of its content
    # returns an iterable of `Micrograph`; a `ValueError` names what cannot be used and the reason,
    # and an iterator can go on with the next frame
    frames: Callable
    specimen: str | None = None
    group: str | None = None  # shared by pieces of one micrograph; by default the name

    def __post_init__(self):
        self.group = self.group or self.name

    def read(self) -> Micrograph:
        """Return the only micrograph; raise a `ValueError` if it cannot be used or is a stack."""
        first, *others = islice(self.frames(), 2)
        if others:
            raise ValueError(f"{self.name}: {STACK}")
        return first


@dataclass
class Source:
    """The micrographs of a source, in natural order."""

    name: str
    entries: list[Entry]
    ignored: list[str]  # sentences on what the source also holds and what is not used
    labels: str = ""  # where the labels come from, for the sentence on what was found
    classes: str = ""  # where the classes come from


class Replayed:
    """Items of an iterator by number. Asking for an earlier item starts the iterator again."""

    def __init__(self, start: Callable):
        self.start, self.iterator, self.next = start, None, 0

    def __getitem__(self, i):
        if self.iterator is None or i < self.next:
            self.iterator, self.next = iter(self.start()), 0
        while True:
            item = next(self.iterator)
            self.next += 1
            if self.next == i + 1:
                return item
