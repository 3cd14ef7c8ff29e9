"""What happens to entries over a store's life: found, swept, written at the end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from jkv.errors import TierError
from jkv.store.index import Index
from jkv.store.keys import split_name
from jkv.store.removal import Removal
from jkv.store.state import Record
from jkv.store.tiering import Tiering

_INDEX_WAIT = 1.0  # seconds from the start that queries wait for entries from before


class Lifecycle:
    """What happens before the first put, now and then, and after the last one.

    Args:
        index: what is where.
        tiering: moves entries, and reads the headers of those from before; ended with the store.
        removal: takes out what is expired or unused.

    Attributes:
        stopped: set once the store closes.
        indexed: set once the headers of entries from before were read.
    """

    def __init__(self, index: Index, tiering: Tiering, removal: Removal) -> None:
        self._index = index
        self._tiering = tiering
        self._removal = removal
        self.stopped = threading.Event()
        self.indexed = threading.Event()
        self._index_until = 0.0
        self._threads: list[threading.Thread] = []
        self._process = os.getpid()
        self._closed = False
        self._active = 0  # operations that are under way

    # Operations, each of which `close` waits for.

    def begin(self, what: str) -> None:
        """Begin an operation that a user asked for.

        Raises:
            ValueError: the store is closed.
            RuntimeError: in a child that was forked, where its threads are not.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                "this store was opened before the process was forked, and its threads are in the "
                "parent alone; open another one here, or start the process by "
                "multiprocessing.get_context('spawn')"
            )
        with self._index.lock:
            if self._closed:
                raise ValueError(f"the store is closed: {what} came after close")
            self._active += 1
            self._index.settle_released()

    def end(self) -> None:
        """End an operation."""
        with self._index.lock:
            self._active -= 1
            if self._closed:
                self._index.changed.notify_all()

    def start(self, name: str, run: Callable[[], None]) -> None:
        """Start a thread that ends when `stopped` is set."""
        thread = threading.Thread(target=run, name=f"jkv-store-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    # At the start, and for what other processes put.

    def find_all(self) -> None:
        """Find what tiers have from before; more than they may have now is evicted.

        A listing each, no more; headers are read by a thread, and before anything is evicted,
        since they say what is pinned.
        """
        index = self._index
        with index.lock:
            for at, state in enumerate(index.tiers):
                for name, size in self._scanned(at).items():
                    record = index.records.get(name)
                    if record is None:
                        record = self._listed(name, size)
                    state.counts["found"] += 1
                    index.add_location(record, at, size)
                    record.unverified.add(at)
        tenants = {name: has for name, has in index.tenants.items() if has.max_bytes is not None}
        if tenants or not all(state.fits(0, 0) for state in index.tiers):
            self._read_headers()
        elif index.records:
            self.start("index", self._read_headers)
        else:
            self.indexed.set()
        for name, has in tenants.items():
            while has.bytes > (has.max_bytes or 0) and self._tiering.free_one_of(name):
                pass
        for at in range(len(index.tiers)):
            self._tiering.trim(at)
        self._index_until = time.monotonic() + _INDEX_WAIT

    def wait_for_index(self) -> None:
        """Wait, for a second at most, until what is there from before is found by its tokens."""
        self.indexed.wait(max(self._index_until - time.monotonic(), 0))

    def _scanned(self, at: int) -> dict[str, int]:
        try:
            return dict(self._index.tiers[at].tier.scan())
        except TierError:
            self._index.tiers[at].count_error()
            return {}

    def _listed(self, name: str, size: int) -> Record:
        tenant, key = split_name(name)
        record = Record(name, tenant, key, size, accessed=self._index.clock())
        self._index.install(record, "found")
        return record

    def _read_headers(self) -> None:
        """Read the headers of entries from before, so that they are found by content too."""
        with self._index.lock:
            records = [x for x in self._index.records.values() if x.version is None]
        try:
            for record in records:
                if self.stopped.is_set():
                    break
                self._tiering.describe(record)
                self._drop_expired(record)
        finally:
            self.indexed.set()

    def _drop_expired(self, record: Record) -> None:
        expired = self._index.is_expired
        if expired(record):
            self._removal.drop([record.name], "expired", expired, wait=False)

    def find_more(self) -> int:
        """Find what other processes put since; entries found."""
        index, found = self._index, 0
        for at, state in enumerate(index.tiers):
            if not state.persistent:
                continue
            for name, size in self._scanned(at).items():
                if name in index.records or name in state.orphans:
                    continue
                if not index.claim([name], wait=False):
                    continue  # it is ours, and under way
                try:
                    with index.lock:
                        if name in index.records:
                            continue
                        record = self._listed(name, size)
                        state.counts["found"] += 1
                        index.add_location(record, at, size)
                        record.unverified.add(at)
                        found += 1
                    self._tiering.describe(record)
                finally:
                    index.unclaim([name])
                self._drop_expired(record)
            self._tiering.trim(at)
        return found

    # Now and then.

    def sweep(self, older_than: int | float | None) -> int:
        """Take out expired entries, and those not used for so long; orphans are tried again."""
        index = self._index
        now = index.clock()

        def unused(record: Record) -> bool:
            old = older_than is not None and now - record.accessed >= older_than
            return old and not record.pinned and record.holds <= 1  # the claim's own

        with index.lock:
            index.settle_released()
            records = list(index.records.values())
        late = [record.name for record in records if index.is_expired(record)]
        swept = self._removal.drop(late, "expired", index.is_expired, wait=False)
        if older_than is not None:
            names = [record.name for record in records if now - record.accessed >= older_than]
            swept += self._removal.drop(names, "removed", unused, wait=False)
        self._removal.clean_orphans()
        return swept

    def sweep_every(self, seconds: int | float) -> None:
        """Sweep until the store closes: a thread's work."""
        while not self.stopped.wait(seconds):
            self.sweep(None)

    def drain(self) -> None:
        """Wait until what is there from before was indexed, and nothing moves."""
        self.indexed.wait()
        self._tiering.drain()

    # At the end.

    def close(self) -> None:
        """Take nothing more, wait for operations, end the threads, and let go of the tiers."""
        index = self._index
        with index.lock:
            if self._closed:
                return
            self._closed = True
            self.stopped.set()
            index.changed.wait_for(lambda: self._active == 0)
        for thread in self._threads:
            thread.join()
        self._tiering.close()
        with index.lock:
            for record in index.records.values():
                if record.ephemeral:
                    record.expires = index.clock()
        self._write_lasting()
        self.sweep(None)
        for state in index.tiers:
            state.tier.close()

    def _write_lasting(self) -> None:
        """Write what only this process has to a tier that lasts, the least recent first."""
        index = self._index
        lasting = [at for at, state in enumerate(index.tiers) if state.persistent]
        if not lasting:
            return
        with index.lock:
            records = sorted(index.records.values(), key=lambda record: record.accessed)
        for record in records:
            index.claim([record.name])
            try:
                locations = sorted(record.locations)
                if not locations or index.is_expired(record) or set(locations) & set(lasting):
                    continue
                entry = self._tiering.fetch(locations[0], record)
                if entry is not None:
                    self._tiering.sink(record, entry, max(lasting[0], locations[0] + 1))
            finally:
                index.unclaim([record.name])
