"""How entries are read: from the first shelf that has them, or declined where that is slower."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jkv.errors import CorruptError, TierError
from jkv.store.answers import Ask, Handle, Match, Search, value_of
from jkv.store.checks import Limit, check_bytes, check_limit, check_text
from jkv.store.entry import Entry
from jkv.store.keys import as_tokens, name_of, split
from jkv.store.moves import Moves
from jkv.store.schema import META
from jkv.store.shelf import Record

_CANDIDATES = 8  # entries that a search tries to read, the longest prefix first


class Reads(Moves):
    """Readers claim nothing, but where an entry is looked for that only another process knows."""

    def __init__(
        self, *args: Any, timer: Callable[[], float], fingerprint: bytes, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.timer = timer
        self.fingerprint = fingerprint
        self.noted: Callable[[str], None] = lambda name: None  # who guesses what comes next
        self.reading = 0  # foreground reads now
        self.last_read = -1e9

    def take(self, asked: Sequence[Ask]) -> None:
        """Answer all: a look at what is known, a read per shelf, and again for what failed.

        What is found is held until `score` or `release`.
        """
        with self.lock:
            self.reading += 1
        try:
            with self.given_back(asked):
                self._take(asked)
        finally:
            with self.lock:
                self.reading -= 1
                self.last_read = self.timer()
        for ask in asked:
            if ask.why == "expired":
                self.drop([ask.name], "expired", self.expired)

    def _take(self, asked: Sequence[Ask]) -> None:
        todo = list(asked)
        while todo:
            reads: dict[int, list[Ask]] = {}
            unknown = []
            for ask in todo:
                self._look_elsewhere(ask)
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

    def _look_elsewhere(self, ask: Ask) -> None:
        """Let go of what another process has put anew, where a tier tells so in an instant.

        Without it a tier in memory would serve for ever what it has. What is found by its tokens
        is right whatever was put since.
        """
        with self.lock:
            record = self.index.get(ask.name)
            if record is None or record.version is None or ask.only is not None:
                return
            top = min(record.homes, default=-1)
        for at in range(len(self.shelves)):  # where it is read from is seen when it is read
            if at != top and self.newer_put(at, record) is not None:
                self.drop([ask.name], "replaced", lambda known: known is record, wait=False)
                return

    @contextlib.contextmanager
    def given_back(self, asked: Iterable[Ask]) -> Iterator[None]:
        """What these hold is let go of where an error ends what is done with them."""
        with contextlib.ExitStack() as failing:
            failing.callback(self._give_back, asked)
            yield
            failing.pop_all()

    def _give_back(self, asked: Iterable[Ask]) -> None:
        with self.lock:
            for ask in asked:
                if ask.record is not None:
                    self.release(ask.record)
                    ask.record = None

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
            ask.record = None

    def _hit(self, ask: Ask, record: Record, entry: Entry, at: int) -> None:
        """It was read, and is held."""
        if not self._unfit(ask, record):
            ask.entry = Entry(entry.arrays, {k: v for k, v in entry.meta.items() if k != META})
            ask.record, ask.at = record, at
            if at > 0:
                self.promote(record, entry)
        else:
            self.release(record)
            ask.record = None

    def unfit(self, ask: Ask) -> None:
        """What was found cannot be used here: it is lost, and this a miss."""
        record, ask.record, ask.entry, ask.why = ask.record, None, None, "error"
        if record is not None:
            with self.lock:
                self.release(record)
            self.reject(ask.name, lambda found: found is record)

    def reject(self, name: str, condition: Callable[[Record], bool]) -> bool:
        """An entry that is not what it says goes from here; whether there was one."""
        self.claim([name])
        try:
            with self.lock:
                record = self.index.get(name)
                if record is None or not condition(record):
                    return False
                lasting = [at for at in record.homes if self.shelves[at].persistent]
                self.shelves[min(record.homes, default=0)].counts["corrupt"] += 1
            for at in lasting:
                self.shelves[at].tier.put_aside(name, record.version)
            with self.lock:
                for at in lasting:
                    self.drop_home(record, at)
                self.forget(record, "lost")
            self.clean_all(name)
            return True
        finally:
            self.unclaim([name])

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
        if len(asks) > 1:
            try:
                said = shelf.tier.read_many(list(dict.fromkeys(ask.name for ask in asks)))
                found = [self._checked(at, ask.name, said[ask.name]) for ask in asks]
            except TierError as error:
                found = [error] * len(asks)
        else:
            for ask in asks:
                try:
                    found.append(self.read(at, ask.name))
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

    def _checked(self, at: int, name: str, found: Any) -> Any:
        """What a tier has read, or the error of an entry that says what no store has written."""
        try:
            if isinstance(found, Entry):
                self.check(at, name, found)
        except CorruptError as error:
            return error
        return found

    def _took(self, ask: Ask, at: int, found: Any) -> int:
        """What a shelf said when asked for an entry that is held; bytes. Under the lock."""
        record = ask.record
        if record is None:
            return 0
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
                self._overtaken(ask, record, at, found)
            else:
                self.lose(record, at)
        self.release(record)
        ask.record = None
        return nbytes

    def _overtaken(self, ask: Ask, record: Record, at: int, entry: Entry) -> None:
        """A shelf has another put of this name: of another process, since that one was written.

        The order of puts is that in which they reach the shelf; clocks differ between machines.
        One that was only listed may be older as well: it stays, and is not served, while there is
        another.
        """
        if at in record.doubtful and record.homes.keys() - record.doubtful:
            ask.tried.add(at)
            return
        self.forget(record, "replaced")
        self.drop_rubbish(at, record.name)
        self._adopt(record.name, at, entry)

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
                if not shelf.persistent or self.of_no_use(at, ask.name):
                    continue
                entry = None
                try:
                    entry = self.read(at, ask.name)
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

    # What users ask for.

    def asked(self, keys: Iterable[Any], tenant: Any, fingerprint: Any) -> list[Ask]:
        """Questions for keys."""
        fingerprint = (self.fingerprint or None) if fingerprint is None else fingerprint
        if fingerprint is not None:
            check_bytes("fingerprint", fingerprint)
        return [Ask(name_of(tenant, key), tenant, fingerprint) for key in keys]

    def scored(self, asked: Sequence[Ask], *, release: bool = True) -> None:
        """Count what came of them."""
        with self.lock:
            for ask in asked:
                self.score(ask, release=release)
        for ask in asked:
            self.noted(ask.name)

    def values(self, asked: Sequence[Ask]) -> list[Any]:
        """What was put, for each; None where there is none."""
        self.take(asked)
        values = []
        with self.given_back(asked):
            for ask in asked:
                value = None
                if ask.entry is not None and ask.record is not None:
                    try:
                        value = value_of(ask.entry, ask.record.packed)
                    except CorruptError:  # whole, but of another version of this library
                        self.unfit(ask)
                values.append(value)
        self.scored(asked)
        return values

    def matches(
        self,
        tokens: Sequence[Any],
        limits: Sequence[Limit],
        tenant: Any,
        fingerprint: Any,
        recompute_seconds: int | float | None,
    ) -> list[Match | None]:
        """For each the entry that shares the most first tokens; one that fails gives way."""
        check_text("tenant", tenant)
        limits = [check_limit("limit", limit) for limit in limits]
        searched = [
            Search(as_tokens(ids), limit, Ask("", tenant, why="absent"))
            for ids, limit in zip(tokens, limits, strict=True)
        ]
        fingerprint = self.fingerprint if fingerprint is None else fingerprint
        check_bytes("fingerprint", fingerprint)
        with self.lock:
            for one in searched:
                wanted = one.tokens[: one.limit]
                found = self.prefixes.find(fingerprint, tenant, wanted, _nearness)
                one.candidates = list(itertools.islice(found, _CANDIDATES))
        todo = [one for one in searched if one.candidates]
        with self.given_back(one.ask for one in searched):  # those of then
            while todo:
                for one in todo:
                    record, one.length = one.candidates.pop(0)
                    one.ask = Ask(record.name, tenant, fingerprint, only=record)
                    one.ask.share = one.length / len(record.tokens)
                    if recompute_seconds is not None:
                        one.ask.seconds = recompute_seconds * one.length / len(one.tokens)
                self.take([one.ask for one in todo])
                todo = [one for one in todo if one.ask.entry is None and one.candidates]
        matches: list[Match | None] = []
        with self.lock:
            for one in searched:
                self.score(one.ask, release=False)
                self.count(tenant, "tokens_asked", len(one.tokens))
                record, entry = one.ask.record, one.ask.entry
                if record is None or entry is None:
                    matches.append(None)
                    continue
                self.count(tenant, "tokens_found", one.length)
                matches.append(Match(Handle(record, entry, self.released), one.length))
        for one in searched:
            if one.ask.entry is not None:
                self.noted(one.ask.name)
        return matches

    # Away.

    def drop(
        self,
        names: Sequence[str],
        reason: str,
        condition: Callable[[Record], bool],
        *,
        wait: bool = True,
        any_put: bool = False,
    ) -> int:
        """Entries go from everywhere, those for which the condition holds then.

        What another process has put under their names since stays, but with `any_put`.
        """
        dropped = 0
        for name in names:
            if not self.claim([name], wait=wait):
                continue
            try:
                with self.lock:
                    record = self.index.get(name)
                    if record is None or not condition(record):
                        continue
                    self.forget(record, reason, any_put=any_put)
                    dropped += 1
                self.clean_all(name)
            finally:
                self.unclaim([name])
        return dropped

    def delete_unknown(self, name: str) -> bool:
        """Delete what tiers may have of a name that the store does not know.

        Whether a reader has come to know it meanwhile: then it goes as what is known.
        """
        self.claim([name])
        try:
            with self.lock:
                record = self.index.get(name)
                if record is not None:
                    self.forget(record, "removed", any_put=True)
            for at, shelf in enumerate(self.shelves):
                if name in shelf.rubbish:
                    self.clean(at, name)
                elif shelf.persistent and not self._delete(at, name):
                    with self.lock:
                        self.add_rubbish(at, name, 0)  # how much is not known
            return record is not None
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
            if names:
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


def _nearness(record: Record) -> tuple[int, int]:
    """Of entries with as long a prefix, the one in the fastest tier, then the smallest."""
    return (0 if record.moving is not None else min(record.homes, default=99)), record.nbytes
