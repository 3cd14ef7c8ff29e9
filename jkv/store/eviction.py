"""The state behind each eviction policy: which of a tier's entries is evicted next.

`Evictor` checks arguments and pins entries that are in use; an order of its own is all that a
policy adds. An entry that is pinned stands outside the order: no search for the next victim ever
meets it.
"""

from __future__ import annotations

import abc
import dataclasses
import heapq
import math
from collections import OrderedDict
from collections.abc import Hashable

from jkv._text import brief


@dataclasses.dataclass(slots=True, eq=False)
class Item:
    """What an evictor knows of an entry.

    Attributes:
        size: bytes, or whatever the capacity counts.
        cost: of making the entry again.
        uses: times that it was added or touched.
        pinned: in use, and outside the order.
        segment: of a policy that has two, 0 or 1.
        rank: of a policy that orders by one; entries of lower rank are evicted first.
    """

    key: Hashable
    size: int | float
    cost: int | float
    uses: int = 1
    pinned: bool = False
    segment: int = 0
    rank: int | float = 0


class Evictor(abc.ABC):
    """The order in which the entries of one tier are evicted. A refused call changes nothing.

    A policy implements `_insert`, `_touch`, `_remove` and `_next`. It may also learn from what is
    expected, evicted, updated or resized: those methods do nothing by default.

    Attributes:
        capacity: what the tier may hold, in the unit of the entries' sizes.

    Example:
        >>> evictor = jkv.store.LRU().start(capacity=2)
        >>> evictor.add("a"); evictor.add("b"); evictor.hold("a")
        >>> evictor.victim()  # "a" is pinned
        'b'
    """

    def __init__(self, capacity: int | float) -> None:
        self.capacity = _checked_capacity(capacity)
        self._items: dict[Hashable, Item] = {}
        self._pins = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    # What a policy implements.

    @abc.abstractmethod
    def _insert(self, item: Item) -> None:
        """Put an entry into the order, as the latest: a new one, or one pinned until now.

        A policy that orders by arrival puts one that was pinned where it was.
        """

    @abc.abstractmethod
    def _touch(self, item: Item) -> None:
        """Move an entry by one more use; a pinned one only changes its standing."""

    @abc.abstractmethod
    def _remove(self, item: Item) -> None:
        """Take an entry out of the order: for good, or while it is pinned."""

    @abc.abstractmethod
    def _next(self) -> Hashable:
        """Return the first key of the order, which is not empty.

        It is asked for often and must change nothing: a policy that moves a hand or clears marks
        while it searches does so in `_evicted`.
        """

    def expect(self, key: Hashable) -> None:  # noqa: B027
        """Announce a key that will be added once there is room: ARC learns before it chooses."""

    def _evicted(self, item: Item) -> None:  # noqa: B027
        """Learn from an eviction."""

    def _updated(self, item: Item, old_size: int | float) -> None:  # noqa: B027
        """Follow an entry's new size and cost."""

    def _resized(self) -> None:  # noqa: B027
        """Follow a new capacity."""

    # What its owner calls.

    def add(self, key: Hashable, size: int | float = 1, cost: int | float = 1.0) -> None:
        """Add a new entry, used once.

        Args:
            key: must not be here yet.
            size: bytes, or whatever the capacity counts; above 0.
            cost: of making the entry again, say in seconds; at least 0.

        Raises:
            ValueError: the key is here, or a size or cost that cannot be.
        """
        if key in self._items:
            raise ValueError(
                f"add got {brief(key)}, which is here already; expected a new key, or touch"
            )
        _check_weight(key, size, cost)
        item = self._items[key] = Item(key, size, cost)
        self._insert(item)

    def touch(self, key: Hashable) -> None:
        """Count another use of an entry, which may be held.

        Raises:
            KeyError: no such entry.
        """
        item = self._get(key)
        item.uses += 1
        self._touch(item)

    def update(self, key: Hashable, size: int | float = 1, cost: int | float = 1.0) -> None:
        """Change the size or cost of an entry, held or not, as of a conversation that grew.

        Raises:
            KeyError: no such entry.
            ValueError: a size or cost that cannot be.
        """
        item = self._get(key)
        _check_weight(key, size, cost)
        old_size, item.size, item.cost = item.size, size, cost
        self._updated(item, old_size)

    def hold(self, key: Hashable) -> None:
        """Pin an entry that is in use: it is not the victim until it is released.

        Raises:
            KeyError: no such entry.
            ValueError: it is held already.
        """
        item = self._free(key)
        item.pinned = True
        self._pins += 1
        self._remove(item)

    def release(self, key: Hashable) -> None:
        """Unpin an entry. That is no further use, but it is the latest one.

        Raises:
            KeyError: no such entry.
            ValueError: it is not held.
        """
        item = self._get(key)
        if not item.pinned:
            raise ValueError(f"release got {brief(key)}, which is not held; expected one that was")
        self._unpin(item)

    def victim(self) -> Hashable:
        """Return the entry that is evicted next. It stays until `evicted` says that it went.

        Raises:
            LookupError: nothing can go: there is no entry, or all are held.
        """
        if self._pins == len(self._items):
            held = (
                "the one entry is held" if self._pins == 1 else f"all {self._pins} entries are held"
            )
            raise LookupError(f"nothing can go: {held if self._pins else 'no entry'}")
        return self._next()

    def evicted(self, key: Hashable) -> None:
        """Take out an entry that made room; it need not have been the victim.

        Raises:
            KeyError: no such entry.
            ValueError: it is held.
        """
        item = self._free(key)
        self._remove(item)
        del self._items[key]
        self._evicted(item)

    def removed(self, key: Hashable) -> None:
        """Take out an entry, held or not, for another reason: nothing is learnt from that.

        Raises:
            KeyError: no such entry.
        """
        item = self._get(key)
        if item.pinned:
            self._unpin(item)
        self._remove(item)
        del self._items[key]

    def resize(self, capacity: int | float) -> None:
        """Change the capacity. What does not fit any more is for the owner to evict.

        Raises:
            ValueError: not above 0.
        """
        self.capacity = _checked_capacity(capacity)
        self._resized()

    def _get(self, key: Hashable) -> Item:
        item = self._items.get(key)
        if item is None:
            raise KeyError(f"no entry {brief(key)}; expected a key that was added and has not gone")
        return item

    def _free(self, key: Hashable) -> Item:
        """Return an entry that is not pinned."""
        item = self._get(key)
        if item.pinned:
            raise ValueError(f"{brief(key)} is held; release it first")
        return item

    def _unpin(self, item: Item) -> None:
        self._insert(item)  # which sees that it was pinned, and is not new
        item.pinned = False
        self._pins -= 1


