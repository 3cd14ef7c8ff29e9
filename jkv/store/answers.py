"""What readers ask for, and what they get: entries that stay where they are while they are read."""

from __future__ import annotations

import dataclasses
import importlib
from collections import deque
from typing import Any

import numpy as np

from jkv.store.entry import Entry
from jkv.store.shelf import Record


class Handle:
    """An entry that is being read: it stays where it is until `release`, or the end of `with`.

    Attributes:
        key: that of the put.
        entry: arrays and meta as they were put, in the form that the tier holds.
        tokens: that the put came with, int32 [T]; None if it had none.
    """

    def __init__(self, record: Record, entry: Entry, released: deque[Record]) -> None:
        self.key = record.key
        self.entry = entry
        self.tokens = record.tokens
        self._packed = record.packed
        self._held = [record]
        self._released = released

    @property
    def value(self) -> Any:
        """What was put: a cache for a cache.

        Raises:
            CorruptError: a cache of another version of this library.
        """
        return value_of(self.entry, self._packed)

    def release(self) -> None:
        """Let go of it; once is enough, and more does nothing."""
        # No lock: this may run wherever an object is collected, the lock's owner included.
        while self._held:
            try:
                self._released.append(self._held.pop())
            except IndexError:
                return

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class Match:
    """A prefix that was found; its entry is held until `release`, or the end of `with`.

    Attributes:
        key: that of the entry; length: how many first tokens it shares; entry: the whole of it.
    """

    def __init__(self, handle: Handle, length: int) -> None:
        self.handle = handle
        self.key = handle.key
        self.length = length
        self.entry = handle.entry

    @property
    def value(self) -> Any:
        """What was put: a cache for a cache.

        Raises:
            CorruptError: a cache of another version of this library.
        """
        return self.handle.value

    def release(self) -> None:
        """Let go of it."""
        self.handle.release()

    def __enter__(self) -> Match:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def value_of(entry: Entry, packed: bool) -> Any:
    """What was put, of what is stored."""
    return importlib.import_module("jkv.store.packing").unpack(entry) if packed else entry


@dataclasses.dataclass(slots=True, eq=False)
class Ask:
    """One entry that somebody wants, and what came of it: an entry, or why not.

    Attributes:
        only: this record, and no other of its name.
        seconds: to make it instead; by default `share` of what the record says.
    """

    name: str
    tenant: str
    fingerprint: bytes | None = None
    seconds: int | float | None = None
    only: Record | None = None
    share: float = 1.0
    record: Record | None = None
    entry: Entry | None = None
    why: str = ""
    tried: set[int] = dataclasses.field(default_factory=set)
    looked: bool = False  # where other processes write
    wait: bool = False  # for who is moving it
    at: int = 0  # the shelf that had it


@dataclasses.dataclass(slots=True)
class Search:
    """Tokens of which the longest known beginning is looked for."""

    tokens: np.ndarray
    limit: int | None
    ask: Ask
    candidates: list[tuple[Any, int]] = dataclasses.field(default_factory=list)
    length: int = 0
