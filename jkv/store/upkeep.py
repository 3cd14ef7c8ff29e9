"""What is done to entries by whom nobody asked: found at the start, swept, written at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from jkv.errors import CorruptError, TierError
from jkv.store import figures
from jkv.store.entry import Entry
from jkv.store.keys import name_of, split
from jkv.store.ledger import operation
from jkv.store.moves import LIFELINE, store_meta
from jkv.store.prefetch import Prefetcher
from jkv.store.shelf import Record
from jkv.store.writes import Writes

_UNSET: Any = object()


class Upkeep(Writes):
    """What happens before the first put, now and then, and after the last one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stopped = threading.Event()
        self.indexed = threading.Event()
        self.prefetcher: Prefetcher | None = None
        self._threads: list[threading.Thread] = []

    def start(self, name: str, run: Callable[[], None]) -> None:
        """A thread that ends when `stopped` is set."""
        thread = threading.Thread(target=run, name=f"jkv-store-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def find_all(self) -> None:
        """What tiers have from before; more than they may have now goes.

        A listing each, no more; headers are read by a thread, and before anything goes, since they
        say what is pinned.
        """
        with self.lock:
            for at in range(len(self.shelves)):
                for name, size in self._scanned(at).items():
                    record = self.index.get(name)
                    if record is None:
                        record = self._listed(name, size)
                    self.shelves[at].counts["found"] += 1
                    self.add_home(record, at, size)
                    record.doubtful.add(at)
        tenants = {name: has for name, has in self.tenants.items() if has.max_bytes is not None}
        if tenants or not all(shelf.fits(0, 0) for shelf in self.shelves):
            self._index()
        elif self.index:
            self.start("index", self._index)
        else:
            self.indexed.set()
        for name, has in tenants.items():
            while has.bytes > (has.max_bytes or 0) and self.free_one_of(name):
                pass
        for at in range(len(self.shelves)):
            self.trim(at)

    def _scanned(self, at: int) -> dict[str, int]:
        try:
            return dict(self.shelves[at].tier.scan())
        except TierError:
            self.shelves[at].counts["errors"] += 1
            return {}

    def _listed(self, name: str, size: int) -> Record:
        tenant, key = split(name)
        record = Record(name, tenant, key, size, accessed=self.clock())
        self.install(record, "found")
        return record

    def _index(self) -> None:
        """Read the headers of entries from before, so that they are found by content too."""
        with self.lock:
            records = [record for record in self.index.values() if record.version is None]
        try:
            for record in records:
                if self.stopped.is_set():
                    break
                self._describe(record)
                self._drop_expired(record)
        finally:
            self.indexed.set()

    def _describe(self, record: Record) -> None:
        for at in sorted(record.homes):
            describe = getattr(self.shelves[at].tier, "describe", None)
            if describe is None:
                continue
            try:
                meta = describe(record.name)
            except (TierError, CorruptError):
                continue  # who reads it will know, and count it
            said = store_meta(Entry({}, meta or {}))
            outlived = said is not None and self._outlived(at, said.get(LIFELINE))
            with self.lock:
                if said is not None and record.version is None and self.current(record):
                    self.learn(record, said)
                    if outlived:
                        record.expires = self.clock()
                    record.doubtful.discard(at)
                    return

    def _outlived(self, at: int, lifeline: Any) -> bool:
        """Whether the process is gone for which alone an entry was kept."""
        if lifeline is None:
            return False
        try:
            return not self.shelves[at].tier.lives(lifeline)
        except TierError:  # until it is known, or its time to live ends it
            return False

    def _drop_expired(self, record: Record) -> None:
        if self.expired(record):
            self.drop([record.name], "expired", self.expired, wait=False)

    # Meanwhile.

    def find_more(self) -> int:
        """What other processes put since; entries found."""
        found = 0
        for at, shelf in enumerate(self.shelves):
            if not shelf.persistent:
                continue
            for name, size in self._scanned(at).items():
                if name in self.index or name in shelf.rubbish:
                    continue
                if not self.claim([name], wait=False):
                    continue  # it is ours, and under way
                try:
                    with self.lock:
                        if name in self.index:
                            continue
                        record = self._listed(name, size)
                        shelf.counts["found"] += 1
                        self.add_home(record, at, size)
                        record.doubtful.add(at)
                        found += 1
                    self._describe(record)
                finally:
                    self.unclaim([name])
                self._drop_expired(record)
            self.trim(at)
        return found

    def clean_up(self, older_than: int | float | None) -> int:
        """Expired entries go, and those not used for so long; rubbish is tried again."""
        now = self.clock()

        def unused(record: Record) -> bool:
            old = older_than is not None and now - record.accessed >= older_than
            return old and not record.pinned and record.holds <= 1  # the claim's own

        with self.lock:
            self.settle_released()
            records = list(self.index.values())
        late = [record.name for record in records if self.expired(record)]
        swept = self.drop(late, "expired", self.expired, wait=False)
        if older_than is not None:
            names = [record.name for record in records if now - record.accessed >= older_than]
            swept += self.drop(names, "removed", unused, wait=False)
        self._clean_rubbish()
        return swept

    def _clean_rubbish(self) -> None:
        """Try again to delete what could not be deleted."""
        for at, shelf in enumerate(self.shelves):
            for name in list(shelf.rubbish):
                if self.claim([name], wait=False):
                    try:
                        self.clean(at, name)
                    finally:
                        self.unclaim([name])

    def sweeper(self, every: int | float) -> None:
        """A thread that cleans up now and then."""
        while not self.stopped.wait(every):
            self.clean_up(None)

    def settle_queues(self) -> None:
        """Wait until nothing moves. Moves up may begin moves down, never the other way."""
        for mover in self.movers:
            mover.drain()

    # After the last.

    def write_lasting(self) -> None:
        """What only this process has is written to a tier that lasts, the least recent first."""
        lasting = [at for at, shelf in enumerate(self.shelves) if shelf.persistent]
        if not lasting:
            return
        with self.lock:
            records = sorted(self.index.values(), key=lambda record: record.accessed)
        for record in records:
            self.claim([record.name])
            try:
                homes = sorted(record.homes)
                if not homes or self.expired(record) or set(homes) & set(lasting):
                    continue
                entry = self.fetch(homes[0], record)
                if entry is not None:
                    self.sink(record, entry, max(lasting[0], homes[0] + 1))
            finally:
                self.unclaim([record.name])

    def finish(self) -> None:
        """End the threads, and let go of the tiers. Nobody else is in the store any more."""
        for thread in self._threads:
            thread.join()
        for mover in self.movers:
            mover.close()
        with self.lock:
            for record in self.index.values():
                if record.ephemeral:
                    record.expires = self.clock()
        self.write_lasting()
        self.clean_up(None)
        for shelf in self.shelves:
            shelf.tier.close()

    # What users ask for.

    @operation
    def clear(self, *, tenant: str | None = None) -> int:
        """All entries go that the store knows of, or all of one tenant, as by `remove`; how many.

        Raises:
            TierError: of some of them something may be left, or come back.
        """
        with self.lock:
            known = [*self.index, *(name for shelf in self.shelves for name in shelf.rubbish)]
            names = [name for name in known if tenant is None or split(name)[0] == tenant]
        gone = self.drop(names, "removed", lambda _: True)
        self._clean_rubbish()
        self.purge(names)
        return gone

    @operation
    def unpin(self, key: str, *, tenant: str = "") -> None:
        """A pinned entry may go again; nothing happens to another one."""
        with self.lock:
            record = self.index.get(name_of(tenant, key))
            if record is not None and record.pinned:
                record.pinned = False
                self.release(record)

    @operation
    def sweep(self, older_than: int | float | None = None) -> int:
        """Expired entries go, and those that nobody used for so many seconds; how many."""
        return self.clean_up(older_than)

    @operation
    def refresh(self) -> int:
        """Look for what other processes put; how many were found.

        A `get` by key finds them without; `longest_prefix` does not. Disk: a listing and a header
        of each new one; Remote: a request for every entry there is.
        """
        return self.find_more()

    @operation
    def resize(
        self, tier: str | int, *, max_bytes: int | None = _UNSET, max_entries: int | None = _UNSET
    ) -> None:
        """Other limits for a tier, by name or number; what has no room any more moves down.

        Raises:
            ValueError: no such tier.
        """
        names = [shelf.name for shelf in self.shelves]
        at = names.index(tier) if tier in names else tier
        if not isinstance(at, int) or not 0 <= at < len(names):
            raise ValueError(f"tier got {tier!r}; expected one of {names}, or its number")
        shelf = self.shelves[at]
        with self.lock:
            shelf.resize(
                shelf.max_bytes if max_bytes is _UNSET else max_bytes,
                shelf.max_entries if max_entries is _UNSET else max_entries,
            )
        self.trim(at)

    @operation
    def drain(self) -> None:
        """Wait until what moves between tiers has arrived."""
        self.indexed.wait()
        self.settle_queues()

    # What it tells.

    def stats(self, *, detailed: bool = False) -> dict[str, Any]:
        """Figures since the store was made; see `jkv.store.figures`. With `detailed`, by entry."""
        with self.lock:
            self.settle_released()
            said = figures.collect(self)
            if detailed:
                said["by_entry"] = figures.by_entry(self)
        if self.prefetcher is not None:
            said["prediction"] = self.prefetcher.predictor.stats()
        return said

    def hot(self, k: int = 10) -> list[tuple[str, int]]:
        """The keys of most hits, and how many."""
        with self.lock:
            records = sorted(self.index.values(), key=lambda r: (-r.hits, -r.accessed))[:k]
            return [(record.key, record.hits) for record in records]

    def report(self) -> Any:
        """The figures as a `rich` table, to print."""
        return figures.report(self.stats())

    def prometheus(self) -> str:
        """The figures in Prometheus' text format."""
        return figures.prometheus(self.stats())
