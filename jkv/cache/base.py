"""The cache of a whole model: a value, and the algebra on it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from jkv import _pytree
from jkv._axes import Array
from jkv._checks import check_integer
from jkv._pytree import pytree
from jkv._text import brief, plural
from jkv._transfer import intended, transfers
from jkv.cache.protocol import (
    CacheKind,
    LayerCache,
    Layers,
    Shape,
    as_kind,
    furthest,
    own_kind_hint,
)
from jkv.cache.rows import Lengths, Rows, check_lengths, check_rows
from jkv.cache.scores import Score
from jkv.cache.shared_state import SharedState
from jkv.errors import CacheFullError, NonFiniteError, UnsupportedError

if TYPE_CHECKING:
    from jkv.cache.run import Run
else:
    Run = Any  # its module imports this one

P = ParamSpec("P")
R = TypeVar("R")
_REPLACED = {
    "advance": "run = cache.begin(tokens, counts) and run.end(hidden, layers)",
    "tables": "cache.shared[0].tables",
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
    new one. Orbax saves it as any pytree, flax has a state dict of it, and programs of `jax.export`
    take it (a process that reads such a program imports `jkv.cache` first). A row that has no room
    for its new tokens takes none of them, keeps every bit, and raises the flag `overflowed`, which
    `check` turns into an error on the host. It takes no others either, which would not be where
    they belong, until `crop` has made it shorter.

    Example:
        >>> cache = jkv.init_cache(lm.config, "dense", batch=1, slots=8)
        >>> logits, cache = jkv.prefill(lm.model, jnp.array([[5, 6, 7]]), cache)
        >>> cache.lengths.tolist(), cache.crop(2).lengths.tolist(), cache.fork(3).batch
        ([3], [2], 3)
    """

    layers: Layers
    lengths: Array  # [B] int32, tokens held by each row
    overflowed: Array  # [B] bool
    shared: tuple[SharedState, ...] = ()  # what layers share: block tables, a history of tokens

    @classmethod
    def empty(cls, layers: Sequence[LayerCache], batch: int, slots: int) -> Cache:
        """Make the cache of new layers, and what these share."""
        made, shared = tuple(layers), []
        # Of several layers that share a state, one.
        for state in dict.fromkeys(x.shares for x in layers if x.shares is not None):
            made, new = state.empty(made, batch, slots)
            shared.append(new)
        return cls(
            layers=made,
            lengths=jnp.zeros((batch,), jnp.int32),
            overflowed=jnp.zeros((batch,), bool),
            shared=tuple(shared),
        )

    @property
    def batch(self) -> int:
        """Rows."""
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int | None:
        """Tokens that a row can hold, None when it never runs full."""
        limits = [layer.capacity for layer in self.layers]
        limits += [state.capacity(self.layers) for state in self.shared]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def grows(self) -> bool:
        """Whether a loop should give it slots as it goes, and not all at the start."""
        return any(part.grows for part in (*self.layers, *self.shared))

    @property
    def forgets(self) -> bool:
        """Whether every layer keeps but so many tokens of a row, however long it is."""
        return all(layer.retained is not None for layer in self.layers)

    @property
    def recomputes(self) -> bool:
        """Whether each pass runs over all tokens."""
        return any(state.recomputes for state in self.shared)

    def reach(self, new: int) -> int | None:
        """Return how far back a token sees in a pass of `new`, see `LayerCache.reach`."""
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
            >>> cache = jkv.init_cache(lm.config, batch=1, slots=8)
            >>> run = cache.begin(jnp.array([[5, 6, 7]]))
            >>> layers, spec = [], jkv.ops.AttentionSpec(scale=0.125)
            >>> for layer in run.layers:  # what a model does between embedding and logits
            ...     q, k = jnp.ones((1, 3, 4, 64)), jnp.ones((1, 3, 2, 64))  # [B, T, N, H], K
            ...     out, layer = layer.attend(q, k, k, run.step, spec)
            ...     layers.append(layer)
            >>> hidden, cache = run.end(out, layers)
            >>> cache.lengths.tolist()
            [3]
        """
        from jkv.cache.run import begin  # it makes the next cache

        return begin(self, tokens, counts)

    if not TYPE_CHECKING:  # there, a misspelt name is an error

        def __getattr__(self, name: str) -> Any:
            hint = f"; it is {_REPLACED[name]} now" if name in _REPLACED else ""
            raise AttributeError(f"Cache has no attribute {name!r}{hint}")

    @transfers
    def check(self) -> Cache:
        """Return this cache, or raise if a row refused tokens or was given NaN.

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
            reasons = "".join(f", or {state.refusal}" for state in self.shared if state.refusal)
            raise CacheFullError(
                f"the cache is full: rows {brief(full.tolist())} had no room for their new tokens"
                f"{where}{reasons}; nothing was written. "
                "Ask for more slots or fewer tokens"
            )
        for i, layer in enumerate(self.layers):
            flags = layer.invalid_rows(self.shared)
            invalid = [] if flags is None else np.flatnonzero(np.asarray(flags)).tolist()
            if invalid:
                raise NonFiniteError(
                    f"layer {i} was given NaN or infinity as keys or values of rows "
                    f"{invalid}, which no code can hold; expected finite ones. Look at the "
                    "model's own activations, or use jkv.dense() to keep them as they are"
                )
        return self

    @_eager
    def crop(self, lengths: Lengths) -> Cache:
        """Roll rows back to their first `lengths` tokens; a row that is shorter stays as it is.

        A row that gives up tokens lacks none of those it keeps: if it had overflowed, it may go
        on. One that keeps all it has is still without what it refused, and its flag stays.

        Args:
            lengths: an integer, or one for each row.

        Raises:
            ValueError: a length below 0, or lengths of another shape than [B] or [].
            UnsupportedError: a kind that no longer has what it would need.
        """
        wanted = check_lengths(lengths, self.batch)
        new = jnp.minimum(jnp.maximum(wanted, 0), self.lengths)
        layers = tuple(layer.crop(self.lengths, new) for layer in self.layers)
        shared = tuple(state.crop(self.layers, self.lengths, new) for state in self.shared)
        overflowed = self.overflowed & (new == self.lengths)
        return _pytree.replace(
            self, layers=layers, lengths=new, overflowed=overflowed, shared=shared
        )

    @_eager
    def take(self, rows: Rows) -> Cache:
        """Reorder, repeat or drop rows: row r of the result is row ``rows[r]`` of this cache.

        Args:
            rows: a list or integer array ``[R]`` of row numbers.

        Raises:
            ValueError: a row that is not there.
        """
        at = check_rows(rows, self.batch)
        return _pytree.replace(
            self,
            layers=tuple(layer.take(at) for layer in self.layers),
            lengths=self.lengths[at],
            overflowed=self.overflowed[at],
            shared=tuple(state.take(at) for state in self.shared),
        )

    def fork(self, count: int) -> Cache:
        """Repeat every row `count` times, copies next to each other: prefill once, sample many.

        Rows share their pages, if it is a cache of pages: `resize` makes more of these.

        Raises:
            ValueError: `count` is no integer of at least 1.
        """
        count = check_integer("count", count, 1, of="fork")
        return self.take(np.repeat(np.arange(self.batch), count))

    @_eager
    def convert(
        self, to: CacheKind | str, *, config: Shape | None = None, slots: int | None = None
    ) -> Cache:
        """Convert to a cache of another kind, which decides what it keeps of the tokens.

        Args:
            to: the kind, such as `jkv.quantized(bits=4)`, or its text, "int4".
            config: the model's configuration, for kinds that depend on the model or the layer.
            slots: tokens that each row has room for, by default as many as now.

        Raises:
            UnsupportedError: a token's keys and values have not been kept, or the kind keeps none.
            CacheFullError: fewer slots than tokens.
        """
        from jkv.cache.convert import convert  # it makes caches

        return convert(self, to, config=config, slots=slots)

    @_eager
    def evict(self, budget: int | Sequence[int], score: Score | None = None) -> Cache:
        """Keep the best `budget` tokens of each row and head, in an evicting cache.

        No attention weights exist yet. `jkv.scores.key_norm` needs none; attention-based scores
        keep the newest tokens. A cache that evicts already is cut down by the scores it has.

        Args:
            budget: tokens, or one number for each key/value head.
            score: of `jkv.scores`, by default `key_norm`; it stays that of the cache.

        Raises:
            UnsupportedError: a cache that has let go of tokens in its own way.
            ValueError: a larger budget than an evicting cache has, or another score.
        """
        from jkv.cache.evict import evict  # it knows the evicting kind

        return evict(self, budget, score)

    @_eager
    def requantise(self, to: CacheKind | str) -> Cache:
        """Round what is rounded to another form; exact layers and tokens stay exact.

        Args:
            to: a kind that rounds, such as `jkv.quantized(bits=4)`, or its text, "int4".

        Raises:
            TypeError: `to` is no such kind.
            UnsupportedError: no layer rounds what it keeps: `convert` is for those.
        """
        kind = as_kind(to)
        rounding = [layer.rounds for layer in self.layers]
        if not any(rounding):
            raise UnsupportedError(
                "requantise got a cache of which no layer rounds what it keeps; expected one of "
                "jkv.quantized or the like. Use cache.convert(to) to round an exact cache"
            )
        if not isinstance(kind, CacheKind):
            raise TypeError(
                f"requantise got {brief(kind)}; expected a kind that rounds, such as "
                f"jkv.quantized(bits=4){own_kind_hint(kind)}"
            )
        layers = tuple(
            layer.requantise(kind, self.lengths) if rounds else layer
            for layer, rounds in zip(self.layers, rounding, strict=True)
        )
        return _pytree.replace(self, layers=layers)

    @_eager
    def resize(self, slots: int) -> Cache:
        """Resize to `slots` slots per row, and to pages for as many.

        Raises:
            ValueError: `slots` is no integer of at least 1.
            CacheFullError: a row holds more than that.
        """
        slots = check_integer("slots", slots, 1, of="resize")
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
        layers = tuple(layer.resize(slots) for layer in self.layers)
        shared = tuple(state.resize(self.layers, slots) for state in self.shared)
        return _pytree.replace(self, layers=layers, shared=shared).fit()

    def fit(self, sizes: Sequence[tuple[int, ...]] | None = None) -> Cache:
        """Give what the layers share as much storage as the rows may need.

        Args:
            sizes: storage of each shared state, from `fork_sizes`, in place of that.
        """
        layers, shared = self.layers, []
        for i, state in enumerate(self.shared):
            layers, fitted = state.fit(layers, None if sizes is None else sizes[i])
            shared.append(fitted)
        return _pytree.replace(self, layers=layers, shared=tuple(shared))

    def fork_sizes(self, count: int) -> tuple[tuple[int, ...], ...]:
        """Return sizes for `fit` that are enough for rows which go on `count` ways each.

        On the host: they depend on the lengths.
        """
        if not self.shared:
            return ()
        lengths = np.asarray(self.lengths)
        return tuple(state.fork_sizes(self.layers, lengths, count) for state in self.shared)

    def save(self, path: str | os.PathLike[str], model: object = None) -> None:
        """Save it as one safetensors file, for `jkv.load_cache`.

        The file replaces what was at `path` once it is complete. All slots are written, also those
        that are empty: `resize` it first where that is too much.

        Args:
            path: of the file.
            model: whose keys and values these are: what `jkv.load` returns, a decoder, or a pytree
                of weights. The file can then only be loaded for it. None: the file names none.

        Raises:
            TypeError: the cache is being traced, or `model` holds no weights.
            UnsupportedError: a dtype, or a kind, that no file can hold.
            OSError: the file cannot be written.

        Example:
            >>> cache = jkv.init_cache(lm.config, "int8", batch=1, slots=8)
            >>> cache.save("prompt.safetensors", lm)
            >>> jkv.load_cache("prompt.safetensors", lm).nbytes == cache.nbytes
            True
        """
        from jkv.cache.file import save_cache  # it reads caches, too

        save_cache(path, self, model)

    @_eager
    def to_legacy(self) -> tuple[tuple[Array, Array], ...]:
        """Return each layer's keys and values ``[B, K, S, H]``, cut to the longest row if known."""
        pairs = tuple(x.to_legacy_shared(self.lengths, self.shared) for x in self.layers)
        if isinstance(self.lengths, Tracer):
            return pairs
        longest = int(np.max(np.asarray(self.lengths), initial=0))
        return tuple((k[:, :, :longest], v[:, :, :longest]) for k, v in pairs)


def on_device(cache: Cache) -> Cache:
    """Bring a cache back from the host, where `jax.device_get` moved it, as a copy.

    An array of numpy's has none of the methods by which a cache is written.
    """
    if not any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(cache)):
        return cache
    return jax.tree.map(jnp.array, cache)
