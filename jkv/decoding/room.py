"""How many tokens there is room for: in the model, in the cache, and in a cache that grows."""

from __future__ import annotations

import functools
from typing import Any

import jax

from jkv._pytree import replace
from jkv._text import plural
from jkv.cache.base import Cache
from jkv.cache.protocol import unbounded
from jkv.decoding.request import bucket


def limit(config: Any, kept: Any) -> int | None:
    """Tokens that a row may have in all, None where the model may run past its context.

    Args:
        config: of the model.
        kept: the kind of cache, or a cache to go on with.
    """
    endless = kept.unbounded if isinstance(kept, Cache) else unbounded(kept, config)
    # A learned table of positions has no row for what is past it, whatever the cache keeps.
    return None if endless and config.rope is not None else config.context


def check_limit(config: Any, kept: Any, longest: int, new: int) -> None:
    """Refuse more tokens than the model can take.

    Raises:
        ValueError: the prompt and its continuation are longer than that.
    """
    most = limit(config, kept)
    if most is None or longest + new <= most:
        return
    hint = (
        "the model's positions are learned, and there are no more of them"
        if config.rope is None
        else "a cache that keeps only the last ones, such as jkv.window(1020, sinks=4), goes on"
    )
    raise ValueError(
        f"a prompt of {plural(longest, 'token')} and max_new_tokens={new} make {longest + new}, "
        "more than "
        f"the model's context of {most}; shorten the prompt or ask for fewer tokens ({hint})"
    )


def slots_for(tokens: int, kept: Any) -> int:
    """How long to make a cache, or one of a kind, for so many tokens.

    One that grows doubles, so that a conversation of n tokens has log2(n) sizes at most; where
    the work grows with the buffer too the steps are smaller.
    """
    if not getattr(kept, "grows", False) or getattr(kept, "recomputes", False):
        return bucket(tokens)
    slots = bucket(1)
    while slots < tokens:
        slots *= 2
    return slots


@functools.partial(jax.jit, static_argnums=1)
def _longer(layer: Any, slots: int) -> Any:
    return layer.resize(slots)


def grown(cache: Cache, slots: int) -> Cache:
    """A cache that nobody else holds in buffers of `slots` slots; its own are gone after this.

    One layer after another, each layer's old buffers freed before the next one's new ones are
    made: there is never more than the new cache and one old layer.
    """
    layers = []
    for layer in cache.layers:
        layers.append(jax.block_until_ready(_longer(layer, slots)))
        for leaf in jax.tree.leaves(layer):
            leaf.delete()
    return replace(cache, layers=tuple(layers))
