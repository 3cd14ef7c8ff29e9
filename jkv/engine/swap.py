"""Pages that leave the device and may be wanted again: on the host, or in a store."""

from __future__ import annotations

import dataclasses
import itertools
import os
import secrets
import time
import warnings
from collections.abc import Sequence

import jax
import numpy as np

from jkv._pytree import nbytes
from jkv.cache.fingerprint import fingerprint
from jkv.decoding.capacity import bucket
from jkv.engine.page_pool import PageSequence
from jkv.engine.page_transfer import PageForm, pad
from jkv.engine.request import Contents, PageLeaves, Request, SwappedPages
from jkv.engine.runner import Runner
from jkv.engine.sequence import RunningSequence
from jkv.store.entry import Entry, check_store, reject
from jkv.store.store import Store

FIRST_RATE = 4e9  # bytes per second between device and host, until it has been measured
BATCH = 64  # evicted pages that are copied at once, at most

_engines = itertools.count()
WAITS = 24 * 3600.0  # seconds that a request may wait, if nothing sees that its process ended


class Swap:
    """Moves pages between the device and the host: swapped requests, and evicted pages.

    An evicted page's contents are copied before anything is written to it: `save_evicted` comes
    before every step, and before whatever is written here.

    Args:
        runner: with the pages.
        store: keeps evicted pages and swapped requests; None: requests are kept in the host's
            memory, and evicted pages not at all.

    Attributes:
        rate: bytes per second between device and host, as measured.
        fingerprint: of the model and its pages, b"" without a store.
    """

    def __init__(self, runner: Runner, store: Store | None):
        self._runner, self._store = runner, store
        self._page = runner.kind.page
        # No larger than what `warm` compiles.
        self._batch = min(BATCH, self._pages_for(runner.config.context))
        self._moved: set[int] = set()  # sizes whose copy is compiled
        self.rate = FIRST_RATE
        self.reset()

    def reset(self) -> None:
        """Forget what has not been saved, and take the runner's weights as they are now."""
        runner = self._runner
        self._evicted: list[tuple[bytes, int]] = []
        self.store: PageStore | None = None
        self.fingerprint = b""
        if self._store is not None:
            # The number of pages has no influence on their contents.
            kind = dataclasses.replace(runner.kind, pages=None)
            self.fingerprint = fingerprint(runner.model, kind)
            self.store = PageStore(self._store, self.fingerprint)

    @property
    def keeps_evicted(self) -> bool:
        """Whether evicted pages are saved: not where a prefix needs the pages of several groups."""
        return self.store is not None and len(self._runner.columns) == 1

    # Pages by their contents.

    def on_evict(self, name: bytes, page: int) -> None:
        """Remember to save a page that its pool has evicted."""
        self._evicted.append((name, page))

    def save_evicted(self) -> None:
        """Copy the evicted pages, on the device, before anything is written to them."""
        while self._evicted and self.store is not None:
            batch, self._evicted = self._evicted[: self._batch], self._evicted[self._batch :]
            at = pad([page for _, page in batch], bucket(len(batch), 4))
            self.store.add([name for name, _ in batch], self._runner.gather((at,)))

    def save_all(self, cached: list[tuple[bytes, int]]) -> None:
        """Copy pages that stay in the pool, too."""
        if self.keeps_evicted:
            self._evicted += cached
            self.save_evicted()

    def flush(self, seconds: float) -> None:
        """Put the copied pages into the store; `seconds` is the time to compute one."""
        if self.store is not None:
            self.store.flush(seconds)

    def find_pages(self, table: PageSequence, ids: list[int], most: int) -> list[PageLeaves]:
        """Return the leaves of stored pages that continue a page table over the tokens `ids`.

        Args:
            table: which has the first of these tokens.
            ids: token ids.
            most: pages.
        """
        if self.store is None:
            return []
        names = table.names(ids)[len(table.table) :]
        form = [(shape[1:], dtype) for shape, dtype in self._runner.page_form(1)]
        return self.store.find(names, most, form) if names else []

    def load(self, pages: Sequence[int], contents: list[PageLeaves]) -> None:
        """Write what `find_pages` returned into these pages."""
        self.save_evicted()
        size = bucket(len(contents), 4)
        leaves = [np.stack(leaf) for leaf in zip(*contents, strict=True)]
        zeros = [np.zeros((size - len(x), *x.shape[1:]), x.dtype) for x in leaves]
        padded = [np.concatenate(pair) for pair in zip(leaves, zeros, strict=True)]
        self._runner.scatter((pad(pages, size),), self._runner.contents_from(padded))

    # Pages of requests that wait.

    def saved(self, request: Request) -> SwappedPages | None:
        """Return the request's pages on the host, if it can go on from them.

        They must be of all its tokens but the last, and of these weights: an interrupt or new
        weights may have come between. Others are discarded.
        """
        saved = request.swapped
        if saved is None:
            return None
        if saved.weights is self._runner.weights and saved.length == len(request.history) - 1:
            return saved
        self.discard(request)
        return None

    def save(self, sequence: RunningSequence) -> bool:
        """Copy a sequence's pages to the host; False if there is no room for them."""
        request, length = sequence.request, sequence.written
        key = None if self.store is None else self.store.key_of(request.number)
        # First the key, so that no interrupt leaves anything in a store for good.
        request.swapped = saved = SwappedPages(length, self._runner.weights, key=key)
        if not self._copy(sequence, saved):
            request.swapped = None
        return request.swapped is not None

    def _copy(self, sequence: RunningSequence, saved: SwappedPages) -> bool:
        began = time.perf_counter()
        tables = self._tables(sequence, saved.length)
        contents = jax.device_get(self._runner.gather(tables))
        saved.nbytes = nbytes(contents)
        if self._is_compiled(saved.nbytes):
            rate = saved.nbytes / max(time.perf_counter() - began, 1e-6)
            self.rate = (self.rate + rate) / 2
        if self.store is None or saved.key is None:
            saved.contents = contents
            return True
        return self.store.save_request(saved.key, contents, saved.length)

    def fetch(self, request: Request) -> Contents | None:
        """Take the request's pages from the host; None if they were lost."""
        saved = request.swapped
        contents = None if saved is None else self._fetch(saved)
        request.swapped = None
        return contents

    def _fetch(self, saved: SwappedPages) -> Contents | None:
        if saved.key is None or self.store is None:
            return saved.contents
        form = self._runner.page_form(bucket(self._pages_for(saved.length), 4))
        leaves = self.store.load_request(saved.key, form)
        return None if leaves is None else self._runner.contents_from(leaves)

    def restore(self, sequence: RunningSequence, contents: Contents) -> None:
        """Write what `fetch` returned into the sequence's pages."""
        self.save_evicted()
        self._runner.scatter(self._tables(sequence, sequence.target), contents)

    def discard(self, request: Request) -> None:
        """Delete the request's pages on the host."""
        saved = request.swapped
        if saved is not None and saved.key is not None and self.store is not None:
            self.store.remove_request(saved.key)
        request.swapped = None

    def nbytes(self, tokens: int) -> int:
        """Return the bytes of the pages of so many tokens."""
        return int(self._pages_for(tokens) * self._runner.page_bytes)

    def warm(self) -> None:
        """Compile the copies of all sizes."""
        runner, size = self._runner, 4
        while size <= bucket(self._pages_for(runner.config.context), 4):
            tables = tuple(pad((), size) for _ in runner.columns)
            contents = jax.device_get(runner.gather(tables))
            runner.scatter(tables, contents)
            self._is_compiled(nbytes(contents))
            size = bucket(size + 1, 4)

    def _is_compiled(self, size: int) -> bool:
        """Whether so much was copied before, so that the time is not that of a compiler."""
        known = size in self._moved
        self._moved.add(size)
        return known

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page)

    def _tables(self, sequence: RunningSequence, length: int) -> tuple[np.ndarray, ...]:
        count = self._pages_for(length)
        return tuple(pad(t.table[:count], bucket(count, 4)) for t in sequence.page_tables)


