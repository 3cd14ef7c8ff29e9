"""What the store asks of a place for entries: memory, a disk, a bucket, or one of a user's own."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jkv._checks import check_text
from jkv._text import brief
from jkv.errors import CorruptError, TierError, UnsupportedError
from jkv.store.checks import Limit, check_limit
from jkv.store.entry import Entry


class Tier(abc.ABC):
    """A place for entries: plain, slow perhaps, and without an opinion on what to evict.

    Keys are texts of any characters. Limits, policies, counters and what moves where are the
    store's affair. Methods may be called from several threads at once.

    A tier implements `scan`, `write`, `read` and `delete`. All else has a default: batches go one
    by one, and a tier that other processes do not share has no versions, no liveness locks and no
    quarantine. `jkv.store.Disk` implements all of it.

    Args:
        max_bytes, max_entries: limits that a store is to keep; nothing is refused here.

    Attributes:
        name: of its kind, such as "device", "memory", "disk" or "remote".
        persistent: whether entries outlive this process, which others may share them with.
        immediate: whether `read` waits for nothing: the store calls it while it has its lock.

    Raises:
        TypeError, ValueError: a limit that is no whole number from 0.

    Example:
        >>> class Shelf(jkv.store.Tier):
        ...     def __init__(self): super().__init__(); self.kept = {}
        ...     def scan(self): return {}
        ...     def write(self, key, entry): self.kept[key] = entry; return entry.nbytes
        ...     def read(self, key): return self.kept.get(key)
        ...     def delete(self, key): self.kept.pop(key, None)
        >>> store = jkv.store.Store([Shelf()])
    """

    name: str = "tier"
    persistent: bool = False
    immediate: bool = False
    max_bytes: int | None = None
    max_entries: int | None = None

    def __init__(self, max_bytes: Limit = None, max_entries: Limit = None) -> None:
        self.max_bytes = check_limit("max_bytes", max_bytes)
        self.max_entries = check_limit("max_entries", max_entries)

    @abc.abstractmethod
    def scan(self) -> Mapping[str, int]:
        """List the keys that are there from before, with the bytes that each takes; oldest first.

        Leftovers of a crash are cleaned up.

        Raises:
            TierError: it cannot be listed now.
        """

    @abc.abstractmethod
    def write(self, key: str, entry: Entry) -> int:
        """Keep an entry, all of it or nothing, in place of what was there; the bytes it takes.

        Raises:
            TierError: it could not be kept, and what was there before is, or nothing.
            UnsupportedError: this tier cannot hold it.
        """

    @abc.abstractmethod
    def read(self, key: str) -> Entry | None:
        """Return the entry, None if there is none.

        Raises:
            CorruptError: what is there is not what was written; it has been put aside.
            TierError: it cannot be read now.
        """

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Delete an entry; nothing happens if it is not there.

        Raises:
            TierError: it could not be deleted, and may still be there.
        """

    def close(self) -> None:  # noqa: B027
        """Let go of what is held open."""

    # Several at once.

    def write_many(
        self, entries: Mapping[str, Entry]
    ) -> dict[str, int | TierError | UnsupportedError]:
        """Keep several; for each the bytes it takes, or the error.

        Raises:
            TierError, UnsupportedError: of some of them; they are then written one by one.
        """
        results: dict[str, int | TierError | UnsupportedError] = {}
        for key, entry in entries.items():
            try:
                results[key] = self.write(key, entry)
            except (TierError, UnsupportedError) as error:
                results[key] = error
        return results

    def read_many(self, keys: Iterable[str]) -> dict[str, Entry | CorruptError | TierError | None]:
        """Return what `read` returns or raises for each of them.

        Raises:
            TierError: none of them can be read now.
        """
        results: dict[str, Entry | CorruptError | TierError | None] = {}
        for key in keys:
            try:
                results[key] = self.read(key)
            except (CorruptError, TierError) as error:
                results[key] = error
        return results

    # Where entries come from before, or from other processes.

    def describe(self, key: str) -> Mapping[str, Any] | None:
        """Return an entry's meta without reading its arrays; None where that cannot be done.

        Raises:
            CorruptError: it is damaged; `read` puts it aside.
            TierError: it cannot be read now.
        """
        return None

    def version_of(self, key: str) -> str | None:
        """Return which put is there, in microseconds; None where it cannot be told as fast.

        Raises:
            TierError: it cannot be read now.
        """
        return None

    def delete_put(self, key: str, version: str) -> bool:
        """Delete one put of a key, and no other where the tier can tell; whether it has gone.

        Raises:
            TierError: it could not be deleted, and may still be there.
        """
        self.delete(key)
        return True

    def purge(self, keys: Sequence[str]) -> None:  # noqa: B027
        """Wait until what was deleted of these keys is gone for good.

        Raises:
            TierError: something of them may still be there, or come back.
        """

    def put_aside(self, key: str, version: str | None) -> None:  # noqa: B027
        """Move one put of a key, or any, out of the way, where there is a place for such."""

    def liveness_lock(self) -> str | None:
        """Return the name of a lock that ends with this process; None where there are none.

        Raises:
            TierError: it cannot be made.
        """
        return None

    def is_live(self, lock: str) -> bool:
        """Tell whether the process that holds a liveness lock is alive, as far as can be told.

        Raises:
            TierError: it cannot be found out now.
        """
        return True


def check_tiers(tiers: object) -> list[tuple[str, Tier]]:
    """Return the tiers with their names; those that share one get a number.

    Raises:
        TypeError: something that is no tier, or no list of them.
        ValueError: none, or one tier twice.
    """
    if isinstance(tiers, str | bytes | Mapping) or not isinstance(tiers, Iterable):
        raise TypeError(f"tiers got {brief(tiers)}; expected a list, such as [Memory(2**30)]")
    found: list[Tier] = []
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
        found.append(tier)
    if not found:
        raise ValueError("tiers got none; expected at least one, such as Memory(2**30)")
    if len({id(tier) for tier in found}) < len(found):
        raise ValueError("tiers got one tier twice; expected another object for each")
    names = [tier.name for tier in found]
    names = [n if names.count(n) == 1 else f"{n}{i}" for i, n in enumerate(names)]
    return list(zip(names, found, strict=True))
