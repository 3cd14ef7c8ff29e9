"""What the store knows of an entry, of a tenant and of a tier. Changed under its lock only."""

from __future__ import annotations

import collections
import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from jkv.errors import CorruptError, TierError
from jkv.store.checks import Limit, check_limit
from jkv.store.entry import Entry
from jkv.store.policy import Evictor, Policy
from jkv.store.schema import PutMeta, check_entry
from jkv.store.tier import Tier

_BOUNDLESS = 1 << 62
_STALE_AFTER = 60.0  # seconds, then a measured bandwidth says nothing any more


@dataclasses.dataclass(slots=True, eq=False)
class Record:
    """What the store knows of an entry.

    Attributes:
        name: the key in the tiers.
        nbytes: of the arrays as they were put; as they are stored, where that is not known.
        version: of this put; None until a blob from before was read.
        seconds: to make it again.
        ephemeral: of this process, and of no use after it.
        locations: bytes by number of the tier.
        unverified: locations that were listed and not read yet.
        leaving: the tier whose evictor does not count it any more.
        moving: the entry on its way from the tier `moving_from` to one below.
        reserved: bytes of its tenant, until it is in the index.
    """

    name: str
    tenant: str
    key: str
    nbytes: int
    version: str | None = None
    created: int | float = 0.0
    updated: int | float = 0.0
    accessed: int | float = 0.0
    expires: int | float | None = None
    seconds: int | float | None = None
    fingerprint: bytes = b""
    tokens: np.ndarray | None = None
    whole: bool = False
    packed: bool = False
    hits: int = 0
    pinned: bool = False
    ephemeral: bool = False
    holds: int = 0
    locations: dict[int, int] = dataclasses.field(default_factory=dict)
    unverified: set[int] = dataclasses.field(default_factory=set)
    leaving: int | None = None
    moving: Entry | None = None
    moving_from: int = 0
    promoting: bool = False
    reserved: int = 0

    @property
    def cost(self) -> int | float:
        """Seconds to make it again; where that is unknown, to move its bytes at 1 GB/s."""
        return 1e-9 * self.nbytes if self.seconds is None else self.seconds

    def meta(self, liveness_lock: str | None = None) -> dict[str, Any]:
        """Return what is stored with the entry, for the next process."""
        return PutMeta(
            version=self.version,
            created=self.created,
            updated=self.updated,
            expires=self.expires,
            seconds=self.seconds,
            fingerprint=self.fingerprint,
            tokens=self.tokens,
            whole=self.whole,
            packed=self.packed,
            pinned=self.pinned,
            liveness_lock=liveness_lock,
        ).to_json()

    def learn(self, put: PutMeta) -> None:
        """Take over what `meta` said."""
        self.version = put.version
        self.created, self.updated = put.created, put.updated
        if self.hits == 0:  # when it was last used before is not known
            self.accessed = self.updated
        self.expires, self.seconds = put.expires, put.seconds
        self.fingerprint, self.tokens = put.fingerprint, put.tokens
        self.whole, self.packed, self.pinned = put.whole, put.packed, put.pinned


