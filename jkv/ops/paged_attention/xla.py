"""Attention over pages for any device that XLA compiles for: a block of one row after another.

The blocks of all rows that some query sees are one list, so that the cost follows the tokens that
are there, and not the longest row. What is in memory beside the pages is what is fetched at a time:
one block where a loop runs on one core anyway, as many as there are rows where more run at once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jkv._axes import Array
from jkv.ops.attention import xla
from jkv.ops.encoded import Encoded
from jkv.ops.masks import Mask
from jkv.ops.pages import taken
from jkv.ops.paged_attention.reference import gathered, slot_positions
from jkv.ops.partial import Partial


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
) -> Partial:
    """See `jkv.ops.paged_attention`."""
    mask = Mask(scale, window, sinks, softcap)
    rows = xla.rows_of(q, k_pages.shape[1])
    out, lse = _walked(mask, rows, k_pages, v_pages, block_table, positions, lengths)
    return xla.partial_of(out, lse, q)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _walked(mask, q, k_pages, v_pages, table, positions, lengths):
    def walk(together):
        return functools.partial(_walk, mask, together)

    # A loop on the CPU runs on one core: blocks that are fetched together only fill its caches.
    arguments = (q, k_pages, v_pages, table, positions, lengths)
    return lax.platform_dependent(*arguments, cpu=walk(1), default=walk(len(table)))


def _walk(mask, together, q, k_pages, v_pages, table, positions, lengths):
    """Output [Z, R, H] and log-sum-exp [Z, R], by an online softmax over `together` blocks."""
    (batch, columns), (_, heads, page, _) = table.shape, k_pages.shape
    many = min(max(xla.BLOCK // page, 1), columns)  # pages of a block
    size = many * page
    z, queries, dim = q.shape
    q = q.reshape(batch, heads, queries, dim)

    def range_of(positions, length):
        slots = columns * page
        return xla.block_range(mask, positions[None], None, length[None], slots, size)

    first, last = jax.vmap(range_of)(positions, lengths)
    ends = jnp.cumsum(last - first)
    begins = ends - (last - first)

    def step(i, carry):
        out, top, total = carry
        # The blocks of row 0, then those of row 1, ...: whose are these, and which of its own?
        numbers = i * together + jnp.arange(together)
        live = numbers < ends[-1]
        row = jnp.minimum(jnp.sum(ends[None] <= numbers[:, None], axis=1), batch - 1)
        start = (first[row] + numbers - begins[row]) * size
        # Past the table's end, where its last block may reach, there is no page.
        column = start[:, None] // page + jnp.arange(many)[None]
        pages = table[row[:, None], jnp.minimum(column, columns - 1)]
        there = (column < columns) & (pages >= 0) & live[:, None]
        slots = start[:, None] + jnp.arange(size)[None]
        at = jnp.repeat(there, page, axis=1) & (slots < lengths[row][:, None])
        at = jnp.where(at, slots, -1)
        k, v = (_fetched(x, jnp.maximum(pages, 0)) for x in (k_pages, v_pages))

        seers = positions[row]
        products = _products(q[row].reshape(-1, queries, dim), k)
        scores = xla._masked(mask, products, seers, at)
        scores = scores.reshape(together, heads, queries, size)
        new_top = top.at[row].max(jnp.max(scores, axis=-1))
        shift = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
        weights = jnp.exp(scores - shift[row][..., None])
        faded = jnp.exp(top - shift)
        sums = _sums(weights.reshape(-1, queries, size), v, seers, at)
        out = (out * faded[..., None]).at[row].add(sums.reshape(together, heads, queries, dim))
        return out, new_top, (total * faded).at[row].add(jnp.sum(weights, axis=-1))

    out = jnp.zeros(q.shape, jnp.float32)
    nothing = jnp.zeros(q.shape[:3], jnp.float32)
    carry = (out, jnp.full_like(nothing, -jnp.inf), nothing)
    out, top, total = lax.fori_loop(0, -(-ends[-1] // together), step, carry)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    return out.reshape(z, queries, dim), (top + jnp.log(total)).reshape(z, queries)


def _fetched(pages: Any, numbers: Array) -> Any:
    """Keys or values [W * K, S', H] of the pages [W, U], side by side."""
    many = numbers.shape[1]

    def beside(leaf: Array, axis: int) -> Array:
        apart = jnp.moveaxis(leaf.reshape(-1, many, *leaf.shape[1:]), 1, axis)
        return apart.reshape(*apart.shape[:axis], -1, *apart.shape[axis + 2 :])

    found = taken(pages, numbers.reshape(-1))
    if isinstance(found, Encoded):
        return found.over_slots(beside).merged()
    found = beside(found, 2)
    return found.reshape(-1, *found.shape[2:])


def _products(q: Array, k: Any) -> Array:
    """Products [Z, R, S'] of the queries with the keys of a block."""
    if isinstance(k, Encoded):
        return k.scores(q.astype(jnp.float32), 0, k.shape[1])
    return jnp.einsum("zrh,zsh->zrs", q, k, **xla._PRODUCT)


def _sums(weights: Array, v: Any, positions: Array, at: Array) -> Array:
    """Weighted sums [Z, R, H] of the values of a block."""
    if isinstance(v, Encoded):
        return v.weighted(weights, 0, xla._used(len(weights), positions, at))
    return xla._weighted(weights, xla._zeroed(v, positions, at))


@_walked.defjvp
def _walked_jvp(mask, primals, tangents):
    q, k_pages, v_pages, table, positions, lengths = primals
    at = slot_positions(table, k_pages.shape[2])

    def whole(q, k_pages, v_pages):
        k, v = (gathered(pages, table) for pages in (k_pages, v_pages))
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        return xla._shortest(mask, q, k, v, positions, at, lengths)

    return jax.jvp(whole, (q, k_pages, v_pages), tangents[:3])
