"""Attention over pages for any device that XLA compiles for: some pages at a time.

Each step of the walk fetches the pages that hold one block of positions of every row, so that what
is in memory beside the pages is a block, and the cost follows the longest row that is filled.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkv._axes import Array
from jkv.ops.attention import xla
from jkv.ops.encoded import Encoded
from jkv.ops.masks import Mask
from jkv.ops.paged_attention.reference import gathered, slot_positions
from jkv.ops.partial import Partial


class _Pages(NamedTuple):
    """Where `xla.walk` reads; of a block, each page is a row of its own."""

    q: Array  # [Z, R, H]
    k: Any  # [P, K, page, H]
    v: Any
    table: Array  # [B, M]
    lengths: Array  # [B]

    @property
    def page(self) -> int:
        return self.k.shape[2]

    @property
    def slots(self) -> int:
        return self.table.shape[1] * self.page

    @property
    def together(self) -> int:
        """Pages of a block."""
        return min(max(xla.BLOCK // self.page, 1), self.table.shape[1])

    @property
    def size(self) -> int:
        return self.together * self.page

    def numbers(self, start: Array) -> Array:
        """Pages [B, U] of a block."""
        return lax.dynamic_slice_in_dim(self.table, start // self.page, self.together, 1)

    def at(self, slots: Array, batch: int) -> Array:
        """Positions [B, S'] in the slots of a block, -1 where there is no token."""
        there = jnp.repeat(self.numbers(slots[0]) >= 0, self.page, axis=1)
        there &= slots[None] < self.lengths[:, None]
        return jnp.where(there, jnp.broadcast_to(slots[None], (batch, len(slots))), -1)

    def block(self, pages: Any, start: Array) -> Any:
        """Keys or values [B * U * K, page, H] of a block."""
        numbers = jnp.maximum(self.numbers(start), 0).reshape(-1)
        if isinstance(pages, Encoded):
            return pages.take(numbers).merged()
        return pages[numbers].reshape(-1, *pages.shape[2:])

    def paged(self, x: Array) -> Array:
        """From [Z, R, U * ...] to a line for each page and head, [B * U * K, R, ...]."""
        batch, heads = len(self.table), self.k.shape[1]
        x = x.reshape(batch, heads, x.shape[1], self.together, -1)
        return x.transpose(0, 3, 1, 2, 4).reshape(-1, x.shape[2], x.shape[4])

    def products(self, start: Array) -> Array:
        """Products [Z, R, S'] of the queries with the keys of a block."""
        q, k = self.paged(jnp.tile(self.q, (1, 1, self.together))), self.block(self.k, start)
        if isinstance(k, Encoded):
            out = k.scores(q.astype(jnp.float32), 0, self.page)
        else:
            out = jnp.einsum("zrh,zsh->zrs", q, k, **xla._PRODUCT)
        rows, heads = self.q.shape[1], self.k.shape[1]
        out = out.reshape(len(self.table), self.together, heads, rows, self.page)
        return out.transpose(0, 2, 3, 1, 4).reshape(-1, rows, self.size)

    def sums(self, weights: Array, start: Array, positions: Array, at: Array) -> Array:
        """Weighted sums [Z, R, H] of the values of a block."""
        batch, heads = len(self.table), self.k.shape[1]
        weights = self.paged(weights)
        used = self.paged(xla._used(batch * heads, positions, at)[:, None])[:, 0]
        v = self.block(self.v, start)
        if isinstance(v, Encoded):
            out = v.weighted(weights, 0, used)
        else:
            v = jnp.where(used[..., None], v, jnp.zeros((), v.dtype))
            out = xla._weighted(weights, v)
        out = out.reshape(batch, self.together, heads, *out.shape[1:])
        return jnp.sum(out, axis=1).reshape(batch * heads, *out.shape[3:])


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
    where = _Pages(q, k_pages, v_pages, table, lengths)
    first, last = xla.block_range(mask, positions, None, lengths, where.slots, where.size)
    return xla.walk(mask, where, positions, first, last)


@_walked.defjvp
def _walked_jvp(mask, primals, tangents):
    q, k_pages, v_pages, table, positions, lengths = primals
    at = slot_positions(table, k_pages.shape[2])

    def whole(q, k_pages, v_pages):
        k, v = (gathered(pages, table) for pages in (k_pages, v_pages))
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        return xla._shortest(mask, q, k, v, positions, at, lengths)

    return jax.jvp(whole, (q, k_pages, v_pages), tangents[:3])
