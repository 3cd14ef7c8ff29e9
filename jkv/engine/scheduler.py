"""Who is next, who runs, and what each holds: the host's bookkeeping, without JAX."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable
from typing import Any

import numpy as np

from jkv.engine.request import Request


class Queue:
    """Waiting requests by rank, the lowest first; removal in O(log n)."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self._there: set[Request] = set()

    def push(self, request: Request) -> None:
        """One more."""
        heapq.heappush(self._heap, (request.rank, request.number, request))
        self._there.add(request)

    def pop(self) -> Request:
        """The next one, taken out."""
        while True:
            request = heapq.heappop(self._heap)[2]
            if request in self._there:
                self._there.remove(request)
                return request

    def remove(self, request: Request) -> None:
        """Take it out, wherever it is."""
        self._there.remove(request)
        # What has been removed stays in the heap until its turn, or until it is most of it.
        if len(self._heap) > 2 * len(self._there) + 16:
            self._heap = [entry for entry in self._heap if entry[2] in self._there]
            heapq.heapify(self._heap)

    def __contains__(self, request: Request) -> bool:
        return request in self._there

    def __len__(self) -> int:
        return len(self._there)


class Tally:
    """What is counted of each lane, side by side: a step looks at hundreds of them at once.

    Attributes:
        number: of who sits there, 0 for nobody; nobody gets one twice.
        speaking: its prompt is in the cache, and what follows is the answer.
        watched: somebody wants to hear of each of its tokens.
        fresh: nobody has heard of it yet.
        base: tokens in the cache if it had been asked for none.
        limit: tokens that it may say.
        asked: those that it has been asked for.
        said: those that have been read.
        reserved: tokens that it has pages for.
    """

    def __init__(self, lanes: int) -> None:
        self.number = np.zeros(lanes, np.int64)
        self.speaking, self.watched, self.fresh = np.zeros((3, lanes), bool)
        self.base, self.limit, self.asked, self.said, self.reserved = np.zeros((5, lanes), np.int64)

    def clear(self, lane: int) -> None:
        """Nobody sits there."""
        for values in vars(self).values():
            values[lane] = 0

    def wants(self) -> np.ndarray:
        """Lanes that may say more than they have been asked for, ``[W]``."""
        return self.speaking & (self.asked < self.limit)

    def bounds(self, more: int) -> np.ndarray:
        """Tokens in the cache, at most, once each has been asked for `more`, ``[W]``."""
        return self.base + np.minimum(self.asked + more, self.limit)


@dataclasses.dataclass(eq=False)
class Seat:
    """A request in a lane."""

    request: Request
    lane: int
    tally: Tally
    held: Any  # its sequences in the page pools, one per group of layers
    target: int  # tokens that are to be in the cache before it says any
    ahead: int = 1  # 1 where its first token comes of the prefill, and is not in the cache yet
    cached: int = 0  # of its target, those that have been dispatched
    shown: int = 0  # and how many of them others can find
    columns: list[int] = dataclasses.field(default_factory=list)  # of its tables, on the device

    def sit(self, number: int, limit: int) -> None:
        """Be counted, by a number of its own; it may say so many tokens."""
        tally, lane = self.tally, self.lane
        tally.number[lane], tally.limit[lane] = number, limit
        tally.base[lane] = self.target - self.ahead
        tally.fresh[lane] = True
        tally.watched[lane] = bool(self.request.stop_strings or self.request.on_token)
        tally.speaking[lane] = not self.reading

    @property
    def reading(self) -> bool:
        """Whether it is still at its prompt."""
        return self.cached < self.target

    def filled(self) -> int:
        """Tokens in the cache, with those that it has been asked for."""
        if self.reading:
            return self.cached
        return int(self.tally.base[self.lane] + self.tally.asked[self.lane])

    def written(self) -> int:
        """Tokens in the cache, by what has been read."""
        if self.reading:
            return self.cached
        return int(self.tally.base[self.lane] + self.tally.said[self.lane])


def shared_ahead(history: np.ndarray, tenant: str, seats: Iterable[Seat | None], page: int) -> bool:
    """Whether someone is just reading pages that this prompt begins with too.

    It is worth a few steps' wait: the pages are then found instead of computed twice.
    """
    for seat in seats:
        if seat is None or seat.shown == seat.target or seat.request.tenant != tenant:
            continue
        other = seat.request.history[: seat.target]
        most = min(len(history) - 1, len(other))
        same = history[:most] == other[:most]
        common = most if same.all() else int(np.argmin(same))
        if seat.shown < common // page * page:
            return True
    return False
