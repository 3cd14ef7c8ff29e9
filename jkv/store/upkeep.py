"""What happens to entries over a store's life: found, removed, swept, written at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from jkv._text import brief
from jkv.errors import CorruptError, TierError
from jkv.store.answers import Ask
from jkv.store.checks import Limit
from jkv.store.keys import split
from jkv.store.schema import put_meta
from jkv.store.shelf import Record
from jkv.store.writes import Writes

UNSET: Any = object()  # where None is a value


class Upkeep(Writes):
    """What happens before the first put, now and then, and after the last one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stopped = threading.Event()
        self.indexed = threading.Event()
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
            if record.version is not None:
                return  # somebody else has read it
            try:
                said = put_meta(self.shelves[at].tier.describe(record.name) or {})
            except (TierError, CorruptError):
                continue  # who reads it will know, and count it
            outlived = said is not None and self._outlived(at, said.liveness_lock)
            with self.lock:
                if said is not None and record.version is None and self.current(record):
                    self.learn(record, said)
                    if outlived:
                        record.expires = self.clock()
                    record.doubtful.discard(at)
                    return

    def _outlived(self, at: int, lock: str | None) -> bool:
        """Tell whether the process is gone for which alone an entry was kept."""
        if lock is None:
            return False
        try:
            return not self.shelves[at].tier.is_live(lock)
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
        self.clean_rubbish()
        return swept

    def clean_rubbish(self) -> None:
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

    # What users ask for.

    def has(self, ask: Ask) -> bool:
        """Whether it would be found; that is no access.

        Of an entry that is only listed so far the header is read: to read all of it would count
        as what its tier can do, and the `get` that follows might be declined for it.
        """
        with self.lock:
            record = self.index.get(ask.name)
        if record is not None and record.version is None:
            self._describe(record)
        with self.lock:
            record = self.index.get(ask.name)
            if record is not None and record.version is not None:
                same = ask.fingerprint is None or ask.fingerprint == record.fingerprint
                return same and not self.expired(record)
        self.take([ask])
        with self.lock:
            if ask.entry is not None and ask.record is not None:
                self.release(ask.record)
        return ask.entry is not None

    def remove(self, name: str, sync: bool) -> bool:
        """See `Store.remove`."""
        known = self.drop([name], "removed", lambda _: True, any_put=True)
        # Another process may have put it, or put it anew.
        if not known or any(self.version_at(at, name) for at in range(len(self.shelves))):
            known = self.delete_unknown(name) or known
        if sync:
            self.purge([name])
        return bool(known)

    def clear(self, tenant: str | None) -> int:
        """See `Store.clear`."""
        with self.lock:
            known = [*self.index, *(name for shelf in self.shelves for name in shelf.rubbish)]
            names = [name for name in known if tenant is None or split(name)[0] == tenant]
        gone = self.drop(names, "removed", lambda _: True, any_put=True)
        self.clean_rubbish()
        self.purge(names)
        return gone

    def unpin(self, name: str) -> None:
        """See `Store.unpin`."""
        with self.lock:
            record = self.index.get(name)
            if record is not None and record.pinned:
                record.pinned = False
                self.release(record)

    def resize(self, tier: str | int, max_bytes: Limit, max_entries: Limit) -> None:
        """See `Store.resize`."""
        names = [shelf.name for shelf in self.shelves]
        at = names.index(tier) if tier in names else tier
        if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < len(names):
            raise ValueError(f"tier got {brief(tier)}; expected one of {names}, or its number")
        shelf = self.shelves[at]
        with self.lock:
            shelf.resize(
                shelf.max_bytes if max_bytes is UNSET else max_bytes,
                shelf.max_entries if max_entries is UNSET else max_entries,
            )
        self.trim(at)

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
        """Take nothing more, wait for who is at it, end the threads, and let go of the tiers."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self.stopped.set()
            self.changed.wait_for(lambda: self.active == 0)
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
