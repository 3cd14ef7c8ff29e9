"""Block tables: which pages are whose, all layers of a group at once (Kwon et al. 2023,
arXiv:2309.06180).

A table ``[B, M]`` says in column c which page has a row's tokens from ``c * page`` on, -1 for
none. It is all that is known: a page that nobody mentions is free, and one that is mentioned more
than once is shared. There are no counts that could disagree with it, so that taking, dropping,
forking and cropping rows are changes of the table alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Int

from jkv._axes import Array
from jkv._pytree import pytree, replace
from jkv.errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class Pool:
    """What the layers of a group have in common.

    Attributes:
        page: tokens of a page.
        count: P, pages.
        window: tokens that a query sees, None for all; pages that nobody sees again are freed.
        managed: pages are named by whoever holds the cache, and none is taken or freed here.
        elastic: there are as many pages as the rows need, whatever their number.
    """

    page: int
    count: int
    window: int | None = None
    managed: bool = False
    elastic: bool = True


@pytree
class Plan:
    """Which pages one pass reads and writes: the same in all layers of a group."""

    before: Array  # [B, M] int32, the table as it was
    table: Array  # [B, M] int32, and as it is after
    source: Array  # [B, U] int32, what the pages that are written begin as
    into: Array  # [B, U] int32, which they are; -1 for none
    at: Array  # [B, U, page] int32, which new token goes to each of their slots; -1 for none


def columns(page: int, slots: int) -> int:
    """M: columns of a table for so many tokens."""
    return -(-slots // page)


def pages_of_row(pool: Pool, width: int) -> int:
    """Pages that a row may need at once, with a table of `width` columns."""
    return (
        width if pool.window is None else min(width, (pool.window + pool.page - 2) // pool.page + 1)
    )


def pools(layers: Sequence[Any]) -> tuple[Pool, ...]:
    """The pool of each group of layers."""
    found = {layer.table_index: layer.pool for layer in layers if layer.pool is not None}
    return tuple(found[group] for group in range(len(found)))


def grouped(layers: Sequence[Any], batch: int, slots: int) -> tuple[tuple[Any, ...], tuple]:
    """New layers with their groups, those with the same pool together, and each one's table."""
    found: dict[Pool, int] = {}  # in the order of the tables
    made = []
    for layer in layers:
        if layer.pool is not None:
            layer = replace(layer, group=found.setdefault(layer.pool, len(found)))
        made.append(layer)
    tables = [jnp.full((batch, columns(pool.page, slots)), -1, jnp.int32) for pool in found]
    return tuple(made), tuple(tables)


def columns_of_tables(layers: Sequence[Any], slots: int) -> int:
    """Numbers of pages that the tables of layers have for a row, four bytes each."""
    found = {layer.pool for layer in layers if layer.pool is not None}
    return sum(columns(pool.page, slots) for pool in found)


def mentions(table: Int[Array, "B M"], count: int) -> Int[Array, " P"]:
    """How often each page is mentioned."""
    at = jnp.where(table < 0, count, table).reshape(-1)
    return jnp.zeros((count,), jnp.int32).at[at].add(1, mode="drop")


def capacity(pool: Pool, table: Array) -> int:
    """Tokens that a row can hold."""
    return table.shape[-1] * pool.page


@dataclasses.dataclass
class _Want:
    """What rows want of one group in a pass; masks [B, U] of the columns that they touch."""

    pool: Pool
    table: Array  # [B, M]
    held: Array  # [B, M] without what leaves the window
    columns: Array  # [B, U]
    touched: Array  # that new tokens go to
    old: Array  # [B, U] pages that are there, else -1

    @property
    def fresh(self) -> Array:
        return self.touched & (self.old < 0)

    def among(self, numbers: Array) -> Array:
        """Something of each page, looked up for the old ones."""
        return numbers[jnp.maximum(self.old, 0)]

    def writers(self) -> Array:
        return self.touched & (self.old >= 0)


