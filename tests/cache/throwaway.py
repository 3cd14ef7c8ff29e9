"""Two caches that prove the protocol: a ring, and int8 with a residual in full precision.

Written against `LayerCache`, `ops.attention` and `merge` alone, to be thrown away when the
library has kinds like them. What they show: a cache can read before it writes, hold its tokens in
any slot order, in two storage forms at once, and never be written out in full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jkv import ops
from jkv._pytree import pytree, replace, static
from jkv.cache.dense import write
from jkv.cache.protocol import Step
from jkv.errors import UnsupportedError
from jkv.ops.order import after

BLOCK = 128


def held_positions(count: jax.Array, size: int) -> jax.Array:
    """Positions [B, size] in the slots of a ring after `count` [B] tokens, -1 where empty."""
    last = count[:, None] - 1
    positions = last - (last - jnp.arange(size)[None, :]) % size
    return jnp.maximum(positions, -1)


def heads_first(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)


@pytree
class Ring:
    """The last W tokens: position p in slot p mod W."""

    keys: jax.Array  # [B, K, W, H]
    values: jax.Array  # [B, K, W, H]
    read_first: bool = static(default=False)  # also where writing first would do

    @property
    def capacity(self) -> None:
        """Never full."""
        return None

    @property
    def size(self) -> int:
        return self.keys.shape[2]

    def read(self, q, step: Step, count, **options: Any) -> ops.Partial:
        """Attention over what the ring holds after `count` tokens."""
        held = held_positions(count, self.size)
        return ops.attention(
            q, self.keys, self.values, positions=step.positions, slot_positions=held, **options
        )

    def put(self, k, v, step: Step, result=None) -> Ring:
        """The ring with the newest of the new tokens, written after `result` is known."""
        kept = step.positions >= jnp.maximum(step.stop[:, None] - self.size, 0)
        slots = jnp.where(kept, step.positions % self.size, -1)
        if result is not None:
            slots = after(slots, result)
        return replace(self, keys=write(self.keys, k, slots), values=write(self.values, v, slots))

    def attend(self, q, k, v, step: Step, *, scale, window=None, softcap=None):
        window = self.size if window is None else min(window, self.size)
        options = {"scale": scale, "window": window, "softcap": softcap}
        if q.shape[1] == 1 and not self.read_first:
            # The token that one new token overwrites is the one that leaves its window.
            ring = self.put(k, v, step)
            return ring.read(q, step, step.stop, **options).out.astype(q.dtype), ring
        old = self.read(q, step, step.start, **options)
        part = ops.merge(old, chunk(q, k, v, step, **options))
        return part.out.astype(q.dtype), self.put(k, v, step, part.out)

    def take(self, rows) -> Ring:
        return replace(self, keys=self.keys[rows], values=self.values[rows])

    def resize(self, slots: int) -> Ring:
        """A ring is as long as its window, whatever there is room for elsewhere."""
        del slots
        return self

    def crop(self, held, lengths) -> Ring:
        if isinstance(held, jax.core.Tracer) or isinstance(lengths, jax.core.Tracer):
            raise UnsupportedError("under jit nobody knows whether a ring still holds the tokens")
        gone = (np.asarray(held) > self.size) & (np.asarray(lengths) < np.asarray(held))
        if gone.any():
            raise UnsupportedError(
                f"rows {np.flatnonzero(gone).tolist()} were longer than the window of {self.size}: "
                "the tokens before the last ones have been overwritten"
            )
        return self

    def concat(self, others: Sequence[Ring]) -> Ring:
        return replace(
            self,
            keys=jnp.concatenate([self.keys, *(o.keys for o in others)]),
            values=jnp.concatenate([self.values, *(o.values for o in others)]),
        )

    def to_legacy(self, lengths):
        if isinstance(lengths, jax.core.Tracer) or (np.asarray(lengths) > self.size).any():
            raise UnsupportedError("a ring has overwritten tokens, or may have")
        return self.keys, self.values


def chunk(q, k, v, step: Step, **options: Any) -> ops.Partial:
    """Attention of the new tokens among themselves."""
    return ops.attention(
        q,
        heads_first(k),
        heads_first(v),
        positions=step.positions,
        slot_positions=step.positions,
        **options,
    )


@dataclasses.dataclass(frozen=True)
class RingKind:
    window: int
    read_first: bool = False

    def init(self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any) -> Ring:
        del slots
        empty = jnp.zeros((batch, kv_heads, self.window, head_dim), dtype)
        return Ring(keys=empty, values=jnp.zeros_like(empty), read_first=self.read_first)


@pytree
class Int8:
    """Tokens in int8 with a scale each."""

    codes: jax.Array  # [B, K, S, H] int8
    scales: jax.Array  # [B, K, S] float32

    @classmethod
    def empty(cls, batch: int, heads: int, slots: int, dim: int) -> Int8:
        return cls(
            codes=jnp.zeros((batch, heads, slots, dim), jnp.int8),
            scales=jnp.zeros((batch, heads, slots), jnp.float32),
        )

    def put(self, new, slots) -> Int8:
        wide = new.astype(jnp.float32)
        scales = jnp.max(jnp.abs(wide), axis=-1) / 127
        # A row of zeros has scale 0, and 0 / 0 is no number.
        codes = jnp.round(wide / jnp.where(scales == 0, 1.0, scales)[..., None])
        return Int8(
            codes=write(self.codes, codes.astype(jnp.int8), slots),
            scales=write(self.scales, scales, slots),
        )

    def block(self, start, size: int) -> jax.Array:
        """Slots from `start` on, [B, K, size, H] float32."""
        batch, heads, slots, dim = self.codes.shape
        codes = self.codes.reshape(-1, slots, dim)
        scales = self.scales.reshape(-1, slots)
        codes = lax.dynamic_slice_in_dim(codes, start, size, 1).astype(jnp.float32)
        scales = lax.dynamic_slice_in_dim(scales, start, size, 1)
        return (codes * scales[..., None]).reshape(batch, heads, size, dim)

    def at(self, positions) -> jax.Array:
        """The tokens at positions [B, R], as [B, K, R, H] float32; anything at -1."""
        at = jnp.maximum(positions, 0)[:, None]
        codes = jnp.take_along_axis(self.codes, at[..., None], axis=2).astype(jnp.float32)
        return codes * jnp.take_along_axis(self.scales, at, axis=2)[..., None]


@pytree
class Rounded:
    """Every token in int8, the newest R in full precision as well."""

    keys: Int8
    values: Int8
    near: Ring

    @property
    def capacity(self) -> int:
        return self.keys.codes.shape[2]

    def attend(self, q, k, v, step: Step, *, scale, window=None, softcap=None):
        options = {"scale": scale, "window": window, "softcap": softcap}
        if q.shape[1] == 1 and not self.near.read_first:
            stored = self.put(k, v, step, step.positions)
            far = stored.read_far(q, step, step.stop - self.near.size, **options)
            part = ops.merge(far, stored.near.read(q, step, step.stop, **options))
            return part.out.astype(q.dtype), stored
        # The chunk sees itself before it is rounded, and the residual as it was.
        part = ops.merge(
            self.read_far(q, step, step.start - self.near.size, **options),
            self.near.read(q, step, step.start, **options),
            chunk(q, k, v, step, **options),
        )
        slots = after(step.positions, part.out)
        return part.out.astype(q.dtype), self.put(k, v, step, slots, part.out)

    def put(self, k, v, step: Step, slots=None, result=None) -> Rounded:
        slots = step.positions if slots is None else slots
        return Rounded(
            keys=self.keys.put(k, slots),
            values=self.values.put(v, slots),
            near=self.near.put(k, v, step, result),
        )

    def read_far(self, q, step: Step, count, **options: Any) -> ops.Partial:
        """Attention over the first `count` tokens, dequantised a block at a time."""
        size = min(BLOCK, self.capacity)

        def block(i, part):
            start = jnp.minimum(i * size, self.capacity - size)
            numbers = start + jnp.arange(size)[None, :]
            fresh = (numbers >= i * size) & (numbers < count[:, None])
            found = ops.attention(
                q,
                self.keys.block(start, size),
                self.values.block(start, size),
                positions=step.positions,
                slot_positions=jnp.where(fresh, numbers, -1),
                **options,
            )
            return ops.merge(part, found)

        nothing = ops.Partial(
            out=jnp.zeros(q.shape, jnp.float32), lse=jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
        )
        blocks = -(-jnp.maximum(jnp.max(count), 0) // size)
        return lax.fori_loop(0, blocks, block, nothing)

    def take(self, rows) -> Rounded:
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def resize(self, slots: int) -> Rounded:
        def resized(leaf):
            change = max(slots - self.capacity, 0)
            pad = [(0, 0), (0, 0), (0, change)] + [(0, 0)] * (leaf.ndim - 3)
            return jnp.pad(leaf[:, :, :slots], pad)

        keys, values = jax.tree.map(resized, (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def crop(self, held, lengths) -> Rounded:
        """The residual moves back over tokens of which only the rounded form is left."""
        size = self.near.size
        wanted = held_positions(lengths, size)
        there = (wanted >= (held - size)[:, None])[:, None, :, None]

        def refilled(exact, rounded):
            return jnp.where(there, exact, rounded.at(wanted).astype(exact.dtype))

        near = replace(
            self.near,
            keys=refilled(self.near.keys, self.keys),
            values=refilled(self.near.values, self.values),
        )
        return replace(self, near=near)

    def concat(self, others: Sequence[Rounded]) -> Rounded:
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), self, *others)

    def to_legacy(self, lengths):
        held = held_positions(lengths, self.near.size)

        def whole(rounded, exact):
            far = rounded.block(0, self.capacity).astype(exact.dtype)
            return write(far, heads_first(exact), held)

        return whole(self.keys, self.near.keys), whole(self.values, self.near.values)


@dataclasses.dataclass(frozen=True)
class RoundedKind:
    residual: int
    read_first: bool = False

    def init(self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any) -> Rounded:
        near = RingKind(self.residual, self.read_first)
        return Rounded(
            keys=Int8.empty(batch, kv_heads, slots, head_dim),
            values=Int8.empty(batch, kv_heads, slots, head_dim),
            near=near.init(batch, slots, kv_heads, head_dim, dtype),
        )


def ring(window: int, *, read_first: bool = False) -> RingKind:
    """The last `window` tokens."""
    return RingKind(window, read_first)


def int8(residual: int, *, read_first: bool = False) -> RoundedKind:
    """All tokens in int8, the newest `residual` exact."""
    return RoundedKind(residual, read_first)
