"""The order in which the entries of a tier go: what every state of a policy does."""

from __future__ import annotations

import abc
import math
from collections.abc import Hashable

from jkv._text import brief


class Evictor(abc.ABC):
    """The order in which the entries of one tier go. What is refused changes nothing.

    Attributes:
        capacity: what the tier may hold, in the unit of the entries' sizes.
    """

    def __init__(self, capacity: int | float) -> None:
        self.capacity = _capacity(capacity)

    @abc.abstractmethod
    def __contains__(self, key: Hashable) -> bool: ...

    @abc.abstractmethod
    def __len__(self) -> int: ...

    def expect(self, key: Hashable) -> None:  # noqa: B027
        """Room will be made for this key, and then it is added: ARC learns before it chooses."""

    @abc.abstractmethod
    def add(self, key: Hashable, size: int | float = 1, cost: int | float = 1.0) -> None:
        """A new entry, used once.

        Args:
            key: must not be here yet.
            size: bytes, or whatever the capacity counts; above 0.
            cost: of making the entry again, say in seconds; at least 0.

        Raises:
            ValueError: the key is here, or a size or cost that cannot be.
        """

    @abc.abstractmethod
    def touch(self, key: Hashable) -> None:
        """The entry was used once more; it may be held.

        Raises:
            KeyError: no such entry.
        """

    @abc.abstractmethod
    def update(self, key: Hashable, size: int | float = 1, cost: int | float = 1.0) -> None:
        """The entry, held or not, has another size or cost by now, as a conversation that grew.

        Raises:
            KeyError: no such entry.
            ValueError: a size or cost that cannot be.
        """

    @abc.abstractmethod
    def hold(self, key: Hashable) -> None:
        """The entry is in use: it is not the victim until it is released.

        Raises:
            KeyError: no such entry.
            ValueError: it is held already.
        """

    @abc.abstractmethod
    def release(self, key: Hashable) -> None:
        """The entry was in use until now. That is no further use, but it is the latest one.

        Raises:
            KeyError: no such entry.
            ValueError: it is not held.
        """

    @abc.abstractmethod
    def victim(self) -> Hashable:
        """The entry that goes next. It stays until `evicted` says that it went.

        Raises:
            LookupError: nothing can go: there is no entry, or all are held.
        """

    @abc.abstractmethod
    def evicted(self, key: Hashable) -> None:
        """The entry went to make room; it need not have been the victim.

        Raises:
            KeyError: no such entry.
            ValueError: it is held.
        """

    @abc.abstractmethod
    def removed(self, key: Hashable) -> None:
        """The entry, held or not, is gone for another reason: nothing is learnt from that.

        Raises:
            KeyError: no such entry.
        """

    def resize(self, capacity: int | float) -> None:
        """Another capacity. What does not fit any more is for the owner to evict.

        Raises:
            ValueError: not above 0.
        """
        self.capacity = _capacity(capacity)


def _capacity(capacity: int | float) -> int | float:
    if not 0 < capacity < math.inf:
        raise ValueError(f"capacity got {brief(capacity)}; expected a number above 0")
    return capacity


def check_new(evictor: Evictor, key: Hashable, size: int | float, cost: int | float) -> None:
    """What is added is new, and its size and cost can be.

    Raises:
        ValueError: it is not so.
    """
    if key in evictor:
        raise ValueError(
            f"add got {brief(key)}, which is here already; expected a new key, or touch"
        )
    check_weight(key, size, cost)


def check_known(evictor: Evictor, key: Hashable, size: int | float, cost: int | float) -> None:
    """What is changed is here, and its new size and cost can be.

    Raises:
        KeyError: it is not here.
        ValueError: its size or cost cannot be.
    """
    if key not in evictor:
        raise unknown(key)
    check_weight(key, size, cost)


def check_weight(key: Hashable, size: int | float, cost: int | float) -> None:
    """A size and a cost that can be.

    Raises:
        ValueError: they cannot.
    """
    if not 0 < size < math.inf:
        raise ValueError(f"size of {brief(key)} got {brief(size)}; expected a number above 0")
    if not 0 <= cost < math.inf:
        raise ValueError(f"cost of {brief(key)} got {brief(cost)}; expected a number from 0")


def unknown(key: Hashable) -> KeyError:
    """The error for a key that is not here."""
    return KeyError(f"no entry {brief(key)}; expected a key that was added and has not gone")


def is_held(key: Hashable) -> ValueError:
    """The error where an entry would have to be free."""
    return ValueError(f"{brief(key)} is held; release it first")


def not_held(key: Hashable) -> ValueError:
    """The error where an entry would have to be held."""
    return ValueError(f"release got {brief(key)}, which is not held; expected one that was")


def none_can_go(held: int) -> LookupError:
    """The error where there is no victim."""
    held_ones = "the one entry is held" if held == 1 else f"all {held} entries are held"
    return LookupError(f"nothing can go: {held_ones if held else 'no entry'}")
