"""How entries are read: from the first tier that has them, or declined where that is slower."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from numpy.typing import ArrayLike

from jkv._checks import check_text
from jkv.errors import CorruptError, TierError
from jkv.store.checks import Fingerprint, Key, Limit, check_bytes, check_limit
from jkv.store.entry import Entry
from jkv.store.handles import Handle, Lookup, Match, PrefixQuery, value_of
from jkv.store.index import Index
from jkv.store.keys import as_tokens, entry_name, split_name
from jkv.store.removal import Removal
from jkv.store.schema import META
from jkv.store.state import Record, TierState
from jkv.store.tiering import Tiering

_CANDIDATES = 8  # entries that a query tries to read, the longest prefix first

ReadResult = Entry | CorruptError | TierError | None  # of a read


class Reader:
    """Lookups, by key and by prefix.

    Readers claim nothing, but where an entry is looked for that only another process knows.

    Args:
        index: what is where.
        tiering: promotes what was read further down.
        removal: takes out what is expired, overtaken or not what it says.
        timer: seconds, for durations.
        fingerprint: by default, of what made the entries.

    Attributes:
        accessed: called with the name of each entry that was asked for.
        reading: lookups that users wait for now.
        last_read: when the last of them ended, by the timer.
    """

    def __init__(
        self,
        index: Index,
        tiering: Tiering,
        removal: Removal,
        *,
        timer: Callable[[], float],
        fingerprint: bytes,
    ) -> None:
        self._index = index
        self._tiering = tiering
        self._removal = removal
        self.timer = timer
        self.fingerprint = fingerprint
        self.accessed: Callable[[str], None] = lambda name: None
        self.reading = 0
        self.last_read = -1e9

    # What users ask for.

    def lookups(self, keys: Iterable[Key], tenant: Key, fingerprint: Fingerprint) -> list[Lookup]:
        """Return lookups of keys."""
        fingerprint = (self.fingerprint or None) if fingerprint is None else fingerprint
        if fingerprint is not None:
            check_bytes("fingerprint", fingerprint)
        return [Lookup(entry_name(tenant, key), tenant, fingerprint) for key in keys]

    def scored(self, lookups: Sequence[Lookup], *, release: bool = True) -> None:
        """Count the outcomes."""
        with self._index.lock:
            for lookup in lookups:
                self._score(lookup, release=release)
        for lookup in lookups:
            self.accessed(lookup.name)

    def handles(self, lookups: Sequence[Lookup]) -> list[Handle | None]:
        """Return the entries, held; None where there is none."""
        self.take(lookups)
        self.scored(lookups, release=False)
        return [
            None
            if lookup.record is None or lookup.entry is None
            else Handle(lookup.record, lookup.entry, self._index.released)
            for lookup in lookups
        ]

    def values(self, lookups: Sequence[Lookup]) -> list[Any]:
        """Return what was put, for each; None where there is none."""
        self.take(lookups)
        values = []
        with self._released_on_error(lookups):
            for lookup in lookups:
                value = None
                if lookup.entry is not None and lookup.record is not None:
                    try:
                        value = value_of(lookup.entry, lookup.record.packed)
                    except CorruptError:  # whole, but of another version of this library
                        self._unusable(lookup)
                values.append(value)
        self.scored(lookups)
        return values

    def matches(
        self,
        tokens: Sequence[ArrayLike],
        limits: Sequence[Limit],
        tenant: Key,
        fingerprint: Fingerprint,
        recompute_seconds: int | float | None,
    ) -> list[Match | None]:
        """Find for each the entry that shares the most first tokens; the next where one fails."""
        index = self._index
        check_text("tenant", tenant)
        limits = [check_limit("limit", limit) for limit in limits]
        queries = [
            PrefixQuery(as_tokens(ids), limit, Lookup("", tenant, reason="absent"))
            for ids, limit in zip(tokens, limits, strict=True)
        ]
        fingerprint = self.fingerprint if fingerprint is None else fingerprint
        check_bytes("fingerprint", fingerprint)
        with index.lock:
            for query in queries:
                wanted = query.tokens[: query.limit]
                found = index.prefixes.find(fingerprint, tenant, wanted, _nearness)
                query.candidates = list(itertools.islice(found, _CANDIDATES))
        todo = [query for query in queries if query.candidates]
        with self._released_on_error(query.lookup for query in queries):  # those of then
            while todo:
                for query in todo:
                    record, query.length = query.candidates.pop(0)
                    query.lookup = Lookup(record.name, tenant, fingerprint, only=record)
                    if record.tokens is not None:  # or it would not be a candidate
                        query.lookup.share = query.length / len(record.tokens)
                    if recompute_seconds is not None:
                        share = query.length / len(query.tokens)
                        query.lookup.seconds = recompute_seconds * share
                self.take([query.lookup for query in todo])
                todo = [query for query in todo if query.lookup.entry is None and query.candidates]
        matches: list[Match | None] = []
        with index.lock:
            for query in queries:
                self._score(query.lookup, release=False)
                index.count(tenant, "tokens_asked", len(query.tokens))
                record, entry = query.lookup.record, query.lookup.entry
                if record is None or entry is None:
                    matches.append(None)
                    continue
                index.count(tenant, "tokens_found", query.length)
                matches.append(Match(Handle(record, entry, index.released), query.length))
        for query in queries:
            if query.lookup.entry is not None:
                self.accessed(query.lookup.name)
        return matches

    def has(self, lookup: Lookup) -> bool:
        """Tell whether it would be found; that is no access.

        Of an entry that is only listed so far the header is read: to read all of it would count
        as what its tier can do, and the `get` that follows might be declined for it.
        """
        index = self._index
        with index.lock:
            record = index.records.get(lookup.name)
        if record is not None and record.version is None:
            self._tiering.describe(record)
        with index.lock:
            record = index.records.get(lookup.name)
            if record is not None and record.version is not None:
                same = lookup.fingerprint is None or lookup.fingerprint == record.fingerprint
                return same and not index.is_expired(record)
        self.take([lookup])
        with index.lock:
            if lookup.entry is not None and lookup.record is not None:
                index.release(lookup.record)
        return lookup.entry is not None

    # Lookups.

    def take(self, lookups: Sequence[Lookup]) -> None:
        """Answer all: a look at what is known, a read per tier, and again for what failed.

        What is found is held until it is scored or released.
        """
        index = self._index
        with index.lock:
            self.reading += 1
        try:
            with self._released_on_error(lookups):
                self._take(lookups)
        finally:
            with index.lock:
                self.reading -= 1
                self.last_read = self.timer()
        for lookup in lookups:
            if lookup.reason == "expired":
                self._removal.drop([lookup.name], "expired", index.is_expired)

    def _take(self, lookups: Sequence[Lookup]) -> None:
        index = self._index
        todo = list(lookups)
        while todo:
            reads: dict[int, list[Lookup]] = {}
            unknown = []
            for lookup in todo:
                self._drop_overtaken(lookup)
            with index.lock:
                for lookup in todo:
                    at = self._locate(lookup)
                    if at is not None and index.tiers[at].immediate:
                        self._took(lookup, at, index.tiers[at].tier.read(lookup.name))
                    elif at is not None:
                        reads.setdefault(at, []).append(lookup)
                    elif lookup.is_open:
                        unknown.append(lookup)
            for lookup in unknown:
                self._discover(lookup)
            for at, group in reads.items():
                self._read(at, group)
            todo = [lookup for lookup in todo if lookup.is_open]
            for lookup in todo:
                if lookup.wait:
                    index.wait_unclaimed(lookup.name)
                    lookup.wait = False

    def _drop_overtaken(self, lookup: Lookup) -> None:
        """Let go of what another process has put anew, where a tier tells so in an instant.

        Without it a tier in memory would serve for ever what it has. What is found by its tokens
        is right whatever was put since.
        """
        index = self._index
        with index.lock:
            record = index.records.get(lookup.name)
            if record is None or record.version is None or lookup.only is not None:
                return
            top = min(record.locations, default=-1)
        for at, state in enumerate(index.tiers):  # where it is read from is seen when it is read
            if at != top and state.newer_put(record) is not None:
                self._removal.drop(
                    [lookup.name], "replaced", lambda known: known is record, wait=False
                )
                return

    @contextlib.contextmanager
    def _released_on_error(self, lookups: Iterable[Lookup]) -> Iterator[None]:
        """Release what these hold where an error ends what is done with them."""
        with contextlib.ExitStack() as failing:
            failing.callback(self._release, lookups)
            yield
            failing.pop_all()

    def _release(self, lookups: Iterable[Lookup]) -> None:
        with self._index.lock:
            for lookup in lookups:
                if lookup.record is not None:
                    self._index.release(lookup.record)
                    lookup.record = None

    def _locate(self, lookup: Lookup) -> int | None:
        """Find the tier to read from; None: it is answered, or is not known here."""
        index = self._index
        record = index.records.get(lookup.name)
        if record is None or (lookup.only is not None and record is not lookup.only):
            looked = lookup.looked or not any(state.persistent for state in index.tiers)
            if lookup.only is not None or looked:
                lookup.reason = "error" if lookup.tried else "absent"
            return None
        if self._is_unfit(lookup, record):
            return None
        if record.moving is not None:
            index.hold(record)
            self._hit(lookup, record, record.moving, record.moving_from)
            return None
        at = min((at for at in record.locations if at not in lookup.tried), default=None)
        if at is None:
            lookup.reason = "error"
            return None
        rate = index.tiers[at].rate(self.timer())
        seconds = lookup.seconds
        if seconds is None and record.seconds is not None:
            seconds = record.seconds * lookup.share
        if rate is not None and seconds is not None and record.locations[at] > rate * seconds:
            lookup.reason = "declined"
            return None
        index.hold(record)
        lookup.record = record
        return at

    def _is_unfit(self, lookup: Lookup, record: Record) -> bool:
        """Tell whether it is a miss although it is there."""
        if self._index.is_expired(record):
            lookup.reason = "expired"
        elif record.version is not None and lookup.fingerprint not in (None, record.fingerprint):
            lookup.reason = "foreign"
        return bool(lookup.reason)

    def _hit(self, lookup: Lookup, record: Record, entry: Entry, at: int) -> None:
        """Answer with an entry that was read, and is held."""
        if not self._is_unfit(lookup, record):
            meta = {name: value for name, value in entry.meta.items() if name != META}
            lookup.entry = Entry(entry.arrays, meta)
            lookup.record, lookup.at = record, at
            if at > 0:
                self._tiering.promote(record, entry)
        else:
            self._index.release(record)
            lookup.record = None

    def _unusable(self, lookup: Lookup) -> None:
        """Lose an entry that cannot be used here: the lookup is a miss."""
        record, lookup.record, lookup.entry, lookup.reason = lookup.record, None, None, "error"
        if record is not None:
            with self._index.lock:
                self._index.release(record)
            self._removal.reject(lookup.name, lambda found: found is record)

    def _score(self, lookup: Lookup, *, release: bool) -> None:
        """Count the outcome as an access. Under the lock."""
        index, record = self._index, lookup.record
        if record is None or lookup.entry is None:
            index.count(lookup.tenant, "misses")
            index.count(lookup.tenant, f"misses_{lookup.reason}")
            return
        record.hits += 1
        record.accessed = index.clock()
        for evictor in index.evictors(record):
            evictor.touch(record.name)
        index.count(record.tenant, "hits")
        if record.seconds is not None:
            index.count(record.tenant, "seconds_saved", record.seconds * lookup.share)
        index.tiers[lookup.at].counts["hits"] += 1
        if release:
            index.release(record)
            lookup.record = None

    # Reads.

    def _read(self, at: int, lookups: list[Lookup]) -> None:
        """Read from a tier once, and note the outcomes."""
        index = self._index
        state = index.tiers[at]
        begun = self.timer()
        found: list[ReadResult] = []
        if len(lookups) > 1:
            try:
                read = state.tier.read_many(list(dict.fromkeys(x.name for x in lookups)))
                found = [self._checked(state, x.name, read[x.name]) for x in lookups]
            except TierError as error:
                found = [error] * len(lookups)
        else:
            for lookup in lookups:
                try:
                    found.append(state.read(lookup.name))
                except (TierError, CorruptError) as error:
                    found.append(error)
        seconds = self.timer() - begun
        with index.lock:
            nbytes = 0
            for lookup, outcome in zip(lookups, found, strict=True):
                nbytes += self._took(lookup, at, outcome)
            if nbytes:
                state.measured(nbytes, seconds, self.timer())
                index.counts["seconds_reading"] += seconds  # pyright: ignore[reportArgumentType]
            full = not state.fits(0, 0)
        if full:  # another process's put was longer than what was known
            self._tiering.trim(at)

    def _checked(self, state: TierState, name: str, found: ReadResult) -> ReadResult:
        """Return what was read, or the error of an entry that no store has written so."""
        try:
            if isinstance(found, Entry):
                state.check(name, found)
        except CorruptError as error:
            return error
        return found

    def _took(self, lookup: Lookup, at: int, found: ReadResult) -> int:
        """Note what a tier gave for an entry that is held; bytes. Under the lock."""
        index, record = self._index, lookup.record
        if record is None:
            return 0
        state = index.tiers[at]
        nbytes = 0
        if isinstance(found, Entry):
            nbytes = record.locations.get(at) or found.nbytes
            state.counts["bytes_read"] += nbytes
            if index.is_current(record) and index.verify(record, at, found):
                self._hit(lookup, record, found, at)
                return nbytes
        if isinstance(found, TierError):
            state.counts["errors"] += 1
            lookup.tried.add(at)
        elif isinstance(found, CorruptError):
            state.counts["corrupt"] += 1
            lookup.tried.add(at)
        if not isinstance(found, TierError):
            if index.is_claimed(lookup.name) or not index.is_current(record):
                lookup.wait = True
            elif isinstance(found, Entry):
                self._overtaken(lookup, record, at, found)
            else:
                index.lose(record, at)
        index.release(record)
        lookup.record = None
        return nbytes

    def _overtaken(self, lookup: Lookup, record: Record, at: int, entry: Entry) -> None:
        """Take over another put of this name: of another process, since that one was written.

        The order of puts is that in which they reach the tier; clocks differ between machines.
        One that was only listed may be older as well: it stays, and is not served, while there is
        another.
        """
        if at in record.unverified and record.locations.keys() - record.unverified:
            lookup.tried.add(at)
            return
        self._index.forget(record, "replaced")
        self._index.drop_orphan(at, record.name)
        self._adopt(record.name, at, entry)

    def _adopt(self, name: str, at: int, entry: Entry) -> Record:
        """Index an entry that another process put, or one before. Under the lock."""
        index = self._index
        tenant, key = split_name(name)
        record = Record(name, tenant, key, entry.nbytes)
        index.verify(record, at, entry)
        index.install(record, "found")
        index.tiers[at].counts["found"] += 1
        index.add_location(record, at, max(entry.nbytes, 1))
        return record

    def _discover(self, lookup: Lookup) -> None:
        """Look where other processes write."""
        index = self._index
        lookup.looked = True
        index.claim([lookup.name])
        try:
            if lookup.name in index.records:
                return
            for at, state in enumerate(index.tiers):
                if not state.persistent or state.only_orphan(lookup.name):
                    continue
                entry = None
                try:
                    entry = state.read(lookup.name)
                except (TierError, CorruptError) as error:
                    with index.lock:
                        state.counts["errors" if isinstance(error, TierError) else "corrupt"] += 1
                        lookup.tried.add(at)
                if entry is not None:
                    with index.lock:
                        record = self._adopt(lookup.name, at, entry)
                        index.hold(record)
                        self._hit(lookup, record, entry, at)
                    self._tiering.trim(at)
                    return
        finally:
            index.unclaim([lookup.name])


def _nearness(record: Record) -> tuple[int, int]:
    """Rank entries with as long a prefix: the fastest tier first, then the smallest."""
    fastest = 0 if record.moving is not None else min(record.locations, default=99)
    return fastest, record.nbytes
