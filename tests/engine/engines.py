"""Small engines, and prompts for them."""

from __future__ import annotations

import numpy as np

import jkv

PAGE = 4
SHAPE = {"page": PAGE, "max_batch": 4, "block": 2, "prefill_chunk": 8, "prefill_rows": 2}
HOT = jkv.sampling.temperature(1.5)
PUSHED = jkv.sampling.chain(jkv.sampling.repetition_penalty(1.7), jkv.sampling.greedy())
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 11, n).tolist() for n in (1, 3, 4, 5, 8, 9, 13, 21, 2, 16, 7, 30)]


def make_engine(lm, pages=64, **changes):
    return jkv.Engine(lm, pages=pages, **(SHAPE | changes))


def check_empty(engine):
    figures = engine.stats()
    assert (figures["running"], figures["waiting"]) == (0, 0)
    pages = figures["pages"]
    assert pages["used"] == 0
    assert pages["free"] + pages["cached"] == pages["pages"]
    assert figures["swapped_bytes"] == 0
    for pool in engine.core.pages.pools:
        pool.check()
