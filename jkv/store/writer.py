"""How values become entries, and get into the first tier that takes them."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Sequence

from numpy.typing import ArrayLike

from jkv._checks import check_flag
from jkv.store import keys
from jkv.store.checks import Fingerprint, Key, Seconds, check_bytes, check_seconds
from jkv.store.entry import Entry
from jkv.store.index import Index
from jkv.store.removal import Removal
from jkv.store.state import Record
from jkv.store.tiering import KEPT, Tiering

Put = tuple[Record, Entry]  # what is to be known of a put, and what is to be stored


class Writer:
    """Puts, in batches.

    Args:
        index: what is where.
        tiering: writes to tiers.
        removal: takes out what a put replaces.
        fingerprint, ttl: by default.
        through: whether a put is written to all tiers.
    """

    def __init__(
        self,
        index: Index,
        tiering: Tiering,
        removal: Removal,
        *,
        fingerprint: bytes,
        ttl: int | float | None,
        through: bool,
    ) -> None:
        self._index = index
        self._tiering = tiering
        self._removal = removal
        self._fingerprint = fingerprint
        self._ttl = ttl
        self._through = through

    def prepare(
        self,
        key: str | None,
        value: object,
        *,
        tokens: ArrayLike | None,
        tenant: Key,
        seconds: Seconds,
        fingerprint: Fingerprint,
        ttl: Seconds,
        pin: bool = False,
        whole: bool = False,
        ephemeral: bool = False,
    ) -> Put:
        """Check what `Store.put` was given, and pack it.

        Raises:
            TypeError, ValueError: as `Store.put` says.
        """
        for name, flag in (("pin", pin), ("whole", whole), ("ephemeral", ephemeral)):
            check_flag(name, flag)
        seconds = check_seconds("seconds", seconds)
        ttl = check_seconds("ttl", ttl)
        fingerprint = self._fingerprint if fingerprint is None else fingerprint
        check_bytes("fingerprint", fingerprint)
        ids = None if tokens is None else keys.as_tokens(tokens)
        if key is None:
            if ids is None:
                raise ValueError("put got no key and no tokens; expected one of them")
            key = keys.content_key(fingerprint, ids)
        name = keys.entry_name(tenant, key)
        packed = not isinstance(value, Entry)
        entry = value if isinstance(value, Entry) else _packed(value)
        if seconds is None:
            seconds = check_seconds("seconds of the entry's meta", entry.meta.get("seconds"))
        now = self._index.clock()
        ttl = self._ttl if ttl is None else ttl
        record = Record(
            name,
            tenant,
            key,
            entry.nbytes,
            version=secrets.token_hex(8),
            created=now,
            updated=now,
            accessed=now,
            expires=None if ttl is None else now + ttl,
            seconds=seconds,
            fingerprint=fingerprint,
            tokens=ids,
            whole=whole,
            packed=packed,
            pinned=pin,
            ephemeral=ephemeral,
        )
        return record, entry

    def put(self, puts: Sequence[Put]) -> list[bool]:
        """Put records of different names, in one go for each tier; whether each was kept."""
        index = self._index
        names = [record.name for record, _ in puts]
        index.claim(names)
        try:
            todo = [put for put in puts if self._tiering.make_quota(put[0])]
            for record, _ in todo:
                self._removal.discard_older(record)
            for at in range(len(index.tiers)):
                left: list[Put] = []
                for group in self._groups(at, todo):
                    results = self._tiering.place(at, group)
                    left += [x for x, result in zip(group, results, strict=True) if result != KEPT]
                todo = left
            kept = [bool(record.locations) for record, _ in puts]
            if self._through:
                for at in range(1, len(index.tiers)):
                    here = [x for x in puts if x[0].locations and at > min(x[0].locations)]
                    for group in self._groups(at, [x for x in here if at not in x[0].locations]):
                        self._tiering.place(at, group)
            with index.lock:
                for (record, _), good in zip(puts, kept, strict=True):
                    if good:
                        continue
                    old = index.records.get(record.name)
                    if old is record:  # it was there until its size with headers was known
                        index.forget(record, "rejected")
                        continue
                    if old is not None:
                        index.forget(old, "replaced")  # what it is now is not what it was
                    index.count(record.tenant, "puts")
                    index.count(record.tenant, "rejected")
            for name in names:
                self._removal.clean_all(name)
            return kept
        finally:
            with index.lock:
                for record, _ in puts:
                    index.unreserve(record)
            index.unclaim(names)

    def put_many(self, puts: Sequence[Put]) -> set[str]:
        """Put in batches; the names that were kept. Of those that come twice the last is put."""
        latest: dict[str, Put] = {}
        for record, entry in puts:
            if record.name in latest:
                with self._index.lock:
                    self._index.count(record.tenant, "puts")
                    self._index.count(record.tenant, "replaced")
            latest[record.name] = record, entry
        names: set[str] = set()
        for group in self._groups(0, list(latest.values())):
            kept = self.put(group)
            names |= {record.name for (record, _), good in zip(group, kept, strict=True) if good}
        return names

    def _groups(self, at: int, puts: Sequence[Put]) -> list[list[Put]]:
        """Split into batches that an empty tier, and what a tenant may have, could hold.

        A batch's own entries cannot make room for each other.
        """
        if len(puts) < 2:
            return [list(puts)] if puts else []
        state = self._index.tiers[at]
        with self._index.lock:
            tenants = {self._index.tenant(record.tenant) for record, _ in puts}
            limits = [x.max_bytes for x in (state, *tenants) if x.max_bytes is not None]
        most = min(limits, default=None)
        groups: list[list[Put]] = []
        size = 0
        for record, entry in puts:
            size += entry.nbytes
            full = most is not None and size > most
            full |= bool(groups) and len(groups[-1]) == state.max_entries
            if not groups or full:
                groups.append([])
                size = entry.nbytes
            groups[-1].append((record, entry))
        return groups


def _packed(value: object) -> Entry:
    return importlib.import_module("jkv.store.packing").pack(value)
