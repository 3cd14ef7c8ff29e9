"""How entries are read: from the first shelf that has them, or declined where that is slower."""

from __future__ import annotations

import dataclasses
import importlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from jkv.errors import CorruptError, TierError
from jkv.store.entry import Entry
from jkv.store.keys import split
from jkv.store.moves import META, Moves, store_meta
from jkv.store.shelf import Record


class Handle:
    """An entry that is being read: it stays where it is until `release`, or the end of `with`.

    Attributes:
        key: that of the put.
        entry: arrays and meta as they were put, in the form that the tier holds.
        tokens: that the put came with, int32 [T]; None if it had none.
    """

    def __init__(self, record: Record, entry: Entry, released: deque[Record]) -> None:
        self.key = record.key
        self.entry = entry
        self.tokens = record.tokens
        self._packed = record.packed
        self._held = [record]
        self._released = released

    @property
    def value(self) -> Any:
        """What was put: a cache for a cache.

        Raises:
            CorruptError: a cache of another version of this library.
        """
        return value_of(self.entry, self._packed)

    def release(self) -> None:
        """Let go of it; once is enough, and more does nothing."""
        # No lock: this may run wherever an object is collected, the lock's owner included.
        while self._held:
            try:
                self._released.append(self._held.pop())
            except IndexError:
                return

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class Match:
    """A prefix that was found; its entry is held until `release`, or the end of `with`.

    Attributes:
        key: that of the entry; length: how many first tokens it shares; entry: the whole of it.
    """

    def __init__(self, handle: Handle, length: int) -> None:
        self.handle = handle
        self.key = handle.key
        self.length = length
        self.entry = handle.entry

    @property
    def value(self) -> Any:
        """What was put: a cache for a cache.

        Raises:
            CorruptError: a cache of another version of this library.
        """
        return self.handle.value

    def release(self) -> None:
        """Let go of it."""
        self.handle.release()

    def __enter__(self) -> Match:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def value_of(entry: Entry, packed: bool) -> Any:
    """What was put, of what is stored."""
    return importlib.import_module("jkv.store.pack").unpack(entry) if packed else entry


@dataclasses.dataclass(slots=True, eq=False)
class Ask:
    """One entry that somebody wants, and what came of it: an entry, or why not.

    Attributes:
        only: this record, and no other of its name.
        seconds: to make it instead; by default `share` of what the record says.
    """

    name: str
    tenant: str
    fingerprint: bytes | None = None
    seconds: int | float | None = None
    only: Record | None = None
    share: float = 1.0
    record: Record | None = None
    entry: Entry | None = None
    why: str = ""
    tried: set[int] = dataclasses.field(default_factory=set)
    looked: bool = False  # where other processes write
    wait: bool = False  # for who is moving it
    at: int = 0  # the shelf that had it


