"""Policies whose entries have a rank that never falls while they stay: LFU and CostAware."""

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


class _Ranked(Evictor):
    """Rank: the worth of all uses, above the rank of what went last.

    Entries of one rank stand in a line, the longest unused first. The heap has nothing but numbers:
    with a million entries that takes half the time of pairs, which lie scattered in memory.
    """

    def __init__(self, capacity: int | float, *, aging: bool, by_cost: bool) -> None:
        super().__init__(capacity)
        self._aging = aging
        self._by_cost = by_cost
        self._floor: int | float = 0
        self._entries: dict[Hashable, _Entry] = {}
        self._lines: dict[int | float, OrderedDict[Hashable, None]] = {}  # none is empty
        self._heap: list[int | float] = []  # the ranks of all lines, and of some that are gone

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: Hashable, size: int | float = 1, cost: int | float = 1.0) -> None:
        check_new(self, key, size, cost)
        entry = self._entries[key] = _Entry(cost / size if self._by_cost else 1)
        self._place(key, entry)

    def touch(self, key: Hashable) -> None:
        entry = self._get(key)
        entry.uses += 1
        if not entry.held:
            self._take(key, entry)
            self._place(key, entry)

    def update(self, key: Hashable, size: int | float = 1, cost: int | float = 1.0) -> None:
        check_known(self, key, size, cost)
        if self._by_cost:
            entry = self._entries[key]
            entry.worth = cost / size
            if not entry.held:
                self._take(key, entry)
                self._place(key, entry)

    def hold(self, key: Hashable) -> None:
        entry = self._get(key)
        if entry.held:
            raise is_held(key)
        self._take(key, entry)
        entry.held = True

    def release(self, key: Hashable) -> None:
        entry = self._get(key)
        if not entry.held:
            raise not_held(key)
        entry.held = False
        self._place(key, entry)

    def victim(self) -> Hashable:
        while self._heap:
            line = self._lines.get(self._heap[0])
            if line is not None:
                return next(iter(line))
            heapq.heappop(self._heap)
        raise none_can_go(len(self._entries))

    def evicted(self, key: Hashable) -> None:
        entry = self._get(key)
        if entry.held:
            raise is_held(key)
        if self._aging:
            self._floor = max(self._floor, entry.rank)
        self.removed(key)

    def removed(self, key: Hashable) -> None:
        entry = self._get(key)
        if not entry.held:
            self._take(key, entry)
        del self._entries[key]

    def _get(self, key: Hashable) -> _Entry:
        entry = self._entries.get(key)
        if entry is None:
            raise unknown(key)
        return entry

    def _place(self, key: Hashable, entry: _Entry) -> None:
        rank = entry.rank = self._floor + entry.uses * entry.worth
        line = self._lines.get(rank)
        if line is None:
            line = self._lines[rank] = OrderedDict()
            heapq.heappush(self._heap, rank)
            if len(self._heap) > 2 * len(self._lines) + 64:
                self._heap = list(self._lines)
                heapq.heapify(self._heap)
        line[key] = None

    def _take(self, key: Hashable, entry: _Entry) -> None:
        line = self._lines[entry.rank]
        del line[key]
        if not line:
            del self._lines[entry.rank]


class _Entry:
    """What a rank is made of."""

    __slots__ = "held", "rank", "uses", "worth"

    def __init__(self, worth: int | float) -> None:
        self.worth = worth  # of one use
        self.uses = 1
        self.rank: int | float = 0
        self.held = False
