"""Convert a cache to another kind."""

from __future__ import annotations

import jax.numpy as jnp

from jkv._checks import check_integer
from jkv._pytree import replace
from jkv._text import brief, plural
from jkv.cache.base import Cache
from jkv.cache.protocol import CacheKind, Shape, as_kind, is_kind, own_kind_hint
from jkv.errors import CacheFullError, UnsupportedError


def convert(
    cache: Cache, to: CacheKind | str, *, config: Shape | None = None, slots: int | None = None
) -> Cache:
    """See `Cache.convert`."""
    kind = as_kind(to)
    if not is_kind(kind) or kind.recomputes:
        raise UnsupportedError(
            f"convert got {brief(kind)}; expected a kind that keeps keys and values, such as "
            f"jkv.dense(){own_kind_hint(kind)}"
        )
    pairs = cache.to_legacy()
    held = pairs[0][0].shape[2]
    room = cache.capacity if cache.capacity is not None else max(held, 1)
    slots = room if slots is None else check_integer("slots", slots, 1, of="convert")
    if slots < held:
        raise CacheFullError(f"convert got slots={slots} for rows of up to {plural(held, 'token')}")
    layers = []
    for i, (keys, _) in enumerate(pairs):
        batch, heads, _, dim = keys.shape
        own = kind if config is None else kind.bind(config, i)
        if own.managed:
            raise UnsupportedError(
                "convert got a kind of managed pages, of which none are named yet; expected "
                "jkv.paged() without managed=True"
            )
        layers.append(own.init(batch, slots, heads, dim, keys.dtype))
    converted = Cache.empty(layers, cache.batch, slots)
    if not held:
        return replace(converted, overflowed=cache.overflowed, lengths=cache.lengths)
    # A pass of tokens whose ids no layer asks for.
    run = converted.begin(jnp.zeros((cache.batch, held), jnp.int32), cache.lengths)
    layers = [
        layer.append(jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2), run.step)
        for layer, (keys, values) in zip(run.layers, pairs, strict=True)
    ]
    converted = run.next_cache(layers)
    # Where pages run out, rows are refused.
    return replace(converted, overflowed=cache.overflowed | converted.overflowed)
