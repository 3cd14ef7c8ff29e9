"""Attention of a few new tokens over blocks of cached ones, in a Mosaic kernel for TPUs.

The grid walks rows, groups of key/value heads and blocks of slots. Which blocks a row reads is
known before the kernel starts, from prefetched scalars: the grid ends with the last block of the
longest row, and for a shorter row the index of its last block repeats, which fetches nothing. All
queries of a key/value head are the rows of one product. The softmax is the online one (Milakov and
Gimelshein 2018, arXiv:1805.02867) in float32: m is the running maximum of the scores, l the sum of
the weights, and alpha rescales sums to a new maximum.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jkv._axes import Array, Index, Ref, Shaped
from jkv.ops.kv import KV
from jkv.ops.masks import AttentionSpec
from jkv.ops.mosaic_tpu.operands import (
    DenseReader,
    KeysReader,
    Leaf,
    ValuesReader,
    product,
    refusal,
    split_bf16,
)
from jkv.ops.mosaic_tpu.write import in_hbm
from jkv.ops.partial import Partial
from jkv.ops.tile import LANES

# Sizes of blocks: bytes of keys that a step of the grid fetches (enough to hide the cost of a step,
# about a third of a microsecond), and the slots and heads that they are spread over.
BLOCK = {"bytes": 2**20, "least slots": 128, "most slots": 1024, "heads": 8}
MOST_NEW = 16  # new tokens
MOST_GROUPS = 16
SUBLANES = 8
LOW = -3e38  # below any score

KeysOperand: TypeAlias = tuple[KeysReader, list[Leaf]]
ValuesOperand: TypeAlias = tuple[ValuesReader, list[Leaf]]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The division of the work into steps of the grid, static in the kernel."""

    new: int
    groups: int
    heads: int  # of a step
    size: int  # slots of a step
    first: int  # blocks with sinks, read whatever the window
    pages: int  # tiles that the slots of a step are in; 1 unless they are pages
    pack_factor: int = 1  # tokens of a line of a page, `jkv.ops.pages.TpuPages`


