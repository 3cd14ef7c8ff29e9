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


@dataclasses.dataclass(eq=False)
class Seat:
    """A request in a lane."""

    request: Request
    lane: int
    held: Any  # its sequences in the page pools, one per group of layers
    target: int  # tokens that are to be in the cache before it says any
    cached: int  # how many of them have been dispatched
    shown: int = 0  # and how many of them others can find
    ahead: int = 1  # 1 where its first token comes of the prefill, and is not in the cache yet
    limit: int = 0  # tokens that it may say from here
    asked: int = 0  # tokens that it has been asked for
    said: int = 0  # those that have been read
    reserved: int = 0  # tokens that it has pages for
    columns: list[int] = dataclasses.field(default_factory=list)  # of its tables, on the device

    @property
    def reading(self) -> bool:
        """Whether it is still at its prompt."""
        return self.cached < self.target

    def wants(self) -> bool:
        """Whether it may say more than it has been asked for."""
        return self.asked < self.limit

    def bound(self, more: int) -> int:
        """Tokens in the cache, at most, once it has been asked for `more`."""
        return self.target + min(self.asked + more, self.limit) - self.ahead

    def filled(self) -> int:
        """Tokens in the cache, with those that it has been asked for."""
        return self.cached if self.reading else self.bound(0)

    def written(self) -> int:
        """Tokens in the cache, by what has been read."""
        return self.cached if self.reading else self.target + self.said - self.ahead


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
