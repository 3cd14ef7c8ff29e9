"""Block tables: which pages hold which row's tokens (Kwon et al. 2023, arXiv:2309.06180).

A table ``[B, M]`` names in column c the page of a row's tokens from ``c * page`` on, -1 for none.
There is no other bookkeeping: a page that no table names is free, and one that is named more than
once is shared. No count can disagree with the tables, and taking, dropping, forking and cropping
rows changes them alone.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Int

from jkv._axes import Array
from jkv._pytree import pytree, replace
from jkv.cache.page_allocation import PageWrites, PoolSpec, allocate, count_uses
from jkv.cache.protocol import LayerCache, Layers, Step
from jkv.cache.shared_state import SharedState
from jkv.errors import UnsupportedError

if TYPE_CHECKING:
    from typing import Self
else:
    Self = Any  # beartype, which watches the tests, has none inside of jaxtyping's decorators


class PooledLayer(LayerCache):
    """A layer of pages, as its block table sees it: every array ``[P, ...]``."""

    @property
    @abc.abstractmethod
    def pool(self) -> PoolSpec:
        """What the layers of a group have in common."""

    @property
    @abc.abstractmethod
    def table_index(self) -> int:
        """Which of the cache's block tables is its group's."""

    @abc.abstractmethod
    def with_table_index(self, index: int) -> Self:
        """Return the layer as one of a group."""


@pytree
class BlockTables(SharedState):
    """The block tables of all groups of layers.

    Whether a row's new tokens fit is decided over all groups at once.

    Example:
        >>> cache = jkv.init_cache(lm.config, jkv.paged(4), batch=2, slots=16)
        >>> [table.shape for table in cache.shared[0].tables]  # [B, M], of each group of layers
        [(2, 4)]
    """

    tables: tuple[Array, ...]  # [B, M] int32 for each group, -1 for none

    @classmethod
    def empty(
        cls, layers: Sequence[LayerCache], batch: int, slots: int
    ) -> tuple[Layers, BlockTables]:
        """Group the layers by their pools, and make each group's empty table."""
        groups: dict[PoolSpec, int] = {}  # in the order of the tables
        grouped = []
        for layer in layers:
            if isinstance(layer, PooledLayer):
                index = groups.setdefault(layer.pool, len(groups))
                layer = layer.with_table_index(index)
            grouped.append(layer)
        tables = [jnp.full((batch, columns(pool.page, slots)), -1, jnp.int32) for pool in groups]
        return tuple(grouped), cls(tuple(tables))

    def capacity(self, layers: Layers) -> int:
        """Return the tokens that a row can hold: those of the shortest table."""
        return min(table.shape[-1] * pool.page for pool, table in self._groups(layers))

    @property
    def refusal(self) -> str:
        """Why a row may have been refused, besides being full."""
        return "no page was free"

    def reserve(
        self,
        layers: Layers,
        start: Int[Array, " B"],
        counts: Int[Array, " B"],
        new: int,
        fits: Bool[Array, " B"],
    ) -> tuple[tuple[PageWrites, ...], Bool[Array, " B"]]:
        """Allocate pages for new tokens, see `allocate`."""
        return allocate(pools(layers), self.tables, start, counts, new, fits)

    def begin(
        self, reserved: tuple[PageWrites, ...], tokens: Int[Array, "B T"], step: Step
    ) -> tuple[BlockTables, Int[Array, "B T"], Step]:
        """Return the tables after the pass, and the step with the pages that it writes to."""
        after = BlockTables(tuple(writes.table for writes in reserved))
        return after, tokens, replace(step, pages=reserved)

    def take(self, rows: Int[Array, " R"]) -> BlockTables:
        """Return the tables of other rows."""
        return BlockTables(tuple(table[rows] for table in self.tables))

    def crop(
        self, layers: Layers, held: Int[Array, " B"], lengths: Int[Array, " B"]
    ) -> BlockTables:
        """Give up the pages after the first `lengths` tokens of each row.

        Raises:
            UnsupportedError: a page is gone that a row would see again, or, under `jit`, may be.
        """
        cropped = []
        for pool, table in self._groups(layers):
            if pool.window is not None:
                _check_crop(pool, table, held, lengths)
            first = jnp.arange(table.shape[1], dtype=jnp.int32)[None] * pool.page
            cropped.append(jnp.where(first < lengths[:, None], table, -1))
        return BlockTables(tuple(cropped))

    def resize(self, layers: Layers, slots: int) -> BlockTables:
        """Return the tables with columns for `slots` tokens."""
        resized = []
        for pool, table in self._groups(layers):
            width = columns(pool.page, slots)
            room = ((0, 0), (0, max(width - table.shape[1], 0)))
            resized.append(jnp.pad(table[:, :width], room, constant_values=-1))
        return BlockTables(tuple(resized))

    def concat(self, others: Sequence[BlockTables], layers: Sequence[Layers]) -> BlockTables:
        """Concatenate along the batch axis; the pages of the caches follow each other."""
        joined = []
        for group in range(len(self.tables)):
            first, parts = 0, []
            for state, own in zip([self, *others], layers, strict=True):
                table = state.tables[group]
                parts.append(jnp.where(table < 0, -1, table + first))
                first += pools(own)[group].count
            joined.append(jnp.concatenate(parts))
        return BlockTables(tuple(joined))

    def fit(
        self, layers: Layers, sizes: tuple[int, ...] | None = None
    ) -> tuple[Layers, BlockTables]:
        """Return layers and tables with other numbers of pages, enough for those in use.

        Args:
            layers: of the cache.
            sizes: pages of each group; by default as many as the rows may need, or as there are
                where their number is fixed.
        """
        counts = self._needed(layers) if sizes is None else sizes
        orders: list[Array | None] = []
        tables = []
        for (pool, table), count in zip(self._groups(layers), counts, strict=True):
            order = None
            if count < pool.count:
                used = count_uses(table, pool.count) > 0
                order = jnp.argsort(~used, stable=True)[:count]
                numbers = jnp.cumsum(used).astype(jnp.int32) - 1
                table = jnp.where(table < 0, -1, numbers[jnp.maximum(table, 0)])
            orders.append(order)
            tables.append(table)

        def fitted(layer: LayerCache) -> LayerCache:
            if not isinstance(layer, PooledLayer):
                return layer
            count, order = counts[layer.table_index], orders[layer.table_index]

            def change(leaf: Array) -> Array:
                if order is not None:
                    return leaf[order]
                room = [(0, count - leaf.shape[0])] + [(0, 0)] * (leaf.ndim - 1)
                return jnp.pad(leaf, room)

            return jax.tree.map(change, layer) if count != layer.pool.count else layer

        return tuple(map(fitted, layers)), BlockTables(tuple(tables))

    def fork_sizes(self, layers: Layers, lengths: np.ndarray, times: int) -> tuple[int, ...]:
        """Return the pages of each group for rows that go on `times` ways each.

        They share what they have filled. In sixteenths of what they would need without sharing:
        each number is another program.
        """
        counts = []
        for pool, table in self._groups(layers):
            rows, width = table.shape
            apart = rows * times * pages_of_row(pool, width)
            shared = 0 if pool.window is not None else int(np.sum(lengths // pool.page))
            needed = apart - (times - 1) * shared
            part = -(-apart // 16)
            counts.append(min(-(-needed // part) * part, apart) if pool.elastic else pool.count)
        return tuple(counts)

    def _groups(self, layers: Layers) -> list[tuple[PoolSpec, Array]]:
        return list(zip(pools(layers), self.tables, strict=True))

    def _needed(self, layers: Layers) -> tuple[int, ...]:
        return tuple(
            table.shape[0] * pages_of_row(pool, table.shape[1]) if pool.elastic else pool.count
            for pool, table in self._groups(layers)
        )


def columns(page: int, slots: int) -> int:
    """Return M, the columns of a table for so many tokens."""
    return -(-slots // page)


def pages_of_row(pool: PoolSpec, width: int) -> int:
    """Return the pages that a row may need at once, with a table of `width` columns."""
    if pool.window is None:
        return width
    return min(width, (pool.window + pool.page - 2) // pool.page + 1)


def pools(layers: Sequence[LayerCache]) -> tuple[PoolSpec, ...]:
    """Return the pool of each group of layers."""
    found = {x.table_index: x.pool for x in layers if isinstance(x, PooledLayer)}
    return tuple(found[group] for group in range(len(found)))


def tables_of(shared: Sequence[SharedState]) -> tuple[Array, ...]:
    """Return the block tables ``[B, M]`` among what layers share, one per group; () for none."""
    return next((state.tables for state in shared if isinstance(state, BlockTables)), ())


def check_whole(pool: PoolSpec, table: Int[Array, "B M"], lengths: Int[Array, " B"]) -> None:
    """Refuse rows of which pages have been freed, or may have been.

    Raises:
        UnsupportedError: there is one.
    """
    if pool.window is None:
        return
    if not isinstance(table, Tracer) and not isinstance(lengths, Tracer):
        numbers, held = np.asarray(table), np.asarray(lengths)
        first = np.arange(numbers.shape[1])[None] * pool.page
        if not np.any((numbers < 0) & (first < held[:, None])):
            return
    raise UnsupportedError(
        f"pages that have left a window of {pool.window} tokens are freed, or, under jit, may have "
        "been; to_legacy and convert need every token"
    )


def _check_crop(
    pool: PoolSpec,
    table: Int[Array, "B M"],
    held: Int[Array, " B"],
    lengths: Int[Array, " B"],
) -> None:
    if any(isinstance(x, Tracer) for x in (table, held, lengths)) or pool.window is None:
        raise UnsupportedError(
            "crop under jit: whether pages that have left a window would be needed again is only "
            "known outside of it"
        )
    numbers, old, new = (np.asarray(x) for x in (table, held, lengths))
    first = np.arange(numbers.shape[1])[None] * pool.page
    needed = (first + pool.page > new[:, None] - pool.window + 1) & (first < new[:, None])
    gone = np.any(needed & (numbers < 0), axis=1) & (new < old)
    if gone.any():
        raise UnsupportedError(
            f"crop: rows {np.flatnonzero(gone).tolist()} would see tokens whose pages have left "
            f"the window of {pool.window} tokens and are freed; keep the cache from before, it is "
            "still a value"
        )