def planned(
    groups: Sequence[Pool],
    tables: Sequence[Int[Array, "B M"]],
    start: Int[Array, " B"],
    counts: Int[Array, " B"],
    new: int,
    fits: Bool[Array, " B"],
) -> tuple[tuple[Plan, ...], Bool[Array, " B"]]:
    """The pages for new tokens of each row, and which rows may have theirs.

    A row's tokens go to pages of its own: where there is none, or one that somebody else holds too,
    it gets a free one, which begins as the old one's content. If there are too few, rows that want
    fewest come first, and the others get none.

    As many pages as rows and columns always suffice: of rows that all write to a page which they
    share, the first keeps it.

    Args:
        groups: of layers.
        tables: of each group.
        start: tokens in each row.
        counts: new ones of each.
        new: T.
        fits: rows that may take part.
    """
    wants = [_want(*group, start, counts, new, fits) for group in zip(groups, tables, strict=True)]
    for want in wants:
        if want.pool.managed:
            fits &= ~jnp.any(want.fresh, axis=1)
    own = [want for want in wants if not want.pool.managed]
    sparing = generous = jnp.ones((), bool)
    if own:
        # Sparing: all take part, and what they let go of at this moment is free already. If that
        # does not do, nothing is shared with rows which may have to stay as they are.
        plain = [_plainly(want) for want in own]
        best = [_sparingly(want) for want in own]
        sparing = jnp.stack([jnp.sum(needs) <= jnp.sum(free) for needs, free in best]).all()
        generous = _admitted(plain)
        fits &= sparing | generous
    plans = []
    for i, pair in enumerate(zip(groups, tables, strict=True)):
        want = _want(*pair, start, counts, new, fits)
        numbers, source = want.old, want.old
        if not want.pool.managed:
            at = sum(not w.pool.managed for w in wants[:i])
            (needs_a, free_a), (needs_b, free_b) = best[at], plain[at]
            needs = jnp.where(sparing, needs_a, needs_b) & want.touched
            free = jnp.where(sparing, free_a, free_b)
            numbers = jnp.where(needs, _given(needs, free), want.old)
            source = jnp.where(want.old < 0, numbers, want.old)
        into = jnp.where(want.touched, numbers, -1)
        rows = jnp.arange(len(start), dtype=jnp.int32)[:, None]
        where = jnp.where(want.touched, want.columns, want.table.shape[1])
        table = want.held.at[rows, where].set(numbers, mode="drop")
        plans.append(Plan(want.table, table, source, into, _slots(want, start, counts, fits)))
    return tuple(plans), fits


def _want(pool: Pool, table: Array, start: Array, counts: Array, new: int, fits: Array) -> _Want:
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
        # Who manages pages may let others find them: those are written, though this row will not
        # look at them again.
        touched &= _seen(pool, at, stop)
    old = jnp.take_along_axis(held, jnp.minimum(at, width - 1), axis=1)
    return _Want(pool, table, held, at, touched, jnp.where(touched, old, -1))


def _seen(pool: Pool, at: Array, stop: Array) -> Array:
    """Whether the last of the tokens before `stop`, or a later one, may see a column's tokens."""
    return jnp.bool_(True) if pool.window is None else (at + 1) * pool.page > stop - pool.window


def _sparingly(want: _Want) -> tuple[Array, Array]:
    """Needs [B, U] and free pages [P] if all rows take part."""
    count = want.pool.count
    held = mentions(want.held, count)
    writing = want.writers()
    written = mentions(jnp.where(writing, want.old, -1), count)
    rows = jnp.broadcast_to(jnp.arange(len(writing), dtype=jnp.int32)[:, None], writing.shape)
    at = jnp.where(writing, want.old, count).reshape(-1)
    first = jnp.full((count,), len(writing), jnp.int32).at[at].min(rows.reshape(-1), mode="drop")
    stays = (want.among(written) == want.among(held)) & (want.among(first) == rows)
    copied = writing & (want.among(held) > 1) & ~stays
    return want.fresh | copied, held == 0


def _plainly(want: _Want) -> tuple[Array, Array]:
    """The same if any row may be refused: what is free now, a copy of all that is shared now."""
    held = mentions(want.table, want.pool.count)
    return want.fresh | (want.writers() & (want.among(held) > 1)), held == 0


def _admitted(found: Sequence[tuple[Array, Array]]) -> Array:
    """Rows [B] for which there are pages in all groups, those that need fewest first."""
    needs = jnp.stack([jnp.sum(needs, axis=1) for needs, _ in found])  # [groups, B]
    free = jnp.stack([jnp.sum(free) for _, free in found])
    order = jnp.argsort(jnp.sum(needs, axis=0), stable=True)
    enough = jnp.all(jnp.cumsum(needs[:, order], axis=1) <= free[:, None], axis=0)
    return jnp.zeros_like(enough).at[order].set(enough) | (jnp.sum(needs, axis=0) == 0)


def _given(needs: Bool[Array, "B U"], free: Bool[Array, " P"]) -> Int[Array, "B U"]:
    """A free page for each need."""
    flat = needs.reshape(-1)
    ranks = jnp.cumsum(free) - 1
    at = jnp.where(free, ranks, flat.size)
    pages = jnp.arange(free.size, dtype=jnp.int32)
    given = jnp.zeros(flat.shape, jnp.int32).at[at].set(pages, mode="drop")
    return given[jnp.maximum(jnp.cumsum(flat) - 1, 0)].reshape(needs.shape)


def _slots(want: _Want, start: Array, counts: Array, fits: Array) -> Array:
    """Which new token goes to each slot of the touched pages, [B, U, page]."""
    page = want.pool.page
    positions = want.columns[..., None] * page + jnp.arange(page, dtype=jnp.int32)[None, None]
    token = positions - start[:, None, None]
    counts = jnp.where(fits, counts, 0)[:, None, None]
    return jnp.where((token >= 0) & (token < counts) & want.touched[..., None], token, -1)


