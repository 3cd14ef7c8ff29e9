"""How entries get into tiers, and down and up: what is written, evicted, demoted and promoted.

All of it outside the lock, with the entry's name claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jkv._text import brief
from jkv.errors import CorruptError, TierError, UnsupportedError
from jkv.store.checks import UNSET, Limit
from jkv.store.entry import Entry
from jkv.store.index import Index
from jkv.store.removal import Removal
from jkv.store.schema import META, put_meta
from jkv.store.state import Record, TierState
from jkv.store.worker import BoundedWorker

KEPT, REFUSED, FAILED = "kept", "refused", "failed"

Promotion = tuple[Record, Entry | None]  # None: it is read first


class Tiering:
    """The tiers, with a thread each for what is to arrive there.

    Args:
        index: what is where.
        removal: deletes what is left of entries.
        convert: an entry into a form.
        queue_entries, queue_bytes: what may wait for each tier.
    """

    def __init__(
        self,
        index: Index,
        removal: Removal,
        *,
        convert: Callable[[Entry, str], Entry],
        queue_entries: int,
        queue_bytes: int,
    ) -> None:
        self._index = index
        self._removal = removal
        self._convert = convert
        self._demotions = [
            BoundedWorker(f"jkv-store-{state.name}", self._arrive, queue_entries, queue_bytes)
            for state in index.tiers[1:]
        ]
        self.promotions = BoundedWorker(
            f"jkv-store-{index.tiers[0].name}", self._promote, queue_entries, queue_bytes
        )

    @property
    def workers(self) -> Sequence[BoundedWorker[Record] | BoundedWorker[Promotion]]:
        """One for each tier: promotions to the first, demotions to the others."""
        return [self.promotions, *self._demotions]

    def drain(self) -> None:
        """Wait until nothing moves. Moves up may begin moves down, never the other way."""
        for worker in self.workers:
            worker.drain()

    def close(self) -> None:
        """Finish what moves, and end the threads."""
        for worker in self.workers:
            worker.close()

    # Into a tier.

    def place(self, at: int, items: Sequence[tuple[Record, Entry]]) -> list[str]:
        """Write entries to a tier: KEPT, REFUSED for want of room, or FAILED, each.

        A new record becomes that of its name as soon as it has a location, and the old one goes.
        """
        index = self._index
        state = index.tiers[at]
        formed = [self._formed(entry, record, state) for record, entry in items]
        rooms = [
            self._make_room(at, record, max(entry.nbytes, 1))
            for (record, _), entry in zip(items, formed, strict=True)
        ]
        results = [REFUSED if room is None else KEPT for room in rooms]
        chosen = [i for i, room in enumerate(rooms) if room is not None]
        sizes = self._write(state, [(items[i][0].name, formed[i]) for i in chosen])
        with index.lock:
            for i, size in zip(chosen, sizes, strict=True):
                results[i] = self._settle(at, items[i][0], rooms[i] or (0, 0), size)
        for i, size in zip(chosen, sizes, strict=True):
            # With headers it may be more than was thought.
            if results[i] == KEPT and (size or 0) > formed[i].nbytes and not self.trim(at):
                record = items[i][0]
                with index.lock:
                    left = record.locations[at]
                    index.drop_location(record, at)
                    index.add_orphan(at, record.name, left, record.version)
                    state.counts["refused"] += 1
                self._removal.clean(at, record.name)
                results[i] = REFUSED
        return results

    def _formed(self, entry: Entry, record: Record, state: TierState) -> Entry:
        """Convert an entry to the tier's form, with what the store knows of it."""
        exact = entry.meta.get("form", "exact") == "exact"
        if exact and state.form != "exact":
            try:
                entry = self._convert(entry, state.form)
            except (UnsupportedError, CorruptError):  # it stays as it is, and its meta says so
                with self._index.lock:
                    state.counts["unconverted"] += 1
        # What a device tier had is JAX's.
        arrays = {name: np.asarray(array) for name, array in entry.arrays.items()}
        lock = None
        if record.ephemeral:
            try:
                lock = state.tier.liveness_lock()
            except TierError:  # only its time to live will end it
                state.count_error()
        return Entry(arrays, {**entry.meta, META: record.meta(lock)})

    def _write(self, state: TierState, items: list[tuple[str, Entry]]) -> list[int | None]:
        """Write entries; the bytes that each takes, None where it failed."""
        if len(items) > 1:
            try:
                written = state.tier.write_many(dict(items))
                found = [written[name] for name, _ in items]
                return [size if isinstance(size, int) else None for size in found]
            except (TierError, UnsupportedError):
                pass  # one after the other, to see which
        sizes: list[int | None] = []
        for name, entry in items:
            try:
                sizes.append(state.tier.write(name, entry))
            except (TierError, UnsupportedError):
                sizes.append(None)
        return sizes

    def _settle(self, at: int, record: Record, room: tuple[int, int], size: int | None) -> str:
        """Note the outcome of a write for which there was room. Under the lock."""
        index = self._index
        state = index.tiers[at]
        state.bytes -= room[0]
        state.entries -= room[1]
        if size is None:
            state.counts["errors"] += 1
            return FAILED
        old = index.records.get(record.name)
        if old is not record:
            if old is not None:
                record.created = old.created
                index.forget(old, "replaced", successor_at=at)
            index.install(record, "puts")
        elif at in record.locations:  # one of which it was only known that it is there
            index.drop_location(record, at)
        index.drop_orphan(at, record.name)
        state.counts["writes"] += 1
        state.counts["bytes_written"] += size
        index.add_location(record, at, size)
        return KEPT

    # Room.

    def _make_room(self, at: int, record: Record, size: int) -> tuple[int, int] | None:
        """Reserve bytes and a place in a tier, evicting what has to go for it. None: it cannot."""
        index = self._index
        state = index.tiers[at]
        with index.lock:
            if not state.takes(size):
                state.counts["rejected"] += 1
                return None
            if record.name not in state.evictor:
                state.evictor.expect(record.name)
        while True:
            with index.lock:
                # What this write will replace needs no room beside it.
                old = index.records.get(record.name)
                before = state.orphans.get(
                    record.name, None if old is None else old.locations.get(at)
                )
                room = (size, 1) if before is None else (max(size - before, 0), 0)
                if state.fits(*room):
                    state.bytes += room[0]
                    state.entries += room[1]
                    return room
            if not self._free_one(at):
                with index.lock:
                    state.counts["refused"] += 1
                return None

    def trim(self, at: int) -> bool:
        """Evict until a tier is within its limits; False: something has to go that cannot."""
        while True:
            with self._index.lock:
                if self._index.tiers[at].fits(0, 0):
                    return True
            if not self._free_one(at):
                return False

    def resize(self, tier: str | int, max_bytes: Limit, max_entries: Limit) -> None:
        """See `Store.resize`."""
        names = [state.name for state in self._index.tiers]
        at = names.index(tier) if tier in names else tier
        if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < len(names):
            raise ValueError(f"tier got {brief(tier)}; expected one of {names}, or its number")
        state = self._index.tiers[at]
        with self._index.lock:
            state.resize(
                state.max_bytes if max_bytes is UNSET else max_bytes,
                state.max_entries if max_entries is UNSET else max_entries,
            )
        self.trim(at)

    def _free_one(self, at: int) -> bool:
        """Delete an orphan from a tier, or evict an entry; False: nothing can go."""
        index = self._index
        state = index.tiers[at]
        with index.lock:
            name = next((name for name in state.orphans if not index.is_claimed(name)), None)
            victim = None
            if name is None:
                try:
                    name = str(state.evictor.victim())
                except LookupError:
                    return False
                victim = index.records[name]
                state.evictor.evicted(name)
                victim.leaving = at
            # It is not claimed: what is claimed is held.
            index.claim([name])
        try:
            return self._removal.clean(at, name) if victim is None else self._evict(at, victim)
        finally:
            index.unclaim([name])

    def make_quota(self, record: Record) -> bool:
        """Reserve bytes of its tenant, evicting entries for it; False: there cannot be room."""
        index = self._index
        while True:
            with index.lock:
                tenant = index.tenant(record.tenant)
                if tenant.max_bytes is None:
                    return True
                old = index.records.get(record.name)
                more = max(record.nbytes - (0 if old is None else old.nbytes), 0)
                if tenant.bytes + tenant.reserved + more <= tenant.max_bytes:
                    record.reserved = more
                    tenant.reserved += more
                    return True
                if record.nbytes > tenant.max_bytes:
                    return False
            if not self.free_one_of(record.tenant):
                return False

    def free_one_of(self, tenant: str) -> bool:
        """Evict an entry of a tenant from everywhere; False: none can go."""
        index = self._index
        with index.lock:
            evictor = index.tenant(tenant).evictor
            if evictor is None:
                return False
            try:
                name = str(evictor.victim())
            except LookupError:
                return False
            evictor.evicted(name)
            index.claim([name])
            index.forget(index.records[name], "evicted")
        self._removal.clean_all(name)
        index.unclaim([name])
        return True

    # Down.

    def _evict(self, at: int, record: Record) -> bool:
        """Evict, to a tier below if one takes the entry. False: it could not be deleted."""
        index = self._index
        state = index.tiers[at]
        entry, outcome = None, KEPT
        with index.lock:
            expired = index.is_expired(record)
            below = at + 1 in record.locations and at + 1 not in record.unverified
        if at + 1 < len(index.tiers) and not below and not expired:
            entry = self.fetch(at, record)
            if at not in record.locations:
                return True  # it was corrupt, and is gone
            if entry is None:
                outcome = FAILED
            elif state.persistent:  # what is safe here stays until it is safe below
                outcome, entry = self.sink(record, entry, at + 1), None
        if not state.delete(record.name, record.version):
            with index.lock:
                record.leaving = None
                state.place(record, record.locations[at])
            return False
        with index.lock:
            index.drop_location(record, at, evicted=True)
            if entry is not None:
                record.moving, record.moving_from = entry, at
                state.counts["demotions"] += 1
                if self._demotions[at].offer(record, entry.nbytes):
                    return True
                # The queue is full: the caller that needs the room waits for the tier below.
                state.counts["demotions_by_caller"] += 1
            elif record.locations:
                state.counts["demotions"] += not below
            else:
                reason = "expired" if expired else "lost" if outcome == FAILED else "evicted"
                index.forget(record, reason)
        if entry is not None:
            self._land(record)
        return True

    def sink(self, record: Record, entry: Entry, start: int) -> str:
        """Write an entry to the first tier from `start` on that takes it."""
        failed = False
        for at, state in enumerate(self._index.tiers[start:], start):
            if at in record.locations and at not in record.unverified:
                return KEPT
            if state.newer_put(record) is not None:
                return REFUSED  # of another process: what would be written is what it replaced
            outcome = self.place(at, [(record, entry)])[0]
            if outcome == KEPT:
                return KEPT
            failed |= outcome == FAILED
        return FAILED if failed else REFUSED

    def _arrive(self, record: Record) -> None:
        """Write what left the tier above: a worker's job."""
        self._index.claim([record.name])
        try:
            self._land(record)
        finally:
            self._index.unclaim([record.name])

    def _land(self, record: Record) -> None:
        entry = record.moving
        if entry is None:
            return  # it was replaced or removed meanwhile
        outcome = FAILED
        try:
            outcome = self.sink(record, entry, record.moving_from + 1)
        finally:
            with self._index.lock:
                record.moving = None
                if not record.locations:
                    self._index.forget(record, "lost" if outcome == FAILED else "evicted")

    # Up.

    def promote(self, record: Record, entry: Entry | None) -> bool:
        """Queue an entry for the first tier; False: the queue has no room. Under the lock."""
        if record.promoting or 0 in record.locations:
            return True
        nbytes = record.nbytes if entry is None else entry.nbytes
        record.promoting = self.promotions.offer((record, entry), nbytes)
        if not record.promoting:
            self._index.tiers[0].counts["promotions_dropped"] += 1
        return record.promoting

    def _promote(self, job: Promotion) -> None:
        """Copy an entry to the fastest tier that takes it: the first worker's job."""
        index = self._index
        record, entry = job
        index.claim([record.name])
        try:
            if not index.is_current(record) or not record.locations or index.is_expired(record):
                return
            top = min(record.locations)
            if entry is None and top > 0:
                entry = self.fetch(top, record)
            if entry is None:
                return
            for at, state in enumerate(index.tiers[:top]):
                if state.newer_put(record) is not None:
                    return
                if self.place(at, [(record, entry)])[0] == KEPT:
                    with index.lock:
                        state.counts["promotions"] += 1
                    return
        finally:
            record.promoting = False
            index.unclaim([record.name])

    def fetch(self, at: int, record: Record) -> Entry | None:
        """Read an entry for a move. None: it cannot be read now, or is not there any more."""
        index = self._index
        state = index.tiers[at]
        try:
            entry = state.read(record.name)
        except TierError:
            state.count_error()
            return None
        except CorruptError:
            entry = None
            with index.lock:
                state.counts["corrupt"] += 1
        with index.lock:
            if entry is None or not index.verify(record, at, entry):
                index.lose(record, at)
                return None
            state.counts["bytes_read"] += record.locations.get(at, 0)
        return entry

    def describe(self, record: Record) -> None:
        """Complete a record that was only listed by the header of its entry."""
        index = self._index
        for at in sorted(record.locations):
            if record.version is not None:
                return  # it was read meanwhile
            state = index.tiers[at]
            try:
                put = put_meta(state.tier.describe(record.name) or {})
            except (TierError, CorruptError):
                continue  # a read will fail too, and count it
            outlived = put is not None and self._is_outlived(state, put.liveness_lock)
            with index.lock:
                if put is not None and record.version is None and index.is_current(record):
                    index.learn(record, put)
                    if outlived:
                        record.expires = index.clock()
                    record.unverified.discard(at)
                    return

    def _is_outlived(self, state: TierState, lock: str | None) -> bool:
        """Tell whether the process is gone for which alone an entry was kept."""
        if lock is None:
            return False
        try:
            return not state.tier.is_live(lock)
        except TierError:  # until it is known, or its time to live ends it
            return False
