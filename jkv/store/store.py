"""The store as users see it: entries by key and by content, over tiers, with figures of it all.

How it is done stands in layers, which `jkv.store.ledger` names.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from jkv._text import brief
from jkv.store import figures
from jkv.store.answers import Handle, Match
from jkv.store.checks import (
    Checked,
    Key,
    Limit,
    Seconds,
    check_bytes,
    check_count,
    check_flag,
    check_limit,
    check_seconds,
    check_text,
)
from jkv.store.entry import Entry
from jkv.store.keys import as_tokens, content_key, name_of
from jkv.store.policy import LRU, Policy
from jkv.store.prefetch import Predictor, Prefetcher
from jkv.store.shelf import Shelf
from jkv.store.tier import Tier
from jkv.store.upkeep import UNSET, Upkeep

P = ParamSpec("P")
R = TypeVar("R")
_INDEX_WAIT = 1.0  # seconds from the start that searches wait for entries from before


def operation(
    method: Callable[Concatenate[Store, P], R],
) -> Callable[Concatenate[Store, P], R]:
    """What users ask for: refused once the store is closed, and waited for when it is to be."""

    @functools.wraps(method)
    def wrapped(self: Store, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self._inner.begin(method.__name__)
        try:
            return method(self, *args, **kwargs)
        finally:
            self._inner.end()

    return wrapped


class Store:
    """Sequences' caches that outlive a request, over tiers from the fastest to the slowest.

    An entry is put into the first tier that takes it. What a tier has no room for moves to the one
    below, and out of the last one it is evicted; what is read further down is copied to the first.
    Threads do both, from queues that are bounded: where the one down is full, the caller moves the
    entry itself; where the one up is full, the entry stays where it is, counted. `close` finishes
    what was begun and writes what only a tier in this process has to one that lasts; without it,
    and without `write_through`, such entries end with the process.

    An entry is whole and immutable: a put under the same key replaces it for later readers, whether
    there was room for the new one or not. `get` by key answers with the latest put;
    `longest_prefix` finds, among entries put with their tokens, one that begins like those given.

    Several processes may share a tier that lasts: a key that one does not know is looked for there,
    and each keeps to the limits for what it knows. Of several puts of a key the one that reached
    the shared tier last stands, whatever their clocks say, and no process deletes or overwrites,
    to make room, what another has put since. On a `Disk` a read by key notices that another process
    has put the key anew; above a `Remote`, a tier in memory goes on with what it has until that has
    gone from it, and so does `longest_prefix` anywhere. What another process has removed may be
    served from this one's memory: give such entries a `ttl`.

    Counters balance at any time: accesses = hits + misses, and puts + found = entries + replaced +
    removed + expired + evicted + rejected + lost, where `found` are entries of another process, or
    from before. Of a tier: writes + found = entries + evictions + gone.

    Args:
        tiers: from the fastest to the slowest, each with its own limits.
        policy: which entry goes first, in every tier and for every tenant; `LRU()` by default.
        fingerprint: of what made the entries: weights, configuration, rope, dtype, kind and layout
            of the cache. An entry of another one is a miss. Empty: it is not looked at.
        ttl: seconds until an entry is of no use; None: never.
        tenant_bytes: what each tenant may have, or by tenant; entries count once, as they were put.
        write_through: a put is written to all tiers before it returns.
        forms: "int8" or "int4" by name of tier: what it holds is converted where that takes fewer
            bytes, and its meta says so.
        convert: does it, of an entry and a form; by default for caches, other entries stay.
        chunk: tokens between two marks; a shorter prefix is not found. A mark takes about 450 bytes
            of this process, a token 4 more.
        queue_entries, queue_bytes: what may wait for each tier.
        sweep_every: seconds between two sweeps by a thread.
        predictor: what to copy up before it is asked for, while nobody reads.
        clock: seconds since the epoch; timer: seconds, for durations.

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of range.

    Example:
        >>> store = jkv.store.Store([jkv.store.Memory(2**30), jkv.store.Disk("caches", 2**34)])
        >>> jkv.generate(lm, ["Once upon a time"], store=store, max_new_tokens=20)
    """

    def __init__(
        self,
        tiers: Checked[Sequence[Tier]],
        policy: Policy | Any = None,
        *,
        fingerprint: bytes | Any = b"",
        ttl: Seconds = None,
        tenant_bytes: Limit | Mapping[str, int] = None,
        write_through: bool | Any = False,
        forms: Mapping[str, str] | Any = None,
        convert: Callable[[Entry, str], Entry] | Any = None,
        chunk: int | Any = 16,
        queue_entries: int | Any = 64,
        queue_bytes: int | Any = 256 << 20,
        sweep_every: Seconds = None,
        predictor: Predictor | Any = None,
        clock: Callable[[], float] | Any = time.time,
        timer: Callable[[], float] | Any = time.perf_counter,
    ) -> None:
        tiers = _checked_tiers(tiers)
        policy = LRU() if policy is None else policy
        if not isinstance(policy, Policy):
            raise TypeError(
                f"policy got {brief(policy)}; expected one of jkv.store, such as jkv.store.LRU()"
            )
        chunk = check_count("chunk", chunk, 1)
        queue_entries = check_count("queue_entries", queue_entries, 1)
        queue_bytes = check_count("queue_bytes", queue_bytes)
        check_bytes("fingerprint", fingerprint)
        check_flag("write_through", write_through)
        ttl = check_seconds("ttl", ttl)
        sweep_every = check_seconds("sweep_every", sweep_every, positive=True)
        tenant_bytes = _checked_tenants(tenant_bytes)
        _check_functions(convert=convert, clock=clock, timer=timer)
        if predictor is not None and not isinstance(predictor, Predictor):
            raise TypeError(
                f"predictor got {brief(predictor)}; expected a jkv.store.Predictor, or None"
            )
        names = [tier.name for tier in tiers]
        names = [n if names.count(n) == 1 else f"{n}{i}" for i, n in enumerate(names)]
        if not isinstance(forms, Mapping | None):
            raise TypeError(f"forms got {brief(forms)}; expected {{'disk': 'int8'}} or the like")
        forms = dict(forms or {})
        if unknown := set(forms) - set(names):
            raise ValueError(f"forms got {sorted(unknown)}; expected names of tiers: {names}")
        if convert is None and (unknown := set(forms.values()) - {"exact", "int8", "int4"}):
            raise ValueError(f"forms got {sorted(unknown)}; expected int8 or int4, or convert=")
        self._inner = inner = Upkeep(
            [
                Shelf(tier, name, policy, forms.get(name, "exact"))
                for tier, name in zip(tiers, names, strict=True)
            ],
            policy,
            chunk=chunk,
            tenant_bytes=tenant_bytes,
            convert=_converted if convert is None else convert,
            queue_entries=queue_entries,
            queue_bytes=queue_bytes,
            clock=clock,
            timer=timer,
            fingerprint=fingerprint,
            ttl=ttl,
        )
        self._write_through = write_through
        inner.find_all()
        self._index_until = time.monotonic() + _INDEX_WAIT
        self._predictor = predictor
        if predictor is not None:
            prefetcher = Prefetcher(inner, predictor, inner.stopped)
            inner.noted = prefetcher.noted
            inner.start("predict", prefetcher.run)
        if sweep_every is not None:
            inner.start("sweep", lambda: inner.sweeper(sweep_every))

    # In.

    @operation
    def put(
        self,
        key: Key | None,
        value: Any,
        *,
        tokens: Any = None,
        tenant: Key = "",
        seconds: Seconds = None,
        fingerprint: bytes | Any = None,
        ttl: Seconds = None,
        pin: bool | Any = False,
        whole: bool | Any = False,
        ephemeral: bool | Any = False,
    ) -> str | None:
        """Keep a value; its key, or None where no tier had room for it (counted as rejected).

        Args:
            key: of a sequence, any text; None: one that follows from the content.
            value: a cache, which is packed, or an `Entry`.
            tokens: whose keys and values it holds [T]: it is found by `longest_prefix` from now on.
            seconds: that it took to make; by default what the entry's meta says.
            ttl: seconds until it is of no use; by default the store's.
            pin: it never goes to make room, until `unpin` or another put.
            whole: no shorter prefix can be cut from it: it is found with all of its tokens only.
            ephemeral: it ends with this process, however that ends: the next store on a directory
                drops it at its start. On a remote only its `ttl` ends it.

        Raises:
            TypeError: a key or tenant that is no text, or another argument of a wrong type.
            ValueError: no key and no tokens, tokens that are none, seconds that are NaN or below
                0, or a closed store.
        """
        record, entry = self._inner.record(
            key,
            value,
            tokens=tokens,
            tenant=tenant,
            seconds=seconds,
            fingerprint=fingerprint,
            ttl=ttl,
            pin=pin,
            whole=whole,
            ephemeral=ephemeral,
        )
        kept = self._inner.keep([(record, entry)], through=self._write_through)[0]
        return record.key if kept else None

    @operation
    def put_many(
        self,
        keys: Sequence[Key | None],
        values: Sequence[Any],
        *,
        tokens: Sequence[Any] | None = None,
        seconds: Sequence[int | float | None] | None = None,
        tenant: Key = "",
        fingerprint: bytes | Any = None,
        ttl: Seconds = None,
        whole: bool | Any = False,
    ) -> list[str | None]:
        """`put` for several, each tier written to once; of a key that comes twice the last stays.

        Raises:
            ValueError: as `put`, or lists of different lengths.
        """
        none = [None] * len(keys)
        items = [
            self._inner.record(
                key,
                value,
                tokens=ids,
                tenant=tenant,
                seconds=cost,
                fingerprint=fingerprint,
                ttl=ttl,
                whole=whole,
            )
            for key, value, ids, cost in zip(
                keys, values, tokens or none, seconds or none, strict=True
            )
        ]
        kept = self._inner.keep_many(items, through=self._write_through)
        return [record.key if record.name in kept else None for record, _ in items]

    # Out.

    @operation
    def get(
        self,
        key: Key,
        default: Any = None,
        *,
        tenant: Key = "",
        fingerprint: bytes | Any = None,
        recompute_seconds: Seconds = None,
    ) -> Any:
        """What was put under a key: a cache for a cache, an entry for an entry; else `default`.

        It is a miss too where reading would take longer than `recompute_seconds`, by default those
        of the put, as far as the tier's bandwidth was measured within a minute.
        """
        asked = self._inner.asked([key], tenant, fingerprint)
        asked[0].seconds = check_seconds(
            "recompute_seconds", recompute_seconds, may_be_infinite=True
        )
        value = self._inner.values(asked)[0]
        return default if value is None else value

    @operation
    def get_entry(
        self, key: Key, *, tenant: Key = "", fingerprint: bytes | Any = None
    ) -> Entry | None:
        """The entry under a key, whatever was put."""
        asked = self._inner.asked([key], tenant, fingerprint)
        self._inner.take(asked)
        self._inner.scored(asked)
        return asked[0].entry

    @operation
    def get_many(
        self, keys: Sequence[Key], *, tenant: Key = "", fingerprint: bytes | Any = None
    ) -> list[Any]:
        """`get` for several, each tier read once; None where there is none."""
        return self._inner.values(self._inner.asked(_texts(keys), tenant, fingerprint))

    def open(self, key: Key, *, tenant: Key = "", fingerprint: bytes | Any = None) -> Handle:
        """The entry under a key, held: it is not evicted before the handle is released.

        Raises:
            KeyError: a miss.
        """
        handle = self.open_many([key], tenant=tenant, fingerprint=fingerprint)[0]
        if handle is None:
            raise KeyError(f"no entry {brief(key)}, or none that can be read now")
        return handle

    @operation
    def open_many(
        self, keys: Sequence[Key], *, tenant: Key = "", fingerprint: bytes | Any = None
    ) -> list[Handle | None]:
        """`open` for several, each tier read once; None where there is none."""
        asked = self._inner.asked(_texts(keys), tenant, fingerprint)
        self._inner.take(asked)
        self._inner.scored(asked, release=False)
        return [
            None
            if ask.record is None or ask.entry is None
            else Handle(ask.record, ask.entry, self._inner.released)
            for ask in asked
        ]

    @operation
    def longest_prefix(
        self,
        tokens: Any,
        *,
        tenant: Key = "",
        fingerprint: bytes | Any = None,
        limit: Limit = None,
        recompute_seconds: Seconds = None,
    ) -> Match | None:
        """The entry that shares the most first tokens with these, at least `chunk` of them; held.

        Args:
            tokens: [T].
            limit: tokens that may be shared at most: T - 1 where the last one must be computed.
            recompute_seconds: of all T tokens; by default by the entry's own seconds.

        Raises:
            ValueError: tokens that are none.
        """
        cost = check_seconds("recompute_seconds", recompute_seconds, may_be_infinite=True)
        self._wait_for_index()
        return self._inner.matches([tokens], [limit], tenant, fingerprint, cost)[0]

    @operation
    def longest_prefix_many(
        self,
        tokens: Sequence[Any],
        *,
        tenant: Key = "",
        fingerprint: bytes | Any = None,
        limits: Sequence[Limit] | None = None,
    ) -> list[Match | None]:
        """`longest_prefix` for several, each with a limit of its own, each tier read once.

        Raises:
            ValueError: tokens that are none, or lists of different lengths.
        """
        limits = [None] * len(tokens) if limits is None else limits
        self._wait_for_index()
        return self._inner.matches(tokens, limits, tenant, fingerprint, None)

    def _wait_for_index(self) -> None:
        """What is there from before is found by content once its headers were read."""
        self._inner.indexed.wait(max(self._index_until - time.monotonic(), 0))

    @operation
    def contains(self, key: Key, *, tenant: Key = "", fingerprint: bytes | Any = None) -> bool:
        """Whether a `get` would find it; that is no access, and no promise."""
        return self._inner.has(self._inner.asked([key], tenant, fingerprint)[0])

    @operation
    def remove(self, key: Key, *, tenant: Key = "", sync: bool = True) -> bool:
        """An entry goes, from all tiers; whether there was one that the store knew of.

        When it returns nothing of it is left, nor comes back after a power cut. With `sync=False`
        nobody waits for that: what could not be deleted is tried again later.

        Raises:
            TierError: it is not served any more, but something may be left, or come back.
        """
        return self._inner.remove(name_of(tenant, key), sync)

    @operation
    def reject(self, key: Key, *, tenant: Key = "") -> bool:
        """Give back an entry that is not what it says: it is lost, and counted as corrupt.

        A tier of this machine moves it to ``quarantine/``. On one that others share it stays, since
        what this process cannot use another may.
        """
        return self._inner.reject(name_of(tenant, key), lambda _: True)

    @operation
    def clear(self, *, tenant: str | None = None) -> int:
        """All entries go that the store knows of, or all of one tenant, as by `remove`; how many.

        Raises:
            TierError: of some of them something may be left, or come back.
        """
        return self._inner.clear(tenant)

    # Ahead of time.

    @operation
    def prefetch(self, keys: Iterable[Key], *, tenant: Key = "") -> int:
        """Queue entries for the first tier; how many are there or on their way."""
        with self._inner.lock:
            records = [self._inner.index.get(name_of(tenant, key)) for key in _texts(keys)]
            return sum(r is not None and self._inner.promote(r, None) for r in records)

    def warm(
        self, items: Iterable[Any], make: Callable[[Any], Any], *, tenant: Key = "", **put: Any
    ) -> int:
        """Put what is not there yet; how much was made.

        Args:
            items: keys, or prompts as token ids [T].
            make: the cache or entry of one of them; how long it takes is kept as its cost.
            put: for `put`, such as fingerprint, ttl or whole.
        """
        made = 0
        for item in items:
            key, tokens = (item, None) if isinstance(item, str) else (None, as_tokens(item))
            fingerprint = put.get("fingerprint")
            if tokens is not None:
                key = content_key(fingerprint or self._inner.fingerprint, tokens)
            if self.contains(str(key), tenant=tenant, fingerprint=fingerprint):
                continue
            begun = self._inner.timer()
            value = make(item)
            seconds = self._inner.timer() - begun
            done = self.put(key, value, tokens=tokens, tenant=tenant, **{"seconds": seconds, **put})
            made += done is not None
        return made

    def warm_from(
        self, history: Iterable[Any], make: Callable[[Any], Any], *, most: int = 100, **put: Any
    ) -> int:
        """`warm` with the `most` frequent keys or prompts of a history."""
        seen = Counter(x if isinstance(x, str) else tuple(as_tokens(x).tolist()) for x in history)
        return self.warm([item for item, _ in seen.most_common(most)], make, **put)

    # Upkeep.

    @operation
    def unpin(self, key: Key, *, tenant: Key = "") -> None:
        """A pinned entry may go again; nothing happens to another one."""
        self._inner.unpin(name_of(tenant, key))

    @operation
    def sweep(self, older_than: Seconds = None) -> int:
        """Expired entries go, and those that nobody used for so many seconds; how many."""
        return self._inner.clean_up(check_seconds("older_than", older_than))

    @operation
    def refresh(self) -> int:
        """Look for what other processes put; how many were found.

        A `get` by key finds them without; `longest_prefix` does not. Disk: a listing and a header
        of each new one; Remote: a request for every entry there is.
        """
        return self._inner.find_more()

    @operation
    def resize(
        self, tier: str | int, *, max_bytes: Limit = UNSET, max_entries: Limit = UNSET
    ) -> None:
        """Other limits for a tier, by name or number; what has no room any more moves down.

        Raises:
            ValueError: no such tier.
        """
        self._inner.resize(tier, max_bytes, max_entries)

    @operation
    def drain(self) -> None:
        """Wait until what moves between tiers has arrived."""
        self._inner.indexed.wait()
        self._inner.settle_queues()

    # What it tells.

    def stats(self, *, detailed: bool = False) -> dict[str, Any]:
        """Figures since the store was made; see `jkv.store.figures`. With `detailed`, by entry."""
        with self._inner.lock:
            self._inner.settle_released()
            said = figures.collect(self._inner)
            if detailed:
                said["by_entry"] = figures.by_entry(self._inner)
        if self._predictor is not None:
            said["prediction"] = self._predictor.stats()
        return said

    def hot(self, k: int = 10) -> list[tuple[str, int]]:
        """The keys of most hits, and how many."""
        with self._inner.lock:
            records = sorted(self._inner.index.values(), key=lambda r: (-r.hits, -r.accessed))[:k]
            return [(record.key, record.hits) for record in records]

    def report(self) -> Any:
        """The figures as a `rich` table, to print."""
        return figures.report(self.stats())

    def prometheus(self) -> str:
        """The figures in Prometheus' text format."""
        return figures.prometheus(self.stats())

    # The end.

    def close(self) -> None:
        """Finish what moves, write what only this process has to a tier that lasts; twice is once.

        Figures can be asked for afterwards; anything else raises ValueError.
        """
        self._inner.finish()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Entries."""
        return len(self._inner.index)


def _checked_tiers(tiers: Any) -> list[Tier]:
    """The tiers, each of which can do what a tier must.

    Raises:
        TypeError: something that is no tier, or no list of them.
        ValueError: none, or one tier twice.
    """
    if isinstance(tiers, str | bytes | Mapping) or not isinstance(tiers, Iterable):
        raise TypeError(f"tiers got {brief(tiers)}; expected a list, such as [Memory(2**30)]")
    tiers = list(tiers)
    if not tiers:
        raise ValueError("tiers got none; expected at least one, such as Memory(2**30)")
    for tier in tiers:
        if not isinstance(tier, Tier):
            raise TypeError(
                f"tiers got {brief(tier)}; expected objects such as jkv.store.Memory(2**30), "
                "jkv.store.Disk(path) or jkv.store.Remote(url); a class of your own derives from "
                f"jkv.store.Tier and implements {', '.join(sorted(Tier.__abstractmethods__))}"
            )
        check_text("a tier's name", tier.name)
        check_limit(f"max_bytes of the tier {brief(tier.name)}", tier.max_bytes)
        check_limit(f"max_entries of the tier {brief(tier.name)}", tier.max_entries)
    if len({id(tier) for tier in tiers}) < len(tiers):
        raise ValueError("tiers got one tier twice; expected another object for each")
    return tiers


def _checked_tenants(limits: Any) -> int | dict[str, int] | None:
    if not isinstance(limits, Mapping):
        return check_limit("tenant_bytes", limits)
    for tenant, limit in limits.items():
        check_text("tenant_bytes", tenant)
        check_limit(f"tenant_bytes of {brief(tenant)}", limit)
    return dict(limits)


def _check_functions(convert: Any, clock: Any, timer: Any) -> None:
    for name, function in (("convert", convert), ("clock", clock), ("timer", timer)):
        if not callable(function) and not (name == "convert" and function is None):
            raise TypeError(f"{name} got {brief(function)}; expected a function")


def _converted(entry: Entry, form: str) -> Entry:
    return importlib.import_module("jkv.store.packing").converted(entry, form)


def _texts(keys: Iterable[Key]) -> list[Key]:
    if isinstance(keys, str):
        raise TypeError(
            f"keys got the text {brief(keys)}; expected several, such as [{brief(keys)}]"
        )
    return list(keys)