def cropped(
    pool: Pool, table: Int[Array, "B M"], held: Int[Array, " B"], lengths: Int[Array, " B"]
) -> Int[Array, "B M"]:
    """The table of rows of which the first `lengths` tokens are left.

    Raises:
        UnsupportedError: a page is gone that they would see again, or, under `jit`, may be.
    """
    if pool.window is not None:
        _check_crop(pool, table, held, lengths)
    first = jnp.arange(table.shape[1], dtype=jnp.int32)[None] * pool.page
    return jnp.where(first < lengths[:, None], table, -1)


def _check_crop(pool: Pool, table: Any, held: Any, lengths: Any) -> None:
    if any(isinstance(x, Tracer) for x in (table, held, lengths)):
        raise UnsupportedError(
            "crop under jit: whether pages that have left a window would be needed again is only "
            "known outside of it"
        )
    table, held, lengths = (np.asarray(x) for x in (table, held, lengths))
    first = np.arange(table.shape[1])[None] * pool.page
    needed = (first + pool.page > lengths[:, None] - pool.window + 1) & (first < lengths[:, None])
    gone = np.any(needed & (table < 0), axis=1) & (lengths < held)
    if gone.any():
        raise UnsupportedError(
            f"crop: rows {np.flatnonzero(gone).tolist()} would see tokens whose pages have left "
            f"the window of {pool.window} tokens and are freed; keep the cache from before, it is "
            "still a value"
        )


def check_whole(pool: Pool, table: Any, lengths: Any) -> None:
    """Refuse rows of which pages have been freed, or may have been.

    Raises:
        UnsupportedError: there is one.
    """
    if pool.window is None:
        return
    if not isinstance(table, Tracer) and not isinstance(lengths, Tracer):
        table, lengths = np.asarray(table), np.asarray(lengths)
        first = np.arange(table.shape[1])[None] * pool.page
        if not np.any((table < 0) & (first < lengths[:, None])):
            return
    raise UnsupportedError(
        f"pages that have left a window of {pool.window} tokens are freed, or, under jit, may have "
        "been; to_legacy and convert need every token"
    )


def resized(pool: Pool, table: Int[Array, "B M"], slots: int) -> Int[Array, "B W"]:
    """The table with columns for `slots` tokens."""
    width = columns(pool.page, slots)
    room = ((0, 0), (0, max(width - table.shape[1], 0)))
    return jnp.pad(table[:, :width], room, constant_values=-1)


def repooled(layers: Sequence[Any], tables: Sequence[Array], counts: Sequence[int]) -> Any:
    """Layers and tables with another number of pages in each group, enough for those in use."""
    orders: list[Any] = []
    renamed = []
    for pool, table, count in zip(pools(layers), tables, counts, strict=True):
        order = None
        if count < pool.count:
            used = mentions(table, pool.count) > 0
            order = jnp.argsort(~used, stable=True)[:count]
            numbers = jnp.cumsum(used).astype(jnp.int32) - 1
            table = jnp.where(table < 0, -1, numbers[jnp.maximum(table, 0)])
        orders.append(order)
        renamed.append(table)

    def moved(layer: Any) -> Any:
        if layer.pool is None:
            return layer
        count, order = counts[layer.group], orders[layer.group]

        def change(leaf: Array) -> Array:
            if order is not None:
                return leaf[order]
            room = [(0, count - leaf.shape[0])] + [(0, 0)] * (leaf.ndim - 1)
            return jnp.pad(leaf, room)

        return jax.tree.map(change, layer) if count != layer.pool.count else layer

    return tuple(map(moved, layers)), tuple(renamed)


def elastic_counts(groups: Sequence[Pool], tables: Sequence[Array]) -> tuple[int, ...]:
    """Pages that the rows of the tables may need; where their number is fixed, what there is."""
    return tuple(
        table.shape[0] * pages_of_row(pool, table.shape[1]) if pool.elastic else pool.count
        for pool, table in zip(groups, tables, strict=True)
    )


def forked_counts(
    groups: Sequence[Pool], tables: Sequence[Array], lengths: np.ndarray, times: int
) -> tuple[int, ...]:
    """Pages for rows that go on `times` ways each, and share what they have filled.

    In sixteenths of what they would need without sharing: each number is another program.
    """
    counts = []
    for pool, table in zip(groups, tables, strict=True):
        rows, width = table.shape
        apart = rows * times * pages_of_row(pool, width)
        shared = 0 if pool.window is not None else int(np.sum(lengths // pool.page))
        needed = apart - (times - 1) * shared
        part = -(-apart // 16)
        counts.append(min(-(-needed // part) * part, apart) if pool.elastic else pool.count)
    return tuple(counts)


def joined(groups: Sequence[Sequence[Pool]], tables: Sequence[Sequence[Array]]) -> tuple[Any, ...]:
    """Tables of the rows of several caches, whose pages follow each other."""
    made = []
    for g in range(len(groups[0])):
        first, parts = 0, []
        for own, mine in zip(groups, tables, strict=True):
            parts.append(jnp.where(mine[g] < 0, -1, mine[g] + first))
            first += own[g].count
        made.append(jnp.concatenate(parts))
    return tuple(made)