class Reads(Moves):
    """Readers claim nothing, but where an entry is looked for that only another process knows."""

    def __init__(self, *args: Any, timer: Callable[[], float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timer = timer
        self.reading = 0  # foreground reads now
        self.last_read = -1e9

    def take(self, asked: Sequence[Ask]) -> None:
        """Answer all: a look at what is known, a read per shelf, and again for what failed.

        What is found is held until `score` or `release`.
        """
        with self.lock:
            self.reading += 1
        try:
            todo = list(asked)
            while todo:
                reads: dict[int, list[Ask]] = {}
                unknown = []
                with self.lock:
                    for ask in todo:
                        at = self._look(ask)
                        if at is not None and self.shelves[at].immediate:
                            self._took(ask, at, self.shelves[at].tier.read(ask.name))
                        elif at is not None:
                            reads.setdefault(at, []).append(ask)
                        elif ask.entry is None and not ask.why:
                            unknown.append(ask)
                for ask in unknown:
                    self._discover(ask)
                for at, asks in reads.items():
                    self._read(at, asks)
                todo = [ask for ask in todo if ask.entry is None and not ask.why]
                for ask in todo:
                    if ask.wait:
                        self.wait_unclaimed(ask.name)
                        ask.wait = False
        finally:
            with self.lock:
                self.reading -= 1
                self.last_read = self.timer()
        for ask in asked:
            if ask.why == "expired":
                self.drop([ask.name], "expired", self.expired)

    def _look(self, ask: Ask) -> int | None:
        """The shelf to read it from; None: it is answered, or nobody here knows it."""
        record = self.index.get(ask.name)
        if record is None or (ask.only is not None and record is not ask.only):
            if ask.only is not None or ask.looked or not any(s.persistent for s in self.shelves):
                self._no(ask, "error" if ask.tried else "absent")
            return None
        if self._unfit(ask, record):
            return None
        if record.moving is not None:
            self.hold(record)
            self._hit(ask, record, record.moving, record.moving_from)
            return None
        at = min((at for at in record.homes if at not in ask.tried), default=None)
        if at is None:
            self._no(ask, "error")
            return None
        rate = self.shelves[at].rate(self.timer())
        seconds = ask.seconds
        if seconds is None and record.seconds is not None:
            seconds = record.seconds * ask.share
        if rate is not None and seconds is not None and record.homes[at] > rate * seconds:
            self._no(ask, "declined")
            return None
        self.hold(record)
        ask.record = record
        return at

    def _unfit(self, ask: Ask, record: Record) -> bool:
        """Whether it is a miss although it is there."""
        if self.expired(record):
            self._no(ask, "expired")
        elif record.version is not None and ask.fingerprint not in (None, record.fingerprint):
            self._no(ask, "foreign")
        return bool(ask.why)

    def _no(self, ask: Ask, why: str) -> None:
        ask.why = why

    def score(self, ask: Ask, *, release: bool = True) -> None:
        """Count what came of it as an access. Under the lock."""
        if ask.record is None or ask.entry is None:
            self.count(ask.tenant, "misses")
            self.count(ask.tenant, f"misses_{ask.why}")
            return
        self._used(ask.record, ask.at, ask.share)
        if release:
            self.release(ask.record)

    def _hit(self, ask: Ask, record: Record, entry: Entry, at: int) -> None:
        """It was read, and is held."""
        if not self._unfit(ask, record):
            ask.entry = Entry(entry.arrays, {k: v for k, v in entry.meta.items() if k != META})
            ask.record, ask.at = record, at
            if at > 0:
                self.promote(record, entry)
        else:
            self.release(record)

    def unfit(self, ask: Ask) -> None:
        """What was found cannot be used by anybody: it is lost, and this a miss."""
        record, ask.entry, ask.why = ask.record, None, "error"
        if record is not None:
            with self.lock:
                self.shelves[ask.at].counts["corrupt"] += 1
                self.release(record)
            self.drop([ask.name], "lost", lambda found: found is record)

    def _used(self, record: Record, at: int, share: float) -> None:
        """It served somebody, from a shelf."""
        record.hits += 1
        record.accessed = self.clock()
        for evictor in self._evictors(record):
            evictor.touch(record.name)
        self.count(record.tenant, "hits")
        if record.seconds is not None:
            self.count(record.tenant, "seconds_saved", record.seconds * share)
        self.shelves[at].counts["hits"] += 1

    def _read(self, at: int, asks: list[Ask]) -> None:
        """One read from a shelf, and what comes of it."""
        shelf = self.shelves[at]
        begun = self.timer()
        found: list[Any] = []
        many = getattr(shelf.tier, "read_many", None)
        if many is not None and len(asks) > 1:
            try:
                said = many(list(dict.fromkeys(ask.name for ask in asks)))
                found = [said[ask.name] for ask in asks]
            except TierError as error:
                found = [error] * len(asks)
        else:
            for ask in asks:
                try:
                    found.append(shelf.tier.read(ask.name))
                except (TierError, CorruptError) as error:
                    found.append(error)
        seconds = self.timer() - begun
        with self.lock:
            nbytes = 0
            for ask, what in zip(asks, found, strict=True):
                nbytes += self._took(ask, at, what)
            if nbytes:
                shelf.measured(nbytes, seconds, self.timer())
                self.counts["seconds_reading"] += seconds  # pyright: ignore[reportArgumentType]
            full = not shelf.fits(0, 0)
        if full:  # another process's put was longer than what was known
            self.trim(at)

    def _took(self, ask: Ask, at: int, found: Any) -> int:
        """What a shelf said when asked for an entry that is held; bytes. Under the lock."""
        record = ask.record
        if record is None:
            return 0
        ask.record = None
        shelf = self.shelves[at]
        nbytes = 0
        if isinstance(found, Entry):
            nbytes = record.homes.get(at) or found.nbytes
            shelf.counts["bytes_read"] += nbytes
            if self.current(record) and self.verify(record, at, found):
                self._hit(ask, record, found, at)
                return nbytes
        if isinstance(found, TierError):
            shelf.counts["errors"] += 1
            ask.tried.add(at)
        elif isinstance(found, CorruptError):
            shelf.counts["corrupt"] += 1
            ask.tried.add(at)
        if not isinstance(found, TierError):
            if self.claimed(ask.name) or not self.current(record):
                ask.wait = True
            elif isinstance(found, Entry):
                self._overtaken(record, at, found)
            else:
                self.lose(record, at)
        self.release(record)
        return nbytes

    def _overtaken(self, record: Record, at: int, entry: Entry) -> None:
        """A shelf has another put of this name, of another process or from before."""
        meta = store_meta(entry)
        if meta is not None and meta["updated"] > record.updated:
            self.forget(record, "replaced")
            self.drop_rubbish(at, record.name)
            self._adopt(record.name, at, entry)
            return
        size = record.homes.get(at)
        self.lose(record, at)
        if size is not None:
            self.add_rubbish(at, record.name, size)

    def _adopt(self, name: str, at: int, entry: Entry) -> Record:
        """An entry that somebody else put, or this machine before. Under the lock."""
        tenant, key = split(name)
        record = Record(name, tenant, key, entry.nbytes)
        self.verify(record, at, entry)
        self.install(record, "found")
        self.shelves[at].counts["found"] += 1
        self.add_home(record, at, max(entry.nbytes, 1))
        return record

    def _discover(self, ask: Ask) -> None:
        """Look where other processes write."""
        ask.looked = True
        self.claim([ask.name])
        try:
            if ask.name in self.index:
                return
            for at, shelf in enumerate(self.shelves):
                if not shelf.persistent or ask.name in shelf.rubbish:
                    continue
                entry = None
                try:
                    entry = shelf.tier.read(ask.name)
                except TierError:
                    with self.lock:
                        shelf.counts["errors"] += 1
                        ask.tried.add(at)
                except CorruptError:
                    with self.lock:
                        shelf.counts["corrupt"] += 1
                        ask.tried.add(at)
                if entry is not None:
                    with self.lock:
                        record = self._adopt(ask.name, at, entry)
                        self.hold(record)
                        self._hit(ask, record, entry, at)
                    self.trim(at)
                    return
        finally:
            self.unclaim([ask.name])

    def drop(
        self, names: Sequence[str], reason: str, condition: Callable[[Record], bool], **claim: Any
    ) -> int:
        """Entries go from everywhere, those for which the condition holds then."""
        dropped = 0
        for name in names:
            if not self.claim([name], **claim):
                continue
            try:
                with self.lock:
                    record = self.index.get(name)
                    if record is None or not condition(record):
                        continue
                    self.forget(record, reason)
                    dropped += 1
                self.clean_all(name)
            finally:
                self.unclaim([name])
        return dropped

    def delete_unknown(self, name: str) -> None:
        """Delete what tiers may have of a name that the store does not know."""
        self.claim([name])
        try:
            if name in self.index:
                return
            for at, shelf in enumerate(self.shelves):
                if name in shelf.rubbish:
                    self.clean(at, name)
                elif shelf.persistent and not self._delete(at, name):
                    with self.lock:
                        self.add_rubbish(at, name, 0)  # how much is not known
        finally:
            self.unclaim([name])

    def purge(self, names: Sequence[str]) -> None:
        """Wait until what was dropped is gone for good.

        Raises:
            TierError: something is left, or may come back.
        """
        problems = []
        for shelf in self.shelves:
            if left := sum(name in shelf.rubbish for name in names):
                problems.append(f"{left} could not be deleted from {shelf.name}")
            if names and hasattr(shelf.tier, "purge"):
                try:
                    shelf.tier.purge(names)
                except TierError as error:
                    with self.lock:
                        shelf.counts["errors"] += 1
                    problems.append(str(error))
        if problems:
            raise TierError(
                f"removed, and not served any more; but {', '.join(problems)}; it is tried "
                "again now and then, and by another remove or clear"
            )
