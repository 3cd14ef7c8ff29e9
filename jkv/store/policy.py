"""Which entry goes next: eviction policies, for the page pool and for every tier of the store.

A `Policy` is a value with its parameters; `start` makes the state of one tier, an `Evictor`, which
knows keys and never values. Its owner decides when something must go and how much: it asks for the
`victim`, lets it go and says so with `evicted`, or says `removed` where nothing was pushed out.
What is in use is held: an entry that is held keeps its standing and is never the victim, at no
cost to the search for one.

Every operation takes O(1), and those of FIFO, LFU and CostAware O(log n) amortised.
"""

from __future__ import annotations

import abc
import dataclasses

from jkv._text import brief
from jkv.store.eviction import Adaptive, ByArrival, ByRank, ByRecency, Evictor, Segmented


@dataclasses.dataclass(frozen=True)
class Policy(abc.ABC):
    """A rule for what goes next: a value that may serve several tiers.

    Example:
        >>> evictor = jkv.store.LRU().start(capacity=2)
        >>> evictor.add("a"); evictor.add("b"); evictor.touch("a")
        >>> evictor.victim()
        'b'
    """

    @abc.abstractmethod
    def start(self, capacity: int | float) -> Evictor:
        """Return the state of one tier that may hold `capacity`, in the unit of the entries' sizes.

        Raises:
            ValueError: a capacity that is not above 0.
        """


@dataclasses.dataclass(frozen=True)
class FIFO(Policy):
    """What came first goes first, used or not: the baseline.

    Example:
        >>> store = jkv.store.Store([jkv.store.Memory(2**30)], jkv.store.FIFO())
    """

    def start(self, capacity: int | float) -> Evictor:
        """Return the state of one tier."""
        return ByArrival(capacity)


@dataclasses.dataclass(frozen=True)
class LRU(Policy):
    """The least recently used goes first.

    Example:
        >>> store = jkv.store.Store([jkv.store.Memory(2**30)], jkv.store.LRU())
    """

    def start(self, capacity: int | float) -> Evictor:
        """Return the state of one tier."""
        return ByRecency(capacity)


@dataclasses.dataclass(frozen=True)
class LFU(Policy):
    """The least often used goes first, the least recently used one among equals.

    With aging an entry's uses count from a floor, the count of what went last, so that what was
    popular once goes in the end. Arlitt et al., "Evaluating Content Management Techniques for Web
    Proxy Caches" (1999): LFU-DA.

    Attributes:
        aging: without it nothing ever catches up with what was used often.

    Example:
        >>> store = jkv.store.Store([jkv.store.Memory(2**30)], jkv.store.LFU(aging=False))
    """

    aging: bool = True

    def start(self, capacity: int | float) -> Evictor:
        """Return the state of one tier."""
        return ByRank(capacity, aging=self.aging, by_cost=False)


@dataclasses.dataclass(frozen=True)
class SLRU(Policy):
    """Two lines by recency: what was used once, and goes first; and what was used again.

    What falls out of the second line is the newest of the first. Karedla, Love and Wherry, "Caching
    Strategies to Improve Disk System Performance" (1994).

    Attributes:
        protected: the second line's share of the capacity, above 0 and below 1.

    Raises:
        ValueError: another share.

    Example:
        >>> store = jkv.store.Store([jkv.store.Memory(2**30)], jkv.store.SLRU())
    """

    protected: int | float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.protected < 1:
            raise ValueError(
                f"protected got {brief(self.protected)}; expected a share of the capacity above "
                "0 and below 1"
            )

    def start(self, capacity: int | float) -> Evictor:
        """Return the state of one tier."""
        return Segmented(capacity, self.protected)


@dataclasses.dataclass(frozen=True)
class ARC(Policy):
    """Two lines as in SLRU, whose shares follow from what is missed after it went.

    It remembers the keys that it evicted, as many as fit into the capacity once more; one that
    comes back says which line was too short. Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead
    Replacement Cache" (FAST 2003); sizes weigh lines and steps, and are 1 in the paper.

    Example:
        >>> store = jkv.store.Store([jkv.store.Memory(2**30)], jkv.store.ARC())
    """

    def start(self, capacity: int | float) -> Evictor:
        """Return the state of one tier."""
        return Adaptive(capacity)


@dataclasses.dataclass(frozen=True)
class CostAware(Policy):
    """What is cheap to make again for its size, and seldom used, goes first.

    GreedyDual-Size-Frequency: an entry's worth is uses x cost / size above a floor, the worth of
    what went last. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency
    Caching Policy" (1998).

    Example:
        >>> store = jkv.store.Store([jkv.store.Memory(2**30)], jkv.store.CostAware())
    """

    def start(self, capacity: int | float) -> Evictor:
        """Return the state of one tier."""
        return ByRank(capacity, aging=True, by_cost=True)


def check_policy(policy: object) -> Policy:
    """Refuse anything but a policy.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(policy, Policy):
        raise TypeError(
            f"policy got {brief(policy)}; expected one of jkv.store, such as jkv.store.LRU()"
        )
    return policy


POLICIES: dict[str, Policy] = {
    "fifo": FIFO(),
    "lru": LRU(),
    "lfu": LFU(),
    "slru": SLRU(),
    "arc": ARC(),
    "cost-aware": CostAware(),
}
"""Every policy as command lines name it."""
