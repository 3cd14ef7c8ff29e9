"""What an operation of a policy costs; for a process of its own, without the tests' checks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from jkv.store.policy import *  # noqa: F403
from jkv.store.policy import Policy
from tests.counting import bytecodes


def requests(policy: Policy, entries: int) -> Callable[[], None]:
    """Fill a tier, and return a function that serves it five requests, one of which evicts.

    What hits came just now: with any entry of a million, the processor's memory is measured.
    """
    evictor = policy.start(entries)
    for i in range(entries):
        evictor.add(i, cost=i * 2654435761 % 1009)
    for i in range(entries):  # not all alike
        if i % 3:
            evictor.touch(i)
    numbers = itertools.count(entries)

    def serve() -> None:
        new = next(numbers)
        evictor.evicted(evictor.victim())
        evictor.add(new, cost=new * 2654435761 % 1009)
        for _ in range(4):
            evictor.touch(new)
            evictor.hold(new)
            evictor.release(new)

    return serve


def counted(policy: Policy, entries: int, rounds: int = 300) -> float:
    """Return the bytecodes of five requests; what runs in C counts as one."""
    serve = requests(policy, entries)
    return bytecodes(lambda: [serve() for _ in range(rounds)]) / rounds


def timed(policy: Policy, entries: int, rounds: int = 200, repeats: int = 5) -> float:
    """Return the seconds of this process for five requests, where they are fewest."""
    serve = requests(policy, entries)
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(rounds):
            serve()
        best = min(best, time.process_time() - start)
    return best / rounds
