"""Attention of a few new tokens over blocks of cached ones, in a Mosaic kernel for TPUs.

The grid walks rows, groups of key/value heads and blocks of slots. Which blocks a row reads is
known before the kernel starts (scalars that are fetched first): the grid ends with the longest
row's last block, and for a shorter row the index of a block repeats itself, which fetches nothing.
All queries of a key/value head are the rows of one product. The softmax is the online one
(Milakov and Gimelshein 2018, arXiv:1805.02867), in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jkv._axes import Array, Shaped
from jkv.ops.kv import KV
from jkv.ops.masks import AttentionSpec
from jkv.ops.mosaic_tpu.operands import Dense, Leaf, product, refusal, thirds
from jkv.ops.mosaic_tpu.write import where_it_is
from jkv.ops.partial import Partial
from jkv.ops.tile import LANES

# Sizes of blocks: bytes of keys that a step of the grid fetches (enough to hide what a step costs,
# about a third of a microsecond), slots and heads that they are spread over.
BLOCK = {"bytes": 2**20, "least slots": 128, "most slots": 1024, "heads": 8}
MOST_NEW = 16  # new tokens
MOST_GROUPS = 16
SUBLANES = 8
LOW = -3e38  # below any score


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut up: all that is known when the kernel is traced."""

    new: int
    groups: int
    heads: int  # of a step
    size: int  # slots of a step
    first: int  # blocks with sinks, read whatever the window
    pages: int  # tiles that the slots of a step are in; 1 unless they are pages
    pack_factor: int = 1  # tokens of a line of a page, `jkv.ops.pages.TpuPages`


