"""The cache of a whole model: a value, and the algebra on it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from jkv import _pytree
from jkv._axes import Array
from jkv._pytree import pytree
from jkv._text import brief, plural
from jkv._transfer import intended, transfers
from jkv.cache import pages
from jkv.cache.evicting import evicted
from jkv.cache.protocol import (
    LayerCache,
    Step,
    as_kind,
    furthest,
    is_kind,
    own_kind_hint,
)
from jkv.errors import CacheFullError, NonFiniteError, UnsupportedError

P = ParamSpec("P")
R = TypeVar("R")
_RENAMED = {
    "advance": "cache.begin(tokens, counts), whose end(hidden, layers) returns what advance did",
}


def _eager(
    method: Callable[Concatenate[Cache, P], R],
) -> Callable[Concatenate[Cache, P], R]:
    """Decorate what may be called outside of `jit`, and on a cache that lies on the host."""

    @functools.wraps(method)
    def call(cache: Cache, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with intended():
            return method(on_device(cache), *args, **kwargs)

    return call


@pytree
class Cache:
    """The keys and values of every layer, each row with a length of its own: a value.

    Carry it through `lax.scan`, donate it, shard it, fork it, save it: every operation returns a
    new one. A row that has no room for its new tokens takes none of them, keeps every bit, and
    raises the flag `overflowed`, which `check` turns into an error on the host. It takes no others
    either, which would not be where they belong, until `crop` has made it shorter.
    """

    layers: tuple[Any, ...]  # of LayerCache
    lengths: Array  # [B] int32, tokens held by each row
    overflowed: Array  # [B] bool
    tables: tuple[Array, ...] = ()  # [B, M] int32 for each group of layers of pages, -1 for none

    @classmethod
    def empty(cls, layers: Sequence[Any], batch: int, slots: int) -> Cache:
        """A cache of new layers, of which those of pages get their tables."""
        made, tables = pages.grouped(layers, batch, slots)
        return cls(
            layers=made,
            lengths=jnp.zeros((batch,), jnp.int32),
            overflowed=jnp.zeros((batch,), bool),
            tables=tables,
        )

    @property
    def batch(self) -> int:
        """Rows."""
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int | None:
        """Tokens that a row can hold, None when it never runs full."""
        limits = [layer.capacity for layer in self.layers if layer.capacity is not None]
        limits += map(pages.capacity, pages.pools(self.layers), self.tables)
        return min(limits, default=None)

    @property
    def grows(self) -> bool:
        """Whether a loop should give it slots as it goes, and not all at the start."""
        return any(layer.grows for layer in self.layers)

    @property
    def forgets(self) -> bool:
        """Whether every layer keeps but so many tokens of a row, however long it is."""
        return all(layer.retained is not None for layer in self.layers)

    @property
    def recomputes(self) -> bool:
        """Whether each pass runs over all tokens."""
        return False

    def reach(self, new: int) -> int | None:
        """How far back a token sees in a pass of `new`, itself included; None: without limit."""
        return furthest(self.layers, new)

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return _pytree.nbytes(self)

    def begin(self, tokens: Int[Array, "B T"], counts: Int[Array, " B"] | None = None) -> Run:
        """Begin a forward pass over new tokens.

        A full row takes none of its tokens. Tell it from the others by `check` on the host, or by
        `overflowed` of the cache that `Run.end` returns.

        Args:
            tokens: of each row.
            counts: how many of a row's T tokens are real, all by default; the rest is padding.

        Raises:
            ValueError: tokens for another number of rows.

        Example:
            >>> run = cache.begin(tokens)
            >>> x, layers = embed(run.tokens), []
            >>> for block, layer in zip(blocks, run.layers, strict=True):
            ...     q, k, v = block.project(x, run.step.positions)
            ...     out, layer = layer.attend(q, k, v, run.step, block.spec)
            ...     x = block.finish(x, out)
            ...     layers.append(layer)
            >>> hidden, cache = run.end(x, layers)
        """
        self.check_batch(tokens)
        step, overflowed = self.reserve(tokens.shape[1], counts)
        return Run(self, tokens, step, self.layers, step, overflowed)

    def check_batch(self, tokens: Array) -> None:
        """Refuse tokens that are not for the rows of this cache.

        Raises:
            ValueError: another number of rows.
        """
        if tokens.shape[0] != self.batch:
            raise ValueError(
                f"the cache has {plural(self.batch, 'row')} and the tokens {tokens.shape[0]}; "
                "expected as "
                "many: make another with jkv.init_cache(..., batch=), or choose with cache.take"
            )

    def reserve(self, new: int, counts: Int[Array, " B"] | None) -> tuple[Step, Array]:
        """Reserve slots for `new` tokens per row, none in a row that has no room for all.

        Returns:
            The step, and the new `overflowed`.
        """
        if counts is None:
            counts = jnp.full((self.batch,), new, jnp.int32)
        counts = jnp.clip(counts.astype(jnp.int32), 0, new)
        if self.capacity is None:
            return Step.after(self.lengths, counts, new), self.overflowed
        fits = ~self.overflowed & (self.lengths + counts <= self.capacity)
        plans: tuple[Any, ...] = ()
        if self.tables:
            groups = pages.pools(self.layers)
            plans, fits = pages.planned(groups, self.tables, self.lengths, counts, new, fits)
        step = Step.after(self.lengths, jnp.where(fits, counts, 0), new)
        return _pytree.replace(step, pages=plans), ~fits

    def finish(self, run: Run, hidden: Array, layers: tuple[Any, ...]) -> tuple[Array, Cache]:
        """See `Run.end`."""
        after = _pytree.replace(
            self,
            layers=layers,
            lengths=run.new.stop,
            overflowed=run.overflowed,
            tables=tuple(plan.table for plan in run.new.pages),
        )
        return hidden, after

    if not TYPE_CHECKING:  # there, a misspelt name is an error

        def __getattr__(self, name: str) -> Any:
            hint = f". It is now {_RENAMED[name]}" if name in _RENAMED else ""
            raise AttributeError(f"Cache has no attribute {name!r}{hint}")

    @transfers
    def check(self) -> Cache:
        """This cache, if no row has refused tokens and nothing was stored that cannot be.

        Raises:
            CacheFullError: a row overflowed, and has not been made shorter since.
            NonFiniteError: NaN or infinity among keys or values that were to be rounded.
            TypeError: it is being traced, and its flags are not known yet.
        """
        if isinstance(self.overflowed, Tracer):
            raise TypeError(
                "check is traced by jit, vmap or grad, and raises on the host; return the cache "
                "from there and check it outside"
            )
        full = np.flatnonzero(np.asarray(self.overflowed))
        if len(full):
            where = "" if self.capacity is None else f" in {plural(self.capacity, 'slot')}"
            raise CacheFullError(
                f"the cache is full: rows {brief(full.tolist())} had no room for their new tokens"
                f"{where}{', or no page was free' if self.tables else ''}; nothing was written. "
                "Ask for more slots or fewer tokens"
            )
        for i, layer in enumerate(self.layers):
            broken = np.flatnonzero(self._invalid(layer))
            if len(broken):
                raise NonFiniteError(
                    f"layer {i} was given NaN or infinity as keys or values of rows "
                    f"{broken.tolist()}, which no code can hold; expected finite ones. Look at the "
                    "model's own activations, or use jkv.dense() to keep them as they are"
                )
        return self

    def _invalid(self, layer: LayerCache) -> np.ndarray:
        """Rows [B] of which a layer holds what cannot be rounded."""
        at = layer.table_index
        invalid = layer.invalid_rows(None if at is None else self.tables[at])
        return np.zeros((0,), bool) if invalid is None else np.asarray(invalid)

    @_eager
    def crop(self, lengths: Any) -> Cache:
        """Roll rows back to their first `lengths` tokens; a row that is shorter stays as it is.

        A row that gives up tokens lacks none of those it keeps: if it had overflowed, it may go
        on. One that keeps all it has is still without what it refused, and its flag stays.

        Args:
            lengths: an integer, or one for each row.

        Raises:
            ValueError: a length below 0, or lengths of another shape than [B] or [].
            UnsupportedError: a kind that no longer has what it would need.
        """
        wanted = _per_row(lengths, self.batch, "crop")
        new = jnp.minimum(jnp.maximum(wanted, 0), self.lengths)
        layers = tuple(layer.crop(self.lengths, new) for layer in self.layers)
        tables = tuple(
            pages.cropped(pool, table, self.lengths, new)
            for pool, table in zip(pages.pools(self.layers), self.tables, strict=True)
        )
        overflowed = self.overflowed & (new == self.lengths)
        return _pytree.replace(
            self, layers=layers, lengths=new, overflowed=overflowed, tables=tables
        )

    @_eager
    def take(self, rows: Any) -> Cache:
        """Reorder, repeat or drop rows: row r of the result is row ``rows[r]`` of this cache.

        Args:
            rows: a list or integer array ``[R]`` of row numbers.

        Raises:
            ValueError: a row that is not there.
        """
        at = _rows(rows, self.batch)
        return _pytree.replace(
            self,
            layers=tuple(layer.take(at) for layer in self.layers),
            lengths=self.lengths[at],
            overflowed=self.overflowed[at],
            tables=tuple(table[at] for table in self.tables),
        )

    def fork(self, count: Any) -> Cache:
        """Every row `count` times, copies next to each other: prefill once, go on many ways.

        Rows share their pages, if it is a cache of pages: `resize` makes more of these.

        Raises:
            ValueError: `count` is no integer of at least 1.
        """
        return self.take(np.repeat(np.arange(self.batch), _integer("fork", "count", count)))

    @_eager
    def convert(self, to: Any, *, config: Any = None, slots: Any = None) -> Cache:
        """The same tokens in a cache of another kind; what is kept of them is up to that kind.

        Args:
            to: the kind, such as `jkv.quantized(bits=4)`, or its text, "int4".
            config: the model's configuration, for kinds that depend on the model or the layer.
            slots: tokens that each row has room for, by default as many as now.

        Raises:
            UnsupportedError: a token's keys and values have not been kept, or the kind keeps none.
            CacheFullError: fewer slots than tokens.
        """
        to = as_kind(to)
        if not is_kind(to) or to.recomputes:
            raise UnsupportedError(
                f"convert got {brief(to)}; expected a kind that keeps keys and values, such as "
                f"jkv.dense(){own_kind_hint(to)}"
            )
        pairs = self.to_legacy()
        held = pairs[0][0].shape[2]
        room = self.capacity if self.capacity is not None else max(held, 1)
        slots = room if slots is None else _integer("convert", "slots", slots)
        if slots < held:
            raise CacheFullError(
                f"convert got slots={slots} for rows of up to {plural(held, 'token')}"
            )
        layers = []
        for i, (keys, _) in enumerate(pairs):
            batch, heads, _, dim = keys.shape
            kind = to if config is None else to.bind(config, i)
            layers.append(kind.init(batch, slots, heads, dim, keys.dtype))
        made = Cache.empty(layers, self.batch, slots)
        if any(pool.managed for pool in pages.pools(made.layers)):
            raise UnsupportedError(
                "convert got a kind of managed pages, of which none are named yet; expected "
                "jkv.paged() without managed=True"
            )
        flags, lengths, tables = self.overflowed, self.lengths, made.tables
        layers = made.layers
        if held:
            step, refused = made.reserve(held, self.lengths)
            layers = tuple(
                layer.append(jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2), step)
                for layer, (keys, values) in zip(layers, pairs, strict=True)
            )
            # Where pages run out, rows are refused.
            flags, lengths = flags | refused, step.stop
            tables = tuple(plan.table for plan in step.pages)
        return _pytree.replace(
            self, layers=layers, lengths=lengths, overflowed=flags, tables=tables
        )

    @_eager
    def evict(self, budget: Any, score: Any = None) -> Cache:
        """The best `budget` tokens of each row and head, in an evicting cache.

        No attention weights exist yet. `jkv.scores.key_norm` needs none; attention-based scores
        keep the newest tokens. A cache that evicts already is cut down by the scores it has.

        Args:
            budget: tokens, or one number for each key/value head.
            score: of `jkv.scores`, by default `key_norm`; it stays that of the cache.

        Raises:
            UnsupportedError: a cache that has let go of tokens in its own way.
            ValueError: a larger budget than an evicting cache has, or another score.
        """
        return _pytree.replace(evicted(self, budget, score), tables=())

    @_eager
    def requantise(self, to: Any) -> Cache:
        """What has been rounded, rounded in another form; layers and tokens that are exact stay so.

        Args:
            to: a kind that rounds, such as `jkv.quantized(bits=4)`, or its text, "int4".

        Raises:
            TypeError: `to` is no such kind.
            UnsupportedError: no layer rounds what it keeps: `convert` is for those.
        """
        to = as_kind(to)
        rounding = [layer.rounds for layer in self.layers]
        if not any(rounding):
            raise UnsupportedError(
                "requantise got a cache of which no layer rounds what it keeps; expected one of "
                "jkv.quantized or the like. Use cache.convert(to) to round an exact cache"
            )
        layers = tuple(
            layer.requantise(to, self.lengths) if rounds else layer
            for layer, rounds in zip(self.layers, rounding, strict=True)
        )
        return _pytree.replace(self, layers=layers)

    @_eager
    def resize(self, slots: Any) -> Cache:
        """The same tokens in buffers of `slots` slots, and pages for as many in each row.

        Raises:
            ValueError: `slots` is no integer of at least 1.
            CacheFullError: a row holds more than that.
        """
        slots = _integer("resize", "slots", slots)
        if not isinstance(self.lengths, Tracer):
            longest = int(np.max(np.asarray(self.lengths), initial=0))
            if slots < longest:
                raise CacheFullError(
                    f"resize got {plural(slots, 'slot')} for rows of up to "
                    f"{plural(longest, 'token')}; crop them first"
                )
        elif self.capacity is not None and slots < self.capacity:
            raise UnsupportedError(
                f"resize got {plural(slots, 'slot')} under jit, fewer than the {self.capacity} "
                "there are; whether the rows still fit is only known outside of it"
            )
        groups = pages.pools(self.layers)
        tables = [
            pages.resized(pool, table, slots)
            for pool, table in zip(groups, self.tables, strict=True)
        ]
        layers, renamed = pages.repooled(
            [layer.resize(slots) for layer in self.layers],
            tables,
            pages.elastic_counts(groups, tables),
        )
        return _pytree.replace(self, layers=layers, tables=renamed)

    def pair(self, layer: Any) -> tuple[Array, Array]:
        """Keys and values of one of the layers, each ``[B, K, S, H]``."""
        if layer.table_index is None:
            return layer.to_legacy(self.lengths)
        return layer.legacy_from_table(self.lengths, self.tables[layer.table_index])

    @_eager
    def to_legacy(self) -> tuple[tuple[Array, Array], ...]:
        """Per layer (keys, values), each ``[B, K, S, H]``, cut to the longest row if known."""
        pairs = tuple(map(self.pair, self.layers))
        if isinstance(self.lengths, Tracer):
            return pairs
        longest = int(np.max(np.asarray(self.lengths), initial=0))
        return tuple((k[:, :, :longest], v[:, :, :longest]) for k, v in pairs)


@dataclasses.dataclass(frozen=True)
class Run:
    """One forward pass over new tokens, from `Cache.begin`.

    A plain value within a program: return the cache that `end` makes from a jitted function, and
    not this.

    Attributes:
        cache: before the pass.
        tokens: ``[B, T]``, what the layers run over: the new tokens; of `none()`, the whole
            history.
        step: where these are.
        layers: for each of the model's layers, its cache.
        new: where the new tokens are; the same as `step` but for `none()`.
        overflowed: ``[B]``, rows that refuse their new tokens.
    """

    cache: Cache
    tokens: Array
    step: Step
    layers: tuple[Any, ...]  # of LayerCache
    new: Step
    overflowed: Array

    def end(self, hidden: Float[Array, "B T *D"], layers: Sequence[Any]) -> tuple[Array, Cache]:
        """Return the new tokens' hidden states, and the cache after the pass.

        Args:
            hidden: of all `tokens`, after the last layer.
            layers: what each layer's `attend` returned.

        Raises:
            ValueError: another number of layers than `layers` of the pass.
        """
        if len(layers) != len(self.layers):
            raise ValueError(
                f"end got {plural(len(layers), 'layer')}; expected {len(self.layers)}, what attend "
                "of each of run.layers returned"
            )
        return self.cache.finish(self, hidden, tuple(layers))


@transfers
def concat(caches: Any) -> Cache:
    """One batch of the rows of several caches, with the slots of the longest.

    Args:
        caches: a list of them.

    Raises:
        TypeError: something that is no cache.
        ValueError: no cache, or caches of different models, kinds or dtypes.
    """
    if not isinstance(caches, Sequence) or not all(isinstance(c, Cache) for c in caches):
        raise TypeError(f"concat got {brief(caches)}; expected a list of caches")
    if not caches:
        raise ValueError("concat got no caches; expected at least one")
    slots = max((c.capacity for c in caches if c.capacity is not None), default=None)
    if slots is not None:
        caches = [c if c.capacity == slots else c.resize(slots) for c in caches]
    if len({_signature(c) for c in caches}) > 1:
        raise ValueError(f"concat got caches of different kinds or shapes: {brief(caches)}")
    first, rest = caches[0], caches[1:]
    layers = [layer.concat([c.layers[i] for c in rest]) for i, layer in enumerate(first.layers)]
    tables = pages.joined([pages.pools(c.layers) for c in caches], [c.tables for c in caches])
    counts = pages.elastic_counts(pages.pools(layers), tables)
    made, renamed = pages.repooled(layers, tables, counts)
    return _pytree.replace(
        first,
        layers=made,
        lengths=jnp.concatenate([c.lengths for c in caches]),
        overflowed=jnp.concatenate([c.overflowed for c in caches]),
        tables=renamed,
    )


def on_device(cache: Cache) -> Cache:
    """Bring a cache back from the host, where `jax.device_get` moved it, as a copy.

    An array of numpy's has none of the methods by which a cache is written.
    """
    if not any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(cache)):
        return cache
    return jax.tree.map(jnp.array, cache)


def _integer(where: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{where} got {name}={brief(value)}; expected an integer of at least 1")
    return int(value)


def _per_row(lengths: Any, batch: int, what: str) -> Array:
    """Lengths as [B] int32; those whose values are known are checked."""
    array = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
    if array.shape not in ((), (batch,)) or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{what} got lengths of shape {array.shape} and dtype {array.dtype}; expected an "
            f"integer or one integer for each of {plural(batch, 'row')}"
        )
    if not isinstance(array, Tracer) and np.any(np.asarray(array) < 0):
        raise ValueError(f"{what} got a negative length in {np.asarray(array).tolist()}")
    return jnp.broadcast_to(jnp.asarray(array, jnp.int32), (batch,))


def _rows(rows: Any, batch: int) -> Array:
    array = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if array.ndim != 1 or not jnp.issubdtype(array.dtype, jnp.integer) or array.shape[0] == 0:
        raise ValueError(
            f"take got rows of shape {array.shape} and dtype {array.dtype}; expected a list of "
            "row numbers"
        )
    if not isinstance(array, Tracer):
        known = np.asarray(array)
        if known.min() < 0 or known.max() >= batch:
            raise ValueError(f"take got rows {known.tolist()}; expected numbers 0 to {batch - 1}")
    return jnp.asarray(array, jnp.int32)


def _signature(cache: Cache) -> tuple[Any, ...]:
    """Everything but the batch: kinds, shapes from the second axis on, dtypes."""
    leaves, tree = jax.tree.flatten(cache)
    return tree, *((leaf.dtype, leaf.shape[1:]) for leaf in leaves)
