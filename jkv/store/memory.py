"""The tier in this process: entries as they are."""

from __future__ import annotations

import threading

import numpy as np

from jkv.store.entry import Entry


class Memory:
    """Entries in the host's memory.

    An array that somebody could still write to, or that holds a much larger one in memory, is
    copied; one that nobody can write to is kept, and what is read is what is kept.

    Args:
        max_bytes, max_entries: limits that a store is to keep; nothing is refused here.
    """

    name = "memory"
    persistent = False
    immediate = True  # a read waits for nothing: the store reads while it has its lock

    def __init__(self, max_bytes: int | None = None, max_entries: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
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
            name: _copied(array) if wasteful or not _is_frozen(array) else array
            for name, array in entry.arrays.items()
        }
        return Entry(arrays, entry.meta)

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


def _copied(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def _root(array: np.ndarray) -> np.ndarray:
    """The array whose memory it is a view of, as far as numpy knows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _is_frozen(array: np.ndarray) -> bool:
    """Whether nobody can write to its memory without turning a switch on purpose."""
    while True:
        if array.flags.writeable:
            return False
        if not isinstance(array.base, np.ndarray):
            break
        array = array.base
    if array.base is None:
        return True
    try:
        return memoryview(array.base).readonly
    except (TypeError, ValueError, BufferError):  # a JAX array, say, of a dtype buffers don't know
        return True
