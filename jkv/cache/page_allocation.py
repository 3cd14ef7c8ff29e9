"""Allocate the pages that a forward pass writes to, in all groups of layers at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Bool, Int

from jkv._axes import Array
from jkv._pytree import pytree


@dataclasses.dataclass(frozen=True)
class PoolSpec:
    """The pages of a layer, the same for all layers of a group.

    Attributes:
        page: tokens of a page.
        count: P, pages.
        window: tokens that a query sees, None for all; pages that no query will see are freed.
        managed: the caller supplies the tables, and no page is allocated or freed here.
        elastic: there are as many pages as the rows need, whatever their number.
    """

    page: int
    count: int
    window: int | None = None
    managed: bool = False
    elastic: bool = True


@pytree
class PageWrites:
    """The pages that one pass reads and writes, the same in all layers of a group."""

    before: Array  # [B, M] int32, the table before the pass
    table: Array  # [B, M] int32, the table after it
    source: Array  # [B, U] int32, the pages whose content the written ones begin with
    into: Array  # [B, U] int32, the pages that are written, -1 for none
    at: Array  # [B, U, page] int32, the new token for each of their slots, -1 for none


def count_uses(table: Int[Array, "B M"], count: int) -> Int[Array, " P"]:
    """Count how often a table names each page."""
    at = jnp.where(table < 0, count, table).reshape(-1)
    return jnp.zeros((count,), jnp.int32).at[at].add(1, mode="drop")


@dataclasses.dataclass
class _Want:
    """What rows need of one group in a pass; arrays ``[B, U]`` are over the columns they touch."""

    pool: PoolSpec
    table: Array  # [B, M]
    held: Array  # [B, M] without the pages that leave the window
    columns: Array  # [B, U]
    touched: Array  # [B, U] columns that new tokens go to
    old: Array  # [B, U] pages that exist already, -1 for none

    @property
    def is_new(self) -> Array:
        return self.touched & (self.old < 0)

    def among(self, numbers: Array) -> Array:
        """Look up a number of each page [P] for the existing ones."""
        return numbers[jnp.maximum(self.old, 0)]

    def writers(self) -> Array:
        return self.touched & (self.old >= 0)


def allocate(
    groups: Sequence[PoolSpec],
    tables: Sequence[Int[Array, "B M"]],
    start: Int[Array, " B"],
    counts: Int[Array, " B"],
    new: int,
    fits: Bool[Array, " B"],
) -> tuple[tuple[PageWrites, ...], Bool[Array, " B"]]:
    """Allocate pages for the new tokens of each row.

    A row writes to pages of its own. Where it has none, or one that another row shares, it gets a
    free page, which begins as a copy of the shared one. If there are too few, rows that need
    fewest come first, and the others get none.

    As many pages as rows and columns always suffice: of rows that all write to a page which they
    share, the first keeps it.

    Args:
        groups: each group's pool.
        tables: each group's block tables.
        start: tokens in each row.
        counts: new tokens of each row.
        new: T.
        fits: rows that take part.

    Returns:
        Each group's pages, and the rows of `fits` whose tokens have a page.
    """
    wants = [_want(*group, start, counts, new, fits) for group in zip(groups, tables, strict=True)]
    for want in wants:
        if want.pool.managed:
            fits &= ~jnp.any(want.is_new, axis=1)
    own = [want for want in wants if not want.pool.managed]
    sparing = generous = jnp.ones((), bool)
    if own:
        # Sparing: all rows take part, and pages that leave a window now are free already. Where
        # that is not enough, a refused row must stay as it is: pages that it shares are copied.
        of_any = [_needs_of_any(want) for want in own]
        of_all = [_needs_of_all(want) for want in own]
        sparing = jnp.stack([jnp.sum(needs) <= jnp.sum(free) for needs, free in of_all]).all()
        generous = _rows_that_fit(of_any)
        fits &= sparing | generous
    writes = []
    for i, pair in enumerate(zip(groups, tables, strict=True)):
        want = _want(*pair, start, counts, new, fits)
        numbers, source = want.old, want.old
        if not want.pool.managed:
            at = sum(not w.pool.managed for w in wants[:i])
            (needs_a, free_a), (needs_b, free_b) = of_all[at], of_any[at]
            needs = jnp.where(sparing, needs_a, needs_b) & want.touched
            free = jnp.where(sparing, free_a, free_b)
            numbers = jnp.where(needs, _assign(needs, free), want.old)
            source = jnp.where(want.old < 0, numbers, want.old)
        into = jnp.where(want.touched, numbers, -1)
        rows = jnp.arange(len(start), dtype=jnp.int32)[:, None]
        where = jnp.where(want.touched, want.columns, want.table.shape[1])
        table = want.held.at[rows, where].set(numbers, mode="drop")
        writes.append(
            PageWrites(want.table, table, source, into, _slots(want, start, counts, fits))
        )
    return tuple(writes), fits


def _want(
    pool: PoolSpec, table: Array, start: Array, counts: Array, new: int, fits: Array
) -> _Want:
    counts = jnp.where(fits, counts, 0)
    stop = (start + counts)[:, None]
    page, width = pool.page, table.shape[1]
    held = (
        table
        if pool.managed
        else jnp.where(_seen(pool, jnp.arange(width, dtype=jnp.int32)[None], stop), table, -1)
    )
    touch = (new + page - 2) // page + 1
    at = start[:, None] // page + jnp.arange(touch, dtype=jnp.int32)[None]
    touched = (at * page < stop) & (counts > 0)[:, None] & (at < width)
    if not pool.managed:
        # Managed pages may be looked up by other rows: they are written although this row will
        # not see them again.
        touched &= _seen(pool, at, stop)
    old = jnp.take_along_axis(held, jnp.minimum(at, width - 1), axis=1)
    return _Want(pool, table, held, at, touched, jnp.where(touched, old, -1))


def _seen(pool: PoolSpec, at: Array, stop: Array) -> Array:
    """Return whether the token before `stop`, or a later one, may see a column's tokens."""
    return jnp.bool_(True) if pool.window is None else (at + 1) * pool.page > stop - pool.window


