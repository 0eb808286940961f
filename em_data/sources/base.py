"""What every source gives: a list of micrographs that are read later, one by one."""

from collections.abc import Callable
from dataclasses import dataclass


class SourceLost(ValueError):
    """The source as a whole cannot be read any more; skipping one image does not help."""


@dataclass
class Entry:
    """One micrograph that is not read yet.

    Args:
        name: Unique in its source.
        key: Hash of its content.
        read: Returns the `Micrograph`, or raises `ValueError` with the reason.
        specimen: Name of the specimen, or None if unknown.
        group: What the split must not cut apart. Default: the name. Pieces of one micrograph share
            a group.
    """

    name: str
    key: str
    read: Callable
    specimen: str | None = None
    group: str | None = None

    def __post_init__(self):
        self.group = self.group or self.name


@dataclass
class Source:
    """The micrographs of a source, in natural order.

    Args:
        name: For people.
        entries: List of `Entry`.
        ignored: Sentences on what the source also holds and what is not used.
    """

    name: str
    entries: list[Entry]
    ignored: list[str]


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
