"""Caches that round what they keep: recent tokens exact, older ones in a codec's form."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jkv import ops
from jkv._axes import Array
from jkv._pytree import pytree, replace, static
from jkv._text import brief
from jkv.cache.dense import check_heads, write
from jkv.cache.protocol import CacheKind, LayerCache, Step, shard_heads
from jkv.cache.ring import Ring
from jkv.cache.shared_state import SharedState
from jkv.ops.codecs import Encoded, all_finite
from jkv.ops.masks import AttentionSpec
from jkv.ops.order import depend_on

# Tokens that can be rolled back without rounding any a second time: drafts are shorter.
SLACK = 16


@pytree
class QuantizedCache(LayerCache):
    """A layer's keys and values in two parts: the newest tokens exact, all before them encoded.

    Tokens leave the near part in whole blocks (as many as are encoded together) once `recent` newer
    ones are there, and are encoded at that moment, once: which are where follows from a row's
    length alone. New tokens see each other, and the near part, before anything is rounded.

    Example:
        >>> layer = jkv.quantized(8).init(1, slots=64, kv_heads=2, head_dim=4, dtype="float32")
        >>> layer.rounds, layer.recent, layer.keys.shape
        (True, 0, (1, 2, 64, 4))
    """

    keys: Encoded  # far, [B, K, S', H]
    values: Encoded  # far, [B, K, S', H]
    near: Ring | None  # recent + block_size + SLACK tokens; None: every token is encoded at once
    nonfinite: Array  # [B] bool, rows that were given NaN or infinity
    recent: int = static()
    slots: int = static()
    dtype: str = static()

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.slots

    @property
    def block_size(self) -> int:
        """Tokens that leave the near part together."""
        return max(self.keys.block_size, self.values.block_size)

    def far(self, count: Int[Array, " B"]) -> Int[Array, " B"]:
        """Return how many of a row's `count` tokens are in the far part."""
        return jnp.maximum(count - self.recent, 0) // self.block_size * self.block_size

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        step: Step,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "B T N H"], QuantizedCache]:
        """Attend to both parts, and to the new tokens before they are rounded.

        Raises:
            ValueError: keys of other heads than the cache was made for.
        """
        at, since = step.positions, self.far(step.start)
        if q.shape[1] == 1:
            # One token overwrites nothing that it sees: written first, nothing is ever copied.
            stored = self.append(k, v, step)
            if stored.near is None:
                part = ops.attention_with_chunk(q, k, v, at, spec, stored._far(step.start))
            else:
                # What this token pushes out of the near part is still there, and still exact.
                near = stored.near.operand(step.stop, since)
                part = ops.attention(q, [stored._far(since), near], at, spec)
            return part.out.astype(q.dtype), stored
        past = [self._far(since)]
        if self.near is not None:
            past.append(self.near.operand(step.start, since))
        out = ops.attention_with_chunk(q, k, v, at, spec, past).out
        return out.astype(q.dtype), self._append(k, v, step, out)

    def append(
        self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], step: Step
    ) -> QuantizedCache:
        """Append new tokens to the near part, and what they push out of it to the far one.

        Raises:
            ValueError: keys of other heads than the cache was made for.
        """
        return self._append(k, v, step, None)

    def _append(self, k: Array, v: Array, step: Step, result: Array | None) -> QuantizedCache:
        check_heads(self.keys.shape, k)
        first, block = self.far(step.start), self.block_size
        count = 1 if k.shape[1] == 1 else (k.shape[1] + block - 1) // block
        numbers = first[:, None] // block + jnp.arange(count, dtype=jnp.int32)[None, :]
        numbers = jnp.where(numbers < self.far(step.stop)[:, None] // block, numbers, -1)
        if result is not None:
            numbers = depend_on(numbers, result)
        near = None if self.near is None else self.near.append(k, v, step, result)
        # One new token at a time leaves the ring long after it came; of a chunk, part may leave
        # without ever having been in it.
        source = near if k.shape[1] == 1 else self.near
        old_k, old_v = _tokens_at(
            source, k, v, step, first[:, None] + jnp.arange(count * block, dtype=jnp.int32)[None]
        )
        real = (step.positions >= 0)[:, :, None, None]
        return replace(
            self,
            keys=_write_blocks(self.keys, old_k, numbers, block),
            values=_write_blocks(self.values, old_v, numbers, block),
            near=near,
            nonfinite=self.nonfinite | ~(all_finite(k, real) & all_finite(v, real)),
        )

    def _far(self, count: Int[Array, " B"]) -> ops.ContiguousKV:
        """Return the first `count` tokens, all in the far part, for attention."""
        return ops.ContiguousKV(self.keys, self.values, lengths=count)

    def take(self, rows: Int[Array, " R"]) -> QuantizedCache:
        """Return the cache of other rows."""
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def resize(self, slots: int) -> QuantizedCache:
        """Return the same tokens with room for more, or for fewer that still hold them."""
        far = far_slots(slots, self.recent, self.block_size)
        return replace(
            self, keys=self.keys.resize(far), values=self.values.resize(far), slots=slots
        )

    def crop(self, held: Int[Array, " B"], lengths: Int[Array, " B"]) -> QuantizedCache:
        """Move the near part back, over tokens that it still holds, then over rounded ones.

        Rolled back by more than `SLACK` tokens, fewer than a block of the tokens that are left will
        be rounded a second time.
        """
        if self.near is None:
            return self
        near = _roll_back(self.near, self.keys, self.values, held, lengths)
        return replace(self, near=near)

    @property
    def rounds(self) -> bool:
        """Whether it stores codes: it does."""
        return True

    def invalid_rows(self, shared: tuple[SharedState, ...]) -> Bool[Array, " B"]:
        """Return the rows that were given NaN or infinity."""
        del shared
        return self.nonfinite

    def partition_spec(self, axis: str) -> QuantizedCache:
        """See `LayerCache.partition_spec`."""
        return shard_heads(self, axis, whole=("nonfinite",))

    def requantise(self, to: CacheKind, lengths: Int[Array, " B"]) -> QuantizedCache:
        """Convert to another kind that rounds: exact tokens as they are, others rounded anew.

        Raises:
            TypeError: no kind that rounds.
        """
        from jkv.cache.quantized import QuantizedKind  # which makes these layers

        if not isinstance(to, QuantizedKind):
            raise TypeError(
                f"requantise got {brief(to)}; expected a kind that rounds, such as "
                "jkv.quantized(bits=4)"
            )
        keys, values = (jnp.swapaxes(x, 1, 2) for x in self.to_legacy(lengths))
        batch, _, heads, dim = keys.shape
        made = to.init(batch, self.slots, heads, dim, self.dtype)
        step = Step.after(jnp.zeros_like(lengths), lengths, keys.shape[1])
        return replace(made.append(keys, values, step), nonfinite=self.nonfinite)

    def concat(self, others: Sequence[QuantizedCache]) -> QuantizedCache:
        """Concatenate along the batch axis."""
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), self, *others)

    def to_legacy(
        self, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Return keys and values: the far part decoded, the near part exact."""
        far = self.far(lengths)

        def whole(rounded: Encoded, exact: Array | None) -> Array:
            decoded = rounded.decode().astype(self.dtype)[:, :, : self.slots]
            room = ((0, 0), (0, 0), (0, self.slots - decoded.shape[2]), (0, 0))
            decoded = jnp.pad(decoded, room)
            if self.near is None or exact is None:
                return decoded
            held = self.near.slot_positions(lengths)
            held = jnp.where(held >= far[:, None], held, -1)
            return write(decoded, jnp.swapaxes(exact, 1, 2), held)

        near = self.near
        return (
            whole(self.keys, None if near is None else near.keys),
            whole(self.values, None if near is None else near.values),
        )


def far_slots(slots: int, recent: int, block: int) -> int:
    """Return the slots of the far part for `slots` tokens: whole blocks, at least one."""
    return max((slots - recent) // block * block, block)


def _tokens_at(
    near: Ring | None, k: Array, v: Array, step: Step, positions: Int[Array, "B R"]
) -> tuple[Array, Array]:
    """Return keys and values ``[B, R, K, H]`` at positions in the ring or among the new tokens.

    What lies at positions that no token has yet is anything.
    """
    if k.shape[1] == 1 and near is not None:
        return near.at(positions)
    at = jnp.clip(positions - step.start[:, None], 0, k.shape[1] - 1)[..., None, None]
    new_k, new_v = (jnp.take_along_axis(x, at, axis=1) for x in (k, v))
    if near is None:
        return new_k, new_v
    old_k, old_v = near.at(positions)
    new = (positions >= step.start[:, None])[..., None, None]
    return jnp.where(new, new_k, old_k), jnp.where(new, new_v, old_v)


def _write_blocks(far: Encoded, tokens: Array, numbers: Array, block: int) -> Encoded:
    """Write blocks of tokens to the far part, whose own blocks may be fractions of these."""
    return far.write_blocks(tokens, numbers, block // far.block_size)


@jax.jit  # people roll back between turns, outside of any program: one, not one per operation
def _roll_back(near: Ring, keys: Encoded, values: Encoded, held: Array, lengths: Array) -> Ring:
    """Return the near part of the first `lengths` tokens; tokens that had left it are decoded."""
    size, block = near.size, max(keys.block_size, values.block_size)
    wanted = near.slot_positions(lengths)
    there = (wanted >= (held - size)[:, None])[:, None, :, None]
    first = jnp.maximum(lengths - size, 0) // block * block
    span = (-(-size // block) + 1) * block  # that many slots hold what is wanted

    def refilled(exact: Array, rounded: Encoded) -> Array:
        part = _slots(rounded, first, min(span, rounded.shape[2])).decode()
        return jnp.where(there, exact, _reorder(part, wanted - first[:, None], exact.dtype))

    return Ring(keys=refilled(near.keys, keys), values=refilled(near.values, values))


def _slots(encoded: Encoded, first: Int[Array, " B"], size: int) -> Encoded:
    """Return slots first[b] to first[b] + size of each row, both whole blocks."""
    slots = encoded.shape[2]

    def cut(leaf: Array, axis: int) -> Array:
        per = slots // leaf.shape[axis]
        at = jnp.minimum(
            first[:, None] // per + jnp.arange(size // per, dtype=jnp.int32)[None],
            leaf.shape[axis] - 1,
        )
        spread = [1] * leaf.ndim
        spread[0], spread[axis] = at.shape
        return jnp.take_along_axis(leaf, at.reshape(spread), axis=axis)

    return encoded.map_slots(cut)


def _reorder(tokens: Array, at: Array, dtype: DTypeLike) -> Array:
    """Reorder tokens ``[B, K, R, H]`` by `at` ``[B, W]``; anything where it is outside."""
    at = jnp.clip(at, 0, tokens.shape[2] - 1)[:, None, :, None]
    return jnp.take_along_axis(tokens, at, axis=2).astype(dtype)
