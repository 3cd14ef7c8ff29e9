"""What the store knows: which entries there are, whose, where, and who may move them.

One lock covers all of it; nothing here reads or writes a tier. An operation that changes where an
entry is claims its name first, and waits for a claim only while having none, so that no two wait
for each other. Readers claim nothing: they hold the entry, which is then never the victim.

A store is composed of parts, each of which has those before it: an `Index`; a `Removal`, which
takes entries out; a `Tiering`, which moves them between tiers; a `Reader` and a `Writer`; and a
`Lifecycle`, from the first scan to the end.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from jkv.store.entry import Entry
from jkv.store.keys import Prefixes
from jkv.store.policy import Evictor, Policy
from jkv.store.schema import PutMeta, check_entry
from jkv.store.state import Record, Tenant, TierState
from jkv.store.tier import Tier


class Index:
    """Records by name, and what follows from them. All but claims under `lock`.

    Args:
        tiers: with the names that figures give them, the fastest first.
        policy: of every tier and tenant.
        forms: by name of tier, where it is not "exact".
        chunk: tokens between two prefix hashes.
        tenant_bytes: what each tenant may have, or by tenant.
        clock: seconds since the epoch.

    Attributes:
        released: records that handles let go of, until `settle_released`.
    """

    def __init__(
        self,
        tiers: Sequence[tuple[str, Tier]],
        policy: Policy,
        *,
        forms: Mapping[str, str],
        chunk: int,
        tenant_bytes: int | Mapping[str, int] | None,
        clock: Callable[[], float],
    ) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)  # twice as slow to enter as the lock itself
        self.tiers = [
            TierState(tier, at, name, policy, forms.get(name, "exact"), self.lock)
            for at, (name, tier) in enumerate(tiers)
        ]
        self.records: dict[str, Record] = {}
        self.prefixes = Prefixes(chunk)
        self.counts: collections.Counter[str] = collections.Counter()
        self.tenants: dict[str, Tenant] = {}
        self.clock = clock
        self._policy = policy
        self._tenant_bytes = tenant_bytes
        self.released: collections.deque[Record] = collections.deque()
        self._claims: dict[str, Record | None] = {}

    def tenant(self, name: str) -> Tenant:
        """Return what a tenant has, made where there is nothing."""
        if name not in self.tenants:
            limits = self._tenant_bytes
            limit = limits.get(name) if isinstance(limits, Mapping) else limits
            self.tenants[name] = Tenant(self._policy, limit)
        return self.tenants[name]

    def count(self, tenant: str, what: str, n: int | float = 1) -> None:
        """Count for a tenant and for all."""
        self.counts[what] += n  # pyright: ignore[reportArgumentType]
        self.tenant(tenant).counts[what] += n  # pyright: ignore[reportArgumentType]

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
                self._claims[name] = record = self.records.get(name)
                if record is not None:
                    self.hold(record)
            return True

    def unclaim(self, names: Sequence[str]) -> None:
        """End a claim."""
        with self.lock:
            for name in names:
                record = self._claims.pop(name)
                if record is not None:
                    self.release(record)
            self.changed.notify_all()

    def is_claimed(self, name: str) -> bool:
        """Tell whether something is changing where an entry is."""
        return name in self._claims

    def wait_unclaimed(self, name: str) -> None:
        """Wait until nothing is."""
        with self.lock:
            self.changed.wait_for(lambda: name not in self._claims)

    def hold(self, record: Record) -> None:
        """Keep an entry from being the victim until `release`."""
        record.holds += 1
        if record.holds == 1:
            for evictor in self.evictors(record):
                evictor.hold(record.name)

    def release(self, record: Record) -> None:
        """End a `hold`."""
        record.holds -= 1
        if record.holds == 0:
            for evictor in self.evictors(record):
                evictor.release(record.name)

    def settle_released(self) -> None:
        """Release what handles let go of since."""
        while self.released:
            self.release(self.released.popleft())

    def unpin(self, name: str) -> None:
        """Let a pinned entry be evicted again."""
        with self.lock:
            record = self.records.get(name)
            if record is not None and record.pinned:
                record.pinned = False
                self.release(record)

    def evictors(self, record: Record) -> Iterator[Evictor]:
        """Yield those that have it: none once the record is out of the index."""
        for at in record.locations:
            if at != record.leaving:
                yield self.tiers[at].evictor
        evictor = self.tenant(record.tenant).evictor
        if evictor is not None and self.is_current(record) and record.name in evictor:
            yield evictor

    # Records and their locations.

    def is_current(self, record: Record) -> bool:
        """Tell whether it is the record of its name."""
        return self.records.get(record.name) is record

    def is_expired(self, record: Record) -> bool:
        """Tell whether its time is over."""
        return record.expires is not None and self.clock() >= record.expires

    def install(self, record: Record, reason: str) -> None:
        """Make it the record of its name, because it was `puts` or `found`."""
        self.records[record.name] = record
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
        """Give back its tenant's bytes, which were taken or are not needed."""
        self.tenant(record.tenant).reserved -= record.reserved
        record.reserved = 0

    def forget(
        self,
        record: Record,
        reason: str,
        *,
        successor_at: int | None = None,
        any_put: bool = False,
    ) -> None:
        """Take it out of the index; what tiers still have of it is an orphan there.

        In the tier `successor_at` its name keeps its standing, for the record that comes after it.
        With `any_put` whatever is there under its name is an orphan, and not this put alone.
        """
        for at, size in list(record.locations.items()):
            self.drop_location(record, at, successor=at == successor_at)
            self.add_orphan(at, record.name, size, None if any_put else record.version)
        tenant = self.tenant(record.tenant)
        tenant.bytes -= record.nbytes
        tenant.entries -= 1
        if tenant.evictor is not None and record.name in tenant.evictor:
            tenant.evictor.removed(record.name)
        del self.records[record.name]
        self.prefixes.remove(record)
        record.moving = None
        self.count(record.tenant, reason)

    def add_location(self, record: Record, at: int, size: int) -> None:
        """Note that a tier has it."""
        state = self.tiers[at]
        record.locations[at] = size
        state.bytes += size
        state.entries += 1
        state.place(record, size)

    def drop_location(
        self, record: Record, at: int, *, evicted: bool = False, successor: bool = False
    ) -> None:
        """Note that a tier has it no more; a successor takes over its standing there."""
        state = self.tiers[at]
        if record.leaving == at:
            record.leaving = None
        elif not successor:
            state.evictor.removed(record.name)
        state.bytes -= record.locations.pop(at)
        state.entries -= 1
        record.unverified.discard(at)
        state.counts["evictions" if evicted else "gone"] += 1

    def lose(self, record: Record, at: int) -> None:
        """Note that a tier has it no more although nothing here has deleted it."""
        if at in record.locations:
            self.drop_location(record, at)
        if not record.locations and record.moving is None and self.is_current(record):
            self.forget(record, "lost")

    def add_orphan(self, at: int, name: str, size: int, version: str | None = None) -> None:
        """Note bytes that are to be deleted: of one put, or whatever is under the name."""
        self.drop_orphan(at, name)
        state = self.tiers[at]
        state.orphans[name] = size
        if version is not None:
            state.orphan_versions[name] = version
        state.bytes += size
        state.entries += 1

    def drop_orphan(self, at: int, name: str) -> None:
        """Note that they have gone."""
        state = self.tiers[at]
        size = state.orphans.pop(name, None)
        state.orphan_versions.pop(name, None)
        if size is not None:
            state.bytes -= size
            state.entries -= 1

    def learn(self, record: Record, put: PutMeta) -> None:
        """Complete a record that was only listed until now by what its blob says."""
        pinned = record.pinned
        record.learn(put)
        if self.is_current(record):
            self.prefixes.add(record)
            if record.pinned and not pinned:
                self.hold(record)

    def verify(self, record: Record, at: int, entry: Entry) -> bool:
        """Tell whether what a tier gave is of this record; complete one that was only listed."""
        put = check_entry(entry)
        if record.version is None and put is not None:
            self.learn(record, put)
        same = record.version == (None if put is None else put.version)
        if same:
            record.unverified.discard(at)
        return same
