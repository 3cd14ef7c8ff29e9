"""Attention over pages for any device that XLA compiles for, one block of a row at a time.

Beside the pages, only the blocks being read are in memory. A loop on the CPU runs on one core:
there rows are processed one after another, or a few at once where blocks are small, and the cost
follows the tokens of each row, not the longest one. Elsewhere all rows are processed at once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkv._axes import Array
from jkv.ops.attention import xla
from jkv.ops.attention.reference import gather_slots, slot_positions
from jkv.ops.codecs import Encoded
from jkv.ops.codecs.base import PRODUCT
from jkv.ops.kv import PagedKV, Pages, Slots
from jkv.ops.masks import AttentionSpec
from jkv.ops.pages import gather
from jkv.ops.partial import Partial

SOME = 2**16  # numbers of keys that are fetched at a time; measured on the CPU


def attention(q: Array, kv: PagedKV, positions: Array, spec: AttentionSpec) -> Partial:
    """Attend to pages, see `jkv.ops.attention`."""
    rows = xla.rows_of(q, kv.kv_heads)
    out, lse = _attend_pages(spec, rows, kv.k, kv.v, kv.block_table, positions, kv.lengths)
    return xla.partial_of(out, lse, q)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_pages(
    spec: AttentionSpec,
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    table: Array,
    positions: Array,
    lengths: Array,
) -> xla.OutAndLse:
    def row(k_pages: Pages, v_pages: Pages, *own: Array) -> xla.OutAndLse:
        return _row(spec, k_pages, v_pages, *own)

    def few_at_once(k_pages: Pages, v_pages: Pages, *rows: Array) -> xla.OutAndLse:
        batch = some if some > 1 else None
        return lax.map(lambda own: row(k_pages, v_pages, *own), rows, batch_size=batch)

    def at_once(k_pages: Pages, v_pages: Pages, *rows: Array) -> xla.OutAndLse:
        return jax.vmap(row, in_axes=(None, None, 0, 0, 0, 0))(k_pages, v_pages, *rows)

    rows = q.reshape(len(table), -1, *q.shape[1:])
    some = _rows_together(k_pages)
    arguments = (k_pages, v_pages, rows, table, positions, lengths)
    out, lse = lax.platform_dependent(*arguments, cpu=few_at_once, default=at_once)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def _rows_together(pages: Pages) -> int:
    """Return how many rows are processed at once, so that a step is worth its overhead."""
    _, heads, _, dim = pages.shape
    return max(SOME // (xla.BLOCK * heads * dim), 1)


def _row(
    spec: AttentionSpec,
    k_pages: Pages,
    v_pages: Pages,
    q: Array,
    table: Array,
    positions: Array,
    length: Array,
) -> xla.OutAndLse:
    """Attend from the queries of one row, to [K, R, H] and [K, R]."""
    where = _PagedBlocks(q, k_pages, v_pages, table, length)
    first, last = xla.block_range(
        spec, positions[None], None, length[None], where.slots, where.size
    )
    return xla.walk(spec, where, positions[None], first, last)


class _PagedBlocks(NamedTuple):
    """The pages of one row, which `xla.walk` reads a block at a time."""

    q: Array  # [K, R, H]
    k: Pages  # [P, K, page, H]
    v: Pages
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
        """Return the pages [U] of a block."""
        # With a slice, XLA's CPU compiler fetches pages again for each product: 2.5 times the time.
        return self.table[start // self.page + jnp.arange(self.together, dtype=jnp.int32)]

    def at(self, slots: Array, batch: int) -> Array:
        """Return the positions [1, S'] in the slots of a block, -1 where they are empty."""
        del batch
        there = jnp.repeat(self.numbers(slots[0]) >= 0, self.page)
        return jnp.where(there & (slots < self.length), slots, -1)[None]

    def block(self, pages: Pages, start: Array) -> Slots:
        """Gather the keys or values [K, S', H] of a block."""

        def join(leaf: Array, axis: int) -> Array:
            apart = jnp.moveaxis(leaf[None], 1, axis)  # [1, K, ..., U, page, ...]
            return apart.reshape(*apart.shape[:axis], -1, *apart.shape[axis + 2 :])

        found = gather(pages, jnp.maximum(self.numbers(start), 0))
        if isinstance(found, Encoded):
            return found.map_slots(join).flatten_heads()
        return join(found, 2)[0]

    def products(self, start: Array) -> Array:
        """Multiply the queries with the keys of a block to [K, R, S']."""
        k = self.block(self.k, start)
        if isinstance(k, Encoded):
            return k.scores(self.q.astype(jnp.float32), 0, self.size)
        return jnp.einsum("zrh,zsh->zrs", self.q, k, **PRODUCT)

    def sums(self, weights: Array, start: Array, positions: Array, at: Array) -> Array:
        """Sum the values of a block with weights to [K, R, H]."""
        v = self.block(self.v, start)
        if isinstance(v, Encoded):
            return v.weighted_sum(weights, 0, xla.used_slots(len(weights), positions, at))
        return xla.weighted_sum(weights, xla.zero_unseen(v, positions, at))


@_attend_pages.defjvp
def _attend_pages_jvp(
    spec: AttentionSpec, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[xla.OutAndLse, xla.OutAndLse]:
    q, k_pages, v_pages, table, positions, lengths = primals
    at = slot_positions(table, k_pages.shape[2])

    def at_once(q: Array, k_pages: Pages, v_pages: Pages) -> xla.OutAndLse:
        k, v = (gather_slots(pages, table) for pages in (k_pages, v_pages))
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        return xla.attend(spec, q, k, v, positions, at, lengths)

    return jax.jvp(at_once, (q, k_pages, v_pages), tangents[:3])
