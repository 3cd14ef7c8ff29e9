"""Scores: which tokens a cache of limited size keeps. A score is a function; write your own.

It is called once per pass and layer with what that pass saw, and says how much each token is
worth; the highest are kept. To accumulate, add to `inputs.previous`:

    >>> def value_norm(inputs): return jnp.linalg.norm(inputs.values.astype(jnp.float32), axis=-1)
    >>> kind = jkv.evicting(64, score=value_norm)

It is part of the compiled program, like the kind: pass the same function again and not a new
lambda each time. What it says of an empty slot does not matter; NaN is worth less than anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import jax.numpy as jnp
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv._checks import check_integer, is_integer
from jkv._pytree import pytree
from jkv._text import brief


@pytree
class ScoreInputs:
    """What a score is computed from: one pass over a layer's tokens, old and new.

    `append`, which has no queries, is one query that looks at nothing: weights of zero.

    Example:
        >>> def value_norm(inputs: jkv.scores.ScoreInputs):
        ...     return jnp.linalg.norm(inputs.values, axis=-1)  # [B, K, S], of old and new tokens
        >>> kind = jkv.evicting(32, score=value_norm)
    """

    previous: Array  # [B, K, S] float32, the scores before; 0 for new tokens
    weights: Array  # [B, K, G, T, S] float32, who looks at whom; zero for padding queries
    keys: Array  # [B, K, S, H], as rotated; in empty slots anything
    values: Array  # [B, K, S, H]
    positions: Array  # [B, K, S] int32, below 0 where there is no token; in any order
    queries: Array  # [B, T] int32, positions of the queries, -1 for padding
    is_new: Array  # [B, K, S] bool, tokens that are new in this pass

    if not TYPE_CHECKING:  # there, a misspelt name is an error

        def __getattr__(self, name: str) -> NoReturn:
            hint = "; it is is_new now" if name == "fresh" else ""
            raise AttributeError(f"ScoreInputs has no attribute {name!r}{hint}")


Score = Callable[[ScoreInputs], Array]
"""A score: a function of `ScoreInputs` that returns a number ``[B, K, S]`` for each token."""


def key_norm(inputs: ScoreInputs) -> Float[Array, "B K S"]:
    """Score by small L2 norm of keys: these tend to get the most attention.

    Needs no attention: the choice for `Cache.evict`. Source: Devoto et al. 2024, arXiv:2406.11430.

    Example:
        >>> kind = jkv.evicting(32, score=jkv.scores.key_norm)  # what `Cache.evict` does by default
    """
    keys = inputs.keys.reshape(-1, *inputs.keys.shape[2:]).astype(jnp.float32)
    return -jnp.sqrt(jnp.sum(keys * keys, axis=-1)).reshape(inputs.positions.shape)


def h2o(inputs: ScoreInputs) -> Float[Array, "B K S"]:
    """Score by all attention that a token ever got, over queries and the heads of a group.

    Heavy hitters. After a `put` new tokens stand at 0, and of equals the newest are kept.
    Source: Zhang et al. 2023, arXiv:2306.14048.

    Example:
        >>> kind = jkv.evicting(32, score=jkv.scores.h2o)
    """
    return inputs.previous + jnp.sum(inputs.weights, axis=(2, 3))


def tova(inputs: ScoreInputs) -> Float[Array, "B K S"]:
    """Score by the last query's attention, averaged over all heads: they keep the same tokens.

    Not for a model that `jkv.shard` has parted. A `put` has no query: the newest are kept. Source:
    Oren et al. 2024, arXiv:2401.06104.

    Example:
        >>> kind = jkv.evicting(32, score=jkv.scores.tova)
    """
    last = jnp.argmax(inputs.queries, axis=1)[:, None, None, None, None]
    weights = jnp.take_along_axis(inputs.weights, last, axis=3)[:, :, :, 0]
    mean = jnp.mean(weights, axis=(1, 2))
    return jnp.broadcast_to(mean[:, None], inputs.positions.shape)


tova.across_heads = True  # pyright: ignore[reportFunctionMemberAccess]


def compares_heads(score: Score) -> bool:
    """Return whether a score looks at several heads together: an attribute `across_heads` says so.

    Scores are functions, and a user's may say it too.
    """
    return bool(getattr(score, "across_heads", False))


def recency(inputs: ScoreInputs) -> Float[Array, "B K S"]:
    """Score by position: a window, which every other score should beat.

    Example:
        >>> kind = jkv.evicting(32, score=jkv.scores.recency)
    """
    return inputs.positions.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class SnapKV:
    """See `snapkv`.

    Example:
        >>> jkv.scores.snapkv(window=16).window
        16
    """

    window: int
    pool: int

    def __call__(self, inputs: ScoreInputs) -> Float[Array, "B K S"]:
        """Score a prefill by its last queries' attention; in decode the prompt's scores stay."""
        kept = jnp.float32(jnp.inf)
        if inputs.weights.shape[3] == 1:
            return jnp.where(inputs.is_new, kept, inputs.previous)
        since = jnp.max(inputs.queries, axis=1) - self.window
        watching = (inputs.queries >= 0) & (inputs.queries > since[:, None])
        looked = jnp.where(watching[:, None, None, :, None], inputs.weights, 0.0)
        pooled = _max_pool(jnp.sum(looked, axis=(2, 3)), inputs.positions, self.pool // 2)
        return jnp.where(inputs.positions > since[:, None, None], kept, pooled)


def snapkv(window: int = 32, pool: int = 7) -> SnapKV:
    """Keep of a prompt what its end attends to, and then what is generated.

    After each chunk of a prefill: the attention of its last `window` queries, of which each token
    is given the largest among its neighbours, and above all the tokens of those queries. The
    prompt's scores then stay as they are; what is generated displaces its lowest, and once no
    prompt is left the oldest. Source: Li et al. 2024, arXiv:2404.14469 (largest: their "maxpool").

    Args:
        window: queries that look, of the last chunk; so the chunk should not be shorter.
        pool: width of a neighbourhood, in positions; odd.

    Raises:
        ValueError: no integers, below 1, or an even `pool`.

    Example:
        >>> kind = jkv.evicting(128, score=jkv.scores.snapkv(window=16, pool=5))
    """
    window = check_integer("window", window, 1, of="snapkv")
    if not is_integer(pool) or pool < 1 or pool % 2 == 0:
        raise ValueError(
            f"snapkv got pool={brief(pool)}; expected an integer of at least 1, odd: a token and "
            "as many on either side"
        )
    return SnapKV(window, int(pool))


def _max_pool(
    scores: Float[Array, "B K S"], positions: Int[Array, "B K S"], reach: int
) -> Float[Array, "B K S"]:
    """Return the largest score among the tokens at most `reach` positions away."""
    order = jnp.argsort(positions, axis=-1)
    places = jnp.take_along_axis(positions, order, axis=-1)
    line = jnp.take_along_axis(scores, order, axis=-1)
    best = line
    # Neighbours in position are at most as many slots apart, once the slots are in order.
    for shift in (s for d in range(1, reach + 1) for s in (d, -d)):
        place, score = jnp.roll(places, shift, axis=-1), jnp.roll(line, shift, axis=-1)
        near = (place >= 0) & (jnp.abs(place - places) <= reach)
        best = jnp.where(near, jnp.maximum(best, score), best)
    return jnp.take_along_axis(best, jnp.argsort(order, axis=-1), axis=-1)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> NoReturn:
        hint = "; it is ScoreInputs now" if name == "Seen" else ""
        raise AttributeError(f"module 'jkv.cache.scores' has no attribute {name!r}{hint}")


__all__ = ["Score", "ScoreInputs", "SnapKV", "h2o", "key_norm", "recency", "snapkv", "tova"]


def __dir__() -> list[str]:
    return sorted(__all__)
