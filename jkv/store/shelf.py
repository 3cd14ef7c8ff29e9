"""One tier as the store sees it: what is on it, how much, what goes first, and how fast it is."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from jkv.store.checks import Limit, check_limit
from jkv.store.entry import Entry
from jkv.store.policy import Policy
from jkv.store.schema import PutMeta
from jkv.store.tier import Tier

_BOUNDLESS = 1 << 62
_SPOILS_AFTER = 60.0  # seconds, then a measured bandwidth says nothing any more


@dataclasses.dataclass(slots=True, eq=False)
class Record:
    """What the store knows of an entry. Changed under the store's lock only."""

    name: str  # the key in the tiers
    tenant: str
    key: str
    nbytes: int  # of the arrays as they were put; as they are stored, where that is not known
    version: str | None = None  # of this put; None until a blob from before was read
    created: int | float = 0.0
    updated: int | float = 0.0
    accessed: int | float = 0.0
    expires: int | float | None = None
    seconds: int | float | None = None  # to make it again
    fingerprint: bytes = b""
    tokens: np.ndarray | None = None
    whole: bool = False
    packed: bool = False
    hits: int = 0
    pinned: bool = False
    ephemeral: bool = False  # of this process, and of no use after it
    holds: int = 0
    homes: dict[int, int] = dataclasses.field(default_factory=dict)  # bytes by shelf
    doubtful: set[int] = dataclasses.field(default_factory=set)  # homes that were only listed
    leaving: int | None = None  # the shelf whose evictor does not count it any more
    moving: Entry | None = None  # between two shelves
    moving_from: int = 0
    promoting: bool = False
    reserved: int = 0  # of its tenant's bytes, until it is in the index

    @property
    def cost(self) -> int | float:
        """Of making it again, in seconds; where nobody said, of moving its bytes at 1 GB/s."""
        return 1e-9 * self.nbytes if self.seconds is None else self.seconds

    def meta(self, liveness_lock: str | None = None) -> dict[str, Any]:
        """What is stored with the entry, for the next process."""
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
        """What `meta` said."""
        self.version = put.version
        self.created, self.updated = put.created, put.updated
        if self.hits == 0:  # when it was last used before is not known
            self.accessed = self.updated
        self.expires, self.seconds = put.expires, put.seconds
        self.fingerprint, self.tokens = put.fingerprint, put.tokens
        self.whole, self.packed, self.pinned = put.whole, put.packed, put.pinned


class Shelf:
    """A tier, its limits and what it holds. Changed under the store's lock only."""

    def __init__(self, tier: Tier, name: str, policy: Policy, form: str) -> None:
        self.tier = tier
        self.name = name
        self.form = form
        self.max_bytes: int | None = tier.max_bytes
        self.max_entries: int | None = tier.max_entries
        self.persistent = tier.persistent
        self.immediate = tier.immediate
        self._by_bytes = self.max_bytes is not None
        self.evictor = policy.start(self._capacity())
        self.bytes = 0  # with what is being written, and what could not be deleted
        self.entries = 0
        self.rubbish: dict[str, int] = {}  # blobs that count and are not served
        self.rubbish_versions: dict[str, str] = {}  # of which put, where no other may be deleted
        self.counts: collections.Counter[str] = collections.Counter()
        self._rate: tuple[float, float] | None = None  # bytes per second, and when

    def _capacity(self) -> int:
        if self._by_bytes:
            return max(self.max_bytes or 1, 1)
        return max(self.max_entries or 1, 1) if self.max_entries is not None else _BOUNDLESS

    def resize(self, max_bytes: Limit, max_entries: Limit) -> None:
        """Other limits."""
        max_bytes = check_limit("max_bytes", max_bytes)
        max_entries = check_limit("max_entries", max_entries)
        self.max_bytes = self.tier.max_bytes = max_bytes
        self.max_entries = self.tier.max_entries = max_entries
        if self._by_bytes == (max_bytes is not None):
            self.evictor.resize(self._capacity())
        # Else the unit of the sizes would change; the evictor goes on with its old capacity.

    def takes(self, size: int) -> bool:
        """Whether an empty shelf would hold it."""
        return (self.max_bytes is None or size <= self.max_bytes) and self.max_entries != 0

    def fits(self, size: int, count: int) -> bool:
        """Whether there is room for so many bytes and entries more."""
        return (self.max_bytes is None or self.bytes + size <= self.max_bytes) and (
            self.max_entries is None or self.entries + count <= self.max_entries
        )

    def place(self, record: Record, size: int) -> None:
        """The evictor learns of an entry that takes `size` bytes here."""
        size = max(size, 1) if self._by_bytes else 1
        if record.name in self.evictor:  # the same sequence, longer by now perhaps
            self.evictor.update(record.name, size, record.cost)
            self.evictor.touch(record.name)
            return
        self.evictor.add(record.name, size, record.cost)
        if record.holds:
            self.evictor.hold(record.name)

    def measured(self, nbytes: int, seconds: int | float, now: int | float) -> None:
        """So many bytes were read in so long."""
        rate = nbytes / max(seconds, 1e-9)
        if self._rate is not None:
            rate = 0.7 * self._rate[0] + 0.3 * rate
        self._rate = rate, now

    def rate(self, now: int | float) -> float | None:
        """Bytes per second; None if nothing is known, or nothing recent."""
        if self._rate is None or now - self._rate[1] > _SPOILS_AFTER:
            return None
        return self._rate[0]
