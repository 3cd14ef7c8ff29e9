"""Check that a kind of cache, such as one of your own, keeps its promises.

A key says at which position it is and a value which token, so that a query can ask for one position
and see which token is found there. One that is lost, doubled, moved, or kept too long is told by
number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkv._axes import Array
from jkv._probe import DIM, HEADS, SHARP, TOKENS, VALUES, expected, key_of, keys_and_values
from jkv._text import brief, plural
from jkv.cache import Cache, CacheKind, concat, init_cache
from jkv.cache.protocol import as_kind, own_kind_hint
from jkv.errors import UnsupportedError
from jkv.ops.masks import AttentionSpec

Sees = Callable[[int, int], bool]


def everything(query: int, position: int) -> bool:
    """Return whether a token sees another in a cache that forgets nothing: all up to itself.

    Example:
        >>> jkv.testing.everything(query=3, position=3), jkv.testing.everything(query=3, position=4)
        (True, False)
    """
    return position <= query


def check_kind(
    kind: CacheKind | str,
    *,
    sees: Sees = everything,
    tolerance: float = 1e-4,
    slots: int = 48,
    chunks: Sequence[int] = (1, 5, 2, 7, 1, 11, 1),
    rolls_back: bool = True,
) -> None:
    """Run a kind of cache through everything that a layer cache must do.

    Args:
        kind: with ``init(batch, slots, kv_heads, head_dim, dtype)``, or ``bind`` as well; or the
            text of one of jkv's own.
        sees: whether the token at a position still sees another, (query, position) to bool: the
            mask that the kind means.
        tolerance: of what is found beside values between -1 and 1; 0.3 suits a kind that rounds.
        slots: that each row has room for.
        chunks: sizes of the passes in which tokens come.
        rolls_back: whether rows may be shortened after all that; if not, `crop` must refuse.

    Raises:
        AssertionError: a promise is broken; the message says which, where, and what was seen.
        TypeError: something that is no kind.
        ValueError: a text that names none.

    Example:
        >>> sees = lambda query, position: query - 8 < position <= query
        >>> jkv.testing.check_kind(jkv.window(8), sees=sees, rolls_back=False)
    """
    checked = as_kind(kind)
    if not isinstance(checked, CacheKind):
        raise TypeError(
            f"check_kind got {brief(checked)}; expected a kind such as jkv.dense(), or its text"
            f"{own_kind_hint(checked)}"
        )
    if type(checked).__hash__ is None:
        raise AssertionError(
            f"the kind {type(checked).__name__} is not hashable; make it a frozen dataclass"
        )
    probe = _Probe(checked, sees, tolerance, slots, longest=max(chunks))
    probe.is_a_value()
    rows = probe.fed(chunks)
    probe.padding_is_not_stored()
    probe.appends()
    probe.runs_full()
    probe.is_sharded()
    probe.rows_move(rows)
    probe.resizes(rows)
    probe.converts(rows)
    if rolls_back:
        probe.rolls_back(rows)
    else:
        probe.refuses_to_roll_back(rows)
    probe.is_compiled_once()


@dataclasses.dataclass(frozen=True)
class _Config:
    """As much of a model as a cache asks for."""

    layers: int = 1
    kv_heads: int = HEADS
    head_dim: int = DIM
    dtype: str = "float32"
    context: int = 1 << 20
    rope: Any = None

    def window(self, layer: int) -> None:
        del layer


@dataclasses.dataclass
class _Rows:
    """A cache of one layer, and the tokens that are in it."""

    cache: Cache
    tokens: list[list[int]]

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray([len(row) for row in self.tokens], np.int32)


class _Probe:
    def __init__(self, kind: CacheKind, sees: Sees, tolerance: float, slots: int, longest: int):
        self.kind, self.sees, self.tolerance = kind, sees, tolerance
        self.slots, self.longest = slots, longest
        self.random = np.random.default_rng(0)
        self.compiled = 0
        # Whole programs: of single operations each would be compiled by itself.
        self.attend = jax.jit(self._attend)
        self.append = jax.jit(self._append)
        self.take = jax.jit(lambda cache, rows: cache.take(rows))
        self.concat = jax.jit(concat)
        self.longer = jax.jit(lambda cache, slots: cache.resize(slots), static_argnums=1)
        self.cropped = jax.jit(lambda cache, lengths: cache.crop(lengths))
        self.to_legacy = jax.jit(lambda cache: cache.to_legacy())

    def new(self, rows: int) -> Cache:
        return init_cache(_Config(), self.kind, batch=rows, slots=self.slots)

    def _attend(
        self, cache: Cache, tokens: Array, asked: Array, counts: Array
    ) -> tuple[Array, Cache]:
        """Run a pass in which each new token ``[B, T]`` asks for a position; padding is NaN."""
        self.compiled += 1

        run = cache.begin(tokens, counts)
        positions = run.step.positions
        real = (positions >= 0)[..., None, None]
        q, _ = keys_and_values(run.tokens, asked)
        k, v = (jnp.where(real, x, jnp.nan) for x in keys_and_values(run.tokens, positions))
        spec = AttentionSpec(SHARP)
        out, layer = run.layers[0].attend(jnp.where(real, q, 0.0), k, v, run.step, spec)
        out, cache = run.end(out.reshape(*positions.shape, -1), [layer])
        return out.reshape(*tokens.shape, HEADS, DIM), cache

    def _append(self, cache: Cache, tokens: Array, counts: Array) -> Cache:
        """Append without attending, as `Cache.convert` does."""
        run = cache.begin(tokens, counts)
        k, v = keys_and_values(run.tokens, run.step.positions)
        return run.next_cache([run.layers[0].append(k, v, run.step)])

    def push(
        self, rows: _Rows, counts: Sequence[int], what: str, *, asks_itself: bool = False
    ) -> _Rows:
        """Append new tokens to each row, and compare what each of them sees."""
        # Two shapes and no more: a kind costs as many compilations.
        size = 1 if max(counts) == 1 else self.longest
        tokens = self.random.integers(0, TOKENS, (len(counts), size)).astype(np.int32)
        held = np.asarray(rows.lengths)
        newest = held + np.asarray(counts)
        asked = self.random.integers(0, np.maximum(newest, 1)[:, None], tokens.shape)
        if asks_itself:
            asked = held[:, None] + np.arange(size)
        out, cache = self.attend(
            rows.cache, tokens, asked.astype(np.int32), np.asarray(counts, np.int32)
        )
        out = np.asarray(out, float)
        given = zip(rows.tokens, tokens, counts, strict=True)
        told = [[*row, *line[:n].tolist()] for row, line, n in given]
        for b, count in enumerate(counts):
            for t in range(count):
                self.compare(
                    out[b, t], told[b], int(held[b]) + t, int(asked[b, t]), f"{what}, row {b}"
                )
        return _Rows(cache, told)

    def compare(self, got: np.ndarray, row: list[int], query: int, asked: int, what: str) -> None:
        seen = [p for p in range(query + 1) if self.sees(query, p)]
        want = expected(row, seen, np.asarray([asked]))[0]
        off = np.abs(got - want).max()
        if not off <= self.tolerance:
            nearest = np.abs(VALUES - got).max(axis=(1, 2)).argmin()
            places = [p for p, token in enumerate(row) if token == nearest]
            raise AssertionError(
                f"{what}: the token at position {query} asked for position {asked} and is off by "
                f"{off:.3g}, more than {self.tolerance}; what it got is nearest to the tokens at "
                f"positions {places}. It should see {plural(len(seen), 'token')}, {seen[:1]} to "
                f"{seen[-1:]}. Pass tolerance= for a kind that rounds"
            )

    def crop(self, cache: Cache, lengths: np.ndarray) -> Cache:
        try:
            return self.cropped(cache, lengths)
        except UnsupportedError:  # a kind may have to know the lengths
            return cache.crop(lengths)

    def holds(self, rows: _Rows, what: str) -> None:
        """Ask for every position of every row by one more token that is not kept."""
        for _ in range(4):
            self.push(rows, [1] * len(rows.tokens), what)

    def is_a_value(self) -> None:
        cache = self.new(2)
        layer = cache.layers[0]
        leaves, tree = jax.tree.flatten(cache)
        for leaf in leaves:
            if not isinstance(leaf, jax.Array):
                raise AssertionError(
                    f"a {type(leaf).__name__} is where arrays are expected: decorate its class "
                    "with @jkv.cache.pytree, and declare fields that are no arrays with "
                    "jkv.cache.static()"
                )
        if jax.tree.structure(jax.tree.unflatten(tree, leaves)) != tree:
            raise AssertionError(f"{type(layer).__name__} changes when it is rebuilt as a pytree")
        if len({leaf.unsafe_buffer_pointer() for leaf in leaves}) < len(leaves):
            raise AssertionError("one buffer is in two leaves: such a cache cannot be donated")

    def fed(self, chunks: Sequence[int]) -> _Rows:
        """Fill rows of different lengths in chunks; one row has nothing new in some of them."""
        rows = _Rows(self.new(3), [[], [], []])
        for i, size in enumerate(chunks):
            counts = [size, max(size - i % 3, 0), size if i % 2 else 0]
            rows = self.push(rows, counts, f"chunk {i} of {plural(size, 'token')}")
        return rows

    def padding_is_not_stored(self) -> None:
        before = self.new(3)
        _, after = self.attend(
            before,
            np.zeros((3, self.longest), np.int32),
            np.zeros((3, self.longest), np.int32),
            np.asarray([0, 2, 1], np.int32),
        )
        if before.shared:  # of pages, rows are in the block tables alone
            before, after = before.shared, after.shared
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            if not np.array_equal(a[0], b[0]):
                raise AssertionError("a row without new tokens has changed")

    def appends(self) -> None:
        tokens = self.random.integers(0, TOKENS, (3, self.longest)).astype(np.int32)
        counts = [self.longest, 2, 0]
        cache = self.append(self.new(3), tokens, np.asarray(counts, np.int32))
        told = [line[:n].tolist() for line, n in zip(tokens, counts, strict=True)]
        self.holds(_Rows(cache, told), "after append")

    def runs_full(self) -> None:
        """Fill a row to its last slot, and give it one more token."""
        rows = _Rows(self.new(3), [[], [], []])
        capacity, retained = rows.cache.capacity, rows.cache.layers[0].retained
        if capacity is None and retained is None:
            raise AssertionError(
                "capacity is None, for a row that never runs full, and so is retained, for one of "
                "which all tokens are kept; expected a number for one of them"
            )
        if capacity is None:
            return
        for left in range(capacity - 1, 0, -self.longest):
            rows = self.push(rows, [min(left, self.longest), 0, 1], "while a row fills")
        self.holds(rows, "with a row that has one slot left")
        rows = self.push(rows, [1, 1, 1], "in the last slot", asks_itself=True)
        zeros = np.zeros((3, 1), np.int32)
        _, cache = self.attend(rows.cache, zeros, zeros, np.asarray([1, 0, 0], np.int32))
        if cache.overflowed.tolist() != [True, False, False]:
            raise AssertionError(
                f"a row took more than its capacity of {plural(capacity, 'token')}; expected it "
                "to refuse what does not fit and to raise its flag"
            )

    def is_sharded(self) -> None:
        layer = self.new(3).layers[0]
        try:
            specs = layer.partition_spec("heads")
        except UnsupportedError:
            return
        leaves = jax.tree.leaves(layer)
        if len(jax.tree.leaves(specs)) != len(leaves):
            raise AssertionError("partition_spec has another number of leaves than the layer")
        sharded = 0
        for leaf, spec in zip(leaves, jax.tree.leaves(specs), strict=True):
            for size, axis in zip(leaf.shape, spec, strict=False):
                if axis is not None and size != HEADS:
                    raise AssertionError(
                        f"partition_spec shards an axis of {size} of a leaf {list(leaf.shape)}; "
                        f"expected that of the {HEADS} key/value heads"
                    )
                sharded += axis is not None
        if not sharded:
            raise AssertionError("partition_spec shards no leaf; expected those with heads")

    def rows_move(self, rows: _Rows) -> None:
        order = [2, 0, 0]
        taken = self.take(rows.cache, np.asarray(order))
        taken = _Rows(taken, [list(rows.tokens[r]) for r in order])
        self.holds(taken, "after take")
        parts = [self.take(rows.cache, np.asarray([r])) for r in (1, 2, 0)]
        joined = _Rows(self.concat(parts), [list(rows.tokens[r]) for r in (1, 2, 0)])
        self.holds(joined, "after concat")

    def resizes(self, rows: _Rows) -> None:
        longer = self.longer(rows.cache, self.slots + 16)
        self.holds(_Rows(longer.resize(self.slots), rows.tokens), "after resize")

    def converts(self, rows: _Rows) -> None:
        try:
            ((keys, values),) = self.to_legacy(rows.cache)
        except UnsupportedError:
            return
        for name, got in (("keys", keys), ("values", values)):
            if got.shape[:2] != (len(rows.tokens), HEADS) or got.shape[2] < max(rows.lengths):
                raise AssertionError(
                    f"to_legacy: {name} have the shape {list(got.shape)}; expected [B, K, S, H] "
                    f"with {len(rows.tokens)} rows, {HEADS} heads and a slot for each of "
                    f"{plural(int(max(rows.lengths)), 'token')}"
                )
        for b, row in enumerate(rows.tokens):
            for name, got, want in (
                ("keys", keys, np.repeat(key_of(np.arange(len(row)))[:, None], HEADS, axis=1)),
                ("values", values, VALUES[row]),
            ):
                off = np.abs(np.swapaxes(np.asarray(got[b]), 0, 1)[: len(row)] - want).max(
                    initial=0
                )
                if not off <= max(self.tolerance, 1e-6):
                    raise AssertionError(
                        f"to_legacy: {name} of row {b} are off by {off:.3g}, more than "
                        f"{max(self.tolerance, 1e-6)}. Pass tolerance= for a kind that rounds"
                    )

    def rolls_back(self, rows: _Rows) -> None:
        for back in (0, 1, 9):
            kept = [max(len(row) - back * (b + 1), 0) for b, row in enumerate(rows.tokens)]
            cache = self.crop(rows.cache, np.asarray(kept, np.int32))
            short = _Rows(cache, [row[:n] for row, n in zip(rows.tokens, kept, strict=True)])
            self.holds(short, f"after crop by {back}")
            again = self.push(short, [3, 1, 2], f"going on after crop by {back}")
            self.holds(again, f"after going on from crop by {back}")

    def refuses_to_roll_back(self, rows: _Rows) -> None:
        try:
            rows.cache.crop(rows.lengths // 2)
        except UnsupportedError:
            return
        raise AssertionError(
            "crop shortened rows to half; expected UnsupportedError with rolls_back=False. A kind "
            "that keeps what it needs rolls back: leave rolls_back out"
        )

    def is_compiled_once(self) -> None:
        rows, counts = _Rows(self.new(3), [[], [], []]), [1, 1, 1]
        rows = self.push(rows, counts, "a first token")
        before = self.compiled
        for _ in range(5):
            rows = self.push(rows, counts, "one token after another")
        if self.compiled > before:
            raise AssertionError(
                "a step compiles anew: the cache it returns differs in shape, dtype or a static "
                "field from the one it was given"
            )

        @jax.jit
        def reversed_twice(cache: Cache) -> Cache:
            stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), cache)
            forked = jax.vmap(lambda cache: cache.take(jnp.asarray([2, 1, 0])))(stacked)
            return jax.tree.map(lambda leaf: leaf[0], forked)

        flat = reversed_twice(rows.cache)
        self.holds(_Rows(flat, rows.tokens[::-1]), "after vmap")


__all__ = ["check_kind", "everything"]


def __dir__() -> list[str]:
    return sorted(__all__)
