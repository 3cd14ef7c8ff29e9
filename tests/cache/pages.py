"""Caches of pages whose tokens say which they are, and where."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jkv
from jkv.cache import Cache

PAGE, SLOTS = 4, 20


def new(rows=3, slots=SLOTS, kind=None, **options):
    """A cache of one layer, of one head of two numbers: a token and its position."""
    kind = jkv.paged(PAGE, **options) if kind is None else kind
    return Cache.empty([kind.init(rows, slots, 1, 2, jnp.float32)], rows, slots)


@jax.jit
def put(cache, tokens, counts):
    run = cache.begin(tokens, counts)
    k = jnp.stack([tokens, run.step.positions], axis=-1)[:, :, None].astype(jnp.float32)
    layers = [layer.append(k, k + 0.5, run.step) for layer in run.layers]
    return run.end(jnp.zeros((*tokens.shape, 1)), layers)[1]


def written(cache, rows, more, width=None):
    """Each row's new tokens in the cache, and in the lists of what it should be."""
    width = width or (1 if max(map(len, more)) <= 1 else 11)  # few shapes: each is a compilation
    tokens = np.full((len(more), width), 999, np.int32)
    for line, new in zip(tokens, more, strict=True):
        line[: len(new)] = new
    cache = put(cache, tokens, np.array([len(new) for new in more], np.int32))
    return cache, [[*row, *new] for row, new in zip(rows, more, strict=True)]


legacy = jax.jit(lambda cache: cache.to_legacy()[0])


def holds(cache, rows):
    """Every token of every row, where it belongs."""
    assert np.asarray(cache.lengths).tolist() == [len(row) for row in rows]
    keys, values = (np.asarray(x) for x in legacy(cache))
    for b, row in enumerate(rows):
        want = np.stack([row, np.arange(len(row))], axis=-1)
        np.testing.assert_array_equal(keys[b, 0, : len(row)], want)
        np.testing.assert_array_equal(values[b, 0, : len(row)], want + 0.5)


def used(cache, group=0):
    """Count the pages that a row holds."""
    numbers = np.asarray(cache.shared[0].tables[group])
    return len(np.unique(numbers[numbers >= 0]))


def numbered(rows, first=0):
    """As many different tokens as each number says."""
    starts = np.cumsum([first, *rows])
    return [list(range(a, a + n)) for a, n in zip(starts, rows, strict=False)]
