"""What the store keeps: named arrays and what they are. Immutable; imported without JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jkv._text import brief


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """Arrays by name, and what they are.

    Attributes:
        arrays: read-only arrays of numpy, in which bfloat16 and the like are dtypes of `ml_dtypes`;
            what a tier on a device gives has arrays of JAX, which every tier takes.
        meta: what JSON can say: how to make a cache of the arrays, how many tokens it holds, what
            it cost (`seconds`), in which form it is (`form`: "exact", "int8", "int4").
    """

    arrays: Mapping[str, Any]
    meta: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrays", MappingProxyType(dict(self.arrays)))
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


class Private(np.ndarray):
    """Memory that a tier of this library has made, and that nothing else refers to."""


@runtime_checkable
class Tier(Protocol):
    """A place for entries: plain, slow perhaps, and without an opinion on what should go.

    Keys are texts of any characters. Limits, policies, counters and what moves where are the
    store's affair. Methods may be called from several threads at once.

    Others are optional: `write_many` and `read_many`; `describe`, an entry's meta without its
    arrays; `version_of`, which put is there, for a tier that tells it in microseconds;
    `delete_put`, of one put and no other of its key; `purge`, which waits for what was deleted;
    `put_aside`, of a put that is not what it says; `lifeline` and `lives`. `jkv.store.Disk` has
    them all.
    """

    name: str  # of its kind: "device", "memory", "disk", "remote"
    max_bytes: int | None
    max_entries: int | None

    def scan(self) -> Mapping[str, int]:
        """Keys that are there from before, and the bytes that each takes; oldest first.

        Leftovers of a crash are cleaned up.
        """
        ...

    def write(self, key: str, entry: Entry) -> int:
        """Keep it, all of it or nothing, in place of what was there; the bytes that it takes.

        Raises:
            TierError: it could not be kept, and what was there before is, or nothing.
        """
        ...

    def read(self, key: str) -> Entry | None:
        """The entry, None if there is none.

        Raises:
            CorruptError: what is there is not what was written; it has been put aside.
            TierError: it cannot be read now.
        """
        ...

    def delete(self, key: str) -> None:
        """Drop it; nothing happens if it is not there.

        Raises:
            TierError: it could not be dropped, and may still be there.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds open."""
        ...


def check_store(store: Any, methods: Sequence[str]) -> None:
    """Refuse what cannot do all that will be asked of it.

    Raises:
        TypeError: it lacks one of the methods.
    """
    missing = [name for name in methods if not callable(getattr(store, name, None))]
    if missing:
        raise TypeError(
            f"store got {brief(store)}, without {', '.join(missing)}; expected a jkv.store.Store"
        )


def reject(store: Any, key: str, tenant: str = "") -> None:
    """Give back an entry that is not what it says; a store of a user's own need only remove it."""
    if hasattr(store, "reject"):
        store.reject(key, tenant=tenant)
    else:
        store.remove(key, tenant=tenant, sync=False)
