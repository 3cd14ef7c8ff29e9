"""Attention together with its weights, for caches that choose tokens by what is looked at."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv.ops import choice
from jkv.ops.attention import xla
from jkv.ops.masks import Mask

# Keys [B, K, S, H], values [B, K, S, H] and positions [B, K, S], -1 and below where there is none.
Part = tuple[Array, Array, Array]


def attention_weights(
    q: Float[Array, "B T N H"],
    parts: Sequence[Part],
    *,
    positions: Int[Array, "B T"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K G T S"]]:
    """Attention over the union of some parts, and how much each query looks at each slot.

    Unlike in `jkv.ops.attention`, every key/value head has tokens of its own. The weights are
    written out, as many as queries times slots, so this is for few slots, or few queries.

    Args:
        q: queries, already rotated.
        parts: keys, values and positions of the slots, each head's own; S counts those of all
            parts, one after another. What lies in an empty slot may be anything, NaN included.
        positions: of the queries; -1 is padding, which sees nothing and has weights of zero.
        scale: of the scores.
        window: a query sees the last `window` positions, its own included.
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        The output and the weights, both float32; a query's weights sum to 1 if it sees anything.
    """
    choice.note("xla")  # the only one that gives weights
    batch, new, heads, dim = q.shape
    kv_heads = parts[0][0].shape[1]
    groups = heads // kv_heads
    mask = Mask(scale, window, 0, softcap)
    # Each row and head is a row of its own here: one axis, as in `xla`, and for its reasons.
    at = jnp.repeat(positions, kv_heads, axis=0)
    lines = [[x.reshape(batch * kv_heads, *x.shape[2:]) for x in part] for part in parts]

    def plain(q, lines):
        scores = [xla._scores(mask, q, k, at, held) for k, _, held in lines]
        weights, total, _ = xla._softmax(jnp.concatenate(scores, axis=-1))
        weights = weights / total
        out, start = jnp.zeros(q.shape, jnp.float32), 0
        for _, v, held in lines:
            own = lax.slice_in_dim(weights, start, start + v.shape[1], axis=-1)
            out += xla._weighted_in_place(own, v, at, held)
            start += v.shape[1]
        return out, weights

    def in_pairs(q, lines):
        # As in `xla`: one query row alone makes accelerators copy the whole cache.
        out, weights = plain(jnp.concatenate([q, q], axis=1), lines)
        return out[:, :1], weights[:, :1]

    rows = q.reshape(batch, new, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch * kv_heads, groups * new, dim)
    if groups * new > 1:
        out, weights = plain(rows, lines)
    else:
        out, weights = lax.platform_dependent(rows, lines, cpu=plain, default=in_pairs)
    out = out.reshape(batch, kv_heads, groups, new, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape), weights.reshape(batch, kv_heads, groups, new, -1)
