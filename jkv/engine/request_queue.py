"""The requests that have not ended, and the order in which those that wait are served."""

from __future__ import annotations

import heapq
import weakref

from jkv.engine.request import WAITING, Reader, Request


class RequestQueue:
    """The requests that have not ended, and which of the waiting ones is next.

    `live` is the only truth, changed by one operation at a time. The order is a heap that may also
    hold requests that have ended or that run.

    Attributes:
        live: requests by number.
        readers: iterations over tokens, and the request of each.
    """

    def __init__(self) -> None:
        self.live: dict[int, Request] = {}
        self.readers: dict[weakref.ref[Reader], Request] = {}
        self._heap: list[tuple[int, int, Request]] = []
        self._partial = False  # the heap may lack some of the waiting requests

    def add(self, requests: list[Request]) -> None:
        """Queue new requests: all of them or, if interrupted, none or all."""
        before, self._partial = self._partial, True
        self.live.update({request.number: request for request in requests})
        for request in requests:
            self.push(request)
        self._partial = before  # what an interrupted call left out is still missing

    def push(self, request: Request) -> None:
        """Put a waiting request into the order."""
        heapq.heappush(self._heap, (request.rank, request.number, request))

    def pop(self) -> Request | None:
        """Take the next waiting request out of the order; None without one."""
        # Requests that have ended stay in the heap until their turn, or until they are most of it.
        if self._partial or len(self._heap) > 2 * len(self.live) + 16:
            self.rebuild()
        while self._heap:
            request = heapq.heappop(self._heap)[2]
            if request.number in self.live and request.state == WAITING:
                return request
        return None

    def rebuild(self) -> None:
        """Make the order anew of the requests that wait."""
        waiting = [r for r in list(self.live.values()) if r.state == WAITING]
        heap = [(request.rank, request.number, request) for request in waiting]
        heapq.heapify(heap)
        self._heap, self._partial = heap, False

    def abandoned(self) -> list[Request]:
        """Return the requests that have not ended and whose iteration is gone.

        They are cancelled as it goes, unless an interrupt comes first, which Python swallows there.
        """
        found = []
        for reader, request in list(self.readers.items()):
            if request.endings:
                self.readers.pop(reader, None)
            elif reader() is None:
                found.append(request)
        return found

    def discard(self, number: int) -> None:
        """Remove a request that has ended."""
        self.live.pop(number, None)
