"""What one operation of a policy costs; for a process of its own, without the tests' checks."""

from __future__ import annotations

import time

from jkv.store.policy import *  # noqa: F403
from jkv.store.policy import Policy


def cost(policy: Policy, entries: int, rounds: int = 1000, repeats: int = 5) -> float:
    """Seconds for five requests with so many entries, one of which misses and evicts.

    What hits came just now: with any entry of a million, the processor's memory is measured.
    """
    evictor = policy.start(entries)
    for i in range(entries):
        evictor.add(i, cost=i * 2654435761 % 1009)
    for i in range(entries):  # not all alike
        if i % 3:
            evictor.touch(i)
    best = float("inf")
    new = entries
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(rounds):
            evictor.evicted(evictor.victim())
            evictor.add(new, cost=new * 2654435761 % 1009)
            for _ in range(4):
                evictor.touch(new)
                evictor.hold(new)
                evictor.release(new)
            new += 1
        best = min(best, time.process_time() - start)
    return best / rounds


def ratio(policy: Policy, entries: int, bound: float) -> float:
    """How much more it is than with 1000 entries; measured once more where that is too much."""
    measured = float("inf")
    for _ in range(2):
        if measured > bound:
            measured = min(measured, cost(policy, entries) / cost(policy, 1000))
    return measured