def _checked_capacity(capacity: int | float) -> int | float:
    if not 0 < capacity < math.inf:
        raise ValueError(f"capacity got {brief(capacity)}; expected a number above 0")
    return capacity


def _check_weight(key: Hashable, size: int | float, cost: int | float) -> None:
    if not 0 < size < math.inf:
        raise ValueError(f"size of {brief(key)} got {brief(size)}; expected a number above 0")
    if not 0 <= cost < math.inf:
        raise ValueError(f"cost of {brief(key)} got {brief(cost)}; expected a number from 0")


class ByArrival(Evictor):
    """FIFO: by arrival, which pins and uses do not change.

    Ranks are numbers of arrivals. The heap has those of all entries that are not pinned, and some
    that are over.
    """

    def __init__(self, capacity: int | float) -> None:
        super().__init__(capacity)
        self._arrivals = 0
        self._waiting: dict[int | float, Hashable] = {}
        self._heap: list[int | float] = []

    def _insert(self, item: Item) -> None:
        if not item.pinned:
            self._arrivals += 1
            item.rank = self._arrivals
        self._waiting[item.rank] = item.key
        heapq.heappush(self._heap, item.rank)
        if len(self._heap) > 2 * len(self._waiting) + 64:
            self._heap = list(self._waiting)
            heapq.heapify(self._heap)

    def _touch(self, item: Item) -> None:
        pass

    def _remove(self, item: Item) -> None:
        del self._waiting[item.rank]

    def _next(self) -> Hashable:
        while self._heap[0] not in self._waiting:
            heapq.heappop(self._heap)
        return self._waiting[self._heap[0]]