def _needs_of_all(want: _Want) -> tuple[Array, Array]:
    """Return needs [B, U] and free pages [P] if all rows take part."""
    count = want.pool.count
    held = count_uses(want.held, count)
    writing = want.writers()
    written = count_uses(jnp.where(writing, want.old, -1), count)
    rows = jnp.broadcast_to(jnp.arange(len(writing), dtype=jnp.int32)[:, None], writing.shape)
    at = jnp.where(writing, want.old, count).reshape(-1)
    first = jnp.full((count,), len(writing), jnp.int32).at[at].min(rows.reshape(-1), mode="drop")
    stays = (want.among(written) == want.among(held)) & (want.among(first) == rows)
    copied = writing & (want.among(held) > 1) & ~stays
    return want.is_new | copied, held == 0


def _needs_of_any(want: _Want) -> tuple[Array, Array]:
    """Return the same if any row may be refused: every page that is shared now is copied."""
    held = count_uses(want.table, want.pool.count)
    return want.is_new | (want.writers() & (want.among(held) > 1)), held == 0


def _rows_that_fit(found: Sequence[tuple[Array, Array]]) -> Array:
    """Return the rows [B] for which all groups have pages; those that need fewest come first."""
    needs = jnp.stack([jnp.sum(needs, axis=1) for needs, _ in found])  # [groups, B]
    free = jnp.stack([jnp.sum(free) for _, free in found])
    order = jnp.argsort(jnp.sum(needs, axis=0), stable=True)
    enough = jnp.all(jnp.cumsum(needs[:, order], axis=1) <= free[:, None], axis=0)
    return jnp.zeros_like(enough).at[order].set(enough) | (jnp.sum(needs, axis=0) == 0)


def _assign(needs: Bool[Array, "B U"], free: Bool[Array, " P"]) -> Int[Array, "B U"]:
    """Assign a free page to each need."""
    flat = needs.reshape(-1)
    ranks = jnp.cumsum(free) - 1
    at = jnp.where(free, ranks, flat.size)
    pages = jnp.arange(free.size, dtype=jnp.int32)
    given = jnp.zeros(flat.shape, jnp.int32).at[at].set(pages, mode="drop")
    return given[jnp.maximum(jnp.cumsum(flat) - 1, 0)].reshape(needs.shape)


def _slots(want: _Want, start: Array, counts: Array, fits: Array) -> Array:
    """Return the new token for each slot of the touched pages, [B, U, page]; -1 for none."""
    page = want.pool.page
    positions = want.columns[..., None] * page + jnp.arange(page, dtype=jnp.int32)[None, None]
    token = positions - start[:, None, None]
    counts = jnp.where(fits, counts, 0)[:, None, None]
    return jnp.where((token >= 0) & (token < counts) & want.touched[..., None], token, -1)