def rows_of(plan: Plan) -> int:
    """Query rows of a key/value head, filled up to whole tiles."""
    return -(-plan.new * plan.groups // SUBLANES) * SUBLANES


def unsupported(q: Shaped, kv: KV) -> str | None:
    """Return why the kernel cannot do this, or None: for contiguous operands and pages alike."""
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
    """Key/value heads of a step: all, or as many as a tile has rows."""
    most = BLOCK["heads"]
    return kv_heads if kv_heads % most and kv_heads < 2 * most else most


def slots_of(leaves: list[Leaf], kv_heads: int, slots: int) -> int:
    """Slots of a step, a power of two: as many as `BLOCK` says, no more than there are."""
    leaves = [x for x in leaves if not x.whole]  # few bytes, for all heads
    shapes = [(math.prod(x.array.shape[2:]), x.array.shape[x.axis], x) for x in leaves]
    each = sum(n / size * x.share * x.array.dtype.itemsize for n, size, x in shapes)
    most = min(BLOCK["most slots"], 2 ** math.ceil(math.log2(slots)))
    wanted = max(BLOCK["bytes"] / (float(each) * heads_of(kv_heads)), 1)
    return max(min(2 ** int(math.log2(wanted)), most), BLOCK["least slots"])


def flash(
    q: Array,
    keys: tuple[Any, list[Leaf]],
    values: tuple[Any, list[Leaf]],
    plan: Plan,
    spec: AttentionSpec,
    scalars: tuple[Array, ...],
    steps: Array,
    table: int,
    slot_positions: Array | None,
    interpret: Any,
) -> Partial:
    """Run the kernel.

    Args:
        q: [B, T, N, H].
        keys: how they are read, and their arrays.
        values: likewise.
        plan: sizes.
        spec: what is seen.
        scalars: what is fetched before the kernel starts, see `scalars_of`; then the block table.
        steps: blocks of the longest row.
        table: pages of a row in the block table, 0 without one.
        slot_positions: [B, S].
        interpret: of `pl.pallas_call`.
    """
    batch, new, heads, dim = q.shape
    groups, rows = plan.groups, rows_of(plan)
    kv_heads, width = heads // groups, dim * plan.pack_factor
    grouped = q.reshape(batch, new, kv_heads, groups, dim).transpose(0, 2, 1, 3, 4)
    grouped = grouped.reshape(batch, kv_heads, new * groups, dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, rows - new * groups), (0, 0)))
    grouped = keys[0].queries(grouped)
    leaves = [*keys[1], *values[1]]
    tiled = [leaf for leaf in leaves for _ in range(plan.pages)]

    def per_head(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, plan.heads, *shape), lambda b, g, i, *_: (b, g, 0, 0))

    in_specs = [per_head(*grouped.shape[2:])]
    in_specs += [_spec(plan, leaf, tile, table) for leaf in leaves for tile in range(plan.pages)]
    inputs = [grouped, *(where_it_is(leaf.array, interpret) for leaf in tiled)]
    if slot_positions is not None:
        high = min(batch, SUBLANES)
        at = functools.partial(_block_of, plan)
        in_specs += [
            pl.BlockSpec(
                (high, plan.size), lambda b, g, i, info, *_: (lax.div(b, high), at(b, i, info))
            )
        ]
        inputs += [slot_positions]
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel, plan, spec, keys, values, table, len(scalars), slot_positions is not None
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, -(-kv_heads // plan.heads), steps),
            in_specs=in_specs,
            out_specs=[per_head(rows, width), per_head(rows, LANES)],
            scratch_shapes=[
                pltpu.VMEM((plan.heads, rows, width), jnp.float32),
                pltpu.VMEM((plan.heads, rows, LANES), jnp.float32),
                pltpu.VMEM((plan.heads, rows, LANES), jnp.float32),
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
    # The tokens of a line have each their own lanes of the sum.
    out = out.reshape(batch, kv_heads, rows, values[0].parts, plan.pack_factor, -1).sum(axis=4)
    out = out.reshape(batch, kv_heads, rows, dim)
    out = out[:, :, : new * groups].reshape(batch, kv_heads, new, groups, dim)
    lse = lse[:, :, : new * groups, 0].reshape(batch, kv_heads, new, groups)
    return Partial(
        out=out.transpose(0, 2, 1, 3, 4).reshape(q.shape),
        lse=lse.transpose(0, 2, 1, 3).reshape(batch, new, heads),
    )


FIXED = 4  # scalars of a row before the positions of its queries


def scalars_of(
    plan: Plan, spec: AttentionSpec, positions: Array, lengths: Array, in_order: bool
) -> tuple[Array, Array]:
    """Scalars of all rows, flat, and the blocks of the longest row.

    Of a row: how many blocks it reads; how many are left out after those with sinks; its length;
    its last query's position; the positions of its queries.

    Args:
        plan: sizes.
        spec: what is seen.
        positions: [B, T].
        lengths: [B], at most as many as there are slots.
        in_order: whether slot s holds position s: then blocks before the window can be left out.
    """
    high = jnp.max(positions, axis=1)
    skipped = jnp.zeros_like(lengths)
    filled = lengths
    if in_order:
        filled = jnp.minimum(lengths, high + 1)
    last = -(-filled // plan.size)
    if in_order and spec.window is not None:
        low = jnp.min(jnp.where(positions < 0, high[:, None], positions), axis=1)
        start = jnp.clip((low - spec.window + 1) // plan.size, 0, last)
        skipped = jnp.maximum(start - plan.first, 0)
    # Nobody sees anything: no block.
    count = jnp.where(high < 0, 0, last - skipped)
    head = jnp.stack([count, skipped, lengths, high], axis=1)
    flat = jnp.concatenate([head, positions], axis=1).astype(jnp.int32).reshape(-1)
    return flat, jnp.maximum(jnp.max(count), 1).astype(jnp.int32)


def _block_of(plan: Plan, b: Any, i: Any, info: Any) -> Any:
    """The block that a row reads in step i; in steps that it does not need, the last again."""
    at = b * (FIXED + plan.new)
    i = jnp.maximum(jnp.minimum(i, info[at] - 1), 0)
    return jnp.where(i < plan.first, i, i + info[at + 1])


def _spec(plan: Plan, leaf: Leaf, tile: int, table: int) -> pl.BlockSpec:
    """Which part of an array a step fetches: its share of a block, or of a page of it."""
    page = plan.size // plan.pages
    shape = [1, plan.heads, *leaf.array.shape[2:]]
    shape[leaf.axis] = int(page * leaf.share)
    if leaf.whole:
        shape = [1, leaf.array.shape[1], min(_tiles_of(plan) * LANES, leaf.array.shape[2])]

    def index(b: Any, g: Any, i: Any, info: Any, *pages: Any) -> tuple[Any, ...]:
        block = _block_of(plan, b, i, info)
        found = [b, g] + [0] * (len(shape) - 2) if not leaf.whole else [b, 0, g]
        if pages:
            number = block * plan.pages + tile
            at = b * (FIXED + plan.new)
            filled = jnp.minimum(info[at + 2], info[at + 3] + 1)
            # Past the end, what this tile fetched a step ago: that fetches nothing.
            past = number * page >= filled
            number = jnp.maximum(jnp.where(past, number - plan.pages, number), 0)
            found[0] = jnp.maximum(pages[0][b * table + number], 0)
        else:
            found[leaf.axis] = block
        return tuple(found)

    return pl.BlockSpec(tuple(shape), index)


def _tiles_of(plan: Plan) -> int:
    """Tiles of lanes that the scales of a page's heads are in."""
    return -(-plan.heads * (plan.size // plan.pages) // LANES)


def _there(plan: Plan, slots: Array, first: Any, columns: int, pages: Any, row: Any) -> Array:
    """Slots [1, S] as they are, -1 in pages that the table does not name."""
    size = plan.size // plan.pages
    for tile in range(plan.pages):
        number = jnp.minimum(first + tile, columns - 1)
        start = first * size + tile * size
        here = (slots >= start) & (slots < start + size)
        slots = jnp.where(here & (pages[row * columns + number] < 0), -1, slots)
    return slots


def _kernel(
    plan: Plan,
    spec: AttentionSpec,
    keys: Any,
    values: Any,
    table: int,
    scalars: int,
    given: bool,
    *refs: Any,
) -> None:
    info, q_ref = refs[0], refs[scalars]
    out_ref, lse_ref, acc_ref, top_ref, total_ref = refs[-5:]
    held = refs[scalars + 1 : -5]
    b, i = pl.program_id(0), pl.program_id(2)
    at = b * (FIXED + plan.new)
    count, length, high = info[at], info[at + 2], info[at + 3]

    @pl.when(i == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)

    start = _block_of(plan, b, i, info) * plan.size
    stop = start + plan.size
    # Some query sees every slot of the block.
    full = (not given) & (stop <= jnp.minimum(length, high + 1))
    if spec.window is not None:
        full &= (start > high - spec.window) | (stop <= spec.sinks)

    if scalars > 1:
        for tile in range(plan.pages):
            number = jnp.minimum(lax.div(start, plan.size) * plan.pages + tile, table - 1)
            full &= refs[1][b * table + number] >= 0

    def heads(clean: bool) -> None:
        slots = start + _order(plan, (1, plan.size), 1)
        if clean and scalars > 1:
            first = lax.div(start, plan.size) * plan.pages
            slots = _there(plan, slots, first, table, refs[1], b)
        held_at = held[-1][pl.ds(lax.rem(b, held[-1].shape[0]), 1), :] if given else slots
        seen = _seen(plan, spec, info, at, jnp.where(slots < length, held_at, -1))
        tiles = iter(held)
        k, v = (_readers(plan, leaves, tiles) for _, leaves in (keys, values))
        for h in range(plan.heads):
            block = [[x for read in reads for x in read(h)] for reads in (k, v)]
            _head(spec, (keys[0], values[0]), block, q_ref[0, h], seen, h, clean, refs[-3:])

    # Codes stand for numbers, whatever they are: only of dense ones it costs anything to leave out
    # those of slots that nobody sees.
    if isinstance(values[0], Dense):

        @pl.when((i < count) & full)
        def _():
            heads(clean=False)

        @pl.when((i < count) & ~full)
        def _():
            heads(clean=True)

    else:

        @pl.when(i < count)
        def _():
            heads(clean=True)

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        total = total_ref[...]
        none = total == 0
        some = jnp.where(none, 1.0, total)
        lse_ref[0] = jnp.where(none, -jnp.inf, top_ref[...] + jnp.log(some))
        out_ref[0] = acc_ref[...] / some[:, :, :1]


def _seen(plan: Plan, spec: AttentionSpec, info: Any, at: Any, held: Array) -> Array:
    """Which query rows see which slots, [R, S]: the rule of `jkv.ops.masks`."""
    row = lax.broadcasted_iota(jnp.int32, (rows_of(plan), 1), 0)
    positions = jnp.full(row.shape, -1, jnp.int32)
    for t in range(plan.new):
        own = (row >= t * plan.groups) & (row < (t + 1) * plan.groups)
        positions = jnp.where(own, info[at + FIXED + t], positions)
    seen = (held >= 0) & (held <= positions)
    if spec.window is not None:
        seen &= (positions - held < spec.window) | (held < spec.sinks)
    return seen


def _head(
    spec: AttentionSpec,
    forms: tuple[Any, Any],
    block: list[list[Array]],
    q: Array,
    seen: Array,
    h: int,
    clean: bool,
    scratch: Any,
) -> None:
    """One key/value head's share of a block."""
    acc_ref, top_ref, total_ref = scratch
    (keys, values), (k, v) = forms, block
    used = seen if clean else None
    scores = keys.products(q, k, used) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = top_ref[h][:, :1]
    new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
    shift = jnp.where(new_top > LOW, new_top, 0.0)
    weights = jnp.exp(scores - shift)
    faded = jnp.exp(top - shift)
    total = total_ref[h][:, :1] * faded + jnp.sum(weights, axis=1, keepdims=True)
    acc_ref[h] = acc_ref[h] * faded + values.sums(weights, v, used)
    top_ref[h] = jnp.broadcast_to(new_top, top_ref.shape[1:])
    total_ref[h] = jnp.broadcast_to(total, total_ref.shape[1:])


def _readers(
    plan: Plan, leaves: list[Leaf], tiles: Iterator[Any]
) -> list[Callable[[int], list[Array]]]:
    """For each array what a head has of it in a block."""
    found = []
    for leaf in leaves:
        own = [next(tiles) for _ in range(plan.pages)]
        read = functools.partial(_loaded, leaf, own)
        found.append(_spread(plan, leaf, own).__getitem__ if leaf.whole else read)
    return found


def _loaded(leaf: Leaf, tiles: list[Any], h: int) -> list[Array]:
    """What a head has in a block of one array, tiles one after another."""
    # Rows of less than 32 bits cannot be told apart before they are widened.
    parts = [tile[0].astype(jnp.int32)[h : h + 1] if leaf.rows else tile[0, h] for tile in tiles]
    if len(parts) == 1:
        return parts
    return [jnp.concatenate(parts, axis=1 if leaf.rows else leaf.axis - 2)]


def _order(plan: Plan, shape: tuple[int, ...], axis: int) -> Array:
    """Slots of a block in the order of their scores: the first tokens of all lines come first."""
    at = lax.broadcasted_iota(jnp.int32, shape, axis)
    lines = plan.size // plan.pack_factor
    return lax.rem(at, lines) * plan.pack_factor + lax.div(at, lines)


def _spread(plan: Plan, leaf: Leaf, tiles: list[Any]) -> list[list[Array]]:
    """Scales of each head, all groups' steps and all groups' zero points, [groups, S].

    A page has those of all heads in a line, head after head, and a head's are wanted in a line,
    page after page. No lane is moved for that: products with zeros and ones put each page's where
    all pages have theirs, of which each slot then takes its own. Whole numbers take two, of which
    bfloat16 holds each.
    """
    page, wide = plan.size // plan.pages, -(-plan.pages // SUBLANES) * SUBLANES
    room = [jnp.zeros((wide - plan.pages, tiles[0].shape[2]), jnp.float32)]
    words = [tile[0].astype(jnp.int32) for tile in tiles]
    parts, owners = [], []
    for i, whole in enumerate(leaf.whole):
        bits = jnp.concatenate([x[i : i + 1] for x in words], axis=0)
        if whole:
            found = thirds(((bits << 16) >> 16).astype(jnp.float32), 2)
        else:
            found = [lax.bitcast_convert_type(bits << 16, jnp.float32)]
        parts += [jnp.concatenate([x, *room], axis=0) if wide > plan.pages else x for x in found]
        owners += [i] * len(found)

    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    rows = []
    for h in range(plan.heads):
        tile, first = divmod(h * page, LANES)
        here = (lane >= first) & (lane < first + page)
        own = slice(tile * LANES, (tile + 1) * LANES)
        rows += [jnp.where(here, x[:, own], 0.0) for x in parts]
    token = lax.broadcasted_iota(jnp.int32, (LANES, plan.size), 0)
    slot = _order(plan, (LANES, plan.size), 1)
    ones = (lax.rem(token, page) == lax.rem(slot, page)).astype(jnp.float32).astype(jnp.bfloat16)
    every = product(jnp.concatenate(rows, axis=0).astype(jnp.bfloat16), ones, 0)
    number = lax.broadcasted_iota(jnp.int32, (wide, plan.size), 0)
    mine = number == lax.div(_order(plan, (wide, plan.size), 1), page)

    def line(h: int, i: int) -> Array:
        total: Any = 0.0
        for n in (n for n, owner in enumerate(owners) if owner == i):
            at = (h * len(parts) + n) * wide
            total = total + jnp.sum(
                jnp.where(mine, every[at : at + wide], 0.0), axis=0, keepdims=True
            )
        return total

    def lines(h: int, whole: bool) -> list[Array]:
        own = [line(h, i) for i, other in enumerate(leaf.whole) if other == whole]
        return [own[0] if len(own) == 1 else jnp.concatenate(own, axis=0)] if own else []

    return [lines(h, False) + lines(h, True) for h in range(plan.heads)]
