"""How many tokens there is room for: in the model, in the cache, and in a cache that grows."""

from __future__ import annotations

import functools
from typing import TypeVar

import jax

from jkv._pytree import replace
from jkv._text import plural
from jkv.cache.base import Cache
from jkv.cache.protocol import CacheKind, LayerCache, furthest
from jkv.models.config import Config

Held = TypeVar("Held", LayerCache, Cache)

SINKS = 4  # of the window that is recommended (Xiao et al. 2023, arXiv:2309.17453)


def limit(config: Config, kept: CacheKind | Cache, new: int) -> int | None:
    """Return how many tokens a row may have, None where the model may run past its context.

    It may where no token looks further back than the context: not all that is past it has to be
    kept, but what is looked at must be at distances that the model was trained for.

    Args:
        config: of the model.
        kept: the kind of cache, or a cache to go on with.
        new: tokens of a pass of the prefill.
    """
    # A learned table of positions has no row for what is past it, whatever the cache keeps.
    if config.rope is None:
        return config.context
    reach = _reach(config, kept, new)
    return None if reach is not None and reach <= config.context else config.context


def _reach(config: Config, kept: CacheKind | Cache, new: int) -> int | None:
    """Return how far a token may look back, see `Cache.reach`."""
    if isinstance(kept, Cache):
        return kept.reach(new)
    return furthest([kept.bind(config, i) for i in range(config.layers)], new)


def check_limit(
    config: Config, kept: CacheKind | Cache, longest: int, new: int, chunk: int
) -> None:
    """Refuse more tokens than the model can take.

    Args:
        config: of the model.
        kept: the kind of cache, or a cache to go on with.
        longest: tokens of the longest row so far.
        new: tokens that it is to get.
        chunk: tokens of a pass of the prefill.

    Raises:
        ValueError: the prompt and its continuation are longer than that.
    """
    most = limit(config, kept, chunk)
    if most is None or longest + new <= most:
        return
    asked = f" and max_new_tokens={new} make {longest + new}," if new else ","
    raise ValueError(
        f"a prompt of {plural(longest, 'token')}{asked} more than the model's context of {most}; "
        f"shorten the prompt or ask for fewer tokens ({_hint(config, _reach(config, kept, chunk))})"
    )


def _hint(config: Config, reach: int | None) -> str:
    """Name a cache with which the model could go on past its context."""
    context = config.context
    if config.rope is None:
        return "the model's positions are learned, and there are no more of them"
    own = [config.window(i) for i in range(config.layers)]
    if all(size is not None and size <= context for size in own):
        code, text = "jkv.window()", "window"
    elif context > 2 * SINKS:
        size = context - SINKS
        code, text = f"jkv.window({size}, sinks={SINKS})", f"window:{size},sinks={SINKS}"
    else:
        code, text = f"jkv.window({context})", f"window:{context}"
    why = (
        f"with this cache tokens look back at up to {reach}, which the model was not trained for; "
        if reach is not None
        else ""
    )
    return (
        f"{why}a cache that keeps only the last {context} tokens, or fewer, goes on: {code}, as "
        f"text {text}"
    )


def bucket(size: int, least: int = 64) -> int:
    """Return the next size that has a program: powers of two, and quarters between from 1024 on.

    Few programs, at most a quarter of a large buffer unused.
    """
    power = least
    while power < size:
        power *= 2
    if power <= 1024:
        return power
    half, quarter = power // 2, power // 8
    return half + quarter * -(-(size - half) // quarter)


def slots_for(tokens: int, kept: CacheKind | Cache) -> int:
    """Return how many slots a cache needs for so many tokens.

    One that grows doubles, so that a conversation of n tokens has log2(n) sizes at most; where
    the work grows with the buffer too the steps are smaller.
    """
    if not kept.grows or kept.recomputes:
        return bucket(tokens)
    slots = bucket(1)
    while slots < tokens:
        slots *= 2
    return slots


@functools.partial(jax.jit, static_argnums=1)
def _resize_layer_jit(layer: Held, slots: int) -> Held:
    return layer.resize(slots)


def grow(cache: Cache, slots: int) -> Cache:
    """Move a cache that nothing else refers to into buffers of `slots` slots; its own are freed.

    Layers are moved one after another, each layer's old buffers freed before the next one's new
    ones are made: there is never more than the new cache and one old layer.
    """
    if cache.shared:  # a history of tokens: layers that keep nothing
        return _resize_layer_jit(cache, slots)
    layers = []
    for layer in cache.layers:
        layers.append(jax.block_until_ready(_resize_layer_jit(layer, slots)))
        for leaf in jax.tree.leaves(layer):
            leaf.delete()
    return replace(cache, layers=tuple(layers))
