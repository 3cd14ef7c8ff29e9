"""Who is next, who runs, and what each holds: the host's bookkeeping, without JAX."""

from __future__ import annotations

import dataclasses
import heapq
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np

from jkv.engine.request import WAITING, Request


class RequestQueue:
    """The requests that have not ended, and which of them is next.

    `live` is the only truth, changed by one operation at a time; the order is a heap that may also
    hold requests that have ended, or run, or never were.

    Attributes:
        live: by number.
        readers: iterations over tokens, and the request of each.
    """

    def __init__(self) -> None:
        self.live: dict[int, Request] = {}
        self.readers: dict[weakref.ref[Any], Request] = {}
        self._heap: list[tuple[int, int, Request]] = []
        self._partial = False  # the heap may lack some of those that wait

    def add(self, requests: list[Request]) -> None:
        """Queue new requests, all of them or, interrupted, none."""
        before, self._partial = self._partial, True
        self.live.update({request.number: request for request in requests})
        for request in requests:
            self.push(request)
        self._partial = before  # what an interrupted one left out is still missing

    def push(self, request: Request) -> None:
        """Put a request that waits into the order."""
        heapq.heappush(self._heap, (request.rank, request.number, request))

    def pop(self) -> Request | None:
        """Take the waiting request that is next out of the order, None without one."""
        # What has ended stays in the heap until its turn, or until it is most of it.
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

    def deserted(self) -> list[Request]:
        """Return the requests of which an iteration was left, and that have not ended.

        The iteration's finaliser cancels them too, unless an interrupt comes first, which Python
        swallows there.
        """
        found = []
        for reader, request in list(self.readers.items()):
            if request.endings:
                self.readers.pop(reader, None)
            elif reader() is None:
                found.append(request)
        return found

    def discard(self, number: int) -> None:
        """Let go of one that has ended."""
        self.live.pop(number, None)


class SequenceTable:
    """What is counted of each lane, side by side: a step looks at hundreds of them at once.

    Attributes:
        number: of who sits there, 0 for nobody; nobody gets one twice.
        quiet: the same, but 0 where nobody has heard of it yet, or wants to hear of each token.
        filled: tokens in the cache, with those that it has been asked for.
        left: tokens that it may still be asked for; none before its prompt is in the cache.
        said: tokens that have been read.
        reserved: tokens that it has pages for.
        known: and for how many the device knows them.
        tokens: ``[context, W]`` int32, what has been said, where its request has not taken it.
        lock: held by who takes tokens to a request.
    """

    def __init__(self, lanes: int, context: int) -> None:
        self._counts = np.zeros((7, lanes), np.int64)
        self.number, self.quiet, self.filled, self.left, *rest = self._counts
        self.said, self.reserved, self.known = rest
        self.tokens = np.zeros((context, lanes), np.int32)
        self.lock = threading.RLock()

    def clear(self, lane: int) -> None:
        """Nobody sits there."""
        self._counts[:, lane] = 0

    def bounds(self, more: int) -> np.ndarray:
        """Tokens in the cache, at most, once each has been asked for `more`, ``[W]``."""
        return self.filled + np.minimum(self.left, more)

    def ask(self, more: int) -> np.ndarray:
        """Lanes that may say more, in order; each is asked for so many, or what it has left."""
        lanes = self.left.nonzero()[0]
        asked = np.minimum(self.left, more)
        self.filled += asked
        self.left -= asked
        return lanes

    def hear(self, lanes: np.ndarray, tokens: np.ndarray) -> None:
        """These lanes said so many more each, ``[N, n]``."""
        said = self.said[lanes]
        for i, column in enumerate(tokens.T):
            self.tokens[said + i, lanes] = column
        # Only now: another thread may be reading.
        self.said[lanes] = said + tokens.shape[1]


@dataclasses.dataclass(eq=False, slots=True)
class RunningSequence:
    """A request in a lane."""

    request: Request
    lane: int
    tally: SequenceTable
    held: Any  # its sequences in the page pools, one per group of layers
    target: int  # tokens that are to be in the cache before it says any
    ahead: int = 1  # 1 where its first token comes of the prefill, and is not in the cache yet
    cached: int = 0  # of its target, those that have been dispatched
    shown: int = 0  # and how many of them others can find
    limit: int = 0  # tokens that it may say
    before: int = 0  # tokens of its request that were said before it sat down

    def sit(self, number: int, limit: int) -> None:
        """Be counted, by a number of its own; it may say so many tokens."""
        tally, lane = self.tally, self.lane
        self.limit, self.before = limit, len(self.request.tokens)
        tally.number[lane], tally.filled[lane] = number, self.cached
        tally.left[lane] = 0 if self.reading else limit

    def absorbed(self, upto: int) -> None:
        """So much of its target has been dispatched; with the last of it comes its first token."""
        self.cached = self.tally.filled[self.lane] = upto
        if not self.reading:
            self.tally.left[self.lane] = self.limit - 1

    def settle(self) -> None:
        """What has been said in its lane into the request's list; any thread may ask for it."""
        tally, heard = self.tally, self.request.heard
        with tally.lock:
            # Watched tokens come one by one, each after it was looked at.
            if self.request.seat is self and not self.request.watched:
                done, said = len(heard) - self.before, int(tally.said[self.lane])
                if done < said:
                    # Not appended: who interrupts this and asks for the same does no harm.
                    heard[self.before + done :] = tally.tokens[done:said, self.lane].tolist()

    def part(self) -> None:
        """The request has what was said here, and will hear no more of this lane."""
        with self.tally.lock:
            self.settle()
            if self.request.seat is self:
                self.request.seat = None

    @property
    def reading(self) -> bool:
        """Whether it is still at its prompt."""
        return self.cached < self.target

    def filled(self) -> int:
        """Tokens in the cache, with those that it has been asked for."""
        return int(self.tally.filled[self.lane])

    def written(self) -> int:
        """Tokens in the cache, by what has been read."""
        if self.reading:
            return self.cached
        return self.target - self.ahead + int(self.tally.said[self.lane])


def shared_ahead(
    history: np.ndarray, tenant: str, seats: Iterable[RunningSequence | None], page: int
) -> bool:
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
