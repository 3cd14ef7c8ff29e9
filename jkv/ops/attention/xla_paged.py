"""Attention over pages for any device that XLA compiles for: a block of a row after another.

What is in memory beside the pages is what is fetched at a time. A loop on the CPU runs on one core:
there rows come one after another, or a few where blocks are small, and the cost follows the tokens
that are there, not the longest row. Elsewhere a block of each row is looked at at once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkv._axes import Array
from jkv.ops.attention import xla
from jkv.ops.attention.reference import gathered, slot_positions
from jkv.ops.codecs import Encoded
from jkv.ops.kv import PagedKV
from jkv.ops.masks import AttentionSpec
from jkv.ops.pages import gather
from jkv.ops.partial import Partial

SOME = 2**16  # numbers of keys that are fetched at a time; measured on the CPU


def attention(q: Array, kv: PagedKV, positions: Array, spec: AttentionSpec) -> Partial:
    """Attend to pages, see `jkv.ops.attention`."""
    rows = xla.rows_of(q, kv.kv_heads)
    out, lse = _walked(spec, rows, kv.k, kv.v, kv.block_table, positions, kv.lengths)
    return xla.partial_of(out, lse, q)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _walked(spec, q, k_pages, v_pages, table, positions, lengths):
    def row(k_pages, v_pages, *own):
        return _row(spec, k_pages, v_pages, *own)

    def some_at_once(k_pages, v_pages, *rows):
        batch = some if some > 1 else None
        return lax.map(lambda own: row(k_pages, v_pages, *own), rows, batch_size=batch)

    def at_once(k_pages, v_pages, *rows):
        return jax.vmap(row, in_axes=(None, None, 0, 0, 0, 0))(k_pages, v_pages, *rows)

    apart = q.reshape(len(table), -1, *q.shape[1:])
    some = _together(k_pages)
    arguments = (k_pages, v_pages, apart, table, positions, lengths)
    out, lse = lax.platform_dependent(*arguments, cpu=some_at_once, default=at_once)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def _together(pages: Any) -> int:
    """Rows whose blocks are small beside the cost of going on to the next."""
    _, heads, _, dim = pages.shape
    return max(SOME // (xla.BLOCK * heads * dim), 1)


def _row(spec, k_pages, v_pages, q, table, positions, length):
    """Output [K, R, H] and log-sum-exp [K, R] of a row's queries."""
    where = _Pages(q, k_pages, v_pages, table, length)
    seers = positions[None]
    first, last = xla.block_range(spec, seers, None, length[None], where.slots, where.size)
    return xla.walk(spec, where, seers, first, last)


class _Pages(NamedTuple):
    """Where `xla.walk` reads: the pages of one row, those of a block side by side."""

    q: Array  # [K, R, H]
    k: Any  # [P, K, page, H]
    v: Any
    table: Array  # [M]
    length: Array

    @property
    def page(self) -> int:
        return self.k.shape[2]

    @property
    def slots(self) -> int:
        return len(self.table) * self.page

    @property
    def together(self) -> int:
        """Pages of a block."""
        return min(max(xla.BLOCK // self.page, 1), len(self.table))

    @property
    def size(self) -> int:
        return self.together * self.page

    def numbers(self, start: Array) -> Array:
        """Pages [U] of a block."""
        # A slice instead, and XLA's CPU compiler fetches pages anew for each product, at 2.5 times.
        return self.table[start // self.page + jnp.arange(self.together, dtype=jnp.int32)]

    def at(self, slots: Array, batch: int) -> Array:
        """Positions [1, S'] in the slots of a block, -1 where there is no token."""
        del batch
        there = jnp.repeat(self.numbers(slots[0]) >= 0, self.page)
        return jnp.where(there & (slots < self.length), slots, -1)[None]

    def block(self, pages: Any, start: Array) -> Any:
        """Keys or values [K, S', H] of a block."""

        def beside(leaf: Array, axis: int) -> Array:
            apart = jnp.moveaxis(leaf[None], 1, axis)  # [1, K, ..., U, page, ...]
            return apart.reshape(*apart.shape[:axis], -1, *apart.shape[axis + 2 :])

        found = gather(pages, jnp.maximum(self.numbers(start), 0))
        if isinstance(found, Encoded):
            return found.map_slots(beside).flatten_heads()
        return beside(found, 2)[0]

    def products(self, start: Array) -> Array:
        """Products [K, R, S'] of the queries with the keys of a block."""
        k = self.block(self.k, start)
        if isinstance(k, Encoded):
            return k.scores(self.q.astype(jnp.float32), 0, self.size)
        return jnp.einsum("zrh,zsh->zrs", self.q, k, **xla._PRODUCT)

    def sums(self, weights: Array, start: Array, positions: Array, at: Array) -> Array:
        """Weighted sums [K, R, H] of the values of a block."""
        v = self.block(self.v, start)
        if isinstance(v, Encoded):
            return v.weighted_sum(weights, 0, xla._used(len(weights), positions, at))
        return xla._weighted(weights, xla._zeroed(v, positions, at))


@_walked.defjvp
def _walked_jvp(spec, primals, tangents):
    q, k_pages, v_pages, table, positions, lengths = primals
    at = slot_positions(table, k_pages.shape[2])

    def whole(q, k_pages, v_pages):
        k, v = (gathered(pages, table) for pages in (k_pages, v_pages))
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        return xla._shortest(spec, q, k, v, positions, at, lengths)

    return jax.jvp(whole, (q, k_pages, v_pages), tangents[:3])
