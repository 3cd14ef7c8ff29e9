"""The store as users see it: entries by key and by content, over tiers, with figures of it all.

It is composed of the parts that `jkv.store.index` names.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from numpy.typing import ArrayLike

from jkv._checks import check_flag
from jkv._text import brief
from jkv.store import metrics
from jkv.store.checks import (
    UNSET,
    Fingerprint,
    Key,
    Limit,
    Seconds,
    check_bytes,
    check_count,
    check_forms,
    check_functions,
    check_keys,
    check_seconds,
    check_tenants,
)
from jkv.store.entry import Entry
from jkv.store.handles import Handle, Match
from jkv.store.index import Index
from jkv.store.keys import as_tokens, content_key, entry_name
from jkv.store.lifecycle import Lifecycle
from jkv.store.policy import LRU, Policy, check_policy
from jkv.store.prefetch import Predictor, Prefetcher, check_predictor
from jkv.store.reader import Reader
from jkv.store.removal import Removal
from jkv.store.tier import Tier, check_tiers
from jkv.store.tiering import Tiering
from jkv.store.writer import Writer

if TYPE_CHECKING:
    from rich.table import Table

P = ParamSpec("P")
R = TypeVar("R")


def operation(
    method: Callable[Concatenate[Store, P], R],
) -> Callable[Concatenate[Store, P], R]:
    """Refuse a call once the store is closed; else `close` waits for its end."""

    @functools.wraps(method)
    def wrapped(self: Store, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self._lifecycle.begin(method.__name__)
        try:
            return method(self, *args, **kwargs)
        finally:
            self._lifecycle.end()

    return wrapped


class Store:
    """Sequences' caches that outlive a request, over tiers from the fastest to the slowest.

    An entry is put into the first tier that takes it. What a tier has no room for is demoted to the
    one below, and out of the last one it is evicted; what is read further down is promoted to the
    first. Threads do both, from queues that are bounded: where the one down is full, the caller
    moves the entry itself; where the one up is full, the entry stays where it is, counted. `close`
    finishes what was begun and writes what only a tier in this process has to one that lasts;
    without it, and without `write_through`, such entries end with the process.

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
        tiers: from the fastest to the slowest, each with its own limits; see `jkv.store.Tier`.
        policy: which entry goes first, in every tier and for every tenant; `LRU()` by default.
        fingerprint: of what made the entries: weights, configuration, rope, dtype, kind and layout
            of the cache. An entry of another one is a miss. Empty: it is not looked at.
        ttl: seconds until an entry is of no use; None: never.
        tenant_bytes: what each tenant may have, or by tenant; entries count once, as they were put.
        write_through: a put is written to all tiers before it returns.
        forms: "int8" or "int4" by name of tier: what it holds is converted where that takes fewer
            bytes, and its meta says so.
        convert: does it, of an entry and a form; by default for caches, other entries stay.
        chunk: tokens between two prefix hashes; a shorter prefix is not found. A hash takes about
            450 bytes of this process, a token 4 more.
        queue_entries, queue_bytes: what may wait for each tier.
        sweep_every: seconds between two sweeps by a thread.
        predictor: what to promote before it is asked for, while no lookup is under way.
        clock: seconds since the epoch; timer: seconds, for durations.

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of range.

    Example:
        >>> tiers = [jkv.store.Memory(2**30), jkv.store.Disk("caches", 2**34)]
        >>> with jkv.store.Store(tiers) as store:
        ...     out = jkv.generate(lm, "ROMEO:", store=store, max_new_tokens=8)
        ...     again = jkv.generate(lm, "ROMEO:", store=store, max_new_tokens=8)
        >>> bool((out.tokens == again.tokens).all()), out.reused.shape
        (True, (1,))
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        policy: Policy | None = None,
        *,
        fingerprint: bytes = b"",
        ttl: Seconds = None,
        tenant_bytes: int | Mapping[str, int] | None = None,
        write_through: bool = False,
        forms: Mapping[str, str] | None = None,
        convert: Callable[[Entry, str], Entry] | None = None,
        chunk: int = 16,
        queue_entries: int = 64,
        queue_bytes: int = 256 << 20,
        sweep_every: Seconds = None,
        predictor: Predictor | None = None,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        named = check_tiers(tiers)
        policy = check_policy(LRU() if policy is None else policy)
        chunk = check_count("chunk", chunk, 1)
        queue_entries = check_count("queue_entries", queue_entries, 1)
        queue_bytes = check_count("queue_bytes", queue_bytes)
        check_bytes("fingerprint", fingerprint)
        check_flag("write_through", write_through)
        ttl = check_seconds("ttl", ttl)
        sweep_every = check_seconds("sweep_every", sweep_every, positive=True)
        tenant_bytes = check_tenants(tenant_bytes)
        check_functions(clock=clock, timer=timer)
        if convert is not None:
            check_functions(convert=convert)
        check_predictor(predictor)
        forms = check_forms(forms, [name for name, _ in named], known=convert is None)
        self._index = index = Index(
            named, policy, forms=forms, chunk=chunk, tenant_bytes=tenant_bytes, clock=clock
        )
        self._removal = removal = Removal(index)
        self._tiering = tiering = Tiering(
            index,
            removal,
            convert=_converted if convert is None else convert,
            queue_entries=queue_entries,
            queue_bytes=queue_bytes,
        )
        self._reader = reader = Reader(
            index, tiering, removal, timer=timer, fingerprint=fingerprint
        )
        self._writer = Writer(
            index, tiering, removal, fingerprint=fingerprint, ttl=ttl, through=write_through
        )
        self._lifecycle = lifecycle = Lifecycle(index, tiering, removal)
        lifecycle.find_all()
        self._predictor = predictor
        if predictor is not None:
            prefetcher = Prefetcher(index, tiering, reader, predictor, lifecycle.stopped)
            reader.accessed = prefetcher.noted
            lifecycle.start("predict", prefetcher.run)
        if sweep_every is not None:
            lifecycle.start("sweep", functools.partial(lifecycle.sweep_every, sweep_every))

    # Writes.

    @operation
    def put(
        self,
        key: Key | None,
        value: Any,
        *,
        tokens: ArrayLike | None = None,
        tenant: Key = "",
        seconds: Seconds = None,
        fingerprint: Fingerprint = None,
        ttl: Seconds = None,
        pin: bool = False,
        whole: bool = False,
        ephemeral: bool = False,
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
        record, entry = self._writer.prepare(
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
        return record.key if self._writer.put([(record, entry)])[0] else None

    @operation
    def put_many(
        self,
        keys: Sequence[Key | None],
        values: Sequence[Any],
        *,
        tokens: Sequence[ArrayLike | None] | None = None,
        seconds: Sequence[Seconds] | None = None,
        tenant: Key = "",
        fingerprint: Fingerprint = None,
        ttl: Seconds = None,
        whole: bool = False,
    ) -> list[str | None]:
        """Keep several values, each tier written to once; of equal keys the last stays.

        Raises:
            ValueError: as `put`, or lists of different lengths.
        """
        none = [None] * len(keys)
        puts = [
            self._writer.prepare(
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
        kept = self._writer.put_many(puts)
        return [record.key if record.name in kept else None for record, _ in puts]

    # Reads.

    @operation
    def get(
        self,
        key: Key,
        default: Any = None,
        *,
        tenant: Key = "",
        fingerprint: Fingerprint = None,
        recompute_seconds: Seconds = None,
    ) -> Any:
        """Return what was put under a key, a cache for a cache; else `default`.

        It is a miss too where reading would take longer than `recompute_seconds`, by default those
        of the put, as far as the tier's bandwidth was measured within a minute.
        """
        lookups = self._reader.lookups([key], tenant, fingerprint)
        lookups[0].seconds = check_seconds(
            "recompute_seconds", recompute_seconds, may_be_infinite=True
        )
        value = self._reader.values(lookups)[0]
        return default if value is None else value

    @operation
    def get_entry(
        self, key: Key, *, tenant: Key = "", fingerprint: Fingerprint = None
    ) -> Entry | None:
        """Return the entry under a key, whatever was put."""
        lookups = self._reader.lookups([key], tenant, fingerprint)
        self._reader.take(lookups)
        self._reader.scored(lookups)
        return lookups[0].entry

    @operation
    def get_many(
        self, keys: Sequence[Key], *, tenant: Key = "", fingerprint: Fingerprint = None
    ) -> list[Any]:
        """Return what was put under several keys, each tier read once; None for a miss."""
        return self._reader.values(self._reader.lookups(check_keys(keys), tenant, fingerprint))

    def open(self, key: Key, *, tenant: Key = "", fingerprint: Fingerprint = None) -> Handle:
        """Open the entry under a key: it is not evicted before the handle is released.

        Raises:
            KeyError: a miss.
        """
        handle = self.open_many([key], tenant=tenant, fingerprint=fingerprint)[0]
        if handle is None:
            raise KeyError(f"no entry {brief(key)}, or none that can be read now")
        return handle

    @operation
    def open_many(
        self, keys: Sequence[Key], *, tenant: Key = "", fingerprint: Fingerprint = None
    ) -> list[Handle | None]:
        """Open several entries, each tier read once; None where there is none."""
        return self._reader.handles(self._reader.lookups(check_keys(keys), tenant, fingerprint))

    @operation
    def longest_prefix(
        self,
        tokens: ArrayLike,
        *,
        tenant: Key = "",
        fingerprint: Fingerprint = None,
        limit: Limit = None,
        recompute_seconds: Seconds = None,
    ) -> Match | None:
        """Find the entry that shares the most first tokens, at least `chunk`, and hold it.

        Args:
            tokens: [T].
            limit: tokens that may be shared at most: T - 1 where the last one must be computed.
            recompute_seconds: of all T tokens; by default by the entry's own seconds.

        Raises:
            ValueError: tokens that are none.
        """
        cost = check_seconds("recompute_seconds", recompute_seconds, may_be_infinite=True)
        self._lifecycle.wait_for_index()
        return self._reader.matches([tokens], [limit], tenant, fingerprint, cost)[0]

    @operation
    def longest_prefix_many(
        self,
        tokens: Sequence[ArrayLike],
        *,
        tenant: Key = "",
        fingerprint: Fingerprint = None,
        limits: Sequence[Limit] | None = None,
    ) -> list[Match | None]:
        """Find the longest prefix of several prompts, each tier read once.

        Raises:
            ValueError: tokens that are none, or lists of different lengths.
        """
        limits = [None] * len(tokens) if limits is None else limits
        self._lifecycle.wait_for_index()
        return self._reader.matches(tokens, limits, tenant, fingerprint, None)

    @operation
    def contains(self, key: Key, *, tenant: Key = "", fingerprint: Fingerprint = None) -> bool:
        """Tell whether a `get` would find it; that is no access, and no promise."""
        return self._reader.has(self._reader.lookups([key], tenant, fingerprint)[0])

    @operation
    def remove(self, key: Key, *, tenant: Key = "", sync: bool = True) -> bool:
        """Remove an entry from all tiers; whether there was one that the store knew of.

        When it returns nothing of it is left, nor comes back after a power cut. With `sync=False`
        it does not wait for that: what could not be deleted is tried again later.

        Raises:
            TierError: it is not served any more, but something may be left, or come back.
        """
        return self._removal.remove(entry_name(tenant, key), sync)

    @operation
    def reject(self, key: Key, *, tenant: Key = "") -> bool:
        """Give back an entry that is not what it says: it is lost, and counted as corrupt.

        A tier of this machine moves it to ``quarantine/``. On one that others share it stays, since
        what this process cannot use another may.
        """
        return self._removal.reject(entry_name(tenant, key), lambda _: True)

    @operation
    def clear(self, *, tenant: str | None = None) -> int:
        """Remove all entries that the store knows of, or all of one tenant; how many.

        Raises:
            TierError: of some of them something may be left, or come back.
        """
        return self._removal.clear(tenant)

    # Ahead of time.

    @operation
    def prefetch(self, keys: Iterable[Key], *, tenant: Key = "") -> int:
        """Queue entries for the first tier; how many are there or on their way."""
        with self._index.lock:
            records = [self._index.records.get(entry_name(tenant, key)) for key in check_keys(keys)]
            return sum(r is not None and self._tiering.promote(r, None) for r in records)

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
                key = content_key(fingerprint or self._reader.fingerprint, tokens)
            if self.contains(str(key), tenant=tenant, fingerprint=fingerprint):
                continue
            begun = self._reader.timer()
            value = make(item)
            seconds = self._reader.timer() - begun
            done = self.put(key, value, tokens=tokens, tenant=tenant, **{"seconds": seconds, **put})
            made += done is not None
        return made

    def warm_from(
        self, history: Iterable[Any], make: Callable[[Any], Any], *, most: int = 100, **put: Any
    ) -> int:
        """Warm with the `most` frequent keys or prompts of a history; see `warm`."""
        seen = Counter(x if isinstance(x, str) else tuple(as_tokens(x).tolist()) for x in history)
        return self.warm([item for item, _ in seen.most_common(most)], make, **put)

    # Maintenance.

    @operation
    def unpin(self, key: Key, *, tenant: Key = "") -> None:
        """Let a pinned entry be evicted again; nothing happens to another one."""
        self._index.unpin(entry_name(tenant, key))

    @operation
    def sweep(self, older_than: Seconds = None) -> int:
        """Remove expired entries, and those unused for so many seconds; how many."""
        return self._lifecycle.sweep(check_seconds("older_than", older_than))

    @operation
    def refresh(self) -> int:
        """Look for what other processes put; how many were found.

        A `get` by key finds them without; `longest_prefix` does not. Disk: a listing and a header
        of each new one; Remote: a request for every entry there is.
        """
        return self._lifecycle.find_more()

    @operation
    def resize(
        self, tier: str | int, *, max_bytes: Limit = UNSET, max_entries: Limit = UNSET
    ) -> None:
        """Change a tier's limits, by name or number; what has no room is demoted.

        Raises:
            ValueError: no such tier.
        """
        self._tiering.resize(tier, max_bytes, max_entries)

    @operation
    def drain(self) -> None:
        """Wait until what moves between tiers has arrived."""
        self._lifecycle.drain()

    # Figures.

    def stats(self, *, detailed: bool = False) -> dict[str, Any]:
        """Return figures since the start; see `jkv.store.metrics`. With `detailed`, by entry."""
        with self._index.lock:
            self._index.settle_released()
            figures = metrics.collect(self._index, self._tiering, self._reader.timer())
            if detailed:
                figures["by_entry"] = metrics.by_entry(self._index)
        if self._predictor is not None:
            figures["prediction"] = self._predictor.stats()
        return figures

    def hot(self, k: int = 10) -> list[tuple[str, int]]:
        """Return the keys of most hits, and how many."""
        with self._index.lock:
            records = sorted(self._index.records.values(), key=lambda r: (-r.hits, -r.accessed))[:k]
            return [(record.key, record.hits) for record in records]

    def report(self) -> Table:
        """Return the figures as a `rich` table, to print."""
        return metrics.report(self.stats())

    def prometheus(self) -> str:
        """Return the figures in Prometheus' text format."""
        return metrics.prometheus(self.stats())

    # The end.

    def close(self) -> None:
        """Finish what moves, write what only this process has to a tier that lasts; twice is once.

        Figures can be asked for afterwards; anything else raises ValueError.
        """
        self._lifecycle.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._index.records)


def _converted(entry: Entry, form: str) -> Entry:
    return importlib.import_module("jkv.store.packing").converted(entry, form)
