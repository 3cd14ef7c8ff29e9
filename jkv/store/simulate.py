"""What a store of a given size would have found: policies over a trace, beside the optimum.

A trace is a list of requests. A request is an entry by its key, which may grow from one request to
the next as a conversation does; or a list of token ids, cut into blocks that are found by all
tokens up to their ends, as in the page pool. Nothing is stored but sizes: a trace of a million
requests takes seconds.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jkv._text import brief
from jkv.store import digest
from jkv.store.policy import Evictor, Policy

OPTIMUM = "optimum"


@dataclasses.dataclass(frozen=True)
class TraceBlock:
    """What is stored and found as a whole.

    Attributes:
        key: equal for equal contents.
        tokens: in it.
        nbytes: that it takes.
        cost: of making it again, say in seconds.
    """

    key: Hashable
    tokens: int
    nbytes: int
    cost: int | float


@dataclasses.dataclass(frozen=True)
class TraceRequest:
    """What is asked for at once.

    Attributes:
        blocks: in order: one is of use where all before it are found.
        tokens: asked for; those past the last block are never found.
        nbytes: that they take.
        cost: of making all of it.
    """

    blocks: tuple[TraceBlock, ...]
    tokens: int
    nbytes: int
    cost: int | float


@dataclasses.dataclass
class Outcome:
    """What was found of what was asked for.

    Attributes:
        policy: its name.
        capacity: in bytes.
        tokens: found.
        nbytes: found.
        cost: spared.
        asked: the same of all that was asked for.
        evicted: blocks.
    """

    policy: str
    capacity: int
    tokens: int = 0
    nbytes: int = 0
    cost: int | float = 0
    asked: tuple[int, int, int | float] = (0, 0, 0)
    evicted: int = 0

    @property
    def token_hit_rate(self) -> float:
        """The share of tokens that was found."""
        return _share(self.tokens, self.asked[0])

    @property
    def byte_hit_rate(self) -> float:
        """The share of bytes that was found."""
        return _share(self.nbytes, self.asked[1])

    @property
    def cost_saved(self) -> float:
        """The share of the cost that was spared."""
        return _share(self.cost, self.asked[2])

    def found(self, stored: TraceBlock, wanted: TraceBlock) -> None:
        """Count what was stored of a block, which may have grown since."""
        self.tokens += min(stored.tokens, wanted.tokens)
        self.nbytes += min(stored.nbytes, wanted.nbytes)
        self.cost += wanted.cost * min(1.0, stored.tokens / wanted.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "policy": self.policy,
            "capacity": self.capacity,
            "token_hit_rate": self.token_hit_rate,
            "byte_hit_rate": self.byte_hit_rate,
            "cost_saved": self.cost_saved,
            "evicted": self.evicted,
        }


def simulate(
    trace: Sequence[TraceRequest], policy: Policy | None, capacity: int, name: str = ""
) -> Outcome:
    """Simulate what a store of so many bytes finds with a policy; the optimum for None.

    A request's blocks stay while it is served. What does not fit beside them is not stored.

    Raises:
        ValueError: a capacity below 1.
    """
    asked = (
        sum(request.tokens for request in trace),
        sum(request.nbytes for request in trace),
        sum(request.cost for request in trace),
    )
    outcome = Outcome(name or (OPTIMUM if policy is None else str(policy)), capacity, asked=asked)
    if policy is None:
        _foresee(trace, capacity, outcome)
        return outcome
    tier = _SimulatedTier(policy.start(capacity), capacity, outcome)
    for request in trace:
        tier.serve(request)
    return outcome


class _SimulatedTier:
    """A store of nothing but sizes."""

    def __init__(self, evictor: Evictor, capacity: int, outcome: Outcome) -> None:
        self.evictor, self.capacity, self.outcome = evictor, capacity, outcome
        self.blocks: dict[Hashable, TraceBlock] = {}
        self.nbytes = 0

    def serve(self, request: TraceRequest) -> None:
        """Find what there is of a request, and store the rest."""
        held = []
        for block in request.blocks:
            if block.key not in self.blocks:
                break
            self.outcome.found(self.blocks[block.key], block)
            held.append(block.key)
        # As in the pool the last block first, so that the end of a chain is the first to go.
        for key in reversed(held):
            self.evictor.touch(key)
            self.evictor.hold(key)
        for block in request.blocks:
            if self._store(block):
                held.append(block.key)
        for key in reversed(held):
            if key in self.evictor:
                self.evictor.release(key)

    def _store(self, block: TraceBlock) -> bool:
        """Store a block, which may have grown; whether it is new and was stored."""
        stored = self.blocks.get(block.key)
        if block.nbytes > self.capacity or (stored and stored.nbytes == block.nbytes):
            return False
        if stored is None:
            self.evictor.expect(block.key)
        if not self._make_room(block.nbytes - (0 if stored is None else stored.nbytes)):
            return False
        self.blocks[block.key] = block
        if stored is not None:
            self.nbytes += block.nbytes - stored.nbytes
            self.evictor.update(block.key, block.nbytes, block.cost)
            return False
        self.nbytes += block.nbytes
        self.evictor.add(block.key, block.nbytes, block.cost)
        self.evictor.hold(block.key)
        return True

    def _make_room(self, nbytes: int) -> bool:
        while self.nbytes + nbytes > self.capacity:
            try:
                key = self.evictor.victim()
            except LookupError:
                return False
            self.evictor.evicted(key)
            self.nbytes -= self.blocks.pop(key).nbytes
            self.outcome.evicted += 1
        return True


def _foresee(trace: Sequence[TraceRequest], capacity: int, outcome: Outcome) -> None:
    """Follow Belady's optimum: what is needed again the latest is not kept, be it new.

    For entries of one size no policy finds more (Belady, "A Study of Replacement Algorithms for a
    Virtual-Storage Computer", 1966); for others it is what to compare with, and not a bound. Blocks
    count one by one: what is found behind a gap is counted too, which no policy can use.
    """
    if capacity < 1:
        raise ValueError(f"capacity got {capacity}; expected at least 1 byte")
    uses = [block for request in trace for block in request.blocks]
    following: list[float] = [math.inf] * len(uses)
    last: dict[Hashable, int] = {}
    for at in range(len(uses) - 1, -1, -1):
        following[at] = last.get(uses[at].key, math.inf)
        last[uses[at].key] = at
    stored: dict[Hashable, tuple[TraceBlock, float]] = {}  # with the next use
    farthest: list[tuple[float, int]] = []  # minus the next use, and the use before it
    nbytes = 0
    for at, block in enumerate(uses):
        if block.key in stored:
            before, _ = stored.pop(block.key)
            outcome.found(before, block)
            nbytes -= before.nbytes
        if following[at] == math.inf or block.nbytes > capacity:
            continue
        stored[block.key] = block, following[at]
        nbytes += block.nbytes
        heapq.heappush(farthest, (-following[at], at))
        while nbytes > capacity:
            when, which = heapq.heappop(farthest)
            key = uses[which].key
            if key in stored and stored[key][1] == -when:
                nbytes -= stored.pop(key)[0].nbytes
                outcome.evicted += which != at


def whole(trace: Iterable[TraceRequest]) -> int:
    """Count the bytes that hold all of a trace."""
    most: dict[Hashable, int] = {}
    for request in trace:
        for block in request.blocks:
            most[block.key] = max(block.nbytes, most.get(block.key, 0))
    return sum(most.values())


def needed(
    trace: Sequence[TraceRequest],
    policy: Policy | None,
    target: int | float,
    precision: float = 0.005,
) -> int | None:
    """Find about the smallest capacity that finds a share of the tokens; None if none does.

    Where a larger store finds less, which can happen with some policies, it is a capacity that does
    and below which one was seen that does not.

    Args:
        trace: the requests.
        policy: one of them, or None for the optimum.
        target: the share, above 0 and at most 1.
        precision: the answer may be too large by this share.

    Raises:
        ValueError: a target that is no such share.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target got {target}; expected a hit rate above 0 and at most 1")
    too_small, enough = 0, max(whole(trace), 1)
    if simulate(trace, policy, enough).token_hit_rate < target:
        return None
    while enough - too_small > max(1, precision * enough):
        middle = (too_small + enough) // 2
        if simulate(trace, policy, middle).token_hit_rate < target:
            too_small = middle
        else:
            enough = middle
    return enough


def read_trace(
    path: str | Path, *, block: int = 16, bytes_per_token: int = 1
) -> list[TraceRequest]:
    """Read the requests of a file with a JSON object per line.

    ``{"key": "chat-7", "tokens": 512}`` asks for an entry, ``{"tokens": [5, 6, ...]}`` for what is
    common with what was there before, of the same ``tenant`` where one is said. ``bytes`` and
    ``cost`` are those of all its tokens; without them a token takes `bytes_per_token` and costs 1.

    Args:
        path: the file.
        block: tokens that are stored and found together where ids are given.
        bytes_per_token: where a request does not say its bytes.

    Raises:
        ValueError: a line that is no such object, or sizes below 1.
    """
    if block < 1 or bytes_per_token < 1:
        raise ValueError(
            f"block={block}, bytes_per_token={bytes_per_token}; expected at least 1 of each"
        )
    trace = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    trace.append(_request(json.loads(line), block, bytes_per_token))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
    if not trace:
        raise ValueError(f"{path} has no requests; expected a JSON object per line")
    return trace


def _request(said: object, block: int, bytes_per_token: int) -> TraceRequest:
    if not isinstance(said, dict) or not said.keys() <= {
        *("key", "tokens", "bytes", "cost", "tenant")
    }:
        raise ValueError(
            f"got {brief(said)}; expected an object with key or tokens, and bytes, cost and tenant "
            "where wanted"
        )
    ids, tenant = said.get("tokens", 1), said.get("tenant", "")
    tokens = len(ids) if isinstance(ids, list) else ids
    nbytes = said.get("bytes", tokens * bytes_per_token if type(tokens) is int else 0)
    cost = said.get("cost", tokens)
    if type(tokens) is not int or tokens < 1 or type(nbytes) is not int or nbytes < 1:
        raise ValueError(
            f"got {brief(tokens)} tokens and {brief(nbytes)} bytes; expected whole numbers above 0"
        )
    if type(cost) not in (int, float) or not 0 <= cost < math.inf:
        raise ValueError(f"got a cost of {brief(cost)}; expected a number from 0")
    if not isinstance(tenant, str):
        raise ValueError(f"got the tenant {brief(tenant)}; expected a text")
    if "key" in said:
        if isinstance(ids, list) or not isinstance(said["key"], str | int):
            raise ValueError("with a key, which is a text or a number, tokens is their number")
        only = TraceBlock((tenant, said["key"]), tokens, nbytes, cost)
        return TraceRequest((only,), tokens, nbytes, cost)
    if not isinstance(ids, list):
        raise ValueError("got neither a key nor a list of tokens; expected one of them")
    if not all(type(token) is int for token in ids):
        raise ValueError(f"got the tokens {brief(ids)}; expected whole numbers")
    name, blocks = digest.root(tenant, block), []
    for end in range(block, tokens + 1, block):
        name = digest.chain(name, ids[end - block : end])
        # What is left of a division goes to the first blocks: together they take their share.
        taken = nbytes * end // tokens - nbytes * (end - block) // tokens
        blocks.append(TraceBlock(name, block, max(taken, 1), cost * block / tokens))
    return TraceRequest(tuple(blocks), tokens, nbytes, cost)


def _share(part: int | float, of: int | float) -> float:
    return part / of if of else 0.0
