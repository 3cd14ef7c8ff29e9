"""Attention over a cache: one meaning (`reference`), several implementations, one choice."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv.errors import UnsupportedError
from jkv.ops.attention import reference, xla
from jkv.ops.encoded import Encoded
from jkv.ops.partial import Partial

__all__ = ["IMPLEMENTATIONS", "attention"]

IMPLEMENTATIONS = ("xla", "reference")


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | Encoded,
    v: Float[Array, "B K S H"] | Encoded,
    *,
    positions: Int[Array, "B T"],
    slot_positions: Int[Array, "B S"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Partial:
    """Attention of new tokens over cached ones, as a `Partial` that merges with others.

    Args:
        q: queries, already rotated.
        k: keys of the slots; each of the K heads serves N / K query heads. An array, or in a
            codec's form (`jkv.ops.encoded`), which is read a block at a time and never decoded
            as a whole.
        v: values of the slots, likewise.
        positions: of the queries; -1 is padding, which sees nothing.
        slot_positions: of the tokens in the slots, -1 where a slot is empty. Without it slot s
            holds position s.
        lengths: only the first `lengths[b]` slots of a row hold anything. Without it all do.
            What is beyond may be anything, NaN included.
        scale: of the scores, by default ``1 / sqrt(H)``.
        window: a query sees the last `window` positions, its own included.
        sinks: positions below this are seen whatever the window.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2, arXiv:2408.00118).
        implementation: "xla" or "reference"; by default the best that is supported.

    Raises:
        ValueError: shapes that do not fit together, or a window below 1.
        UnsupportedError: an implementation of that name does not exist.
    """
    if q.shape[2] % k.shape[1]:
        raise ValueError(
            f"attention got {q.shape[2]} query heads over {k.shape[1]} key/value heads; "
            "expected a multiple"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention got window={window}; expected at least 1, or None for all")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise UnsupportedError(
            f"attention got implementation={implementation!r}; expected one of {IMPLEMENTATIONS}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shape = {"scale": scale, "window": window, "sinks": sinks, "softcap": softcap}
    if implementation == "reference":
        if slot_positions is None:
            slot_positions = jnp.broadcast_to(
                jnp.arange(k.shape[2])[None], (k.shape[0], k.shape[2])
            )
        if lengths is not None:
            filled = jax.lax.broadcasted_iota(jnp.int32, slot_positions.shape, 1)
            slot_positions = jnp.where(filled < lengths[:, None], slot_positions, -1)
        k, v = (x.decode() if isinstance(x, Encoded) else x for x in (k, v))
        return reference.attention(
            q, k, v, positions=positions, slot_positions=slot_positions, **shape
        )
    return xla.attention(
        q, k, v, positions=positions, slot_positions=slot_positions, lengths=lengths, **shape
    )
