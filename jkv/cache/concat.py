"""Concatenate caches along the batch axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jkv._text import brief
from jkv._transfer import transfers
from jkv.cache.base import Cache


@transfers
def concat(caches: Sequence[Cache]) -> Cache:
    """Concatenate caches along the batch axis, with the slots of the longest.

    Args:
        caches: a list of them.

    Raises:
        TypeError: something that is no cache.
        ValueError: no cache, or caches of different models, kinds or dtypes.

    Example:
        >>> one = jkv.init_cache(lm.config, "dense", batch=1, slots=8)
        >>> jkv.concat([one, one.fork(2)]).batch
        3
    """
    if not isinstance(caches, Sequence) or not all(isinstance(c, Cache) for c in caches):
        raise TypeError(f"concat got {brief(caches)}; expected a list of caches")
    if not caches:
        raise ValueError("concat got no caches; expected at least one")
    slots = max((c.capacity for c in caches if c.capacity is not None), default=None)
    if slots is not None:
        caches = [c if c.capacity == slots else c.resize(slots) for c in caches]
    if len({_signature(c) for c in caches}) > 1:
        raise ValueError(f"concat got caches of different kinds or shapes: {brief(caches)}")
    first, rest = caches[0], caches[1:]
    layers = [layer.concat([c.layers[i] for c in rest]) for i, layer in enumerate(first.layers)]
    every = [c.layers for c in caches]
    shared = [s.concat([c.shared[i] for c in rest], every) for i, s in enumerate(first.shared)]
    joined = Cache(
        layers=tuple(layers),
        lengths=jnp.concatenate([c.lengths for c in caches]),
        overflowed=jnp.concatenate([c.overflowed for c in caches]),
        shared=tuple(shared),
    )
    return joined.fit()


def _signature(cache: Cache) -> tuple[Any, ...]:
    """Return everything but the batch: kinds, shapes from the second axis on, dtypes."""
    leaves, tree = jax.tree.flatten(cache)
    return tree, *((leaf.dtype, leaf.shape[1:]) for leaf in leaves)
