"""Attention over the cache in a Mosaic kernel for TPUs, see `jkv.ops.mosaic_tpu.flash`."""

from __future__ import annotations

import math

import jax.numpy as jnp

from jkv._axes import Array, Shaped
from jkv.ops.codecs import Encoded
from jkv.ops.kv import KV, ContiguousKV, PagedKV, Pages
from jkv.ops.masks import AttentionSpec
from jkv.ops.mosaic_tpu import flash
from jkv.ops.mosaic_tpu.operands import LANES, Leaf, leaf_shapes, reader_of, values_reader_of
from jkv.ops.pages import TpuPages
from jkv.ops.partial import Partial

TILES = 16  # pages of a step, each an operand of the kernel
TABLE = 2**17  # numbers of pages that fit into the memory of scalars


def unsupported(q: Shaped, kv: KV, positions: Shaped | None, spec: AttentionSpec) -> str | None:
    """Return why this implementation cannot do this, or None."""
    del positions, spec
    if isinstance(kv, PagedKV):
        return flash.unsupported(q, kv) or _unsupported_pages(q, kv)
    if kv.slots < LANES:
        return f"{kv.slots} slots, fewer than a tile has lanes ({LANES})"
    return flash.unsupported(q, kv)


def _unsupported_pages(q: Shaped, kv: PagedKV) -> str | None:
    if math.prod(kv.block_table.shape) > TABLE:
        return f"a block table of {math.prod(kv.block_table.shape)} pages; up to {TABLE}"
    tiled = [x.pack_factor for x in (kv.k, kv.v) if isinstance(x, TpuPages)]
    if tiled:
        alike = len(tiled) == 2 and tiled[0] == tiled[1]
        return None if alike else "keys and values of different layouts"
    for name, x in (("keys", kv.k), ("values", kv.v)):
        why = _interleaved(name, leaf_shapes(x, q.dtype), kv.page, x)
        if why is not None:
            return why
    return None


def _interleaved(name: str, leaves: list[Leaf], page: int, x: Pages) -> str | None:
    """Return why a page of an operand is not contiguous in memory, or None.

    Where the last axis of an array is no whole tile (few channels, scales of a few tokens), XLA
    interleaves the pages, which fills its tiles: a page is then one number of each of many. Small
    pages of a cache are `TpuPages`.
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
            "or as `jkv.ops.pages.TpuPages`, which a cache's are where that is possible"
        )
    return None


def attention(
    q: Array, kv: KV, positions: Array, spec: AttentionSpec, interpret: object = False
) -> Partial:
    """Attend, see `jkv.ops.attention`; `interpret` is that of `pl.pallas_call`."""
    if isinstance(kv, PagedKV):
        return _over_pages(q, kv, positions, spec, interpret)
    return _over_slots(q, kv, positions, spec, interpret)


def _over_slots(
    q: Array, kv: ContiguousKV, positions: Array, spec: AttentionSpec, interpret: object
) -> Partial:
    batch, new, heads, _ = q.shape
    kv_heads, slots = kv.kv_heads, kv.slots
    keys, values = reader_of(kv.k, q.dtype), values_reader_of(kv.v, q.dtype)
    tiling = _tiling(new, heads // kv_heads, kv_heads, slots, keys[1], spec)
    lengths = jnp.full((batch,), slots, jnp.int32) if kv.lengths is None else kv.lengths
    lengths = jnp.clip(lengths, 0, slots)
    info, steps = flash.scalars_of(tiling, spec, positions, lengths, kv.slot_positions is None)
    return flash.flash_attention(
        q, keys, values, tiling, spec, (info,), steps, 0, kv.slot_positions, interpret
    )


def _tiling(
    new: int, groups: int, kv_heads: int, slots: int, leaves: list[Leaf], spec: AttentionSpec
) -> flash.Tiling:
    heads = flash.heads_of(kv_heads)
    size = flash.slots_of(leaves, kv_heads, slots)
    # Whole tiles of lanes in every array.
    while any(size * leaf.share % LANES for leaf in leaves if leaf.rows):
        size *= 2
    first = -(-spec.sinks // size)
    return flash.Tiling(new=new, groups=groups, heads=heads, size=size, first=first, pages=1)


def _over_pages(
    q: Array, kv: PagedKV, positions: Array, spec: AttentionSpec, interpret: object
) -> Partial:
    _, new, heads, _ = q.shape
    kv_heads, page, columns = kv.kv_heads, kv.page, kv.block_table.shape[1]
    keys, values = reader_of(kv.k, q.dtype), values_reader_of(kv.v, q.dtype)
    wanted = flash.slots_of(keys[1], kv_heads, columns * page)
    pack_factor = kv.k.pack_factor if isinstance(kv.k, TpuPages) else 1
    lanes = LANES * pack_factor
    whole = lanes // math.gcd(page, lanes)  # pages that fill tiles
    pages = min(max(wanted // page // whole, 1) * whole, max(TILES // whole, 1) * whole)
    size = pages * page
    tiling = flash.Tiling(
        new=new,
        groups=heads // kv_heads,
        heads=flash.heads_of(kv_heads),
        size=size,
        first=-(-spec.sinks // size),
        pages=pages,
        pack_factor=pack_factor,
    )
    lengths = jnp.clip(kv.lengths, 0, columns * page)
    info, steps = flash.scalars_of(tiling, spec, positions, lengths, True)
    table = kv.block_table.astype(jnp.int32).reshape(-1)
    return flash.flash_attention(
        q, keys, values, tiling, spec, (info, table), steps, columns, None, interpret
    )
