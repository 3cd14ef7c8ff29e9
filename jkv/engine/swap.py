"""What leaves the pool's pages and may be wanted again: in a store, by what is in it."""

from __future__ import annotations

import itertools
import os
import secrets
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jkv.store.entry import Entry, check_store, reject

Form = list[tuple[tuple[int, ...], np.dtype]]  # shape and dtype of each leaf

_engines = itertools.count()
WAITS = 24 * 3600.0  # seconds that a request may wait, where nobody sees that its process ended


class PageStore:
    """An engine's entries of a store: single pages by their contents, and requests that wait.

    Args:
        store: a `jkv.store.Store`.
        fingerprint: of the model and the pages.

    Raises:
        TypeError: no store.
    """

    def __init__(self, store: Any, fingerprint: bytes):
        check_store(store, ("contains", "get", "get_many", "put", "put_many", "remove"))
        self.store, self.fingerprint = store, fingerprint
        self._leaving: list[tuple[list[bytes], Any]] = []  # names, and their pages on the device
        # Requests have numbers in their engine only, and processes in their container.
        self._own = f"{secrets.token_hex(8)}.{os.getpid()}.{next(_engines)}"

    def leave(self, names: list[bytes], pages: Any) -> None:
        """Pages that others are about to write to: leaves ``[n, ...]``, still on the device."""
        self._leaving.append((names, pages))

    def flush(self, seconds: float) -> None:
        """Put what has left into the store, for which the device is waited for.

        Args:
            seconds: to compute a page.
        """
        leaving, self._leaving = self._leaving, []
        try:
            for names, pages in leaving:
                self._put(names, pages, seconds)
        except Exception as error:
            # A store that is closed or a tier that fails is no request's fault: nothing is lost
            # but what could have been found again.
            warnings.warn(f"an engine's pages could not be stored: {error!r}", stacklevel=2)

    def _put(self, names: list[bytes], pages: Any, seconds: float) -> None:
        keys = [f"page/{name.hex()}" for name in names]
        # What is in a page never changes: one that is there is not written again.
        new = [i for i, key in enumerate(keys) if not self._has(key)]
        if not new:
            return
        leaves = jax.device_get(jax.tree.leaves(pages))
        self.store.put_many(
            [keys[i] for i in new],
            [_entry([leaf[i] for leaf in leaves], seconds=seconds) for i in new],
            seconds=[seconds] * len(new),
            fingerprint=self.fingerprint,
        )

    def _has(self, key: str) -> bool:
        return self.store.contains(key, fingerprint=self.fingerprint)

    def pages(self, names: Sequence[bytes], most: int, form: Form) -> list[list[np.ndarray]]:
        """The leaves of pages of these names, up to the first that is not there.

        Args:
            form: shapes and dtypes of a page's leaves; an entry of others is given back.
        """
        keys = [f"page/{name.hex()}" for name in names[:most]]
        there = list(itertools.takewhile(self._has, keys))
        found = self.store.get_many(there, fingerprint=self.fingerprint) if there else []
        pages = []
        for key, entry in zip(there, found, strict=True):
            leaves = None if entry is None else self._leaves(key, entry, form)
            if leaves is None:
                break
            pages.append(leaves)
        return pages

    def _leaves(self, key: str, entry: Any, form: Form) -> list[np.ndarray] | None:
        names = [str(i) for i in range(len(form))]
        if isinstance(entry, Entry) and set(entry.arrays) == set(names):
            leaves = [entry.arrays[name] for name in names]
            if [(leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves] == form:
                return leaves
        reject(self.store, key)
        return None

    def key_of(self, number: int) -> str:
        """Under which the pages of a request that waits are put aside."""
        return f"waiting/{self._own}.{number}"

    def put_aside(self, key: str, pages: Any, length: int) -> bool:
        """Keep the pages of a request that waits; False if the store has no room for them."""
        entry = _entry(jax.tree.leaves(pages), length=length)
        who = {"fingerprint": self.fingerprint, "ttl": WAITS}
        return self.store.put(key, entry, pin=True, ephemeral=True, **who) is not None

    def take_back(self, key: str, form: Form) -> list[np.ndarray] | None:
        """The leaves of what was put aside, None if it was lost."""
        entry = self.store.get(key, fingerprint=self.fingerprint, recompute_seconds=float("inf"))
        leaves = None if entry is None else self._leaves(key, entry, form)
        self.store.remove(key, sync=False)
        return leaves

    def forget(self, key: str) -> None:
        """Drop what was put aside."""
        try:
            self.store.remove(key, sync=False)
        except Exception as error:  # such as a store that is closed, and has let go of it
            warnings.warn(f"an engine's waiting request stays stored: {error!r}", stacklevel=2)


def _entry(leaves: list[Any], **meta: Any) -> Entry:
    return Entry({str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}, meta)
