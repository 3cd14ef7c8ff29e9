"""What requests hold: pages on the device, who has which, and what leaves them for a while."""

from __future__ import annotations

import dataclasses
import functools
import operator
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkv._axes import Array
from jkv._pytree import nbytes, replace
from jkv._text import brief, plural
from jkv.cache import heads
from jkv.cache.paged import PagedKind, paged
from jkv.cache.pages import pools
from jkv.cache.protocol import as_kind
from jkv.decoding import loop
from jkv.decoding.capacity import bucket
from jkv.engine import decode_state as device
from jkv.engine.page_pool import PagePool
from jkv.engine.sequence import RunningSequence, SequenceTable
from jkv.engine.swap import Form, PageStore
from jkv.errors import PoolFullError, StaleError
from jkv.models.fingerprint import fingerprint
from jkv.ops.pages import gather, to_layout, write_pages

FIRST_RATE = 4e9  # bytes per second between device and host, until it has been measured


@dataclasses.dataclass
class SwappedPages:
    """A request's pages on the host."""

    length: int  # tokens
    weights: list[Array]  # of the model that computed them
    nbytes: int = 0
    pages: Any = None  # per layer (keys, values) of its pages, in order
    key: str | None = None  # where a store has them instead


class Pages:
    """The pages of all requests in all layers, and the pools that say whose they are.

    Args:
        model: a decoder.
        pages: of each pool.
        page: tokens of each, None for those of the kind.
        kind: a `jkv.paged` kind, its text, or None.
        policy: which page that nobody owns goes first.
        store: where pages go that the pool gives away, or None.

    Raises:
        TypeError: a kind without pages.
        ValueError: pages of two sizes.
    """

    def __init__(
        self, model: Any, *, pages: int, page: int | None, kind: Any, policy: Any, store: Any
    ):
        self.kind = _managed(kind, page, pages)
        self.model, self.config = model, model.config
        self.pages, self.page = pages, self.kind.page
        self.policy, self.store = policy, store
        self.kept: PageStore | None = None
        self._begin()
        self._seen_sizes: set[int] = set()  # of what has been moved, and is compiled
        self.page_bytes = nbytes(self.layers) / pages / len(self.columns)
        self.rate = FIRST_RATE

    def _begin(self) -> None:
        """Empty pages for the model as it is now."""
        self.frame, self.weights = device.split_weights(self.model)
        self._leaving: list[tuple[bytes, int]] = []
        cache = self._empty()
        self.layers = cache.layers
        self.columns = tuple(table.shape[1] for table in cache.tables)
        self.windows = tuple(pool.window for pool in pools(cache.layers))
        self.windowed = any(window is not None for window in self.windows)
        self.rounds = self.kind.keys is not None
        mark, hook = b"", None
        if self.store is not None:
            # How many pages there are, and who manages them, says nothing of what is in one.
            mark = fingerprint(self.model, dataclasses.replace(self.kind, pages=None))
            self.kept = PageStore(self.store, mark)
            # Where layers see differently far, a prefix needs pages of all of them at once.
            hook = self._left if len(self.columns) == 1 else None
        how: dict[str, Any] = {"policy": self.policy, "fingerprint": mark, "on_evict": hook}
        self.pools = [PagePool(pages=self.pages, page=self.page, **how) for _ in self.columns]

    def _empty(self) -> Any:
        slots = self.config.context
        mesh = heads.mesh_of(self.model)
        return loop.init_cache_jit(self.config, self.kind, 1, slots, self.config.dtype, mesh)

    def reset(self) -> None:
        """Make the pages anew, empty; what pools and device had is forgotten."""
        # What is left of the old ones goes first: there may be no room for both.
        self.layers = ()
        self._begin()

    def check_weights(self) -> None:
        """Refuse to go on with weights that the model does not have any more.

        Raises:
            StaleError: they were changed in place.
        """
        now = jax.tree.leaves(self.model)
        if len(now) != len(self.weights) or any(map(operator.is_not, now, self.weights)):
            raise StaleError(
                "the model's weights were changed after this engine had taken them; call "
                "engine.update(lm), which drops what was cached of the old ones"
            )

    def intact(self) -> bool:
        """Whether the device's state is there: a pass that failed may have taken it along."""
        return not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.layers))

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many."""
        return -(-tokens // self.page)

    def free_pages(self) -> int:
        """Pages that could be had now."""
        return min(pool.free_pages for pool in self.pools)

    def check_fits(self, prompt: int, most: int) -> None:
        """Refuse what could never run.

        Raises:
            ValueError: longer than the model's context.
            PoolFullError: more than all pages.
        """
        if prompt + most > self.config.context:
            raise ValueError(
                f"a prompt of {plural(prompt, 'token')} and max_new_tokens={most} make "
                f"{prompt + most}, more "
                f"than the model's context of {self.config.context}; shorten the prompt or ask for "
                "fewer tokens"
            )
        needed = self.pages_for(prompt + most - 1)
        if needed > self.pages:
            raise PoolFullError(
                f"a prompt of {plural(prompt, 'token')} and max_new_tokens={most} need "
                f"{plural(needed, 'page')} of "
                f"{self.page}, and the pool has {self.pages}; expected more pages, or a shorter "
                "request"
            )

    def sequences(self, tenant: str) -> list[Any]:
        """Nothing yet, of a tenant, in each pool."""
        return [pool.sequence(tenant=tenant) for pool in self.pools]

    def match(self, held: list[Any], tokens: np.ndarray) -> int:
        """Take the pages that hold the beginning of `tokens`; how many those are.

        The last token is left to be computed, whose logits are wanted.
        """
        most, ids = len(tokens) - 1, tokens.tolist()
        found = [seq.match(ids, limit=most) for seq in held]
        for seq, n in zip(held, found, strict=True):
            if n > min(found):
                seq.crop(min(found))
        if self.kept is not None and len(held) == 1:
            return self._found(held[0], ids[:most])
        return min(found)

    def _found(self, seq: Any, ids: list[int]) -> int:
        """With the pages that come next and are in the store, as far as there is room for them."""
        names = seq.names(ids)[len(seq.table) :]
        pages = []
        if self.kept and names:
            form = [(shape[1:], dtype) for shape, dtype in self._form(1)]
            pages = self.kept.pages(names, self.free_pages(), form)
        if pages:
            first = len(seq.table)
            seq.reserve((first + len(pages)) * self.page)
            self._save_leaving()
            size = bucket(len(pages), 4)
            rows = [np.stack(leaf) for leaf in zip(*pages, strict=True)]
            rows = [
                np.concatenate([r, np.zeros((size - len(r), *r.shape[1:]), r.dtype)]) for r in rows
            ]
            table = filled(seq.table[first:], size)
            self.layers = _scattered(self.layers, (table,), self._pages(rows))
            seq.publish(ids[: seq.length])
        return seq.length

    def _left(self, name: bytes, page: int) -> None:
        self._leaving.append((name, page))

    def _save_leaving(self) -> None:
        """Read the pages that have just been given away, before anybody writes to them."""
        if self._leaving and self.kept is not None:
            names = [name for name, _ in self._leaving]
            at = filled([page for _, page in self._leaving], bucket(len(names), 4))
            self._leaving = []
            self.kept.leave(names, _gathered(self.layers, (at,)))

    def _pages(self, leaves: list[Any]) -> Any:
        """Leaves as `_gathered` has them."""
        return jax.tree.unflatten(jax.tree.structure(self._gathered_form(1)), leaves)

    def _gathered_form(self, count: int) -> Any:
        tables = tuple(filled((), count) for _ in self.columns)
        return jax.eval_shape(_gathered, self.layers, tables)

    def _form(self, count: int) -> Form:
        """Shapes and dtypes of the leaves of so many pages."""
        leaves = jax.tree.leaves(self._gathered_form(count))
        return [(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves]

    def publish(self, seat: RunningSequence, upto: int) -> None:
        """Let others find the full pages of its first `upto` tokens, which have been dispatched."""
        ids = seat.request.history[:upto].tolist()
        for seq in seat.held:
            seq.reserve(len(ids))  # pages that it has, of which the pool has not heard how full
            seq.publish(ids)

    def withdraw(self, seat: RunningSequence) -> None:
        """Remove the seat's pages from the prefix index: what they hold must not be reused."""
        for seq in seat.held:
            seq.withdraw()

    def reserve(self, seat: RunningSequence, upto: int) -> None:
        """Pages for its first `upto` tokens.

        Raises:
            PoolFullError: there are too few; nothing was taken that `reserve` would not take again.
        """
        for seq in seat.held:
            # Only full pages are shared here, and nobody writes to those: there is nothing to copy.
            if seq.reserve(upto):
                raise RuntimeError(
                    f"{seat.request} shares a page that is not full: an error in jkv"
                )
            self._save_leaving()
        seat.tally.reserved[seat.lane] = len(seat.held[0].table) * self.page

    def extend(
        self, lanes: np.ndarray, upto: np.ndarray, tally: SequenceTable, seats: list[Any]
    ) -> None:
        """As `reserve` for those in these lanes, whose pages are free."""
        for lane, most in zip(lanes.tolist(), upto.tolist(), strict=True):
            for seq in seats[lane].held:
                seq.extend(most)
            self._save_leaving()
        tally.reserved[lanes] = -(-upto // self.page) * self.page

    def could(self, seat: RunningSequence, upto: int) -> bool:
        """Whether `reserve` would do."""
        pairs = zip(self.pools, seat.held, strict=True)
        return all(pool.needs(seq, upto) <= pool.free_pages for pool, seq in pairs)

    def filled(self, tally: SequenceTable) -> tuple[int, int]:
        """Slots of the pages that the first pool's sequences hold, and those with tokens.

        A page that several hold is full, and counted once as what each has that is not.
        """
        held = self.pools[0].stats()["used"] * self.page
        return held, held - int(np.sum(tally.reserved - tally.filled))

    def close(self, held: list[Any]) -> None:
        """Give all pages back."""
        for seq in held:
            seq.close()

    def let_go(self, seat: RunningSequence) -> None:
        """Give back the pages that have left the windows of their layers."""
        self._let_go(seat, seat.written())

    def _let_go(self, seat: RunningSequence, written: int) -> None:
        for seq, window in zip(seat.held, self.windows, strict=True):
            if window is not None and written >= window:
                seq.drop_before(min(written - window + 1, seq.length))

    def pool_stats(self) -> dict[str, int]:
        """Figures of the pools, summed."""
        figures = [pool.stats() for pool in self.pools]
        return {k: sum(f[k] for f in figures) for k in figures[0]}

    # To the host and back.

    def warm_moves(self) -> None:
        """Compile what moves pages to the host and back."""
        size = 4
        while size <= bucket(self.pages_for(self.config.context), 4):
            tables = tuple(filled((), size) for _ in self.columns)
            pages = jax.device_get(_gathered(self.layers, tables))
            self.layers = _scattered(self.layers, tables, pages)
            self._known_size(nbytes(pages))
            size = bucket(size + 1, 4)

    def bytes_of(self, seat: RunningSequence) -> int:
        """Of the pages of its tokens."""
        return int(self.pages_for(seat.written()) * self.page_bytes * len(self.columns))

    def saved(self, seat: RunningSequence) -> SwappedPages:
        """What `save` will fill."""
        key = None if self.kept is None else self.kept.key_of(seat.request.number)
        return SwappedPages(seat.written(), self.weights, key=key)

    def save(self, seat: RunningSequence, saved: SwappedPages) -> bool:
        """Copy its pages to the host, or the store; False where that has no room."""
        began = time.perf_counter()
        pages = jax.device_get(_gathered(self.layers, self._tables(seat, saved.length)))
        saved.nbytes = nbytes(pages)
        if self._known_size(saved.nbytes):
            rate = saved.nbytes / max(time.perf_counter() - began, 1e-6)
            self.rate = (self.rate + rate) / 2
        if self.kept is None or saved.key is None:
            saved.pages = pages
            return True
        return self.kept.put_aside(saved.key, pages, saved.length)

    def _known_size(self, size: int) -> bool:
        """Whether so much has been moved before, so that its time is not that of a compiler."""
        known = size in self._seen_sizes
        self._seen_sizes.add(size)
        return known

    def keep_all(self) -> None:
        """All pages that may be found again to the store."""
        if self.kept is not None and len(self.pools) == 1:
            for name, page in self.pools[0].cached():
                self._left(name, page)
                if len(self._leaving) == 64:
                    self._save_leaving()
            self._save_leaving()

    def fetch(self, saved: SwappedPages) -> Any:
        """What was saved; None if it was lost."""
        if saved.key is None or self.kept is None:
            return saved.pages
        leaves = self.kept.take_back(saved.key, self._form(bucket(self.pages_for(saved.length), 4)))
        return None if leaves is None else self._pages(leaves)

    def forget(self, saved: SwappedPages) -> None:
        """Nobody will want it."""
        if saved.key is not None and self.kept is not None:
            self.kept.forget(saved.key)

    def restore(self, seat: RunningSequence, length: int, pages: Any) -> None:
        """What was saved, in pages of its own."""
        self.reserve(seat, length)
        self.layers = _scattered(self.layers, self._tables(seat, length), pages)
        # Pages that had left a window when it was saved hold anything: nobody may find them.
        self._let_go(seat, length)

    def _tables(self, seat: RunningSequence, length: int) -> tuple[np.ndarray, ...]:
        count = self.pages_for(length)
        return tuple(filled(seq.table[:count], bucket(count, 4)) for seq in seat.held)


@jax.jit
def _gathered(layers: tuple[Any, ...], tables: tuple[Array, ...]) -> Any:
    """The pages of each layer in the order of its table, in a form that all devices have.

    Anything where the table has -1.
    """
    return [
        tuple(
            gather(x, jnp.maximum(tables[layer.group], 0)) for x in (layer.k_pages, layer.v_pages)
        )
        for layer in layers
    ]


@functools.partial(jax.jit, donate_argnums=0)
def _scattered(layers: tuple[Any, ...], tables: tuple[Array, ...], pages: Any) -> tuple[Any, ...]:
    """The layers with those pages; none where the table has -1."""
    after = []
    for layer, (keys, values) in zip(layers, pages, strict=True):
        at = tables[layer.group]
        keys, values = (
            write_pages(held, to_layout(held, new), at)
            for held, new in ((layer.k_pages, keys), (layer.v_pages, values))
        )
        after.append(replace(layer, k_pages=keys, v_pages=values))
    return tuple(after)


def filled(values: Any, width: int, rest: int = -1) -> np.ndarray:
    """Numbers in an int32 array of so many, `rest` after them."""
    out = np.full(width, rest, np.int32)
    out[: len(values)] = values
    return out


def _managed(kind: Any, page: int | None, pages: int) -> PagedKind:
    """The kind with the engine's pages.

    Raises:
        TypeError: a kind without pages.
        ValueError: pages of two sizes.
    """
    if kind is None:
        kind = paged() if page is None else paged(page)
    kind = as_kind(kind)
    if not isinstance(kind, PagedKind):
        raise TypeError(f"cache got {brief(kind)}; expected a kind of pages, such as jkv.paged()")
    if page not in (None, kind.page):
        raise ValueError(
            f"page={page} and a cache with pages of {kind.page}; expected one of them, or the same"
        )
    return dataclasses.replace(kind, pages=pages, managed=True)
