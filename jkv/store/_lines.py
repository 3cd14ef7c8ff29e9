"""Policies whose entries stand in lines: FIFO, LRU, SLRU and ARC."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable

from jkv.store.evictor import (
    Evictor,
    check_known,
    check_new,
    is_held,
    none_can_go,
    not_held,
    unknown,
)


class _Arrival(Evictor):
    """One line in which those held keep their places."""

    def __init__(self, capacity: int | float) -> None:
        super().__init__(capacity)
        self._arrivals = 0
        self._line: OrderedDict[Hashable, int] = OrderedDict()
        self._held: set[Hashable] = set()
        # Those whose turn came while they were held: all of them are older than the line. Of these
        # the heap has those that were released; some may be held again, or gone.
        self._late: dict[Hashable, int] = {}
        self._heap: list[tuple[int, Hashable]] = []
        self._queued: set[int] = set()  # arrivals that the heap has

    def __contains__(self, key: Hashable) -> bool:
        return key in self._line or key in self._late

    def __len__(self) -> int:
        return len(self._line) + len(self._late)

    def add(self, key: Hashable, size: int | float = 1, cost: int | float = 1.0) -> None:
        check_new(self, key, size, cost)
        self._arrivals += 1
        self._line[key] = self._arrivals

    def touch(self, key: Hashable) -> None:
        if key not in self:
            raise unknown(key)

    def update(self, key: Hashable, size: int | float = 1, cost: int | float = 1.0) -> None:
        check_known(self, key, size, cost)

    def hold(self, key: Hashable) -> None:
        if key in self._held or key not in self:
            raise is_held(key) if key in self._held else unknown(key)
        self._held.add(key)

    def release(self, key: Hashable) -> None:
        if key not in self._held:
            raise not_held(key) if key in self else unknown(key)
        self._held.remove(key)
        arrival = self._late.get(key)
        if arrival is not None and arrival not in self._queued:
            self._queued.add(arrival)
            heapq.heappush(self._heap, (arrival, key))

    def victim(self) -> Hashable:
        while self._heap:
            arrival, key = self._heap[0]
            if self._late.get(key) == arrival and key not in self._held:
                return key
            self._queued.remove(heapq.heappop(self._heap)[0])
        while self._line:
            key = next(iter(self._line))
            if key not in self._held:
                return key
            self._late[key] = self._line.pop(key)
        raise none_can_go(len(self._held))

    def evicted(self, key: Hashable) -> None:
        if key in self._held:
            raise is_held(key)
        self.removed(key)

    def removed(self, key: Hashable) -> None:
        if key not in self:
            raise unknown(key)
        (self._line if key in self._line else self._late).pop(key)
        self._held.discard(key)


class _Recency(Evictor):
    """One line, the oldest first. Those held stand beside it."""

    def __init__(self, capacity: int | float) -> None:
        super().__init__(capacity)
        # Not a plain dict: to find its first key is O(n) once others before it were deleted.
        self._line: OrderedDict[Hashable, None] = OrderedDict()
        self._held: set[Hashable] = set()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._line or key in self._held

    def __len__(self) -> int:
        return len(self._line) + len(self._held)

    def add(self, key: Hashable, size: int | float = 1, cost: int | float = 1.0) -> None:
        check_new(self, key, size, cost)
        self._line[key] = None

    def touch(self, key: Hashable) -> None:
        if key in self._line:
            self._line.move_to_end(key)
        elif key not in self._held:
            raise unknown(key)

    def update(self, key: Hashable, size: int | float = 1, cost: int | float = 1.0) -> None:
        check_known(self, key, size, cost)

    def hold(self, key: Hashable) -> None:
        if key not in self._line:
            raise is_held(key) if key in self._held else unknown(key)
        del self._line[key]
        self._held.add(key)

    def release(self, key: Hashable) -> None:
        if key not in self._held:
            raise not_held(key) if key in self._line else unknown(key)
        self._held.remove(key)
        self._line[key] = None

    def victim(self) -> Hashable:
        for key in self._line:
            return key
        raise none_can_go(len(self._held))

    def evicted(self, key: Hashable) -> None:
        if key not in self._line:
            raise is_held(key) if key in self._held else unknown(key)
        del self._line[key]

    def removed(self, key: Hashable) -> None:
        if key in self._line:
            del self._line[key]
        elif key in self._held:
            self._held.remove(key)
        else:
            raise unknown(key)


class _TwoLines(Evictor):
    """Entries used once in the first line, others in the second; each with its size."""

    def __init__(self, capacity: int | float) -> None:
        super().__init__(capacity)
        self._lines: tuple[OrderedDict[Hashable, int | float], ...] = OrderedDict(), OrderedDict()
        self._held: dict[Hashable, tuple[int, int | float]] = {}  # the line, and the size
        self._sizes: list[int | float] = [0, 0]  # of each line, with those held

    def __contains__(self, key: Hashable) -> bool:
        return key in self._lines[0] or key in self._lines[1] or key in self._held

    def __len__(self) -> int:
        return len(self._lines[0]) + len(self._lines[1]) + len(self._held)

    def _insert(self, key: Hashable, size: int | float, line: int) -> None:
        self._lines[line][key] = size
        self._sizes[line] += size

    def touch(self, key: Hashable) -> None:
        once, again = self._lines
        if key in again:
            again.move_to_end(key)
            return
        if key in once:
            again[key] = size = once.pop(key)
        elif key in self._held:
            line, size = self._held[key]
            if line == 1:
                return
            self._held[key] = 1, size
        else:
            raise unknown(key)
        self._sizes[0] -= size
        self._sizes[1] += size
        self._balance()

    def update(self, key: Hashable, size: int | float = 1, cost: int | float = 1.0) -> None:
        check_known(self, key, size, cost)
        if key in self._held:
            line, old = self._held[key]
            self._held[key] = line, size
        else:
            line = self._line_of(key)
            old = self._lines[line][key]
            self._lines[line][key] = size
        self._sizes[line] += size - old
        self._balance()

    def hold(self, key: Hashable) -> None:
        line = self._line_of(key)
        self._held[key] = line, self._lines[line].pop(key)

    def release(self, key: Hashable) -> None:
        if key not in self._held:
            raise not_held(key) if key in self else unknown(key)
        line, size = self._held.pop(key)
        self._lines[line][key] = size
        self._balance()

    def removed(self, key: Hashable) -> None:
        if key in self._held:
            line, size = self._held.pop(key)
        else:
            line = self._line_of(key)
            size = self._lines[line].pop(key)
        self._sizes[line] -= size

    def evicted(self, key: Hashable) -> None:
        line = self._line_of(key)
        self._sizes[line] -= self._lines[line].pop(key)

    def _line_of(self, key: Hashable) -> int:
        """The line of an entry that is not held."""
        for line, entries in enumerate(self._lines):
            if key in entries:
                return line
        raise is_held(key) if key in self._held else unknown(key)

    def _first(self, *order: int) -> Hashable:
        """The oldest entry of the first of these lines that has one."""
        for line in order:
            for key in self._lines[line]:
                return key
        raise none_can_go(len(self._held))

    def _balance(self) -> None:
        """Called when the second line has grown."""


class _Segmented(_TwoLines):
    """Two lines, the second no longer than its share."""

    def __init__(self, capacity: int | float, protected: int | float) -> None:
        super().__init__(capacity)
        self._protected = protected

    def add(self, key: Hashable, size: int | float = 1, cost: int | float = 1.0) -> None:
        check_new(self, key, size, cost)
        self._insert(key, size, 0)

    def victim(self) -> Hashable:
        return self._first(0, 1)

    def resize(self, capacity: int | float) -> None:
        super().resize(capacity)
        self._balance()

    def _balance(self) -> None:
        once, again = self._lines
        while self._sizes[1] > self._protected * self.capacity and again:
            key, size = again.popitem(last=False)
            once[key] = size
            self._sizes[0] += size
            self._sizes[1] -= size


class _Adaptive(_TwoLines):
    """The paper's T1 and T2 are the lines, B1 and B2 the ghosts, and p the target."""

    def __init__(self, capacity: int | float) -> None:
        super().__init__(capacity)
        self._ghosts: tuple[OrderedDict[Hashable, int | float], ...] = OrderedDict(), OrderedDict()
        self._ghost_sizes: list[int | float] = [0, 0]
        self._target: int | float = 0  # of the first line's size
        self._learnt: set[Hashable] = set()  # ghosts that were expected since they went
        self._frequent = False  # whether the one expected is a ghost of the second line

    def expect(self, key: Hashable) -> None:
        line = self._ghost_line(key)
        self._frequent = line == 1
        if line is None or key in self._learnt:
            return
        self._learnt.add(key)
        mine, other = self._ghost_sizes[line], self._ghost_sizes[1 - line]
        step = self._ghosts[line][key] * max(1, other / mine)
        target = self._target + (step if line == 0 else -step)
        self._target = min(max(target, 0), self.capacity)

    def add(self, key: Hashable, size: int | float = 1, cost: int | float = 1.0) -> None:
        check_new(self, key, size, cost)
        self.expect(key)
        self._frequent = False
        line = self._ghost_line(key)
        if line is not None:
            self._forget(line, key)
        self._insert(key, size, 0 if line is None else 1)
        once, again = self._ghosts
        while once and self._sizes[0] + self._ghost_sizes[0] > self.capacity:
            self._forget(0, next(iter(once)))
        while again and sum(self._sizes) + sum(self._ghost_sizes) > 2 * self.capacity:
            self._forget(1, next(iter(again)))

    def victim(self) -> Hashable:
        first = self._sizes[0]
        if first > self._target or (self._frequent and first == self._target):
            return self._first(0, 1)
        return self._first(1, 0)

    def evicted(self, key: Hashable) -> None:
        line = self._line_of(key)
        size = self._lines[line][key]
        super().evicted(key)
        self._ghosts[line][key] = size
        self._ghost_sizes[line] += size

    def resize(self, capacity: int | float) -> None:
        super().resize(capacity)
        self._target = min(self._target, capacity)

    def _ghost_line(self, key: Hashable) -> int | None:
        return next((line for line, ghosts in enumerate(self._ghosts) if key in ghosts), None)

    def _forget(self, line: int, key: Hashable) -> None:
        self._ghost_sizes[line] -= self._ghosts[line].pop(key)
        self._learnt.discard(key)
