"""Masks from positions alone, and the static settings of an attention."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from jkv._axes import Array
from jkv._text import brief


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static part of an attention: its mask, and what is done to its scores.

    It is hashable, so it may be a static argument of `jax.jit`.

    Attributes:
        scale: of the scores, ``1 / sqrt(H)`` in most models.
        window: a query sees the last `window` positions, its own included; None for all.
        sinks: positions below this are seen whatever the window.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2, arXiv:2408.00118).

    Raises:
        TypeError: a traced value, or one that is no number.
        ValueError: a window below 1, or sinks below 0.

    Example:
        >>> spec = jkv.ops.AttentionSpec(scale=64**-0.5, window=1024)
        >>> spec.within(256).window
        256
    """

    scale: float
    window: int | None = None
    sinks: int = 0
    softcap: float | None = None

    def __post_init__(self) -> None:
        """Check the values, and drop sinks that mean nothing without a window."""
        for name, value in (("scale", self.scale), ("softcap", self.softcap)):
            optional = name == "softcap" and value is None
            if not optional and not isinstance(value, int | float | np.floating):
                raise TypeError(
                    f"AttentionSpec got {name}={brief(value)}; expected a number that is known "
                    "when the program is traced"
                )
        for name, value, least in (("window", self.window, 1), ("sinks", self.sinks, 0)):
            if name == "window" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(
                    f"AttentionSpec got {name}={brief(value)}; expected an integer that is known "
                    "when the program is traced"
                )
            if value < least:
                hint = ", or None for all" if name == "window" else ""
                raise ValueError(
                    f"AttentionSpec got {name}={value}; expected at least {least}{hint}"
                )
        if self.window is None:
            object.__setattr__(self, "sinks", 0)

    def within(self, window: int | None) -> AttentionSpec:
        """Narrow the window to at most `window` tokens; None leaves it."""
        if window is None or (self.window is not None and self.window <= window):
            return self
        return dataclasses.replace(self, window=window)


def visible(
    positions: Int[Array, "*rows T"],
    slot_positions: Int[Array, "*rows S"],
    *,
    window: int | None = None,
    sinks: int = 0,
) -> Bool[Array, "*rows T S"]:
    """Return whether the query at each position sees each slot.

    A query at position p sees a slot at position s when ``0 <= s <= p``, and, where a window is
    set, ``p - s < window`` or ``s < sinks``. Padding, causality, windows, attention sinks and the
    holes that eviction leaves are all this one rule; a padding query (p = -1) sees nothing.

    Example:
        >>> at, slots = jnp.array([5]), jnp.array([0, 1, 4, 5, 6, -1])
        >>> jkv.ops.visible(at, slots, window=3, sinks=1).tolist()
        [[True, False, True, True, False, False]]
    """
    p = jnp.expand_dims(positions, -1)
    s = jnp.expand_dims(slot_positions, -2)
    seen = (s >= 0) & (s <= p)
    if window is not None:
        seen &= (p - s < window) | (s < sinks)
    return seen
