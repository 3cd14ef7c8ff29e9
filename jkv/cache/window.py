"""The last tokens in a ring, with or without the first ones: windows and attention sinks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol, get_args, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jkv import ops
from jkv._axes import Array
from jkv._checks import check_integer
from jkv._pytree import pytree, replace, static
from jkv._text import brief, plural
from jkv.cache.dense import Dense, dense
from jkv.cache.form import COUNT, Form, one_of
from jkv.cache.protocol import CacheKind, LayerCache, Shape, Step, shard_heads, window_of
from jkv.cache.ring import Ring
from jkv.errors import UnsupportedError
from jkv.ops.masks import AttentionSpec
from jkv.ops.rope import angles, rotate

Positions = Literal["cache", "text", "clamped"]


@runtime_checkable
class Rotary(Protocol):
    """What is asked of a model's rotary positions."""

    @property
    def interleaved(self) -> bool: ...  # noqa: D102
    def frequencies(self) -> np.ndarray: ...  # noqa: D102


@pytree
class Window(LayerCache):
    """A layer's last W tokens in a ring, and its first s in a buffer of their own.

    Keys are kept as the model rotated them, at their positions in the text. Between the tokens of
    the window that is right under every rule of positions, since rotary scores depend on distances
    alone; the rules differ in how far the sinks are, and turn the queries that look at them.

    Example:
        >>> layer = jkv.window(8).init(batch=1, slots=64, kv_heads=2, head_dim=4, dtype="float32")
        >>> layer.retained, layer.capacity  # the last 8 tokens, of as many as there are
        (8, None)
    """

    ring: Ring
    sinks: Dense | None  # the tokens at positions below s
    positions: Positions = static(default="text")
    rope: Rotary | None = static(default=None)  # of the model, where the rule needs it

    @property
    def capacity(self) -> None:
        """Never full."""
        return None

    @property
    def retained(self) -> int:
        """Tokens that are kept of a row, however long."""
        return self.first + self.ring.size

    def reach(self, new: int) -> int | None:
        """Return how far back a token sees, itself included; None: without limit."""
        del new
        return _reach(self.ring.size, self.first, self.positions)

    @property
    def first(self) -> int:
        """How many sinks there are: s."""
        return 0 if self.sinks is None else self.sinks.capacity

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        step: Step,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "B T N H"], Window]:
        """Attend to the sinks and to the W tokens up to each new one, however many are new.

        A window of the model's own that is shorter takes the place of W.

        Raises:
            ValueError: keys of other heads than the cache was made for.
        """
        spec = spec.within(self.ring.size)
        since = jnp.full_like(step.start, self.first)
        sinks = self._append_sinks(k, v, step)
        parts = _read_sinks(replace(self, sinks=sinks), q, step, spec)
        if q.shape[1] == 1:
            # The token that one new token overwrites is the one that leaves its window.
            ring = self.ring.append(k, v, step)
            own = ops.attention(q, ring.operand(step.stop, since), step.positions, spec)
            part = ops.merge(*parts, own)
        else:
            # Queries among the sinks see sinks alone.
            past = self.ring.operand(step.start, since)
            own = ops.attention_with_chunk(q, k, v, step.positions, spec, past, since=self.first)
            part = ops.merge(*parts, own)
            ring = self.ring.append(k, v, step, part.out)
        return part.out.astype(q.dtype), replace(self, ring=ring, sinks=sinks)

    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], step: Step) -> Window:
        """Write the new tokens to the ring, and the first ones to the sinks.

        Raises:
            ValueError: keys of other heads than the cache was made for.
        """
        return replace(
            self, ring=self.ring.append(k, v, step), sinks=self._append_sinks(k, v, step)
        )

    def _append_sinks(self, k: Array, v: Array, step: Step) -> Dense | None:
        if self.sinks is None:
            return None
        early = replace(
            step, positions=_mask_positions(step.positions < self.first, step.positions)
        )
        return self.sinks.append(k, v, early)

    def take(self, rows: Int[Array, " R"]) -> Window:
        """Return the cache of other rows."""
        sinks = None if self.sinks is None else self.sinks.take(rows)
        return replace(self, ring=self.ring.take(rows), sinks=sinks)

    def resize(self, slots: int) -> Window:
        """Return itself: a window's size does not depend on the slots."""
        del slots
        return self

    def crop(self, held: Int[Array, " B"], lengths: Int[Array, " B"]) -> Window:
        """Return itself, where no token that would be seen again has been overwritten.

        Raises:
            UnsupportedError: one has been, or, under `jit`, may have been.
        """
        # A row of sinks alone needs nothing of the ring, and the ring nothing of the sinks.
        wanted = jnp.where(lengths <= self.first, held, lengths)
        self.ring.check_crop(held - self.first, wanted - self.first)
        return self

    def concat(self, others: Sequence[Window]) -> Window:
        """Concatenate along the batch axis."""
        sinks = self.sinks
        if sinks is not None:
            sinks = sinks.concat([o.sinks for o in others if o.sinks is not None])
        return replace(self, ring=self.ring.concat([o.ring for o in others]), sinks=sinks)

    def partition_spec(self, axis: str) -> Window:
        """See `LayerCache.partition_spec`."""
        return shard_heads(self, axis)

    def to_legacy(
        self, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Return keys and values of rows of at most s + W tokens, as the model made them.

        Raises:
            UnsupportedError: a row is longer, or, under `jit`, may be.
        """
        most = self.first + self.ring.size
        if isinstance(lengths, Tracer) or (np.asarray(lengths) > most).any():
            raise UnsupportedError(
                f"a window of {plural(self.ring.size, 'token')} and "
                f"{plural(self.first, 'sink')} has let go of what "
                "lay between, or, under jit, may have; to_legacy and convert need every token"
            )
        rows = self.ring.keys.shape[0]
        at = jnp.broadcast_to(
            jnp.arange(self.first, most, dtype=jnp.int32)[None], (rows, self.ring.size)
        )
        keys, values = (jnp.swapaxes(x, 1, 2) for x in self.ring.at(at))
        if self.sinks is None:
            return keys, values
        return (
            jnp.concatenate([self.sinks.keys, keys], axis=2),
            jnp.concatenate([self.sinks.values, values], axis=2),
        )


def _reach(size: int, sinks: int, positions: Positions) -> int | None:
    """Return how far back a token sees, itself included, in the model's positions."""
    if not sinks:
        return size
    return {"cache": sinks + size, "clamped": size + 1, "text": None}[positions]


def _mask_positions(chosen: Array, positions: Array) -> Array:
    """Return the positions of the tokens chosen, all others as padding."""
    return jnp.where(chosen, positions, -1)


def _read_sinks(cache: Window, q: Array, step: Step, spec: AttentionSpec) -> list[ops.Partial]:
    """Attend to the sinks by the cache's rule of positions, in disjoint parts."""
    sinks, rope, at = cache.sinks, cache.rope, step.positions
    if sinks is None or spec.window is None:
        return []
    everything, window = dataclasses.replace(spec, window=None), spec.window

    def read(q: Array, keys: Array, positions: Array, spec: AttentionSpec) -> ops.Partial:
        kv = ops.ContiguousKV(keys, sinks.values, lengths=step.stop)
        return ops.attention(q, kv, positions, spec)

    if cache.positions == "text":
        return [read(q, sinks.keys, at, everything)]
    if rope is None:
        raise UnsupportedError(f"a window with {cache.positions=} and no rotary positions to turn")
    if cache.positions == "cache":
        # In the cache the query is at the end, as soon as it is full.
        back = jnp.maximum(at - (cache.first + window - 1), 0)
        return [read(_rotate_back(q, back, rope), sinks.keys, at, everything)]
    # A query up to `window` past a sink is as far as it is; all beyond are as far as that.
    near = read(q, sinks.keys, at, dataclasses.replace(spec, window=window + 1))
    places = jnp.broadcast_to(
        jnp.arange(cache.first, dtype=jnp.int32)[None], (q.shape[0], cache.first)
    )
    keys = jnp.swapaxes(_rotate_back(jnp.swapaxes(sinks.keys, 1, 2), places, rope), 1, 2)
    beyond = _rotate_back(q, jnp.maximum(at - window, 0), rope)
    return [near, read(beyond, keys, at - (window + 1), everything)]


def _rotate_back(x: Array, by: Array, rope: Rotary) -> Array:
    """Rotate queries or keys ``[B, T, heads, H]`` back by `by` ``[B, T]`` positions.

    In float32, so as not to round to the model's dtype twice. YaRN's magnitude is in them already.
    """
    cos, sin = angles(by, rope.frequencies())
    return rotate(x.astype(jnp.float32), cos, -sin, interleaved=rope.interleaved)


@dataclasses.dataclass(frozen=True)
class WindowKind(CacheKind):
    """See `window`."""

    size: int | None
    sinks: int
    positions: Positions
    rope: Rotary | None = None  # of the model, once bound to it

    def reach(self, new: int) -> int | None:
        """Return how far back a token sees, itself included; None: without limit."""
        del new
        return None if self.size is None else _reach(self.size, self.sinks, self.positions)

    @property
    def _turns(self) -> bool:
        return self.sinks > 0 and self.positions != "text"

    def bind(self, config: Shape, layer: int) -> CacheKind:
        """Return the kind for one layer, no longer than the layer's own window.

        Raises:
            UnsupportedError: no size for a model without windows, or positions that cannot turn.
        """
        own = window_of(config, layer)
        size = own if self.size is None else self.size if own is None else min(own, self.size)
        if self.size is None and all(window_of(config, i) is None for i in range(config.layers)):
            raise UnsupportedError(
                "window() takes the model's own windows, and this model has none; give the size: "
                "window(1024)"
            )
        rope = getattr(config, "rope", None)
        if self._turns and rope is None:
            raise UnsupportedError(
                f"window(sinks={self.sinks}, positions={brief(self.positions)}) turns the queries "
                "that look at the sinks, and this model has no rotary positions to turn: learned "
                "ones are in the keys for good, and end with the context. Use positions='text' "
                "within it, or no sinks"
            )
        if size is None:
            return dense()
        return dataclasses.replace(self, size=size, rope=rope if self._turns else None)

    def init(
        self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> Window:
        """Make an empty layer of zeros.

        Raises:
            UnsupportedError: it depends on the model, and has not been bound to one.
        """
        del slots
        if self.size is None or (self._turns and self.rope is None):
            raise UnsupportedError(
                "this window depends on the model's own windows or rotary positions; make the "
                "cache with jkv.init_cache(config, ...), or pass config= to convert"
            )
        ring = Ring.empty(batch, self.size, kv_heads, head_dim, dtype)
        if not self.sinks:
            return Window(ring=ring, sinks=None)
        sinks = dense().init(batch, self.sinks, kv_heads, head_dim, dtype)
        return Window(ring=ring, sinks=sinks, positions=self.positions, rope=self.rope)


def window(size: int | None = None, sinks: int = 0, positions: Positions = "cache") -> WindowKind:
    """Keep the last `size` tokens, and always the first `sinks`.

    Without sinks, exact for models trained with a window of at most `size`; other models forget
    what is further back. With sinks a model with rotary positions runs on past the length that it
    was trained for: attention needs somewhere to go, and goes to the first tokens.

    Args:
        size: tokens that each sees, itself included; less where a layer's own window is shorter.
            None: each layer's own window, and all tokens in layers without one, which is exact.
        sinks: first tokens that all see besides, also in layers whose own window hides them.
        positions: how far the sinks are. "cache": positions are counted within the cache, as in
            StreamingLLM (Xiao et al. 2023, arXiv:2309.17453). "clamped": `size` tokens at most, as
            in LM-Infinite (Han et al. 2023, arXiv:2308.16137). "text": as far as in the text, a
            distance that grows with the text, so that it ends with the model's context.

    Raises:
        ValueError: a size below 1, sinks below 0, or another rule.

    Example:
        >>> kind = jkv.window(128, sinks=4)
        >>> jkv.init_cache(lm.config, kind, batch=1, slots=4096).layers[0].retained
        132
    """
    size = None if size is None else check_integer("size", size, 1, of="window")
    sinks = check_integer("sinks", sinks, 0, of="window")
    if positions not in get_args(Positions):
        raise ValueError(
            f"window got positions={brief(positions)}; expected one of "
            f"{', '.join(map(repr, get_args(Positions)))}"
        )
    return WindowKind(size, sinks, positions)


_POSITIONS = one_of(cache="cache", text="text", clamped="clamped")

FORMS = {
    "window": Form(
        window,
        "the last N tokens, and the first ones if sinks say so; without N the model's own windows",
        examples=(":1024", ":1020,sinks=4"),
        arguments={"size": COUNT, "sinks": COUNT, "positions": _POSITIONS},
        bare=1,
    ),
}
