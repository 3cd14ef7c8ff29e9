"""Attention over pages in a Mosaic kernel for TPUs, see `jkv.ops.mosaic_tpu.flash`."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jkv._axes import Array
from jkv.ops.encoded import Encoded
from jkv.ops.masks import Mask
from jkv.ops.mosaic_tpu import flash
from jkv.ops.mosaic_tpu.operands import LANES, Leaf, operand, outline
from jkv.ops.pages import Tiled
from jkv.ops.partial import Partial

TILES = 16  # pages of a step, each an operand of the kernel
TABLE = 2**17  # numbers of pages that fit into the memory of scalars


def unsupported(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    block_table: Any,
    *,
    positions: Any,
    lengths: Any,
    scale: Any,
    window: Any = None,
    sinks: Any = 0,
    softcap: Any = None,
) -> str | None:
    """Why this implementation cannot do this, in words, or None."""
    del positions, lengths, sinks
    why = flash.unsupported(q, k_pages, v_pages, scale, window, softcap)
    if why is not None:
        return why
    if math.prod(block_table.shape) > TABLE:
        return f"a block table of {math.prod(block_table.shape)} pages; up to {TABLE}"
    page = k_pages.shape[2]
    tiled = [x.beside for x in (k_pages, v_pages) if isinstance(x, Tiled)]
    if tiled:
        alike = len(tiled) == 2 and tiled[0] == tiled[1]
        return None if alike else "keys and values that do not lie alike"
    for name, x in (("keys", k_pages), ("values", v_pages)):
        why = _scattered(name, outline(x, q.dtype), page, x)
        if why is not None:
            return why
    return None


def _scattered(name: str, leaves: list[Leaf], page: int, x: Any) -> str | None:
    """Why a page of an operand is no block of memory, if so.

    An array whose last axis is no whole tile (few channels, steps of a few tokens) XLA lays with
    the pages side by side, which fills its tiles: a page is then one number of each of many. A
    cache's own small pages are `Tiled`.
    """
    least = 1
    for leaf in leaves:
        if leaf.axis == 2 and not leaf.rows:
            least = max(least, 8 * 4 // leaf.array.dtype.itemsize, LANES // TILES)
        else:
            share = leaf.share  # numbers for each slot
            least = max(least, LANES, LANES * share.denominator // math.gcd(LANES, share.numerator))
    if page % least:
        form = type(x).__name__ if isinstance(x, Encoded) else f"{x.shape[3]} channels"
        return (
            f"pages of {page} tokens; {name} as {form} are read in pages of multiples of {least}, "
            "or as `jkv.ops.pages.Tiled`, which a cache's are where that is possible"
        )
    return None


def paged_attention(
    q: Array,
    k_pages: Any,
    v_pages: Any,
    block_table: Array,
    *,
    positions: Array,
    lengths: Array,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    interpret: Any = False,
) -> Partial:
    """See `jkv.ops.paged_attention`; `interpret` is that of `pl.pallas_call`."""
    _, new, heads, _ = q.shape
    _, kv_heads, page, _ = k_pages.shape
    columns = block_table.shape[1]
    keys, values = operand(k_pages, q.dtype), operand(v_pages, q.dtype)
    mask = Mask(scale, window, sinks if window is not None else 0, softcap)
    wanted = flash.slots_of(keys[1], kv_heads, columns * page)
    beside = k_pages.beside if isinstance(k_pages, Tiled) else 1
    lanes = LANES * beside
    whole = lanes // math.gcd(page, lanes)  # pages that fill tiles
    pages = min(max(wanted // page // whole, 1) * whole, max(TILES // whole, 1) * whole)
    size = pages * page
    plan = flash.Plan(
        new=new,
        groups=heads // kv_heads,
        heads=flash.heads_of(kv_heads),
        size=size,
        first=-(-mask.sinks // size),
        pages=pages,
        beside=beside,
    )
    lengths = jnp.clip(lengths, 0, columns * page)
    info, steps = flash.scalars_of(plan, mask, positions, lengths, True)
    table = block_table.astype(jnp.int32).reshape(-1)
    return flash.flash(q, keys, values, plan, mask, (info, table), steps, columns, None, interpret)
