"""The store in memory beside a dictionary and cachetools; and a first token from disk."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jkv
from jkv.models import Config, Rope
from jkv.store import Disk, Entry, Memory, Store

ENTRIES, LIMIT = 2000, 1000

LLAMA_42M = Config(
    vocab=32000,
    layers=8,
    width=512,
    heads=8,
    kv_heads=8,
    head_dim=64,
    feed_forward=1376,
    context=2048,
    rope=Rope(dims=64),
)


def operations(rounds: int = 7) -> list[dict[str, Any]]:
    """Operations per second: entries put with evictions, those read that are there, and not."""
    small = Entry({"x": np.zeros(64, np.uint8)}, {})
    keys = [f"sequence {i}" for i in range(ENTRIES)]
    absent = [f"other {i}" for i in range(ENTRIES)]
    ways: dict[str, Callable[[], tuple[Any, Any]]] = {"dict": _dictionary, "jkv.store": _store}
    if importlib.util.find_spec("cachetools"):
        ways["cachetools.LRUCache"] = _cachetools
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for way, make in ways.items():
            put, get = make()
            for what, call, asked in (
                ("put", lambda key, put=put: put(key, small), keys),
                ("get", get, keys[-LIMIT:] * 2),
                ("miss", get, absent),
            ):
                start = time.perf_counter()
                for key in asked:
                    call(key)
                seconds = time.perf_counter() - start
                times.setdefault((way, what), []).append(len(asked) / seconds)
    with Store(tiers=[Memory(max_entries=LIMIT)]) as store:
        batches = [keys[i : i + 50] for i in range(0, ENTRIES, 50)]
        for what, call in (
            ("put", lambda some: store.put_many(some, [small] * len(some))),
            ("get", store.get_many),
        ):
            start = time.perf_counter()
            for some in batches:
                call(some)
            rate = ENTRIES / (time.perf_counter() - start)
            times[("jkv.store, 50 at once", what)] = [rate]
    return [
        {"way": way, "what": what, "per_second": statistics.median(rates)}
        for (way, what), rates in times.items()
    ]


def _dictionary() -> tuple[Any, Any]:
    held: dict[str, Any] = {}
    return held.__setitem__, held.get


def _cachetools() -> tuple[Any, Any]:
    import cachetools

    held = cachetools.LRUCache(LIMIT)
    return held.__setitem__, held.get


def _store() -> tuple[Any, Any]:
    store = Store(tiers=[Memory(max_entries=LIMIT)])
    return store.put, store.get


def restart(path: Path, tokens: int = 1000, rounds: int = 5) -> dict[str, Any]:
    """Seconds to the first token after a prompt: computed, and from a directory written before.

    The model has 42M parameters; what is compiled is compiled before. Each round has a prompt of
    its own, and each store is opened anew on the directory.
    """
    model = jax.jit(lambda: jkv.Decoder(LLAMA_42M, rngs=nnx.Rngs(0)))()
    rng = np.random.default_rng(0)
    cold, warm, size = [], [], 0
    for _ in range(rounds + 1):
        prompt = rng.integers(3, LLAMA_42M.vocab, tokens).tolist()
        for times in (cold, warm):
            with Store(tiers=[Memory(1 << 30), Disk(path, 4 << 30)]) as store:
                out = jkv.generate(model, [prompt], max_new_tokens=1, stop=(), store=store)
                times.append(out.prefill_seconds)
                if times is warm and out.reused is not None and out.reused[0] < tokens - 1:
                    raise RuntimeError("nothing was found in the directory")
                size = max(size, store.stats()["bytes"])
    found = {"tokens": tokens, "bytes": size}
    return found | {"cold": statistics.median(cold[1:]), "warm": statistics.median(warm[1:])}