class ByRecency(Evictor):
    """LRU: by the last use, or the end of a pin."""

    def __init__(self, capacity: int | float) -> None:
        super().__init__(capacity)
        # Not a plain dict: to find its first key is O(n) once others before it were deleted.
        self._line: OrderedDict[Hashable, None] = OrderedDict()

    def _insert(self, item: Item) -> None:
        self._line[item.key] = None

    def _touch(self, item: Item) -> None:
        if not item.pinned:
            self._line.move_to_end(item.key)

    def _remove(self, item: Item) -> None:
        del self._line[item.key]

    def _next(self) -> Hashable:
        return next(iter(self._line))


class ByRank(Evictor):
    """LFU and CostAware: by the worth of all uses, above the rank of what was evicted last.

    Entries of one rank stand in a line, the longest unused first. The heap has nothing but numbers:
    with a million entries that takes half the time of pairs, which lie scattered in memory.

    Args:
        aging: whether ranks start above that of what was evicted last.
        by_cost: whether a use is worth cost / size; else 1.
    """

    def __init__(self, capacity: int | float, *, aging: bool, by_cost: bool) -> None:
        super().__init__(capacity)
        self._aging = aging
        self._by_cost = by_cost
        self._floor: int | float = 0
        self._lines: dict[int | float, OrderedDict[Hashable, None]] = {}  # none is empty
        self._heap: list[int | float] = []  # the ranks of all lines, and of some that are gone

    def _insert(self, item: Item) -> None:
        worth = item.cost / item.size if self._by_cost else 1
        rank = item.rank = self._floor + item.uses * worth
        line = self._lines.get(rank)
        if line is None:
            line = self._lines[rank] = OrderedDict()
            heapq.heappush(self._heap, rank)
            if len(self._heap) > 2 * len(self._lines) + 64:
                self._heap = list(self._lines)
                heapq.heapify(self._heap)
        line[item.key] = None

    def _touch(self, item: Item) -> None:
        if not item.pinned:
            self._remove(item)
            self._insert(item)

    def _remove(self, item: Item) -> None:
        line = self._lines[item.rank]
        del line[item.key]
        if not line:
            del self._lines[item.rank]

    def _next(self) -> Hashable:
        while self._heap[0] not in self._lines:
            heapq.heappop(self._heap)
        return next(iter(self._lines[self._heap[0]]))

    def _evicted(self, item: Item) -> None:
        if self._aging:
            self._floor = max(self._floor, item.rank)

    def _updated(self, item: Item, old_size: int | float) -> None:
        if self._by_cost:
            self._touch(item)


class TwoSegments(Evictor):
    """Entries used once in the first segment, others in the second, each by recency.

    The size of a segment counts its pinned entries.
    """

    def __init__(self, capacity: int | float) -> None:
        super().__init__(capacity)
        self._segments: tuple[OrderedDict[Hashable, None], ...] = OrderedDict(), OrderedDict()
        self._sizes: list[int | float] = [0, 0]

    @abc.abstractmethod
    def _balance(self) -> None:
        """Follow a second segment that may have grown."""

    def _place(self, item: Item) -> None:
        self._segments[item.segment][item.key] = None
        if not item.pinned:
            self._sizes[item.segment] += item.size

    def _touch(self, item: Item) -> None:
        once, again = self._segments
        if item.segment == 1:
            if not item.pinned:
                again.move_to_end(item.key)
            return
        if not item.pinned:
            del once[item.key]
            again[item.key] = None
        item.segment = 1
        self._sizes[0] -= item.size
        self._sizes[1] += item.size
        self._balance()

    def _remove(self, item: Item) -> None:
        del self._segments[item.segment][item.key]
        if not item.pinned:
            self._sizes[item.segment] -= item.size

    def _updated(self, item: Item, old_size: int | float) -> None:
        self._sizes[item.segment] += item.size - old_size
        self._balance()

    def _first(self, *order: int) -> Hashable:
        """Return the oldest entry of the first of these segments that has one."""
        return next(key for segment in order for key in self._segments[segment])


