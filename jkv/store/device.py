"""The tier on the accelerator: entries that need no transfer to go on."""

from __future__ import annotations

import threading
from typing import Any

from jkv.errors import TierError
from jkv.store.entry import Entry


class Device:
    """Entries in the memory of JAX's default device.

    What is read has arrays of JAX; a tier below gets them as numpy's.

    Args:
        max_bytes, max_entries: limits that a store is to keep; nothing is refused here.
    """

    name = "device"
    persistent = False

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
            TierError: the device has no room.
        """
        import jax

        try:
            # A copy, waited for: nobody else's buffer is kept, and failures show here.
            arrays = jax.block_until_ready({k: jax.numpy.array(v) for k, v in _items(entry)})
        except jax.errors.JaxRuntimeError as error:
            raise TierError(f"the device does not take {entry.nbytes} bytes: {error}") from error
        with self._lock:
            self._entries.pop(key, None)  # to the end of the order, if it was there
            self._entries[key] = Entry(arrays, entry.meta)
        return entry.nbytes

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


def _items(entry: Entry) -> Any:
    return entry.arrays.items()
