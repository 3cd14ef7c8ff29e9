"""The dense cache: every token in the model's dtype, one slot per position."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Int

from jkv import ops
from jkv._axes import Array
from jkv._checks import check_flag
from jkv._pytree import pytree, replace, static
from jkv._text import brief
from jkv._transfer import transfers
from jkv.cache.base import Cache
from jkv.cache.form import Form, one_of
from jkv.cache.protocol import CacheKind, LayerCache, Step, check_heads, shard_heads
from jkv.ops.masks import AttentionSpec
from jkv.ops.write import write


@pytree
class Dense(LayerCache):
    """A layer's keys and values, slot s holding the token at position s.

    Example:
        >>> layer = jkv.dense().init(batch=1, slots=8, kv_heads=2, head_dim=4, dtype="float32")
        >>> layer.keys.shape, layer.capacity
        ((1, 2, 8, 4), 8)
    """

    keys: Array  # [B, K, S, H]
    values: Array  # [B, K, S, H]
    grows: bool = static(default=False)  # a loop gives it slots as it goes

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.keys.shape[2]

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        step: Step,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "B T N H"], Dense]:
        """Write the new tokens, then attend to all that each may see.

        Raises:
            ValueError: keys of other heads than the cache was made for.
        """
        cache = self.append(k, v, step)
        keys, values = cache.keys, cache.values
        part = ops.attention_with_chunk(
            q,
            k.astype(keys.dtype),
            v.astype(values.dtype),
            step.positions,
            spec,
            ops.ContiguousKV(keys, values, lengths=step.start),
            written=ops.ContiguousKV(keys, values, lengths=step.stop),
        )
        return part.out.astype(q.dtype), cache

    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], step: Step) -> Dense:
        """Write each new token to the slot of its position.

        Raises:
            ValueError: keys of other heads than the cache was made for.
        """
        check_heads(self.keys.shape, k)
        keys, values = write(self.keys, k, step.positions), write(self.values, v, step.positions)
        return replace(self, keys=keys, values=values)

    def take(self, rows: Int[Array, " R"]) -> Dense:
        """Return the cache of other rows."""
        return replace(self, keys=self.keys[rows], values=self.values[rows])

    def resize(self, slots: int) -> Dense:
        """Return the same tokens in a longer buffer, or in a shorter one that still holds them."""
        change = slots - self.capacity
        if change <= 0:
            return replace(self, keys=self.keys[:, :, :slots], values=self.values[:, :, :slots])
        pad = ((0, 0), (0, 0), (0, change), (0, 0))
        return replace(self, keys=jnp.pad(self.keys, pad), values=jnp.pad(self.values, pad))

    def crop(self, held: Int[Array, " B"], lengths: Int[Array, " B"]) -> Dense:
        """Return itself: what lies past a row's length is never seen, and overwritten later."""
        del held, lengths
        return self

    def concat(self, others: Sequence[Dense]) -> Dense:
        """Concatenate along the batch axis."""
        return replace(
            self,
            keys=jnp.concatenate([self.keys, *(o.keys for o in others)]),
            values=jnp.concatenate([self.values, *(o.values for o in others)]),
        )

    def partition_spec(self, axis: str) -> Dense:
        """See `LayerCache.partition_spec`."""
        return shard_heads(self, axis)

    def to_legacy(
        self, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Return keys and values as they are."""
        del lengths
        return self.keys, self.values


@dataclasses.dataclass(frozen=True)
class DenseKind(CacheKind):
    """See `dense`.

    Example:
        >>> jkv.dense().init(batch=1, slots=8, kv_heads=2, head_dim=4, dtype="float32").capacity
        8
    """

    grows: bool = False

    def init(self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> Dense:
        """Make an empty layer of zeros."""
        shape = (batch, kv_heads, slots, head_dim)
        keys, values = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        return Dense(keys=keys, values=values, grows=self.grows)


def dense(grow: bool = False) -> DenseKind:
    """Keep every token, in the model's dtype.

    Exact: the tokens are those of a model without a cache.

    Args:
        grow: begin with little and double the buffer whenever it is full, between two blocks of
            `generate`, `stream` or `Chat`: a conversation then needs no maximum in advance, and
            one of n tokens at most log2(n) sizes. In a loop of your own, `Cache.resize` grows it.

    Raises:
        TypeError: `grow` is no bool.

    Example:
        >>> jkv.init_cache(lm.config, jkv.dense(), batch=2, slots=64).capacity
        64
        >>> jkv.init_cache(lm.config, jkv.dense(grow=True), batch=2, slots=64).grows
        True
    """
    return DenseKind(check_flag("grow", grow, of="dense"))


@transfers
def from_legacy(
    layers: Sequence[Sequence[ArrayLike]],
    lengths: Sequence[int] | np.ndarray | Array | None = None,
) -> Cache:
    """Make a dense cache of (keys, values) per layer, each ``[B, K, S, H]``.

    Args:
        layers: one pair per layer, all with the same B and S.
        lengths: tokens in each row, a list or integer array ``[B]``; S by default. Traced ones are
            not known, and bounded to 0..S.

    Raises:
        ValueError: no layers, arrays whose shapes differ or whose dtype holds no fractions, or
            lengths that are no integers or outside 0..S.

    Example:
        >>> keys = np.zeros((2, 2, 3, 64), np.float32)  # [B, K, S, H]
        >>> cache = jkv.from_legacy([(keys, keys)] * 5, lengths=[3, 1])
        >>> cache.lengths.tolist(), cache.to_legacy()[0][0].shape
        ([3, 1], (2, 2, 3, 64))
    """
    pairs = list(layers) if isinstance(layers, Sequence) else []
    if not pairs:
        got = "no layers" if isinstance(layers, Sequence) else brief(layers)
        raise ValueError(f"from_legacy got {got}; expected one (keys, values) pair per layer")
    made = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(
                f"from_legacy got {brief(pair)} as layer {i}; expected a pair, its keys and values"
            )
        keys, values = pair
        if np.ndim(keys) != 4 or np.shape(keys) != np.shape(values):
            raise ValueError(
                f"from_legacy got layer {i} with keys {np.shape(keys)} and values "
                f"{np.shape(values)}; expected two arrays [B, K, S, H] of one shape"
            )
        layer = Dense(keys=jnp.array(keys), values=jnp.array(values))
        if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (layer.keys, layer.values)):
            raise ValueError(
                f"from_legacy got layer {i} with keys of {layer.keys.dtype} and values of "
                f"{layer.values.dtype}; expected floating ones"
            )
        made.append(layer)
    rows_and_slots = {(d.keys.shape[0], d.keys.shape[2]) for d in made}
    if len(rows_and_slots) > 1:
        raise ValueError(f"from_legacy got layers of different (B, S): {sorted(rows_and_slots)}")
    batch, slots = rows_and_slots.pop()
    filled = np.full((batch,), slots) if lengths is None else lengths
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(filled)):
        filled = jnp.asarray(filled)  # a list may hold traced numbers
    else:
        filled = np.asarray(filled)
    whole = jnp.issubdtype(filled.dtype, jnp.integer) and filled.shape == (batch,)
    known = not isinstance(filled, Tracer)
    if not whole or (known and (np.any(filled < 0) or np.any(filled > slots))):
        got = filled.tolist() if known else f"{filled.dtype}{list(filled.shape)}"
        raise ValueError(
            f"from_legacy got lengths {got}; expected {batch} integers from 0 to {slots}, the "
            "slots there are"
        )
    return Cache(
        layers=tuple(made),
        lengths=jnp.clip(jnp.asarray(filled, jnp.int32), 0, slots),
        overflowed=jnp.zeros((batch,), bool),
    )


FORMS = {
    "dense": Form(
        dense,
        "every token as the model makes it; with grow, in a buffer that doubles when it is full",
        arguments={"grow": one_of(grow=True)},
        bare=1,
    ),
}


__all__ = ["Dense", "DenseKind", "check_heads", "dense", "from_legacy", "write"]
