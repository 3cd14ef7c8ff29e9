"""Sequences that run: a request in a lane with its page tables, and the counts of all lanes."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np

from jkv.engine.page_pool import PageSequence
from jkv.engine.request import Request


class SequenceTable:
    """The counts of all lanes, one array per count: a step updates hundreds of lanes at once.

    Attributes:
        ids: of the sequence in each lane, 0 for none; no id is used twice.
        bulk_ids: the same, but 0 while the first token is outstanding, and for requests whose
            tokens are looked at one by one.
        lengths: tokens in the cache once all scheduled steps are done.
        remaining: tokens that may still be scheduled; 0 until the prompt is in the cache.
        generated: tokens that have been read.
        reserved: slots of the pages that the sequence holds.
        tokens: ``[context, W]`` int32, the generated tokens, until the request collects them.
        lock: held while tokens are collected into a request.
    """

    def __init__(self, lanes: int, context: int) -> None:
        self._counts = np.zeros((6, lanes), np.int64)
        self.ids, self.bulk_ids, self.lengths, self.remaining, *rest = self._counts
        self.generated, self.reserved = rest
        self.tokens = np.zeros((context, lanes), np.int32)
        self.lock = threading.RLock()

    def clear(self, lane: int) -> None:
        """Mark a lane as free."""
        self._counts[:, lane] = 0

    def lengths_after(self, block: int) -> np.ndarray:
        """Return the tokens in the cache after `block` more of each lane, at most, ``[W]``."""
        return self.lengths + np.minimum(self.remaining, block)

    def advance(self, block: int) -> np.ndarray:
        """Schedule `block` tokens, or what remains, of each lane that may generate; those lanes."""
        lanes = self.remaining.nonzero()[0]
        scheduled = np.minimum(self.remaining, block)
        self.lengths += scheduled
        self.remaining -= scheduled
        return lanes

    def append(self, lanes: np.ndarray, tokens: np.ndarray) -> None:
        """Append generated tokens ``[N, n]`` to these lanes."""
        generated = self.generated[lanes]
        for i, column in enumerate(tokens.T):
            self.tokens[generated + i, lanes] = column
        # Last: another thread may be reading.
        self.generated[lanes] = generated + tokens.shape[1]


@dataclasses.dataclass(eq=False, slots=True)
class RunningSequence:
    """A request in a lane, and the pages that it holds.

    Attributes:
        request: whose tokens these are.
        lane: its row of the decode state.
        table: with the counts of the lane.
        page_tables: its sequence in each page pool, one per group of layers.
        target: tokens to be in the cache before it generates.
        pending: 1 where the first token comes from the prefill and is not in the cache yet, else 0.
        cached: tokens of the target that are in the cache or have been dispatched.
        published: tokens of the target whose pages other requests can find.
        limit: tokens that it may generate.
        earlier: tokens of its request that were generated before it got the lane.
    """

    request: Request
    lane: int
    table: SequenceTable
    page_tables: list[PageSequence]
    target: int
    pending: int = 1
    cached: int = 0
    published: int = 0
    limit: int = 0
    earlier: int = 0

    def start(self, number: int) -> None:
        """Fill in the counts of the lane, under an id of its own."""
        table, lane = self.table, self.lane
        self.earlier = len(self.request.tokens)
        self.limit = self.request.max_new_tokens - self.earlier
        table.ids[lane], table.lengths[lane] = number, self.cached
        table.remaining[lane] = 0 if self.in_prefill else self.limit

    def advance_prefill(self, stop: int) -> None:
        """Count `stop` tokens of the target as dispatched; the last of them yields a token."""
        self.cached = self.table.lengths[self.lane] = stop
        if not self.in_prefill:
            self.table.remaining[self.lane] = self.limit - 1

    def collect(self) -> None:
        """Move the lane's generated tokens into the request's list; any thread may call it."""
        table, generated = self.table, self.request.generated
        with table.lock:
            # A watched request gets its tokens one by one, each after it was looked at.
            if self.request.sequence is self and not self.request.watched:
                done, count = len(generated) - self.earlier, int(table.generated[self.lane])
                if done < count:
                    # Assigned, not appended: repeated after an interrupt it does no harm.
                    new = table.tokens[done:count, self.lane].tolist()
                    generated[self.earlier + done :] = new

    def detach(self) -> None:
        """Collect the tokens, and take the request out of the lane."""
        with self.table.lock:
            self.collect()
            if self.request.sequence is self:
                self.request.sequence = None

    @property
    def in_prefill(self) -> bool:
        """Whether part of its target has not been dispatched."""
        return self.cached < self.target

    @property
    def written(self) -> int:
        """Tokens in the cache, by what has been read."""
        if self.in_prefill:
            return self.cached
        return self.target - self.pending + int(self.table.generated[self.lane])
