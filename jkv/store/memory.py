"""The tiers in this process: entries as they are, on the host or on the device."""

from __future__ import annotations

import abc
import copy
import threading
from typing import Any

import numpy as np

from jkv.errors import TierError, UnsupportedError
from jkv.store.checks import Limit
from jkv.store.entry import Entry, Private
from jkv.store.tier import Tier


class _InProcess(Tier):
    """A dictionary of entries, each kept so that nothing else can change it."""

    immediate = True

    def __init__(self, max_bytes: Limit = None, max_entries: Limit = None) -> None:
        super().__init__(max_bytes, max_entries)
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Lock()

    @abc.abstractmethod
    def _kept(self, entry: Entry) -> Entry:
        """Return the entry as nothing else can change it."""

    def scan(self) -> dict[str, int]:
        """List the keys that are there and their bytes, the least recently written first."""
        with self._lock:
            return {key: entry.nbytes for key, entry in self._entries.items()}

    def write(self, key: str, entry: Entry) -> int:
        """Keep an entry; bytes of its arrays.

        Raises:
            TierError: there is no room for it.
            UnsupportedError: its meta nests too deep.
        """
        kept = self._kept(entry)
        with self._lock:
            self._entries.pop(key, None)  # to the end of the order, if it was there
            self._entries[key] = kept
        return kept.nbytes

    def read(self, key: str) -> Entry | None:
        """Return the entry, None if there is none."""
        with self._lock:
            return self._entries.get(key)

    def delete(self, key: str) -> None:
        """Delete an entry; nothing happens if it is not there."""
        with self._lock:
            self._entries.pop(key, None)

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._entries.clear()


class Memory(_InProcess):
    """Entries in the host's memory.

    Arrays are copied where something else may write to their memory: arrays that are not read-only,
    views of those, of a `bytearray`, or of JAX's buffers, which may themselves be views of numpy's.
    What another tier has read, what is over `bytes`, and what owns its memory and is read-only, is
    kept as it is, unless it holds a much larger one in memory. What is read is what is kept.

    Args:
        max_bytes, max_entries: limits that a store is to keep; nothing is refused here.

    Raises:
        TypeError, ValueError: a limit that is no whole number from 0.

    Example:
        >>> store = jkv.store.Store([jkv.store.Memory(max_bytes=2**30, max_entries=1000)])
    """

    name = "memory"

    def _kept(self, entry: Entry) -> Entry:
        return _host_entry(entry)


class Device(_InProcess):
    """Entries in the memory of JAX's default device, which need no transfer to go on.

    What is read has arrays of JAX; a tier below gets them as numpy's. Arrays that JAX would round
    stay as they are, on the host: those of 64 bits, unless `jax_enable_x64` is set.

    Args:
        max_bytes, max_entries: limits that a store is to keep; nothing is refused here.

    Raises:
        TypeError, ValueError: a limit that is no whole number from 0.

    Example:
        >>> store = jkv.store.Store([jkv.store.Device(2**28), jkv.store.Memory(2**30)])
    """

    name = "device"

    def _kept(self, entry: Entry) -> Entry:
        """Copy to the device, and wait: no other's buffer is kept, and failures show here.

        Raises:
            TierError: the device has no room.
        """
        import jax

        wide = {
            name: array
            for name, array in entry.arrays.items()
            if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
        }
        stay = _host_entry(Entry(wide, {})).arrays
        try:
            arrays = {
                name: stay[name] if name in stay else jax.numpy.array(array)
                for name, array in entry.arrays.items()
            }
            return Entry(jax.block_until_ready(arrays), _copied_meta(entry))
        except jax.errors.JaxRuntimeError as error:
            raise TierError(f"the device does not take {entry.nbytes} bytes: {error}") from error


def _host_entry(entry: Entry) -> Entry:
    """Return the entry in arrays that nothing else can write to."""
    # A list of what is held, so that a blob that many arrays are views of counts once.
    roots = {id(root): root for root in map(_root, entry.arrays.values())}
    wasteful = sum(root.nbytes for root in roots.values()) > 2 * entry.nbytes + 4096
    arrays = {
        name: _copied(array) if wasteful or not _is_private(array) else array
        for name, array in entry.arrays.items()
    }
    return Entry(arrays, _copied_meta(entry))


def _copied_meta(entry: Entry) -> dict[str, Any]:
    """Copy an entry's meta, whose owner may change what is in it.

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
    """Return the array whose memory it is a view of, as far as numpy knows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _is_private(array: np.ndarray) -> bool:
    """Tell whether nothing else can write to its memory without doing so on purpose.

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
