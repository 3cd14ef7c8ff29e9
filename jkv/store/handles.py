"""What readers ask for, and what they get: entries that stay where they are while they are read."""

from __future__ import annotations

import dataclasses
import importlib
from collections import deque
from typing import Any

import numpy as np

from jkv.store.entry import Entry
from jkv.store.state import Record


class Handle:
    """An entry that is being read: it stays where it is until `release`, or the end of `with`.

    Attributes:
        key: that of the put.
        entry: arrays and meta as they were put, in the form that the tier holds.
        tokens: that the put came with, int32 [T]; None if it had none.

    Example:
        >>> with jkv.store.Store([jkv.store.Memory(2**20)]) as store:
        ...     key = store.put("a", jkv.store.Entry({"k": np.zeros(4)}, {}))
        ...     with store.open("a") as handle:
        ...         print(handle.key, handle.entry.nbytes)
        a 32
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

    Example:
        >>> entry = jkv.store.Entry({"k": np.zeros(4)}, {})
        >>> with jkv.store.Store([jkv.store.Memory(2**20)], chunk=2) as store:
        ...     key = store.put("a", entry, tokens=[5, 6, 7])
        ...     with store.longest_prefix([5, 6, 9, 9]) as match:
        ...         print(match.length)
        2
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
    """Return what was put, of what is stored."""
    return importlib.import_module("jkv.store.packing").unpack(entry) if packed else entry


@dataclasses.dataclass(slots=True, eq=False)
class Lookup:
    """One entry that is asked for, and the outcome: an entry, or why there is none.

    Attributes:
        fingerprint: that the entry must have; None for any.
        seconds: to make it instead; by default `share` of what the record says.
        only: this record, and no other of its name.
        record: of the entry while it is read, and held.
        reason: of a miss.
        tried: tiers that could not give it.
        looked: whether it was looked for where other processes write.
        wait: whether to look again once nothing moves it.
        at: the tier that had it.
    """

    name: str
    tenant: str
    fingerprint: bytes | None = None
    seconds: int | float | None = None
    only: Record | None = None
    share: float = 1.0
    record: Record | None = None
    entry: Entry | None = None
    reason: str = ""
    tried: set[int] = dataclasses.field(default_factory=set)
    looked: bool = False
    wait: bool = False
    at: int = 0

    @property
    def is_open(self) -> bool:
        """Whether there is no outcome yet."""
        return self.entry is None and not self.reason


@dataclasses.dataclass(slots=True)
class PrefixQuery:
    """Tokens whose longest stored prefix is asked for.

    Attributes:
        limit: tokens that may be shared at most.
        lookup: of the candidate that is tried.
        candidates: records that share tokens, with their number; the most first.
        length: tokens that the one tried shares.
    """

    tokens: np.ndarray
    limit: int | None
    lookup: Lookup
    candidates: list[tuple[Record, int]] = dataclasses.field(default_factory=list)
    length: int = 0
