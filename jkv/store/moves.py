"""How entries get onto shelves, and down and up: what is written, read for a move, and deleted.

All of it outside the lock, with the entry's name claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jkv.errors import CorruptError, TierError, UnsupportedError
from jkv.store.entry import Entry
from jkv.store.ledger import Ledger
from jkv.store.mover import Mover
from jkv.store.schema import META, check_entry
from jkv.store.shelf import Record, Shelf

KEPT, REFUSED, FAILED = "kept", "refused", "failed"


class Moves(Ledger):
    """Shelves with a thread each, for what is to arrive there."""

    def __init__(
        self,
        *args: Any,
        convert: Callable[[Entry, str], Entry],
        queue_entries: int,
        queue_bytes: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._convert = convert
        self.movers = [
            Mover(f"jkv-store-{shelf.name}", run, queue_entries, queue_bytes)
            for shelf, run in zip(
                self.shelves, [self._promote, *[self._arrive] * len(self.shelves)], strict=False
            )
        ]

    # Onto a shelf.

    def place(self, at: int, items: Sequence[tuple[Record, Entry]]) -> list[str]:
        """Write entries to a shelf: KEPT, REFUSED for want of room, or FAILED, each.

        A new record becomes that of its name as soon as it has a home, and the old one goes.
        """
        shelf = self.shelves[at]
        formed = [self._formed(entry, record, shelf) for record, entry in items]
        rooms = [
            self._make_room(at, record, max(entry.nbytes, 1))
            for (record, _), entry in zip(items, formed, strict=True)
        ]
        said = [REFUSED if room is None else KEPT for room in rooms]
        chosen = [i for i, room in enumerate(rooms) if room is not None]
        sizes = self._write(shelf, [(items[i][0].name, formed[i]) for i in chosen])
        with self.lock:
            for i, size in zip(chosen, sizes, strict=True):
                said[i] = self._settle(at, items[i][0], rooms[i] or (0, 0), size)
        for i, size in zip(chosen, sizes, strict=True):
            # With headers it may be more than was thought.
            if said[i] == KEPT and (size or 0) > formed[i].nbytes and not self.trim(at):
                record = items[i][0]
                with self.lock:
                    left = record.homes[at]
                    self.drop_home(record, at)
                    self.add_rubbish(at, record.name, left, record.version)
                    shelf.counts["refused"] += 1
                self.clean(at, record.name)
                said[i] = REFUSED
        return said

    def _formed(self, entry: Entry, record: Record, shelf: Shelf) -> Entry:
        """The entry in the shelf's form, with what the store knows of it."""
        exact = entry.meta.get("form", "exact") == "exact"
        if exact and shelf.form != "exact":
            try:
                entry = self._convert(entry, shelf.form)
            except (UnsupportedError, CorruptError):  # it stays as it is, and its meta says so
                with self.lock:
                    shelf.counts["unconverted"] += 1
        # What a device tier had is JAX's.
        arrays = {name: np.asarray(array) for name, array in entry.arrays.items()}
        lock = None
        if record.ephemeral:
            try:
                lock = shelf.tier.liveness_lock()
            except TierError:  # only its time to live will end it
                with self.lock:
                    shelf.counts["errors"] += 1
        return Entry(arrays, {**entry.meta, META: record.meta(lock)})

    def _write(self, shelf: Shelf, items: list[tuple[str, Entry]]) -> list[int | None]:
        """The bytes that each takes; None where it failed."""
        if len(items) > 1:
            try:
                said = shelf.tier.write_many(dict(items))
                found = [said[name] for name, _ in items]
                return [size if isinstance(size, int) else None for size in found]
            except (TierError, UnsupportedError):
                pass  # one after the other, to see which
        sizes: list[int | None] = []
        for name, entry in items:
            try:
                sizes.append(shelf.tier.write(name, entry))
            except (TierError, UnsupportedError):
                sizes.append(None)
        return sizes

    def _settle(self, at: int, record: Record, room: tuple[int, int], size: int | None) -> str:
        """What follows from a write for which there was room. Under the lock."""
        shelf = self.shelves[at]
        shelf.bytes -= room[0]
        shelf.entries -= room[1]
        if size is None:
            shelf.counts["errors"] += 1
            return FAILED
        old = self.index.get(record.name)
        if old is not record:
            if old is not None:
                record.created = old.created
                self.forget(old, "replaced", heir_at=at)
            self.install(record, "puts")
        elif at in record.homes:  # one of which it was only known that it is there
            self.drop_home(record, at)
        self.drop_rubbish(at, record.name)
        shelf.counts["writes"] += 1
        shelf.counts["bytes_written"] += size
        self.add_home(record, at, size)
        return KEPT

    # Room.

    def _make_room(self, at: int, record: Record, size: int) -> tuple[int, int] | None:
        """Reserve bytes and a place on a shelf; what has to go for it goes. None: it cannot."""
        shelf = self.shelves[at]
        with self.lock:
            if not shelf.takes(size):
                shelf.counts["rejected"] += 1
                return None
            if record.name not in shelf.evictor:
                shelf.evictor.expect(record.name)
        while True:
            with self.lock:
                # What this write will replace needs no room beside it.
                old = self.index.get(record.name)
                before = shelf.rubbish.get(record.name, None if old is None else old.homes.get(at))
                room = (size, 1) if before is None else (max(size - before, 0), 0)
                if shelf.fits(*room):
                    shelf.bytes += room[0]
                    shelf.entries += room[1]
                    return room
            if not self._free_one(at):
                with self.lock:
                    shelf.counts["refused"] += 1
                return None

    def trim(self, at: int) -> bool:
        """Entries go until a shelf is within its limits; False: something has to that cannot."""
        while True:
            with self.lock:
                if self.shelves[at].fits(0, 0):
                    return True
            if not self._free_one(at):
                return False

    def _free_one(self, at: int) -> bool:
        """Rubbish or an entry goes from a shelf; False: nothing can."""
        shelf = self.shelves[at]
        with self.lock:
            name = next((name for name in shelf.rubbish if not self.claimed(name)), None)
            victim = None
            if name is None:
                try:
                    name = str(shelf.evictor.victim())
                except LookupError:
                    return False
                victim = self.index[name]
                shelf.evictor.evicted(name)
                victim.leaving = at
            # Nobody has claimed it: what is claimed is held.
            self.claim([name])
        try:
            return self.clean(at, name) if victim is None else self._evict(at, victim)
        finally:
            self.unclaim([name])

    def make_quota(self, record: Record) -> bool:
        """Reserve bytes of its tenant, whose entries go for it; False: there cannot be room."""
        while True:
            with self.lock:
                tenant = self.tenant(record.tenant)
                if tenant.max_bytes is None:
                    return True
                old = self.index.get(record.name)
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
        """An entry of a tenant goes, from everywhere; False: none can."""
        with self.lock:
            evictor = self.tenant(tenant).evictor
            if evictor is None:
                return False
            try:
                name = str(evictor.victim())
            except LookupError:
                return False
            evictor.evicted(name)
            self.claim([name])
            self.forget(self.index[name], "evicted")
        self.clean_all(name)
        self.unclaim([name])
        return True

    # Down.

    def _evict(self, at: int, record: Record) -> bool:
        """A victim goes, to a shelf below if one takes it. False: it could not be deleted."""
        shelf = self.shelves[at]
        entry, answer = None, KEPT
        with self.lock:
            expired = self.expired(record)
            below = at + 1 in record.homes and at + 1 not in record.doubtful
        if at + 1 < len(self.shelves) and not below and not expired:
            entry = self.fetch(at, record)
            if at not in record.homes:
                return True  # it was corrupt, and is gone
            if entry is None:
                answer = FAILED
            elif shelf.persistent:  # what is safe here stays until it is safe below
                answer, entry = self.sink(record, entry, at + 1), None
        if not self._delete(at, record.name, record.version):
            with self.lock:
                record.leaving = None
                shelf.place(record, record.homes[at])
            return False
        with self.lock:
            self.drop_home(record, at, evicted=True)
            if entry is not None:
                record.moving, record.moving_from = entry, at
                shelf.counts["demotions"] += 1
                if self.movers[at + 1].offer(record, entry.nbytes):
                    return True
                # The queue is full: who needs the room waits for the shelf below.
                shelf.counts["demotions_by_caller"] += 1
            elif record.homes:
                shelf.counts["demotions"] += not below
            else:
                reason = "expired" if expired else "lost" if answer == FAILED else "evicted"
                self.forget(record, reason)
        if entry is not None:
            self._land(record)
        return True

    def sink(self, record: Record, entry: Entry, start: int) -> str:
        """Write it to the first shelf from `start` on that takes it."""
        failed = False
        for at in range(start, len(self.shelves)):
            if at in record.homes and at not in record.doubtful:
                return KEPT
            if self.newer_put(at, record) is not None:
                return REFUSED  # of another process: what would be written is what it replaced
            answer = self.place(at, [(record, entry)])[0]
            if answer == KEPT:
                return KEPT
            failed |= answer == FAILED
        return FAILED if failed else REFUSED

    def _arrive(self, record: Record) -> None:
        """A queue's job: what left the shelf above."""
        self.claim([record.name])
        try:
            self._land(record)
        finally:
            self.unclaim([record.name])

    def _land(self, record: Record) -> None:
        entry = record.moving
        if entry is None:
            return  # it was replaced or removed meanwhile
        answer = FAILED
        try:
            answer = self.sink(record, entry, record.moving_from + 1)
        finally:
            with self.lock:
                record.moving = None
                if not record.homes:
                    self.forget(record, "lost" if answer == FAILED else "evicted")

    # Up.

    def promote(self, record: Record, entry: Entry | None) -> bool:
        """Queue it for the first shelf; False: there is no room in the queue. Under the lock."""
        if record.promoting or 0 in record.homes:
            return True
        nbytes = record.nbytes if entry is None else entry.nbytes
        record.promoting = self.movers[0].offer((record, entry), nbytes)
        if not record.promoting:
            self.shelves[0].counts["promotions_dropped"] += 1
        return record.promoting

    def _promote(self, job: tuple[Record, Entry | None]) -> None:
        """The first queue's job."""
        record, entry = job
        self.claim([record.name])
        try:
            if not self.current(record) or not record.homes or self.expired(record):
                return
            top = min(record.homes)
            if entry is None and top > 0:
                entry = self.fetch(top, record)
            if entry is None:
                return
            for at in range(top):
                if self.newer_put(at, record) is not None:
                    return
                if self.place(at, [(record, entry)])[0] == KEPT:
                    with self.lock:
                        self.shelves[at].counts["promotions"] += 1
                    return
        finally:
            record.promoting = False
            self.unclaim([record.name])

    # Out.

    def read(self, at: int, name: str) -> Entry | None:
        """What a tier has of a name, None if nothing.

        Raises:
            CorruptError: it is damaged, or says of itself what no store has written.
            TierError: it cannot be read now.
        """
        entry = self.shelves[at].tier.read(name)
        if entry is not None:
            self.check(at, name, entry)
        return entry

    def check(self, at: int, name: str, entry: Entry) -> None:
        """Refuse an entry that says of itself what no store has written, and put it aside.

        Raises:
            CorruptError: it does.
        """
        try:
            check_entry(entry)
        except CorruptError:
            self.shelves[at].tier.put_aside(name, None)
            raise

    def fetch(self, at: int, record: Record) -> Entry | None:
        """Read what a shelf has, for a move. None: it cannot now, or is not there any more."""
        shelf = self.shelves[at]
        try:
            entry = self.read(at, record.name)
        except TierError:
            with self.lock:
                shelf.counts["errors"] += 1
            return None
        except CorruptError:
            entry = None
            with self.lock:
                shelf.counts["corrupt"] += 1
        with self.lock:
            if entry is None or not self.verify(record, at, entry):
                self.lose(record, at)
                return None
            shelf.counts["bytes_read"] += record.homes.get(at, 0)
        return entry

    def verify(self, record: Record, at: int, entry: Entry) -> bool:
        """Whether what was read is of this record; of one that was only listed, what it is."""
        put = check_entry(entry)
        if record.version is None and put is not None:
            self.learn(record, put)
        same = record.version == (None if put is None else put.version)
        if same:
            record.doubtful.discard(at)
        return same

    def version_at(self, at: int, name: str) -> str | None:
        """Which put a shelf has that other processes write to too.

        None where it has none, or cannot say it in an instant.
        """
        shelf = self.shelves[at]
        if not shelf.persistent:
            return None
        try:
            return shelf.tier.version_of(name)
        except TierError:  # who reads it will know, and count it
            return None

    def newer_put(self, at: int, record: Record) -> str | None:
        """The version of a put on a shelf that came after this record's, None where none did.

        What was there before it has been replaced by it, or is known to be of no use: anything
        else has come since. No clock is asked: those of two machines differ.
        """
        found = self.version_at(at, record.name)
        old = self.shelves[at].rubbish_versions.get(record.name)
        known = (None, record.version, old)
        return None if found in known or at in record.doubtful else found

    def discard_older(self, record: Record) -> None:
        """What other processes have put under its name until now is of no use any more."""
        for at in range(1, len(self.shelves)):
            old = self.version_at(at, record.name)
            if old in (None, record.version):
                continue
            with self.lock:
                known = self.index.get(record.name)
                if known is not None and known.version == old:
                    continue  # it goes when the new one has come
                if known is not None and at in known.homes:
                    self.forget(known, "replaced")
                self.add_rubbish(at, record.name, 0, old)  # how much is not known

    def of_no_use(self, at: int, name: str) -> bool:
        """Whether a shelf has of a name only what is to be deleted."""
        shelf = self.shelves[at]
        if name not in shelf.rubbish:
            return False
        version = shelf.rubbish_versions.get(name)
        return version is None or self.version_at(at, name) in (None, version)

    def clean(self, at: int, name: str) -> bool:
        """Delete what a shelf has of a name and nobody wants; False: it could not be."""
        shelf = self.shelves[at]
        if name not in shelf.rubbish:
            return True
        if not self._delete(at, name, shelf.rubbish_versions.get(name)):
            return False
        with self.lock:
            self.drop_rubbish(at, name)
        return True

    def clean_all(self, name: str) -> None:
        """The same for all shelves; what cannot be deleted now stays rubbish."""
        for at in range(len(self.shelves)):
            self.clean(at, name)

    def _delete(self, at: int, name: str, version: str | None = None) -> bool:
        """Delete one put of a name, or whatever is there; False: it could not be.

        What another process has put since stays, and is no longer this one's affair.
        """
        tier = self.shelves[at].tier
        try:
            if version is None:
                tier.delete(name)
            else:
                tier.delete_put(name, version)
        except TierError:
            with self.lock:
                self.shelves[at].counts["errors"] += 1
            return False
        return True
