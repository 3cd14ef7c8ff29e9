"""The tier in this process: entries as they are."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np

from jkv.errors import UnsupportedError
from jkv.store.checks import Limit, check_limit
from jkv.store.entry import Entry, Private


class Memory:
    """Entries in the host's memory.

    Arrays are copied where something else may write to their memory: arrays that are not read-only,
    views of those, of a `bytearray`, or of JAX's buffers, which may themselves be views of numpy's.
    What another tier has read, what is over `bytes`, and what owns its memory and is read-only, is
    kept as it is, unless it holds a much larger one in memory. What is read is what is kept.

    Args:
        max_bytes, max_entries: limits that a store is to keep; nothing is refused here.

    Raises:
        TypeError, ValueError: a limit that is no whole number from 0.
    """

    name = "memory"
    persistent = False
    immediate = True  # a read waits for nothing: the store reads while it has its lock

    def __init__(self, max_bytes: Limit = None, max_entries: Limit = None) -> None:
        self.max_bytes = check_limit("max_bytes", max_bytes)
        self.max_entries = check_limit("max_entries", max_entries)
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Lock()

    def scan(self) -> dict[str, int]:
        """Keys that are there and their bytes, the least recently written first."""
        with self._lock:
            return {key: entry.nbytes for key, entry in self._entries.items()}

    def write(self, key: str, entry: Entry) -> int:
        """Keep it; bytes of its arrays.

        Raises:
            TierError: there is no room for it.
            UnsupportedError: its meta nests too deep.
        """
        kept = self._kept(entry)
        with self._lock:
            self._entries.pop(key, None)  # to the end of the order, if it was there
            self._entries[key] = kept
        return kept.nbytes

    def _kept(self, entry: Entry) -> Entry:
        """The entry as nobody else can change it."""
        # A list of what is held, so that a blob that many arrays are views of counts once.
        roots = {id(root): root for root in map(_root, entry.arrays.values())}
        wasteful = sum(root.nbytes for root in roots.values()) > 2 * entry.nbytes + 4096
        arrays = {
            name: _copied(array) if wasteful or not _is_private(array) else array
            for name, array in entry.arrays.items()
        }
        return Entry(arrays, copied_meta(entry))

    def read(self, key: str) -> Entry | None:
        """The entry, None if there is none."""
        with self._lock:
            return self._entries.get(key)

    def delete(self, key: str) -> None:
        """Drop it; nothing happens if it is not there."""
        with self._lock:
            self._entries.pop(key, None)

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._entries.clear()


def copied_meta(entry: Entry) -> dict[str, Any]:
    """An entry's meta, of which its owner may change what is in it.

    Raises:
        UnsupportedError: it nests deeper than Python recurses.
    """
    try:
        return copy.deepcopy(dict(entry.meta))
    except RecursionError:
        raise UnsupportedError("an entry's meta nests too deep to be kept") from None


def _copied(array: np.ndarray) -> np.ndarray:
    made = array.copy()
    made.flags.writeable = False
    return made


def _root(array: np.ndarray) -> np.ndarray:
    """The array whose memory it is a view of, as far as numpy knows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _is_private(array: np.ndarray) -> bool:
    """Whether nothing else can write to its memory without turning a switch on purpose.

    That a view is read-only says nothing of what it is a view of, and a buffer of JAX may be that
    of an array of numpy's.
    """
    while not (array.flags.writeable or isinstance(array, Private)):
        base = array.base
        if isinstance(base, memoryview):
            return base.readonly and isinstance(base.obj, bytes)
        if not isinstance(base, np.ndarray):
            return base is None or isinstance(base, bytes)
        array = base
    return isinstance(array, Private)
