"""How values become entries, and get into the first tier that takes them."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Sequence
from typing import Any

from jkv.store import keys
from jkv.store.checks import check_bytes, check_flag, check_seconds
from jkv.store.entry import Entry
from jkv.store.moves import KEPT
from jkv.store.reads import Reads
from jkv.store.shelf import Record


class Writes(Reads):
    """Puts, in batches."""

    def __init__(self, *args: Any, ttl: int | float | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ttl = ttl

    def record(
        self,
        key: Any,
        value: Any,
        *,
        tokens: Any,
        tenant: Any,
        seconds: Any,
        fingerprint: Any,
        ttl: Any,
        pin: Any = False,
        whole: Any = False,
        ephemeral: Any = False,
    ) -> tuple[Record, Entry]:
        """What is to be known of a put, and what is to be stored."""
        packed = not isinstance(value, Entry)
        for name, flag in (("pin", pin), ("whole", whole), ("ephemeral", ephemeral)):
            check_flag(name, flag)
        seconds = check_seconds("seconds", seconds)
        ttl = check_seconds("ttl", ttl)
        fingerprint = self.fingerprint if fingerprint is None else fingerprint
        check_bytes("fingerprint", fingerprint)
        ids = None if tokens is None else keys.as_tokens(tokens)
        if key is None:
            if ids is None:
                raise ValueError("put got no key and no tokens; expected one of them")
            key = keys.content_key(fingerprint, ids)
        name = keys.name_of(tenant, key)
        entry = importlib.import_module("jkv.store.packing").pack(value) if packed else value
        if seconds is None:
            seconds = check_seconds("seconds of the entry's meta", entry.meta.get("seconds"))
        now = self.clock()
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

    def keep(self, items: Sequence[tuple[Record, Entry]], *, through: bool) -> list[bool]:
        """Put records of different names, in one go for each tier; whether each was kept."""
        names = [record.name for record, _ in items]
        self.claim(names)
        try:
            todo = [item for item in items if self.make_quota(item[0])]
            for record, _ in todo:
                self.discard_older(record)
            for at in range(len(self.shelves)):
                left: list[tuple[Record, Entry]] = []
                for group in self.groups(at, todo):
                    said = self.place(at, group)
                    left += [x for x, answer in zip(group, said, strict=True) if answer != KEPT]
                todo = left
            kept = [bool(record.homes) for record, _ in items]
            if through:
                for at in range(1, len(self.shelves)):
                    here = [x for x in items if x[0].homes and at > min(x[0].homes)]
                    for group in self.groups(at, [x for x in here if at not in x[0].homes]):
                        self.place(at, group)
            with self.lock:
                for (record, _), good in zip(items, kept, strict=True):
                    if good:
                        continue
                    old = self.index.get(record.name)
                    if old is record:  # it was there until its size with headers was known
                        self.forget(record, "rejected")
                        continue
                    if old is not None:
                        self.forget(old, "replaced")  # what it is now is not what it was
                    self.count(record.tenant, "puts")
                    self.count(record.tenant, "rejected")
            for name in names:
                self.clean_all(name)
            return kept
        finally:
            with self.lock:
                for record, _ in items:
                    self.unreserve(record)
            self.unclaim(names)

    def keep_many(self, items: Sequence[tuple[Record, Entry]], *, through: bool) -> set[str]:
        """`keep` in batches; the names that were kept. Of those that come twice the last is put."""
        latest: dict[str, tuple[Record, Entry]] = {}
        for record, entry in items:
            if record.name in latest:
                with self.lock:
                    self.count(record.tenant, "puts")
                    self.count(record.tenant, "replaced")
            latest[record.name] = record, entry
        names: set[str] = set()
        for group in self.groups(0, list(latest.values())):
            kept = self.keep(group, through=through)
            names |= {record.name for (record, _), good in zip(group, kept, strict=True) if good}
        return names

    def groups(
        self, at: int, items: Sequence[tuple[Record, Entry]]
    ) -> list[list[tuple[Record, Entry]]]:
        """In batches that an empty shelf, and what a tenant may have, could hold.

        A batch's own entries cannot make room for each other.
        """
        if len(items) < 2:
            return [list(items)] if items else []
        shelf = self.shelves[at]
        with self.lock:
            tenants = {self.tenant(record.tenant) for record, _ in items}
            limits = [x.max_bytes for x in (shelf, *tenants) if x.max_bytes is not None]
        most = min(limits, default=None)
        groups: list[list[tuple[Record, Entry]]] = []
        size = 0
        for record, entry in items:
            size += entry.nbytes
            full = most is not None and size > most
            full |= bool(groups) and len(groups[-1]) == shelf.max_entries
            if not groups or full:
                groups.append([])
                size = entry.nbytes
            groups[-1].append((record, entry))
        return groups
