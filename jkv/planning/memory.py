"""Bytes before anything is allocated: weights, caches, activations, and what fits."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable

import jax
from flax import nnx

from jkv import _pytree
from jkv.cache.base import Cache
from jkv.cache.init import init_cache
from jkv.cache.protocol import CacheKind, LayerCache
from jkv.models.config import Config
from jkv.models.decoder import Decoder
from jkv.ops.attention.xla import BLOCK
from jkv.planning.work import itemsize

LONGEST = 2**31 - 1  # positions are int32
STEP = 1024  # tokens over which `bytes_per_token` looks; whole units of every codec


@functools.lru_cache(maxsize=64)
def weights(config: Config) -> tuple[int, int]:
    """Return the number of a model's parameters, and their bytes."""

    def size(layers: int) -> tuple[int, int]:
        few = dataclasses.replace(config, layers=layers, windows=())
        model = nnx.eval_shape(lambda: Decoder(few, rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(model)), _pytree.nbytes(model)

    # Layers are alike, and a model of a hundred takes seconds to trace.
    one, two = size(1), size(2)
    count, nbytes = (a + (config.layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    return count, nbytes


def weights_read(config: Config, tokens: int) -> int:
    """Return the bytes of weights that a pass over so many tokens reads: of tables only rows."""
    _, nbytes = weights(config)
    tables = (0 if config.tied else config.vocab) + (0 if config.rope else config.context)
    rows = (0 if config.tied else min(tokens, config.vocab)) + (
        0 if config.rope else min(tokens, config.context)
    )
    return nbytes - (tables - rows) * config.width * itemsize(config.dtype)


@dataclasses.dataclass(frozen=True)
class Layers:
    """Layers of one kind: how many, and what one of them is for a batch and a number of slots."""

    kind: CacheKind
    count: int
    numbers: tuple[int, ...]

    def init(self, config: Config, batch: int, slots: int) -> LayerCache:
        """Make one layer's empty cache."""
        return self.kind.init(batch, slots, config.kv_heads, config.head_dim, config.dtype)

    def shape(self, config: Config, batch: int, slots: int) -> LayerCache:
        """Return one layer's cache, of shapes."""
        return jax.eval_shape(lambda: self.init(config, batch, slots))


def distinct(config: Config, kind: CacheKind) -> list[Layers]:
    """Return the kinds of a model's layers, each once."""
    found: dict[CacheKind, list[int]] = collections.defaultdict(list)
    for i in range(config.layers):
        found[kind.bind(config, i)].append(i)
    return [Layers(k, len(numbers), tuple(numbers)) for k, numbers in found.items()]


def cache_shape(config: Config, kind: CacheKind, batch: int, slots: int) -> Cache:
    """Return what `jkv.init_cache` would, of shapes."""
    return jax.eval_shape(lambda: init_cache(config, kind, batch=batch, slots=slots))


def cache_sizer(config: Config, kind: CacheKind) -> Callable[[int, int], int]:
    """Return the bytes of a cache as a function of (batch, slots), faster than `cache_shape`."""
    alike = distinct(config, kind)

    def size(batch: int, slots: int) -> int:
        one_of_each = jax.eval_shape(
            lambda: Cache.empty([x.init(config, batch, slots) for x in alike], batch, slots)
        )
        pairs = zip(alike, one_of_each.layers, strict=True)
        more = sum((x.count - 1) * _pytree.nbytes(layer) for x, layer in pairs)
        return _pytree.nbytes(one_of_each) + more

    return size


def bytes_per_token(config: Config, kind: CacheKind, slots: int) -> int | float:
    """Return the bytes of one more token in a row of `slots`, the average over the next 1024.

    0 for kinds that stop growing; a fraction where tokens share what a cache keeps.
    """
    size = cache_sizer(config, kind)
    grown = (size(1, slots + STEP) - size(1, slots)) / STEP
    return int(grown) if grown.is_integer() else grown


def activations(config: Config, batch: int, new: int, together: int) -> int:
    """Estimate the bytes that a pass over T new tokens needs beside weights and cache.

    The stream and one branch of it; in the attention queries, keys, values, the output, and scores
    and weights in float32 of as many slots as are looked at `together`; or in the feed-forward
    layer what is between its maps; or the logits of one token, in float32, twice: the most.
    """
    tokens, size = batch * new, itemsize(config.dtype)
    stream = 2 * tokens * config.width * size
    heads = config.heads * config.head_dim
    attention = tokens * (2 * heads + 2 * config.kv_heads * config.head_dim) * size
    attention += tokens * heads * 4 + 2 * tokens * config.heads * together * 4
    mlp = tokens * config.feed_forward * (3 if config.gated else 2) * size
    logits = 2 * batch * config.vocab * 4
    return max(stream + max(attention, mlp), logits)


def looked_at_together(config: Config, kind: CacheKind, length: int, new: int) -> int:
    """Return the slots whose scores exist at one time: those of a block of attention.

    A cache that keeps tokens by what looks at them needs the weights of all.
    """
    if not kind.recomputes:
        shapes = [layers.shape(config, 1, length) for layers in distinct(config, kind)]
        kept = [shape.retained for shape in shapes if shape.weighs_tokens]
        whole = [retained + new for retained in kept if retained is not None]
        if whole:
            return max(whole)
    return min(length, BLOCK)


def most(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to `limit` that fits, 0 where none does."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    if high > limit:
        if fits(limit):
            return limit
        high = limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
