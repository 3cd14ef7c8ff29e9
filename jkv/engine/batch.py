"""What the engine has on the device, and in the page pools: pages, lanes, and passes over them."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkv._axes import Array
from jkv._pytree import nbytes, replace
from jkv.cache.paged import PagedKind, paged
from jkv.cache.pages import pools
from jkv.decoding import loop, sampling
from jkv.decoding.request import PAD, bucket
from jkv.engine import lanes as device
from jkv.engine.kept import Kept
from jkv.engine.pool import PagePool
from jkv.engine.scheduler import Seat
from jkv.errors import PoolFullError
from jkv.models.fingerprint import fingerprint

ENDS = 16  # stop ids of a request, at most
FIRST_RATE = 4e9  # bytes per second between device and host, until it has been measured


@dataclasses.dataclass
class Part:
    """One pass that has been dispatched."""

    seats: list[tuple[int, Seat]]  # their rows
    said: Array  # [R, n]
    active: Array  # [R]
    refused: Array  # [R]
    broken: Array  # [R]


@dataclasses.dataclass
class Saved:
    """A request's pages on the host."""

    length: int  # tokens
    nbytes: int
    pages: Any = None  # per layer (keys, values) of its pages, in order
    key: str | None = None  # where a store has them instead


class Batch:
    """The pages of all requests, the lanes they run in, and who holds which page."""

    def __init__(
        self,
        model: Any,
        *,
        pages: int,
        page: int | None,
        lanes: int,
        kind: Any,
        block: int,
        chunk: int,
        rows: int,
        policy: Any,
        store: Any,
    ):
        self.kind = _managed(kind, page, pages)
        self.model, self.config = model, model.config
        self.pages, self.page, self.lanes = pages, self.kind.page, lanes
        self.block, self.chunk, self.rows = block, min(chunk, self.config.context), rows
        cache = self._empty()
        self.layers = cache.layers
        self.columns = tuple(table.shape[1] for table in cache.tables)
        self.windows = tuple(pool.window for pool in pools(cache.layers))
        self.rounds = self.kind.keys is not None
        self._leaving: list[tuple[bytes, int]] = []
        self.kept: Kept | None = None
        mark, hook = b"", None
        if store is not None:
            # How many pages there are, and who manages them, says nothing of what is in one.
            mark = fingerprint(self.model, dataclasses.replace(self.kind, pages=None))
            self.kept = Kept(store, mark)
            # Where layers see differently far, a prefix needs pages of all of them at once.
            hook = self._left if len(self.columns) == 1 else None
        self._pool = functools.partial(
            PagePool, pages=pages, page=self.page, policy=policy, fingerprint=mark, on_evict=hook
        )
        self.pools = [self._pool() for _ in self.columns]
        self.state = device.empty(lanes, self.columns, ENDS)
        self.groups: dict[Any, int] = {}
        self._seen_sizes: set[int] = set()  # of what has been moved, and is compiled
        self.page_bytes = nbytes(self.layers) / pages / len(self.columns)
        self.rate = FIRST_RATE
        self.waited = 0.0  # seconds for the device, in all

    def _empty(self) -> Any:
        slots = self.config.context
        return loop.new_cache(self.config, self.kind, 1, slots, self.config.dtype)

    def reset(self) -> None:
        """Empty pages and lanes; what pools and device had is forgotten."""
        # What is left of the old ones goes first.
        self.layers, self.groups, self._leaving = (), {}, []
        self.layers = self._empty().layers
        self.state = device.empty(self.lanes, self.columns, ENDS)
        self.pools = [self._pool() for _ in self.columns]
        if self.kept is not None:
            self.kept.drop()

    # Pages.

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many."""
        return -(-tokens // self.page)

    def free_pages(self) -> int:
        """Pages that could be had now."""
        return min(pool.free_pages for pool in self.pools)

    def check_fits(self, prompt: int, most: int, ends: tuple[int, ...]) -> None:
        """Refuse what could never run.

        Raises:
            ValueError: longer than the model's context, or too many stop ids.
            PoolFullError: more than all pages.
        """
        if prompt + most > self.config.context:
            raise ValueError(
                f"a prompt of {prompt} tokens and max_new_tokens={most} make {prompt + most}, more "
                f"than the model's context of {self.config.context}; shorten the prompt or ask for "
                "fewer tokens"
            )
        if len(ends) > ENDS:
            raise ValueError(f"stop got {len(ends)} ids; an engine takes at most {ENDS}")
        needed = self.pages_for(prompt + most - 1)
        if needed > self.pages:
            raise PoolFullError(
                f"a prompt of {prompt} tokens and max_new_tokens={most} need {needed} pages of "
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
        pages = self.kept.pages(names, self.free_pages()) if self.kept and names else []
        if pages:
            first = len(seq.table)
            seq.reserve((first + len(pages)) * self.page)
            self._save_leaving()
            size = bucket(len(pages), 4)
            rows = [np.stack(leaf) for leaf in zip(*pages, strict=True)]
            rows = [
                np.concatenate([r, np.zeros((size - len(r), *r.shape[1:]), r.dtype)]) for r in rows
            ]
            table = _filled(seq.table[first:], size)
            self.layers = _scattered(self.layers, (table,), self._pages(rows))
            seq.publish(ids[: seq.length])
        return seq.length

    def _left(self, name: bytes, page: int) -> None:
        self._leaving.append((name, page))

    def _save_leaving(self) -> None:
        """Read the pages that have just been given away, before anybody writes to them."""
        if self._leaving and self.kept is not None:
            names = [name for name, _ in self._leaving]
            at = _filled([page for _, page in self._leaving], bucket(len(names), 4))
            self._leaving = []
            self.kept.leave(names, _gathered(self.layers, (at,)))

    def _pages(self, leaves: list[Any]) -> Any:
        """Leaves as `_gathered` has them."""
        tree = jax.tree.structure([(layer.k_pages, layer.v_pages) for layer in self.layers])
        return jax.tree.unflatten(tree, leaves)

    def publish(self, seat: Seat, upto: int) -> None:
        """Let others find the full pages of its first `upto` tokens, which have been dispatched."""
        ids = seat.request.history[:upto].tolist()
        for seq in seat.held:
            seq.reserve(len(ids))  # pages that it has, of which the pool has not heard how full
            seq.publish(ids)

    def reserve(self, seat: Seat, upto: int) -> None:
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
        seat.reserved = len(seat.held[0].table) * self.page

    def could(self, seat: Seat, upto: int) -> bool:
        """Whether `reserve` would do."""
        pairs = zip(self.pools, seat.held, strict=True)
        return all(pool.needs(seq, upto) <= pool.free_pages for pool, seq in pairs)

    def filled(self, seats: Iterable[Seat]) -> tuple[int, int]:
        """Slots of the pages that the first pool's sequences hold, and those with tokens.

        A page that several hold is full, and counted once as what each has that is not.
        """
        held = self.pools[0].stats()["used"] * self.page
        for_use = sum(len(seat.held[0].table) * self.page - seat.filled() for seat in seats)
        return held, held - for_use

    def close(self, held: list[Any]) -> None:
        """Give all pages back."""
        for seq in held:
            seq.close()

    def let_go(self, seat: Seat) -> None:
        """Give back the pages that have left the windows of their layers."""
        self._let_go(seat, seat.written())

    def _let_go(self, seat: Seat, written: int) -> None:
        for seq, window in zip(seat.held, self.windows, strict=True):
            if window is not None and written >= window:
                seq.drop_before(min(written - window + 1, seq.length))

    def pool_stats(self) -> dict[str, int]:
        """Figures of the pools, summed."""
        figures = [pool.stats() for pool in self.pools]
        return {k: sum(f[k] for f in figures) for k in figures[0]}

    # Lanes.

    def group_of(self, sampler: Any) -> int:
        """The sampler's place among the structures that the lanes know."""
        if sampler is None:
            return -1
        signature = _signature(_plain(sampler))
        if signature not in self.groups:
            self.state = device.with_sampler(self.state, _plain(sampler), self.config.vocab)
            self.groups[signature] = len(self.groups)
        return self.groups[signature]

    def check_sampler(self, sampler: Any) -> None:
        """Refuse one that cannot be run, before it is in a program that others share.

        Raises:
            Exception: whatever it raises.
        """
        if sampler is None:
            return
        plain = _plain(sampler)
        if _signature(plain) not in self.groups:
            vocab = self.config.vocab

            def once(sampler: Any, said: Any) -> Any:
                state = sampler.init(said[None], vocab)
                return sampler.update(jnp.zeros((1, vocab)), state, said[:1])

            jax.eval_shape(once, plain, np.full(bucket(self.config.context), PAD, np.int32))

    def install(self, seat: Seat) -> None:
        """The request's state in its lane."""
        request = seat.request
        group = self.group_of(request.sampler)
        history = request.history
        what = {
            "tables": tuple(
                _filled(seq.table, width)
                for seq, width in zip(seat.held, self.columns, strict=True)
            ),
            "lengths": np.int32(seat.cached),
            "token": np.int32(0 if seat.reading else history[-1]),
            "active": np.bool_(not seat.reading),
            "left": np.int32(seat.limit),
            "ends": _filled(request.stop_ids, ENDS, -2),
            "keys": jax.random.key(0) if request.key is None else request.key,
        }
        if group >= 0:
            # Without the token that goes into the cache next: the sampler hears of that one then.
            said = history[: seat.target]
            what["said"] = _filled(said, bucket(self.config.context), PAD)
            what["sampler"] = _plain(request.sampler)
        seat.columns = [len(seq.table) for seq in seat.held]
        self.state = device.installed(
            self.state, group, self.config.vocab, np.int32(seat.lane), what
        )

    # Passes.

    def absorb(self, prompts: list[tuple[Seat, int]]) -> Part:
        """Dispatch the tokens of each seat from where it is, up to the given one."""
        rows = 1 if len(prompts) == 1 else self.rows
        at = np.full(rows, self.lanes, np.int32)
        tokens = np.zeros((rows, self.chunk), np.int32)
        counts, last = np.zeros(rows, np.int32), np.zeros(rows, bool)
        for i, (seat, upto) in enumerate(prompts):
            at[i], counts[i] = seat.lane, upto - seat.cached
            tokens[i, : counts[i]] = seat.request.history[seat.cached : upto]
            last[i] = upto == seat.target
        seats = list(enumerate(seat for seat, _ in prompts))
        grown = self._grown(rows, seats, self.chunk)
        self.layers, self.state, *out = device.absorbed(
            self.model, self.layers, self.state, at, tokens, counts, last, grown
        )
        speaking = []
        for (i, seat), (_, upto) in zip(seats, prompts, strict=True):
            seat.cached = upto
            if not seat.reading:
                seat.asked = 1
                speaking.append((i, seat))
        return Part(speaking, *out)

    def decode(self, seats: list[Seat]) -> Part:
        """Dispatch the next block of tokens of these seats."""
        highest = max(seat.lane for seat in seats) + 1
        width = next(w for w in self.widths if w >= highest)
        alive = np.zeros(width, bool)
        rows = [(seat.lane, seat) for seat in seats]
        alive[[lane for lane, _ in rows]] = True
        grown = self._grown(width, rows, self.block)
        self.layers, self.state, *out = device.decoded(
            self.block, self.model, self.layers, self.state, alive, grown, np.int32(self.block)
        )
        for seat in seats:
            seat.asked = min(seat.asked + self.block, seat.limit)
        return Part(rows, *out)

    @functools.cached_property
    def widths(self) -> tuple[int, ...]:
        """How many lanes a pass may have: all, and powers of four below."""
        widths = [self.lanes]
        while widths[-1] > 1:
            widths.append(-(-widths[-1] // 4))
        return tuple(reversed(widths))

    def _grown(
        self, rows: int, seats: list[tuple[int, Seat]], tokens: int
    ) -> tuple[device.Grown, ...]:
        """The pages that seats got since the device last heard of them, by row."""
        most = tokens // self.page + 2
        grown = []
        for group in range(len(self.columns)):
            start, pages = np.zeros(rows, np.int32), np.full((rows, most), -1, np.int32)
            for row, seat in seats:
                table, known = seat.held[group].table, seat.columns[group]
                if len(table) > known:
                    start[row] = known
                    pages[row, : len(table) - known] = table[known:]
                    seat.columns[group] = len(table)
            grown.append(device.Grown(start=start, pages=pages))
        return tuple(grown)

    def read(self, part: Part) -> Iterator[tuple[Seat, list[int], bool, bool]]:
        """What a pass said: per seat its new tokens, whether it would say more, and is broken."""
        began = time.perf_counter()
        said, active = np.asarray(part.said).tolist(), np.asarray(part.active).tolist()
        refused, broken = np.asarray(part.refused), np.asarray(part.broken).tolist()
        self.waited += time.perf_counter() - began
        for row, seat in part.seats:
            if refused[row]:
                raise RuntimeError(f"{seat.request} had no page for its tokens: an error in jkv")
            tokens = said[row]
            while tokens and tokens[-1] == PAD:
                tokens.pop()
            yield seat, tokens, active[row], broken[row]

    def warm(self, swaps: bool) -> None:
        """Compile every pass, and what moves pages where `swaps`; no request takes part."""
        context = bucket(self.config.context)
        for group in range(-1, len(self.state.samplers)):
            what = {
                "tables": tuple(_filled((), width) for width in self.columns),
                "lengths": np.int32(0),
                "token": np.int32(0),
                "active": np.bool_(False),
                "left": np.int32(0),
                "ends": _filled((), ENDS, -2),
                "keys": jax.random.key(0),
            }
            if group >= 0:
                some = jax.tree.map(lambda leaf: np.asarray(leaf[0]), self.state.samplers[group])
                what |= {"said": _filled((), context, PAD), "sampler": some}
            # A lane past the last is nobody's.
            self.state = device.installed(
                self.state, group, self.config.vocab, np.int32(self.lanes), what
            )
        size = 4
        while swaps and size <= bucket(self.pages_for(self.config.context), 4):
            tables = tuple(_filled((), size) for _ in self.columns)
            pages = jax.device_get(_gathered(self.layers, tables))
            self.layers = _scattered(self.layers, tables, pages)
            self._known_size(nbytes(pages))
            size = bucket(size + 1, 4)
        for width in self.widths:
            grown = self._grown(width, [], self.block)
            self.layers, self.state, *_ = device.decoded(
                self.block,
                self.model,
                self.layers,
                self.state,
                np.zeros(width, bool),
                grown,
                np.int32(self.block),
            )
        for rows in {1, self.rows}:
            self.layers, self.state, *_ = device.absorbed(
                self.model,
                self.layers,
                self.state,
                np.full(rows, self.lanes, np.int32),
                np.zeros((rows, self.chunk), np.int32),
                np.zeros(rows, np.int32),
                np.zeros(rows, bool),
                self._grown(rows, [], self.chunk),
            )

    # To the host and back.

    def bytes_of(self, seat: Seat) -> int:
        """Of the pages of its tokens."""
        return int(self.pages_for(seat.written()) * self.page_bytes * len(self.columns))

    def save(self, seat: Seat) -> Saved | None:
        """Its pages on the host, or in the store; None where that has no room."""
        length = seat.written()
        began = time.perf_counter()
        pages = jax.device_get(_gathered(self.layers, self._tables(seat, length)))
        size = nbytes(pages)
        if self._known_size(size):
            rate = size / max(time.perf_counter() - began, 1e-6)
            self.rate = (self.rate + rate) / 2
        if self.kept is None:
            return Saved(length, size, pages=pages)
        key = self.kept.put_aside(seat.request.number, pages, length)
        return None if key is None else Saved(length, size, key=key)

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

    def fetch(self, saved: Saved) -> Any:
        """What was saved; None if it was lost."""
        if saved.key is None or self.kept is None:
            return saved.pages
        leaves = self.kept.take_back(saved.key)
        return None if leaves is None else self._pages(leaves)

    def forget(self, saved: Saved) -> None:
        """Nobody will want it."""
        if saved.key is not None and self.kept is not None:
            self.kept.forget(saved.key)

    def restore(self, seat: Seat, length: int, pages: Any) -> None:
        """What was saved, in pages of its own."""
        self.reserve(seat, length)
        self.layers = _scattered(self.layers, self._tables(seat, length), pages)
        # Pages that had left a window when it was saved hold anything: nobody may find them.
        self._let_go(seat, length)

    def _tables(self, seat: Seat, length: int) -> tuple[np.ndarray, ...]:
        count = self.pages_for(length)
        return tuple(_filled(seq.table[:count], bucket(count, 4)) for seq in seat.held)


@jax.jit
def _gathered(layers: tuple[Any, ...], tables: tuple[Array, ...]) -> Any:
    """The pages of each layer in the order of its table; anything where the table has -1."""
    return [
        jax.tree.map(lambda leaf, at=tables[layer.group]: leaf.at[at].get(mode="clip"), pages)
        for layer in layers
        for pages in [(layer.k_pages, layer.v_pages)]
    ]


@functools.partial(jax.jit, donate_argnums=0)
def _scattered(layers: tuple[Any, ...], tables: tuple[Array, ...], pages: Any) -> tuple[Any, ...]:
    """The layers with those pages; none where the table has -1."""
    after = []
    for layer, new in zip(layers, pages, strict=True):
        at = tables[layer.group]

        def put(leaf: Array, part: Array, at: Array = at) -> Array:
            return leaf.at[jnp.where(at < 0, leaf.shape[0], at)].set(part, mode="drop")

        keys, values = jax.tree.map(put, (layer.k_pages, layer.v_pages), tuple(new))
        after.append(replace(layer, k_pages=keys, v_pages=values))
    return tuple(after)


def _filled(values: Any, width: int, rest: int = -1) -> np.ndarray:
    out = np.full(width, rest, np.int32)
    out[: len(values)] = values
    return out


def _plain(sampler: Any) -> Any:
    """A sampler whose parameters are arrays of 32 bits."""
    sampling.check(sampler)

    def array(leaf: Any) -> Any:
        if isinstance(leaf, int):
            return np.asarray(leaf, np.int32)
        return np.asarray(leaf, np.float32) if isinstance(leaf, float) else np.asarray(leaf)

    return jax.tree.map(array, sampler)


def _signature(sampler: Any) -> Any:
    leaves, tree = jax.tree.flatten(sampler)
    return (tree, *((leaf.shape, leaf.dtype) for leaf in leaves))


def _managed(kind: Any, page: int | None, pages: int) -> PagedKind:
    """The kind with the engine's pages.

    Raises:
        TypeError: a kind without pages.
        ValueError: pages of two sizes.
    """
    if kind is None:
        kind = paged() if page is None else paged(page)
    if not isinstance(kind, PagedKind):
        raise TypeError(f"cache got {kind!r:.60}; expected a kind of pages, such as jkv.paged()")
    if page not in (None, kind.page):
        raise ValueError(
            f"page={page} and a cache with pages of {kind.page}; expected one of them, or the same"
        )
    return dataclasses.replace(kind, pages=pages, managed=True)
