"""Keys that say at which position they are, and values that say which token.

A query asks a cache for one position and finds the token there: one that is lost, doubled,
moved or kept too long is noticed at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jkv._axes import Array

HEADS, DIM = 2, 16
SHARP = 6.0  # the scale of the scores: a query sees the position it asks for and hardly any other
TOKENS = 512
_WAVES = np.random.default_rng(1).uniform(0.2, 3.0, DIM // 2)
VALUES = np.random.default_rng(2).uniform(-1, 1, (TOKENS, HEADS, DIM)).astype(np.float32)


def key_of(position: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """Return keys ``[..., DIM]`` of positions: all of one length, far from a few hundred others."""
    angles = np.asarray(position)[..., None] * _WAVES
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def keys_and_values(
    tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Return the keys and values of tokens at positions, the same keys in all heads."""
    angles = positions[..., None] * jnp.asarray(_WAVES, jnp.float32)[None, None]
    keys = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    keys = jnp.broadcast_to(keys[:, :, None], (*keys.shape[:2], HEADS, DIM))
    return keys, jnp.asarray(VALUES)[tokens]


def expected(row: Sequence[int], seen: Sequence[int], asked: np.ndarray) -> np.ndarray:
    """Compute what queries find that see some positions of a row, ``[len(asked), HEADS, DIM]``.

    Args:
        row: tokens.
        seen: the positions that the queries see.
        asked: the position that each query asks for.
    """
    scores = SHARP * key_of(asked).astype(float) @ key_of(seen).astype(float).T
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("ts,snh->tnh", weights, VALUES[[row[p] for p in seen]].astype(float))
