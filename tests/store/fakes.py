"""A tier that does what it is told to do wrong, and what must hold of a store at any time."""

from __future__ import annotations

import threading
import time

import numpy as np

from jkv.errors import CorruptError, TierError
from jkv.store.entry import Entry
from jkv.store.tier import Tier


class Clock:
    """Time that passes when somebody says so."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


class Fake(Tier):
    """A dictionary; `fail[what]` of the next calls of `what` raise, `odd` ones having worked."""

    def __init__(self, max_bytes=None, max_entries=None, name="memory", persistent=None, header=0):
        self.name = name
        self.persistent = name in ("disk", "remote") if persistent is None else persistent
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self.header = header
        self.entries: dict[str, Entry] = {}
        self.fail = dict.fromkeys(("write", "read", "delete", "scan"), 0)
        self.calls: list[tuple] = []
        self.corrupt: set[str] = set()
        self.delay = 0.0
        self.gate: threading.Event | None = None  # what a write waits for
        self.closed = False
        self.lock = threading.Lock()

    def _maybe_fail(self, what):
        with self.lock:
            self.calls.append(what)
            if self.fail[what]:
                self.fail[what] -= 1
                return True
        if self.delay:
            time.sleep(self.delay)
        return False

    def size(self, name):
        return self.entries[name].nbytes + self.header

    @property
    def nbytes(self):
        return sum(map(self.size, self.entries))

    def scan(self):
        if self._maybe_fail("scan"):
            raise TierError("scan")
        return {name: self.size(name) for name in self.entries}

    def write(self, key, entry):
        if self.gate is not None:
            assert self.gate.wait(30)
        if self._maybe_fail("write"):
            if self.fail["write"] % 2:
                self.entries.pop(key, None)  # what was there before is, or nothing
            raise TierError("write")
        with self.lock:
            self.entries.pop(key, None)
            self.entries[key] = entry
            self.corrupt.discard(key)
        return self.size(key)

    def read(self, key):
        if self._maybe_fail("read"):
            raise TierError("read")
        with self.lock:
            if key in self.corrupt and key in self.entries:
                del self.entries[key]
                self.corrupt.discard(key)
                raise CorruptError("corrupt")
            return self.entries.get(key)

    def delete(self, key):
        if self._maybe_fail("delete"):
            if self.fail["delete"] % 2:
                self.entries.pop(key, None)
            raise TierError("delete")
        with self.lock:
            self.entries.pop(key, None)

    def describe(self, key):
        entry = self.entries.get(key)
        return None if entry is None else entry.meta

    def close(self):
        self.closed = True


class Batched(Fake):
    """One that takes several at once."""

    def write_many(self, entries):
        self.calls.append(("write_many", len(entries)))
        result = {}
        for key, entry in entries.items():
            try:
                result[key] = self.write(key, entry)
            except TierError as error:
                result[key] = error
        return result

    def read_many(self, keys):
        self.calls.append(("read_many", len(list(keys))))
        result = {}
        for key in keys:
            try:
                result[key] = self.read(key)
            except (TierError, CorruptError) as error:
                result[key] = error
        return result


def entry(number=0, nbytes=100, **meta):
    """Bytes that all say the same."""
    array = np.full(nbytes, number % 251, np.uint8)
    array.flags.writeable = False
    return Entry({"x": array}, {"number": number, **meta})


def number(got):
    """What `entry` was given, of an entry that is whole."""
    if got is None:
        return None
    assert (got.arrays["x"] == got.meta["number"] % 251).all()
    return got.meta["number"]


def check(store, accesses=None, exact=True):
    """Counters balance, indices agree, limits hold."""
    index = store._index
    if exact:
        store._tiering.drain()  # what is on its way has room reserved
    with index.lock:
        figures = store.stats()
        for owner in (figures, *figures["tenants"].values()):
            fates = ("replaced", "removed", "expired", "evicted", "rejected", "lost")
            assert owner["puts"] + owner["found"] == owner["entries"] + sum(
                owner[fate] for fate in fates
            ), owner
            assert owner["accesses"] == owner["hits"] + owner["misses"]
            assert owner["misses"] == sum(owner["misses_by_reason"].values())
        for name in ("puts", "found", "hits", "misses", "entries"):
            assert figures[name] == sum(t[name] for t in figures["tenants"].values()), name
        assert figures["hits"] == sum(t["hits"] for t in figures["tiers"].values())
        if accesses is not None:
            assert figures["accesses"] == accesses
        for at, (state, tier) in enumerate(
            zip(index.tiers, figures["tiers"].values(), strict=True)
        ):
            records = [r for r in index.records.values() if at in r.locations]
            sizes = {r.name: r.locations[at] for r in records}
            leaving = sum(r.leaving == at for r in index.records.values())
            assert tier["entries"] + leaving == len(sizes) == len(state.evictor) + leaving
            assert tier["writes"] + tier["found"] == len(sizes) + tier["evictions"] + tier["gone"]
            held = sum(sizes.values()) + sum(state.orphans.values())
            assert held <= state.bytes  # the rest is reserved
            if exact:
                assert held == state.bytes
                assert state.entries == len(sizes) + len(state.orphans)
                if state.max_bytes is not None:
                    assert state.bytes <= state.max_bytes
                if state.max_entries is not None:
                    assert state.entries <= state.max_entries
        for name, tenant in index.tenants.items():
            mine = [r for r in index.records.values() if r.tenant == name]
            assert tenant.entries == len(mine)
            assert tenant.bytes == sum(r.nbytes for r in mine)
            if exact and tenant.max_bytes is not None:
                assert tenant.bytes <= tenant.max_bytes
                assert tenant.reserved == 0
        for record in index.records.values():
            assert record.locations or record.moving or index.is_claimed(record.name), record
        return figures


def names(tier):
    """The keys that it has."""
    return sorted(name.split(":")[-1] for name in tier.entries)
