"""What the store knows: which entries there are, whose, where, and who may move them.

One lock covers all of it; nothing here reads or writes a tier. Who changes where an entry is claims
its name first, and waits for a claim only while having none, so that nobody waits in a circle.
Readers claim nothing: they hold the entry, which is then nobody's victim.

What a store does stands on this, a class and a file for each layer: `Ledger` knows, `Moves` puts
entries onto shelves and takes them off, `Reads` answers, `Writes` takes in, `Upkeep` begins and
ends. `Store` has an `Upkeep` and is what users see of it.
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from jkv.store.keys import Prefixes
from jkv.store.policy import Evictor, Policy
from jkv.store.schema import PutMeta
from jkv.store.shelf import Record, Shelf


class Tenant:
    """What one tenant has. Changed under the store's lock only."""

    def __init__(self, policy: Policy, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self.evictor: Evictor | None = None if max_bytes is None else policy.start(max_bytes)
        self.bytes = 0  # of entries as they were put, each once
        self.reserved = 0  # for puts that are under way
        self.entries = 0
        self.counts: collections.Counter[str] = collections.Counter()


class Ledger:
    """Records by name, and what follows from them. All but claims under `lock`."""

    def __init__(
        self,
        shelves: Sequence[Shelf],
        policy: Policy,
        *,
        chunk: int,
        tenant_bytes: int | Mapping[str, int] | None,
        clock: Callable[[], float],
    ) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)  # twice as slow to enter as the lock itself
        self.shelves = list(shelves)
        self.index: dict[str, Record] = {}
        self.prefixes = Prefixes(chunk)
        self.counts: collections.Counter[str] = collections.Counter()
        self.tenants: dict[str, Tenant] = {}
        self.clock = clock
        self._policy = policy
        self._tenant_bytes = tenant_bytes
        self.released: collections.deque[Record] = collections.deque()
        self.closed = False
        self._process = os.getpid()
        self.active = 0  # operations that are under way
        self._claims: dict[str, Record | None] = {}

    def tenant(self, name: str) -> Tenant:
        """A tenant's figures, made where there are none."""
        if name not in self.tenants:
            limits = self._tenant_bytes
            limit = limits.get(name) if isinstance(limits, Mapping) else limits
            self.tenants[name] = Tenant(self._policy, limit)
        return self.tenants[name]

    def count(self, tenant: str, what: str, n: int | float = 1) -> None:
        """Count for a tenant and for all."""
        self.counts[what] += n  # pyright: ignore[reportArgumentType]
        self.tenant(tenant).counts[what] += n  # pyright: ignore[reportArgumentType]

    # Operations, each of which `close` waits for.

    def begin(self, what: str) -> None:
        """What a user asked for begins.

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
        with self.lock:
            if self.closed:
                raise ValueError(f"the store is closed: {what} came after close")
            self.active += 1
            self.settle_released()

    def end(self) -> None:
        """And ends."""
        with self.lock:
            self.active -= 1
            if self.closed:
                self.changed.notify_all()

    # Claims and holds.

    def claim(self, names: Sequence[str], *, wait: bool = True) -> bool:
        """Take the right to change where entries are; their records are held.

        Never called with a claim in hand, but for `wait=False`, which says False where it would
        have to wait.
        """
        with self.lock:
            if any(name in self._claims for name in names):
                if not wait:
                    return False
                self.changed.wait_for(lambda: not any(name in self._claims for name in names))
            for name in names:
                self._claims[name] = record = self.index.get(name)
                if record is not None:
                    self.hold(record)
            return True

    def unclaim(self, names: Sequence[str]) -> None:
        """The end of a claim."""
        with self.lock:
            for name in names:
                record = self._claims.pop(name)
                if record is not None:
                    self.release(record)
            self.changed.notify_all()

    def claimed(self, name: str) -> bool:
        """Whether somebody is changing where it is."""
        return name in self._claims

    def wait_unclaimed(self, name: str) -> None:
        """Wait until nobody is."""
        with self.lock:
            self.changed.wait_for(lambda: name not in self._claims)

    def hold(self, record: Record) -> None:
        """It is nobody's victim until `release`."""
        record.holds += 1
        if record.holds == 1:
            for evictor in self._evictors(record):
                evictor.hold(record.name)

    def release(self, record: Record) -> None:
        """The end of a `hold`."""
        record.holds -= 1
        if record.holds == 0:
            for evictor in self._evictors(record):
                evictor.release(record.name)

    def settle_released(self) -> None:
        """Release what handles let go of since."""
        while self.released:
            self.release(self.released.popleft())

    def _evictors(self, record: Record) -> Iterator[Evictor]:
        """Those that have it: none once the record is out of the index."""
        for at in record.homes:
            if at != record.leaving:
                yield self.shelves[at].evictor
        evictor = self.tenant(record.tenant).evictor
        if evictor is not None and self.current(record) and record.name in evictor:
            yield evictor

    # Records and their homes.

    def current(self, record: Record) -> bool:
        """Whether it is the record of its name."""
        return self.index.get(record.name) is record

    def expired(self, record: Record) -> bool:
        """Whether its time is over."""
        return record.expires is not None and self.clock() >= record.expires

    def install(self, record: Record, reason: str) -> None:
        """It is the record of its name, because it was `puts` or `found`."""
        self.index[record.name] = record
        self.prefixes.add(record)
        tenant = self.tenant(record.tenant)
        self.unreserve(record)
        tenant.bytes += record.nbytes
        tenant.entries += 1
        if tenant.evictor is not None:
            tenant.evictor.add(record.name, max(record.nbytes, 1), record.cost)
        if record.name in self._claims:
            self._claims[record.name] = record
            self.hold(record)
        if record.pinned:
            self.hold(record)
        self.count(record.tenant, reason)

    def unreserve(self, record: Record) -> None:
        """Its tenant's bytes were taken, or are not needed."""
        self.tenant(record.tenant).reserved -= record.reserved
        record.reserved = 0

    def forget(
        self, record: Record, reason: str, *, heir_at: int | None = None, any_put: bool = False
    ) -> None:
        """It is out of the index; what shelves still have of it is rubbish there.

        On the shelf `heir_at` its name keeps its standing, for the record that comes after it. With
        `any_put` whatever is there under its name is rubbish, and not this put alone.
        """
        for at, size in list(record.homes.items()):
            self.drop_home(record, at, heir=at == heir_at)
            self.add_rubbish(at, record.name, size, None if any_put else record.version)
        tenant = self.tenant(record.tenant)
        tenant.bytes -= record.nbytes
        tenant.entries -= 1
        if tenant.evictor is not None and record.name in tenant.evictor:
            tenant.evictor.removed(record.name)
        del self.index[record.name]
        self.prefixes.remove(record)
        record.moving = None
        self.count(record.tenant, reason)

    def add_home(self, record: Record, at: int, size: int) -> None:
        """It is on a shelf."""
        shelf = self.shelves[at]
        record.homes[at] = size
        shelf.bytes += size
        shelf.entries += 1
        shelf.place(record, size)

    def drop_home(
        self, record: Record, at: int, *, evicted: bool = False, heir: bool = False
    ) -> None:
        """It is not on a shelf any more."""
        shelf = self.shelves[at]
        if record.leaving == at:
            record.leaving = None
        elif not heir:
            shelf.evictor.removed(record.name)
        shelf.bytes -= record.homes.pop(at)
        shelf.entries -= 1
        record.doubtful.discard(at)
        shelf.counts["evictions" if evicted else "gone"] += 1

    def lose(self, record: Record, at: int) -> None:
        """A shelf has it no more, and nobody asked for that."""
        if at in record.homes:
            self.drop_home(record, at)
        if not record.homes and record.moving is None and self.current(record):
            self.forget(record, "lost")

    def add_rubbish(self, at: int, name: str, size: int, version: str | None = None) -> None:
        """A shelf has bytes that are to be deleted: of one put, or whatever is under the name."""
        self.drop_rubbish(at, name)
        shelf = self.shelves[at]
        shelf.rubbish[name] = size
        if version is not None:
            shelf.rubbish_versions[name] = version
        shelf.bytes += size
        shelf.entries += 1

    def drop_rubbish(self, at: int, name: str) -> None:
        """It has them no more."""
        shelf = self.shelves[at]
        size = shelf.rubbish.pop(name, None)
        shelf.rubbish_versions.pop(name, None)
        if size is not None:
            shelf.bytes -= size
            shelf.entries -= 1

    def learn(self, record: Record, put: PutMeta) -> None:
        """What a blob from before says of its record, which was only listed until now."""
        pinned = record.pinned
        record.learn(put)
        if self.current(record):
            self.prefixes.add(record)
            if record.pinned and not pinned:
                self.hold(record)