def rows_of(tiling: Tiling) -> int:
    """Return the query rows of a key/value head, padded to whole tiles."""
    return -(-tiling.new * tiling.groups // SUBLANES) * SUBLANES


def unsupported(q: Shaped, kv: KV) -> str | None:
    """Return why the kernel cannot take contiguous operands or pages, or None."""
    k, v = kv.k, kv.v
    _, new, heads, dim = q.shape
    if new > MOST_NEW:
        return f"{new} new tokens; it is for up to {MOST_NEW}"
    if heads // k.shape[1] > MOST_GROUPS:
        return f"{heads // k.shape[1]} query heads to a key/value head; up to {MOST_GROUPS}"
    if dim % 16 or not 64 <= dim <= 256:
        return f"a head dimension of {dim}; expected a multiple of 16 from 64 to 256"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"queries in {q.dtype}"
    return refusal("keys", k, q.dtype) or refusal("values", v, q.dtype)


def heads_of(kv_heads: int) -> int:
    """Return the key/value heads of a step: all, or as many as a tile has rows."""
    most = BLOCK["heads"]
    return kv_heads if kv_heads % most and kv_heads < 2 * most else most


def slots_of(leaves: list[Leaf], kv_heads: int, slots: int) -> int:
    """Return the slots of a step, a power of two: by `BLOCK`, and no more than there are."""
    leaves = [x for x in leaves if not x.whole]  # few bytes, for all heads
    shapes = [(math.prod(x.array.shape[2:]), x.array.shape[x.axis], x) for x in leaves]
    each = sum(n / size * x.share * x.array.dtype.itemsize for n, size, x in shapes)
    most = min(BLOCK["most slots"], 2 ** math.ceil(math.log2(slots)))
    wanted = max(BLOCK["bytes"] / (float(each) * heads_of(kv_heads)), 1)
    return max(min(2 ** int(math.log2(wanted)), most), BLOCK["least slots"])


def flash_attention(
    q: Array,
    keys: KeysOperand,
    values: ValuesOperand,
    tiling: Tiling,
    spec: AttentionSpec,
    scalars: tuple[Array, ...],
    steps: Array,
    table: int,
    slot_positions: Array | None,
    interpret: object,
) -> Partial:
    """Run the kernel.

    Args:
        q: [B, T, N, H].
        keys: their reader and their arrays.
        values: likewise.
        tiling: sizes.
        spec: mask and softcap.
        scalars: prefetched scalars, see `scalars_of`; then the block table.
        steps: blocks of the longest row.
        table: pages of a row in the block table, 0 without one.
        slot_positions: [B, S].
        interpret: of `pl.pallas_call`.
    """
    batch, new, heads, dim = q.shape
    groups, rows = tiling.groups, rows_of(tiling)
    kv_heads, width = heads // groups, dim * tiling.pack_factor
    grouped = q.reshape(batch, new, kv_heads, groups, dim).transpose(0, 2, 1, 3, 4)
    grouped = grouped.reshape(batch, kv_heads, new * groups, dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, rows - new * groups), (0, 0)))
    grouped = keys[0].queries(grouped)
    leaves = [*keys[1], *values[1]]
    tiled = [leaf for leaf in leaves for _ in range(tiling.pages)]

    def per_head(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, tiling.heads, *shape), lambda b, g, i, *_: (b, g, 0, 0))

    in_specs = [per_head(*grouped.shape[2:])]
    in_specs += [
        _spec(tiling, leaf, tile, table) for leaf in leaves for tile in range(tiling.pages)
    ]
    inputs = [grouped, *(in_hbm(leaf.array, interpret) for leaf in tiled)]
    if slot_positions is not None:
        high = min(batch, SUBLANES)
        at = functools.partial(_block_of, tiling)
        in_specs += [
            pl.BlockSpec(
                (high, tiling.size), lambda b, g, i, info, *_: (lax.div(b, high), at(b, i, info))
            )
        ]
        inputs += [slot_positions]
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel, tiling, spec, keys, values, table, len(scalars), slot_positions is not None
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, -(-kv_heads // tiling.heads), steps),
            in_specs=in_specs,
            out_specs=[per_head(rows, width), per_head(rows, LANES)],
            scratch_shapes=[
                pltpu.VMEM((tiling.heads, rows, width), jnp.float32),
                pltpu.VMEM((tiling.heads, rows, LANES), jnp.float32),
                pltpu.VMEM((tiling.heads, rows, LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, rows, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="jkv_attention",
    )(*scalars, *inputs)
    # Each token of a line has its own lanes of the sum.
    out = out.reshape(batch, kv_heads, rows, values[0].parts, tiling.pack_factor, -1).sum(axis=4)
    out = out.reshape(batch, kv_heads, rows, dim)
    out = out[:, :, : new * groups].reshape(batch, kv_heads, new, groups, dim)
    lse = lse[:, :, : new * groups, 0].reshape(batch, kv_heads, new, groups)
    return Partial(
        out=out.transpose(0, 2, 1, 3, 4).reshape(q.shape),
        lse=lse.transpose(0, 2, 1, 3).reshape(batch, new, heads),
    )


FIXED = 4  # scalars of a row before the positions of its queries


def scalars_of(
    tiling: Tiling, spec: AttentionSpec, positions: Array, lengths: Array, in_order: bool
) -> tuple[Array, Array]:
    """Return the scalars of all rows, flat, and the blocks of the longest row.

    For each row: the blocks that it reads, the blocks skipped after those with sinks, its length,
    the position of its last query, and the positions of its queries.

    Args:
        tiling: sizes.
        spec: mask.
        positions: [B, T].
        lengths: [B], at most the number of slots.
        in_order: whether slot s holds position s: then blocks before the window can be skipped.
    """
    high = jnp.max(positions, axis=1)
    skipped = jnp.zeros_like(lengths)
    filled = lengths
    if in_order:
        filled = jnp.minimum(lengths, high + 1)
    last = -(-filled // tiling.size)
    if in_order and spec.window is not None:
        low = jnp.min(jnp.where(positions < 0, high[:, None], positions), axis=1)
        start = jnp.clip((low - spec.window + 1) // tiling.size, 0, last)
        skipped = jnp.maximum(start - tiling.first, 0)
    # Without queries: no block.
    count = jnp.where(high < 0, 0, last - skipped)
    head = jnp.stack([count, skipped, lengths, high], axis=1)
    flat = jnp.concatenate([head, positions], axis=1).astype(jnp.int32).reshape(-1)
    return flat, jnp.maximum(jnp.max(count), 1).astype(jnp.int32)


def _block_of(tiling: Tiling, b: Index, i: Index, info: Ref) -> Array:
    """Return the block that a row reads in step i: its last one in steps past its end."""
    at = b * (FIXED + tiling.new)
    i = jnp.maximum(jnp.minimum(i, info[at] - 1), 0)
    return jnp.where(i < tiling.first, i, i + info[at + 1])


def _spec(tiling: Tiling, leaf: Leaf, tile: int, table: int) -> pl.BlockSpec:
    """Return which part of an array a step fetches: of a block, or of one of its pages."""
    page = tiling.size // tiling.pages
    shape = [1, tiling.heads, *leaf.array.shape[2:]]
    shape[leaf.axis] = int(page * leaf.share)
    if leaf.whole:
        shape = [1, leaf.array.shape[1], min(_tiles_of(tiling) * LANES, leaf.array.shape[2])]

    def index(b: Array, g: Array, i: Array, info: Ref, *pages: Ref) -> tuple[Index, ...]:
        block = _block_of(tiling, b, i, info)
        found = [b, g] + [0] * (len(shape) - 2) if not leaf.whole else [b, 0, g]
        if pages:
            number = block * tiling.pages + tile
            at = b * (FIXED + tiling.new)
            filled = jnp.minimum(info[at + 2], info[at + 3] + 1)
            # Past the end, the page of a step before: that fetches nothing.
            past = number * page >= filled
            number = jnp.maximum(jnp.where(past, number - tiling.pages, number), 0)
            found[0] = jnp.maximum(pages[0][b * table + number], 0)
        else:
            found[leaf.axis] = block
        return tuple(found)

    return pl.BlockSpec(tuple(shape), index)


def _tiles_of(tiling: Tiling) -> int:
    """Return how many tiles of lanes hold the scales of a page's heads."""
    return -(-tiling.heads * (tiling.size // tiling.pages) // LANES)


def _drop_missing_pages(
    tiling: Tiling, slots: Array, first: Array, columns: int, pages: Ref, row: Array
) -> Array:
    """Replace slots [1, S] by -1 in pages that the table does not list."""
    size = tiling.size // tiling.pages
    for tile in range(tiling.pages):
        number = jnp.minimum(first + tile, columns - 1)
        start = first * size + tile * size
        here = (slots >= start) & (slots < start + size)
        slots = jnp.where(here & (pages[row * columns + number] < 0), -1, slots)
    return slots


def _kernel(
    tiling: Tiling,
    spec: AttentionSpec,
    keys: KeysOperand,
    values: ValuesOperand,
    table: int,
    scalars: int,
    has_slot_positions: bool,
    *refs: Ref,
) -> None:
    info, q_ref = refs[0], refs[scalars]
    out_ref, lse_ref, acc_ref, m_ref, l_ref = refs[-5:]
    operand_refs = refs[scalars + 1 : -5]
    b, i = pl.program_id(0), pl.program_id(2)
    at = b * (FIXED + tiling.new)
    count, length, high = info[at], info[at + 2], info[at + 3]

    @pl.when(i == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
        l_ref[...] = jnp.zeros_like(l_ref)

    start = _block_of(tiling, b, i, info) * tiling.size
    stop = start + tiling.size
    # Every slot of the block is visible by divisor query.
    full = (not has_slot_positions) & (stop <= jnp.minimum(length, high + 1))
    if spec.window is not None:
        full &= (start > high - spec.window) | (stop <= spec.sinks)

    if scalars > 1:
        for tile in range(tiling.pages):
            number = jnp.minimum(lax.div(start, tiling.size) * tiling.pages + tile, table - 1)
            full &= refs[1][b * table + number] >= 0

    def heads(masked: bool) -> None:
        slots = start + _order(tiling, (1, tiling.size), 1)
        if masked and scalars > 1:
            first = lax.div(start, tiling.size) * tiling.pages
            slots = _drop_missing_pages(tiling, slots, first, table, refs[1], b)
        slot_positions = (
            operand_refs[-1][pl.ds(lax.rem(b, operand_refs[-1].shape[0]), 1), :]
            if has_slot_positions
            else slots
        )
        visible = _visible(tiling, spec, info, at, jnp.where(slots < length, slot_positions, -1))
        tiles = iter(operand_refs)
        k, v = (_leaf_readers(tiling, leaves, tiles) for _, leaves in (keys, values))
        for h in range(tiling.heads):
            block = [[x for read in reads for x in read(h)] for reads in (k, v)]
            _head(spec, (keys[0], values[0]), block, q_ref[0, h], visible, h, masked, refs[-3:])

    # Any code decodes to a finite number: only dense values of unseen slots have to be masked.
    if isinstance(values[0], DenseReader):

        @pl.when((i < count) & full)
        def _():
            heads(masked=False)

        @pl.when((i < count) & ~full)
        def _():
            heads(masked=True)

    else:

        @pl.when(i < count)
        def _():
            heads(masked=True)

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        l = l_ref[...]
        empty = l == 0
        divisor = jnp.where(empty, 1.0, l)
        lse_ref[0] = jnp.where(empty, -jnp.inf, m_ref[...] + jnp.log(divisor))
        out_ref[0] = acc_ref[...] / divisor[:, :, :1]


def _visible(
    tiling: Tiling, spec: AttentionSpec, info: Ref, at: Array, slot_positions: Array
) -> Array:
    """Return which query rows see which slots, [R, S], by the rule of `jkv.ops.masks`."""
    row = lax.broadcasted_iota(jnp.int32, (rows_of(tiling), 1), 0)
    positions = jnp.full(row.shape, -1, jnp.int32)
    for t in range(tiling.new):
        own = (row >= t * tiling.groups) & (row < (t + 1) * tiling.groups)
        positions = jnp.where(own, info[at + FIXED + t], positions)
    seen = (slot_positions >= 0) & (slot_positions <= positions)
    if spec.window is not None:
        seen &= (positions - slot_positions < spec.window) | (slot_positions < spec.sinks)
    return seen


def _head(
    spec: AttentionSpec,
    readers: tuple[KeysReader, ValuesReader],
    block: list[list[Array]],
    q: Array,
    seen: Array,
    h: int,
    masked: bool,
    scratch: Sequence[Ref],
) -> None:
    """Process the block of one key/value head."""
    acc_ref, m_ref, l_ref = scratch
    (keys, values), (k, v) = readers, block
    used = seen if masked else None
    scores = keys.products(q, k, used) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    scores = jnp.where(seen, scores, -jnp.inf)
    m = m_ref[h][:, :1]
    new_m = jnp.maximum(m, jnp.max(scores, axis=1, keepdims=True))
    shift = jnp.where(new_m > LOW, new_m, 0.0)
    weights = jnp.exp(scores - shift)
    alpha = jnp.exp(m - shift)
    l = l_ref[h][:, :1] * alpha + jnp.sum(weights, axis=1, keepdims=True)
    acc_ref[h] = acc_ref[h] * alpha + values.sums(weights, v, used)
    m_ref[h] = jnp.broadcast_to(new_m, m_ref.shape[1:])
    l_ref[h] = jnp.broadcast_to(l, l_ref.shape[1:])


def _leaf_readers(
    tiling: Tiling, leaves: list[Leaf], tiles: Iterator[Ref]
) -> list[Callable[[int], list[Array]]]:
    """Return for each array a function that loads a head's part of a block."""
    found = []
    for leaf in leaves:
        own = [next(tiles) for _ in range(tiling.pages)]
        read = functools.partial(_load, leaf, own)
        found.append(_head_scales(tiling, leaf, own).__getitem__ if leaf.whole else read)
    return found


def _load(leaf: Leaf, tiles: list[Ref], h: int) -> list[Array]:
    """Load a head's part of a block of one array, its tiles one after another."""
    # Rows of fewer than 32 bits cannot be indexed before they are widened.
    parts = [tile[0].astype(jnp.int32)[h : h + 1] if leaf.rows else tile[0, h] for tile in tiles]
    if len(parts) == 1:
        return parts
    return [jnp.concatenate(parts, axis=1 if leaf.rows else leaf.axis - 2)]


def _order(tiling: Tiling, shape: tuple[int, ...], axis: int) -> Array:
    """Return the slots of a block in the order of their scores: first tokens of lines first."""
    at = lax.broadcasted_iota(jnp.int32, shape, axis)
    lines = tiling.size // tiling.pack_factor
    return lax.rem(at, lines) * tiling.pack_factor + lax.div(at, lines)


def _head_scales(tiling: Tiling, leaf: Leaf, tiles: list[Ref]) -> list[list[Array]]:
    """Return for each head the scales and the zero points of all groups, [groups, S].

    A page has those of all heads in a line, head after head, while the kernel reads those of a head
    in a line, page after page. No lane is moved: products with zeros and ones copy the scales of
    each page to all slots, from which each slot selects its own. Zero points are split into two
    numbers that bfloat16 represents.
    """
    page, wide = tiling.size // tiling.pages, -(-tiling.pages // SUBLANES) * SUBLANES
    room = [jnp.zeros((wide - tiling.pages, tiles[0].shape[2]), jnp.float32)]
    words = [tile[0].astype(jnp.int32) for tile in tiles]
    parts, owners = [], []
    for i, whole in enumerate(leaf.whole):
        bits = jnp.concatenate([x[i : i + 1] for x in words], axis=0)
        if whole:
            found = split_bf16(((bits << 16) >> 16).astype(jnp.float32), 2)
        else:
            found = [lax.bitcast_convert_type(bits << 16, jnp.float32)]
        parts += [jnp.concatenate([x, *room], axis=0) if wide > tiling.pages else x for x in found]
        owners += [i] * len(found)

    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    rows = []
    for h in range(tiling.heads):
        tile, first = divmod(h * page, LANES)
        here = (lane >= first) & (lane < first + page)
        own = slice(tile * LANES, (tile + 1) * LANES)
        rows += [jnp.where(here, x[:, own], 0.0) for x in parts]
    token = lax.broadcasted_iota(jnp.int32, (LANES, tiling.size), 0)
    slot = _order(tiling, (LANES, tiling.size), 1)
    ones = (lax.rem(token, page) == lax.rem(slot, page)).astype(jnp.float32).astype(jnp.bfloat16)
    every = product(jnp.concatenate(rows, axis=0).astype(jnp.bfloat16), ones, 0)
    number = lax.broadcasted_iota(jnp.int32, (wide, tiling.size), 0)
    mine = number == lax.div(_order(tiling, (wide, tiling.size), 1), page)

    def line(h: int, i: int) -> Array:
        row: Any = 0.0
        for n in (n for n, owner in enumerate(owners) if owner == i):
            at = (h * len(parts) + n) * wide
            row = row + jnp.sum(jnp.where(mine, every[at : at + wide], 0.0), axis=0, keepdims=True)
        return row

    def lines(h: int, whole: bool) -> list[Array]:
        own = [line(h, i) for i, other in enumerate(leaf.whole) if other == whole]
        return [own[0] if len(own) == 1 else jnp.concatenate(own, axis=0)] if own else []

    return [lines(h, False) + lines(h, True) for h in range(tiling.heads)]
