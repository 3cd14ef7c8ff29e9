"""Attention over the cache in a Mosaic kernel for TPUs, see `jkv.ops.mosaic_tpu.flash`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jkv._axes import Array
from jkv.ops.masks import Mask
from jkv.ops.mosaic_tpu import flash
from jkv.ops.mosaic_tpu.operands import LANES, operand
from jkv.ops.partial import Partial


def unsupported(
    q: Any,
    k: Any,
    v: Any,
    *,
    positions: Any,
    slot_positions: Any,
    lengths: Any,
    scale: Any,
    window: Any = None,
    sinks: Any = 0,
    softcap: Any = None,
    chunk: bool = False,
) -> str | None:
    """Why this implementation cannot do this, in words, or None."""
    del positions, slot_positions, lengths, sinks, chunk
    if k.shape[2] < LANES:
        return f"{k.shape[2]} slots, fewer than a tile has lanes ({LANES})"
    return flash.unsupported(q, k, v, scale, window, softcap)


def attention(
    q: Array,
    k: Any,
    v: Any,
    *,
    positions: Array,
    slot_positions: Array | None,
    lengths: Array | None,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    chunk: bool = False,
    interpret: Any = False,
) -> Partial:
    """See `jkv.ops.attention`; `interpret` is that of `pl.pallas_call`."""
    del chunk
    batch, new, heads, _ = q.shape
    _, kv_heads, slots, _ = k.shape
    keys, values = operand(k, q.dtype), operand(v, q.dtype)
    mask = Mask(scale, window, sinks if window is not None else 0, softcap)
    plan = _plan(new, heads // kv_heads, kv_heads, slots, keys[1], mask)
    if lengths is None:
        lengths = jnp.full((batch,), slots, jnp.int32)
    lengths = jnp.clip(lengths, 0, slots)
    info, steps = flash.scalars_of(plan, mask, positions, lengths, slot_positions is None)
    return flash.flash(q, keys, values, plan, mask, (info,), steps, 0, slot_positions, interpret)


def _plan(new: int, groups: int, kv_heads: int, slots: int, leaves: Any, mask: Mask) -> flash.Plan:
    heads = flash.heads_of(kv_heads)
    size = flash.slots_of(leaves, kv_heads, slots)
    # Whole tiles of lanes in every array.
    while any(size * leaf.share % LANES for leaf in leaves if leaf.rows):
        size *= 2
    first = -(-mask.sinks // size)
    return flash.Plan(new=new, groups=groups, heads=heads, size=size, first=first, pages=1)