class Tenant:
    """What one tenant has.

    Attributes:
        bytes: of entries as they were put, each once.
        reserved: bytes for puts that are under way.
        evictor: of a tenant with a limit.
    """

    def __init__(self, policy: Policy, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self.evictor: Evictor | None = None if max_bytes is None else policy.start(max_bytes)
        self.bytes = 0
        self.reserved = 0
        self.entries = 0
        self.counts: collections.Counter[str] = collections.Counter()


class TierState:
    """A tier as the store sees it: its limits, what it holds, what is evicted next, how fast it is.

    `read`, `check`, `version_of`, `newer_put` and `delete` ask the tier itself, without the lock.

    Attributes:
        at: its number, the fastest tier's being 0.
        bytes: with what is being written, and with orphans.
        orphans: bytes by name of blobs that no record refers to: they are to be deleted.
        orphan_versions: of an orphan the one put that may be deleted, where no other may.
    """

    def __init__(
        self,
        tier: Tier,
        at: int,
        name: str,
        policy: Policy,
        form: str,
        lock: AbstractContextManager[object],
    ) -> None:
        self.tier = tier
        self.at = at
        self.name = name
        self.form = form
        self.lock = lock
        self.max_bytes = tier.max_bytes
        self.max_entries = tier.max_entries
        self.persistent = tier.persistent
        self.immediate = tier.immediate
        self._by_bytes = self.max_bytes is not None
        self.evictor = policy.start(self._capacity())
        self.bytes = 0
        self.entries = 0
        self.orphans: dict[str, int] = {}
        self.orphan_versions: dict[str, str] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self._rate: tuple[float, float] | None = None  # bytes per second, and when

    def _capacity(self) -> int:
        if self._by_bytes:
            return max(self.max_bytes or 1, 1)
        return max(self.max_entries or 1, 1) if self.max_entries is not None else _BOUNDLESS

    def resize(self, max_bytes: Limit, max_entries: Limit) -> None:
        """Change the limits."""
        max_bytes = check_limit("max_bytes", max_bytes)
        max_entries = check_limit("max_entries", max_entries)
        self.max_bytes = self.tier.max_bytes = max_bytes
        self.max_entries = self.tier.max_entries = max_entries
        if self._by_bytes == (max_bytes is not None):
            self.evictor.resize(self._capacity())
        # Else the unit of the sizes would change; the evictor goes on with its old capacity.

    def takes(self, size: int) -> bool:
        """Tell whether the tier would hold so many bytes if it were empty."""
        return (self.max_bytes is None or size <= self.max_bytes) and self.max_entries != 0

    def fits(self, size: int, count: int) -> bool:
        """Tell whether there is room for so many bytes and entries more."""
        return (self.max_bytes is None or self.bytes + size <= self.max_bytes) and (
            self.max_entries is None or self.entries + count <= self.max_entries
        )

    def place(self, record: Record, size: int) -> None:
        """Tell the evictor of an entry that takes `size` bytes here."""
        size = max(size, 1) if self._by_bytes else 1
        if record.name in self.evictor:  # the same sequence, longer by now perhaps
            self.evictor.update(record.name, size, record.cost)
            self.evictor.touch(record.name)
            return
        self.evictor.add(record.name, size, record.cost)
        if record.holds:
            self.evictor.hold(record.name)

    def measured(self, nbytes: int, seconds: int | float, now: int | float) -> None:
        """Take so many bytes, read in so many seconds, into the bandwidth."""
        rate = nbytes / max(seconds, 1e-9)
        if self._rate is not None:
            rate = 0.7 * self._rate[0] + 0.3 * rate
        self._rate = rate, now

    def rate(self, now: int | float) -> float | None:
        """Return bytes per second; None if nothing is known, or nothing recent."""
        if self._rate is None or now - self._rate[1] > _STALE_AFTER:
            return None
        return self._rate[0]

    # What asks the tier itself.

    def count_error(self) -> None:
        """Count a failure of the tier."""
        with self.lock:
            self.counts["errors"] += 1

    def read(self, name: str) -> Entry | None:
        """Read what the tier has of a name, None if nothing.

        Raises:
            CorruptError: it is damaged, or says of itself what no store has written.
            TierError: it cannot be read now.
        """
        entry = self.tier.read(name)
        if entry is not None:
            self.check(name, entry)
        return entry

    def check(self, name: str, entry: Entry) -> None:
        """Refuse an entry that says of itself what no store has written, and put it aside.

        Raises:
            CorruptError: it does.
        """
        try:
            check_entry(entry)
        except CorruptError:
            self.tier.put_aside(name, None)
            raise

    def version_of(self, name: str) -> str | None:
        """Return which put is there, of a tier that other processes write to too.

        None where there is none, or where that cannot be told in an instant.
        """
        if not self.persistent:
            return None
        try:
            return self.tier.version_of(name)
        except TierError:  # a read will fail too, and count it
            return None

    def newer_put(self, record: Record) -> str | None:
        """Return the version of a put that came after this record's, None where none did.

        What was there before it has been replaced by it, or is known to be an orphan: anything
        else has come since. No clock is asked: those of two machines differ.
        """
        found = self.version_of(record.name)
        old = self.orphan_versions.get(record.name)
        known = (None, record.version, old)
        return None if found in known or self.at in record.unverified else found

    def only_orphan(self, name: str) -> bool:
        """Tell whether all that the tier has of a name is to be deleted."""
        if name not in self.orphans:
            return False
        version = self.orphan_versions.get(name)
        return version is None or self.version_of(name) in (None, version)

    def delete(self, name: str, version: str | None = None) -> bool:
        """Delete one put of a name, or whatever is there; False: it could not be deleted.

        What another process has put since stays, and is no longer this one's affair.
        """
        try:
            if version is None:
                self.tier.delete(name)
            else:
                self.tier.delete_put(name, version)
        except TierError:
            self.count_error()
            return False
        return True
