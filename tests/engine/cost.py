"""What a request costs in a pool; for a process of its own, without the tests' checks."""

from __future__ import annotations

import time

from jkv.engine.pool import PagePool

PAGE = 16
PROMPT = 128


def cost(pages: int, rounds: int = 100, repeats: int = 7) -> float:
    """Seconds for one request in a pool that is full of what went before.

    Each has half of its prompt in common with the others, and evicts what is new in it; it is
    forked, and both write.
    """
    pool = PagePool(pages=pages, page=PAGE)
    blocks = PROMPT // PAGE
    for i in range(pages // blocks):
        seq = pool.sequence()
        seq.reserve(PROMPT)
        seq.publish([i] * PROMPT)
        seq.close()
    common = list(range(PROMPT // 2))
    best = float("inf")
    number = pages
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(rounds):
            number += 1
            tokens = common + [number] * (PROMPT // 2)
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
        best = min(best, time.process_time() - start)
    return best / rounds


def ratio(pages: int, bound: float) -> float:
    """How much more it is than with 1000 pages; measured once more where that is too much."""
    measured = float("inf")
    for _ in range(2):
        if measured > bound:
            measured = min(measured, cost(pages) / cost(1000))
    return measured
