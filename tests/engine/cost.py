"""What a request costs in a pool; for a process of its own, without the tests' checks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from jkv.engine.page_pool import PagePool
from tests.counting import bytecodes

PAGE = 16
PROMPT = 128


def requests(pages: int) -> Callable[[], None]:
    """Fill a pool, and return a function that serves it one more request.

    Each has half of its prompt in common with the others, and evicts what is new in it; it is
    forked, and both write.
    """
    pool = PagePool(pages=pages, page=PAGE)
    for i in range(pages // (PROMPT // PAGE)):
        seq = pool.sequence()
        seq.reserve(PROMPT)
        seq.publish([i] * PROMPT)
        seq.close()
    common = list(range(PROMPT // 2))
    numbers = itertools.count(pages)

    def serve() -> None:
        tokens = common + [next(numbers)] * (PROMPT // 2)
        seq = pool.sequence()
        seq.match(tokens, limit=PROMPT - 1)
        pool.needs(seq, PROMPT)
        seq.reserve(PROMPT)
        seq.publish(tokens)
        for length in range(PROMPT + 1, PROMPT + 9):
            seq.reserve(length)
        other = seq.fork()
        for length in range(PROMPT + 9, PROMPT + 17):
            seq.reserve(length)
            other.reserve(length)
        other.crop(PROMPT + 3)
        other.close()
        seq.drop_before(PROMPT // 2)
        seq.close()

    return serve


def counted(pages: int, rounds: int = 50) -> float:
    """Return the bytecodes of one request."""
    serve = requests(pages)
    return bytecodes(lambda: [serve() for _ in range(rounds)]) / rounds


def timed(pages: int, rounds: int = 100, repeats: int = 7) -> float:
    """Return the seconds of this process for one request, where they are fewest."""
    serve = requests(pages)
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(rounds):
            serve()
        best = min(best, time.process_time() - start)
    return best / rounds