class PageStore:
    """An engine's entries in a store: single pages by their contents, and requests that wait.

    Args:
        store: a store, or an object with its methods.
        fingerprint: of the model and the pages.

    Raises:
        TypeError: a method is missing.
    """

    def __init__(self, store: Store, fingerprint: bytes):
        check_store(store, ("contains", "get", "get_many", "put", "put_many", "remove"))
        self.store, self.fingerprint = store, fingerprint
        self._new: list[tuple[list[bytes], Contents]] = []  # names, and pages on the device
        # A request's number is unique in its engine, and a process's in its container.
        self._own = f"{secrets.token_hex(8)}.{os.getpid()}.{next(_engines)}"

    def add(self, names: list[bytes], pages: Contents) -> None:
        """Remember pages to be stored by the next `flush`; leaves ``[n, ...]`` on the device."""
        self._new.append((names, pages))

    def flush(self, seconds: float) -> None:
        """Put the pages that were added into the store; this waits for the device.

        Args:
            seconds: to compute a page.
        """
        added, self._new = self._new, []
        try:
            for names, pages in added:
                self._put(names, pages, seconds)
        except Exception as error:
            # A closed store or a failing tier is no request's fault: what is lost can be computed
            # again.
            warnings.warn(f"an engine's pages could not be stored: {error!r}", stacklevel=2)

    def _put(self, names: list[bytes], pages: Contents, seconds: float) -> None:
        keys = [f"page/{name.hex()}" for name in names]
        # A named page never changes: one that is there is not written again.
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

    def find(self, names: Sequence[bytes], most: int, form: PageForm) -> list[PageLeaves]:
        """Return the leaves of pages of these names, up to the first that is not there.

        Args:
            names: of pages that follow each other.
            most: pages.
            form: shapes and dtypes of a page's leaves; an entry of others is rejected.
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

    def _leaves(self, key: str, entry: object, form: PageForm) -> PageLeaves | None:
        names = [str(i) for i in range(len(form))]
        if isinstance(entry, Entry) and set(entry.arrays) == set(names):
            leaves = [entry.arrays[name] for name in names]
            if [(leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves] == form:
                return leaves
        reject(self.store, key)
        return None

    def key_of(self, number: int) -> str:
        """Return the key of a waiting request's pages."""
        return f"waiting/{self._own}.{number}"

    def save_request(self, key: str, pages: Contents, length: int) -> bool:
        """Store the pages of a waiting request; False if the store has no room for them."""
        entry = _entry(jax.tree.leaves(pages), length=length)
        mark = self.fingerprint
        kept = self.store.put(key, entry, pin=True, ephemeral=True, fingerprint=mark, ttl=WAITS)
        return kept is not None

    def load_request(self, key: str, form: PageForm) -> PageLeaves | None:
        """Return the leaves of what `save_request` stored and remove it; None if it was lost."""
        entry = self.store.get(key, fingerprint=self.fingerprint, recompute_seconds=float("inf"))
        leaves = None if entry is None else self._leaves(key, entry, form)
        self.store.remove(key, sync=False)
        return leaves

    def remove_request(self, key: str) -> None:
        """Remove what `save_request` stored."""
        try:
            self.store.remove(key, sync=False)
        except Exception as error:  # such as a closed store, which has removed it
            warnings.warn(f"an engine's waiting request stays stored: {error!r}", stacklevel=2)


def _entry(leaves: PageLeaves, **meta: object) -> Entry:
    return Entry({str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}, meta)
