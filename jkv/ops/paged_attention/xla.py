"""Attention over pages for any device that XLA compiles for: a block of a row after another.

What is in memory beside the pages is what is fetched at a time. A loop on the CPU runs on one core:
there rows come one after another, and the cost follows the tokens that are there, not the longest
row. Elsewhere a block of each row is looked at at once.
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
from jkv.ops.paged_attention.reference import gathered, slot_positions
from jkv.ops.pages import taken
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
    def row(k_pages, v_pages, *own):
        return _row(mask, k_pages, v_pages, *own)

    def one_by_one(k_pages, v_pages, *rows):
        return lax.map(lambda own: row(k_pages, v_pages, *own), rows)

    def at_once(k_pages, v_pages, *rows):
        return jax.vmap(row, in_axes=(None, None, 0, 0, 0, 0))(k_pages, v_pages, *rows)

    apart = q.reshape(len(table), -1, *q.shape[1:])
    arguments = (k_pages, v_pages, apart, table, positions, lengths)
    out, lse = lax.platform_dependent(*arguments, cpu=one_by_one, default=at_once)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def _row(mask, k_pages, v_pages, q, table, positions, length):
    """Output [K, R, H] and log-sum-exp [K, R] of a row's queries, by an online softmax."""
    columns, page = len(table), k_pages.shape[2]
    many = min(max(xla.BLOCK // page, 1), columns)  # pages of a block
    size, seers = many * page, positions[None]

    def block(i, carry):
        out, top, total = carry
        # Past the table's end, where its last block may reach, there is no page.
        column = i * many + jnp.arange(many)
        numbers = table[jnp.minimum(column, columns - 1)]
        there = jnp.repeat((column < columns) & (numbers >= 0), page)
        slots = i * size + jnp.arange(size)
        at = jnp.where(there & (slots < length), slots, -1)[None]
        k, v = (_fetched(x, jnp.maximum(numbers, 0)) for x in (k_pages, v_pages))
        scores = xla._masked(mask, _products(q, k), seers, at)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        shift = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
        weights = jnp.exp(scores - shift[..., None])
        faded = jnp.exp(top - shift)
        out = out * faded[..., None] + _sums(weights, v, seers, at)
        return out, new_top, total * faded + jnp.sum(weights, axis=-1)

    first, last = xla.block_range(mask, seers, None, length[None], columns * page, size)
    nothing = jnp.zeros(q.shape[:2], jnp.float32)
    carry = (jnp.zeros(q.shape, jnp.float32), jnp.full_like(nothing, -jnp.inf), nothing)
    out, top, total = lax.fori_loop(first, last, block, carry)
    return out / jnp.where(total == 0, 1.0, total)[..., None], top + jnp.log(total)


def _fetched(pages: Any, numbers: Array) -> Any:
    """Keys or values [K, S', H] of the pages [U], side by side."""

    def beside(leaf: Array, axis: int) -> Array:
        apart = jnp.moveaxis(leaf[None], 1, axis)  # [1, K, ..., U, page, ...]
        return apart.reshape(*apart.shape[:axis], -1, *apart.shape[axis + 2 :])

    found = taken(pages, numbers)
    if isinstance(found, Encoded):
        return found.over_slots(beside).merged()
    return beside(found, 2)[0]


def _products(q: Array, k: Any) -> Array:
    """Products [K, R, S'] of the queries with the keys of a block."""
    if isinstance(k, Encoded):
        return k.scores(q.astype(jnp.float32), 0, k.shape[1])
    return jnp.einsum("zrh,zsh->zrs", q, k, **xla._PRODUCT)


def _sums(weights: Array, v: Any, positions: Array, at: Array) -> Array:
    """Weighted sums [K, R, H] of the values of a block."""
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