class Segmented(TwoSegments):
    """SLRU: the second segment is no longer than its share, where what is pinned allows it."""

    def __init__(self, capacity: int | float, protected: int | float) -> None:
        super().__init__(capacity)
        self._protected = protected

    def _insert(self, item: Item) -> None:
        self._place(item)
        self._balance()

    def _next(self) -> Hashable:
        return self._first(0, 1)

    def _resized(self) -> None:
        self._balance()

    def _balance(self) -> None:
        once, again = self._segments
        while self._sizes[1] > self._protected * self.capacity and again:
            key, _ = again.popitem(last=False)
            once[key] = None
            item = self._items[key]
            item.segment = 0
            self._sizes[0] += item.size
            self._sizes[1] -= item.size


class Adaptive(TwoSegments):
    """ARC: the paper's T1 and T2 are the segments, B1 and B2 the ghosts, and p the target."""

    def __init__(self, capacity: int | float) -> None:
        super().__init__(capacity)
        self._ghosts: tuple[OrderedDict[Hashable, int | float], ...] = OrderedDict(), OrderedDict()
        self._ghost_sizes: list[int | float] = [0, 0]
        self._target: int | float = 0  # of the first segment's size
        self._learnt: set[Hashable] = set()  # ghosts that were expected since they went
        self._frequent = False  # whether the one expected is a ghost of the second segment

    def expect(self, key: Hashable) -> None:
        """Move the target towards the segment that a ghost came from, once for each ghost."""
        segment = self._ghost_segment(key)
        self._frequent = segment == 1
        if segment is None or key in self._learnt:
            return
        self._learnt.add(key)
        mine, other = self._ghost_sizes[segment], self._ghost_sizes[1 - segment]
        step = self._ghosts[segment][key] * max(1, other / mine)
        target = self._target + (step if segment == 0 else -step)
        self._target = min(max(target, 0), self.capacity)

    def _insert(self, item: Item) -> None:
        if item.pinned:
            self._place(item)
            return
        self.expect(item.key)
        self._frequent = False
        segment = self._ghost_segment(item.key)
        if segment is not None:
            self._forget(segment, item.key)
            item.segment = 1
        self._place(item)
        once, again = self._ghosts
        while once and self._sizes[0] + self._ghost_sizes[0] > self.capacity:
            self._forget(0, next(iter(once)))
        while again and sum(self._sizes) + sum(self._ghost_sizes) > 2 * self.capacity:
            self._forget(1, next(iter(again)))

    def _next(self) -> Hashable:
        first = self._sizes[0]
        if first > self._target or (self._frequent and first == self._target):
            return self._first(0, 1)
        return self._first(1, 0)

    def _evicted(self, item: Item) -> None:
        self._ghosts[item.segment][item.key] = item.size
        self._ghost_sizes[item.segment] += item.size

    def _resized(self) -> None:
        self._target = min(self._target, self.capacity)

    def _balance(self) -> None:
        """Do nothing: the target decides when an entry is evicted."""

    def _ghost_segment(self, key: Hashable) -> int | None:
        return next((at for at, ghosts in enumerate(self._ghosts) if key in ghosts), None)

    def _forget(self, segment: int, key: Hashable) -> None:
        self._ghost_sizes[segment] -= self._ghosts[segment].pop(key)
        self._learnt.discard(key)
