"""Keep the best tokens of a cache, and drop the others."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jkv._pytree import replace
from jkv._text import brief
from jkv.cache import scores
from jkv.cache.base import Cache
from jkv.cache.evicting import evicting
from jkv.cache.evicting_layer import Evicting
from jkv.cache.protocol import Step
from jkv.cache.scores import Score


def evict(cache: Cache, budget: int | Sequence[int], score: Score | None = None) -> Cache:
    """See `Cache.evict`."""
    layers = []
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, Evicting):
            if score is not None and score != layer.score:
                raise ValueError(
                    f"evict got score={brief(score)} for layer {i}, whose tokens have been judged "
                    f"by {brief(layer.score)}; leave score out"
                )
            layers.append(layer.evict(cache.lengths, evicting(budget, layer.score).budget))
            continue
        kind = evicting(budget, scores.key_norm if score is None else score)
        keys, values = layer.to_legacy_shared(cache.lengths, cache.shared)
        if not isinstance(cache.lengths, Tracer):
            held = max(int(np.max(np.asarray(cache.lengths), initial=0)), 1)
            keys, values = keys[:, :, :held], values[:, :, :held]
        batch, heads, held, dim = keys.shape
        step = Step.after(jnp.zeros_like(cache.lengths), cache.lengths, held)
        empty = kind.init(batch, held, heads, dim, keys.dtype)
        layers.append(empty.append(jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2), step))
    return replace(cache, layers=tuple(layers), shared=())
