"""Who sees whom, from positions only."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Bool, Int

from jkv._axes import Array


@dataclasses.dataclass(frozen=True)
class Mask:
    """The static part of who sees whom, and of the scores; see `jkv.ops.attention`."""

    scale: float
    window: int | None
    sinks: int
    softcap: float | None


def visible(
    positions: Int[Array, "*rows T"],
    slot_positions: Int[Array, "*rows S"],
    *,
    window: int | None = None,
    sinks: int = 0,
) -> Bool[Array, "*rows T S"]:
    """Whether the query at each position sees each slot.

    A query at position p sees a slot at position s when ``0 <= s <= p``, and, where a window is
    set, ``p - s < window`` or ``s < sinks``. Padding, causality, windows, attention sinks and the
    holes that eviction leaves are all this one rule; a padding query (p = -1) sees nothing.
    """
    p = jnp.expand_dims(positions, -1)
    s = jnp.expand_dims(slot_positions, -2)
    seen = (s >= 0) & (s <= p)
    if window is not None:
        seen &= (p - s < window) | (s < sinks)
    return seen
