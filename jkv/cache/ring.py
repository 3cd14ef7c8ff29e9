"""The newest tokens in a ring of slots: what windows and exact residuals are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Float, Int

from jkv import ops
from jkv._axes import Array
from jkv._pytree import pytree
from jkv.cache.protocol import Step, check_heads
from jkv.errors import UnsupportedError
from jkv.ops.order import after
from jkv.ops.write import write


@pytree
class Ring:
    """The last W tokens of each row: position p in slot p mod W. Part of a layer cache."""

    keys: Array  # [B, K, W, H]
    values: Array  # [B, K, W, H]

    @classmethod
    def empty(cls, batch: int, size: int, kv_heads: int, head_dim: int, dtype: Any) -> Ring:
        """A ring of `size` slots: zeros."""
        shape = (batch, kv_heads, size, head_dim)
        return cls(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))

    @property
    def size(self) -> int:
        """W."""
        return self.keys.shape[2]

    def held(self, count: Int[Array, " B"]) -> Int[Array, "B W"]:
        """Positions in the slots after `count` tokens, -1 where a slot is empty."""
        last = count[:, None] - 1
        positions = last - (last - jnp.arange(self.size, dtype=jnp.int32)[None, :]) % self.size
        return jnp.maximum(positions, -1)

    def read(
        self,
        q: Float[Array, "B T N H"],
        step: Step,
        count: Int[Array, " B"],
        since: Int[Array, " B"] | None = None,
        **options: Any,
    ) -> ops.Partial:
        """Attention over what the ring holds after `count` tokens, from position `since` on."""
        held = self.held(count)
        if since is not None:
            held = jnp.where(held >= since[:, None], held, -1)
        return ops.attention(
            q, self.keys, self.values, positions=step.positions, slot_positions=held, **options
        )

    def put(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        step: Step,
        result: Float[Array, "..."] | None = None,
    ) -> Ring:
        """The ring with the newest of the new tokens, written once `result` is known.

        Raises:
            ValueError: keys of other heads than the ring was made for.
        """
        check_heads(self.keys, k)
        kept = step.positions >= jnp.maximum(step.stop[:, None] - self.size, 0)
        slots = jnp.where(kept, step.positions % self.size, -1)
        if result is not None:
            slots = after(slots, result)
        return Ring(keys=write(self.keys, k, slots), values=write(self.values, v, slots))

    def at(
        self, positions: Int[Array, "B R"]
    ) -> tuple[Float[Array, "B R K H"], Float[Array, "B R K H"]]:
        """Keys and values of tokens that it holds; whatever lies there for others."""
        rows = jnp.arange(self.keys.shape[0], dtype=jnp.int32)[:, None]
        slots = positions % self.size
        return self.keys[rows, :, slots], self.values[rows, :, slots]

    def take(self, rows: Int[Array, " R"]) -> Ring:
        """The ring with other rows."""
        return Ring(keys=self.keys[rows], values=self.values[rows])

    def concat(self, others: Sequence[Ring]) -> Ring:
        """The rows of all."""
        return Ring(
            keys=jnp.concatenate([self.keys, *(o.keys for o in others)]),
            values=jnp.concatenate([self.values, *(o.values for o in others)]),
        )

    def check_crop(self, held: Int[Array, " B"], lengths: Int[Array, " B"]) -> None:
        """Refuse to roll back to tokens that have been overwritten, or may have been.

        Raises:
            UnsupportedError: a row was longer than the ring, or nobody knows.
        """
        if isinstance(held, Tracer) or isinstance(lengths, Tracer):
            raise UnsupportedError(
                "crop under jit: whether a window of the last tokens still holds what it would "
                "need is only known outside of it"
            )
        gone = (np.asarray(held) > self.size) & (np.asarray(lengths) < np.asarray(held))
        if gone.any():
            raise UnsupportedError(
                f"crop: rows {np.flatnonzero(gone).tolist()} have held more than the {self.size} "
                "tokens of the window, so the ones before the last have been overwritten; keep the "
                "cache from before, it is still a value"
            )


def chunk(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    step: Step,
    since: int = 0,
    **options: Any,
) -> ops.Partial:
    """Attention of the new tokens among themselves, from position `since` on."""
    if since and apart(q, k, v, step, **options):
        return _from(since, q, k, v, step, options)
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if not since:
        return ops.attention(q, keys, values, positions=step.positions, chunk=True, **options)
    positions = jnp.where(step.positions >= since, step.positions, -1)
    return ops.attention(q, keys, values, positions=positions, slot_positions=positions, **options)


def _from(since: int, q: Array, k: Array, v: Array, step: Step, options: Any) -> ops.Partial:
    """The part of `chunk` from that position on, brought to the front of each row and back."""
    new = q.shape[1]
    skipped = jnp.clip(since - step.start, 0, new)
    counts = jnp.maximum(step.stop - step.start - skipped, 0)
    offsets = jnp.arange(new, dtype=jnp.int32)[None]

    def moved(x: Array, by: Array) -> Array:
        at = (offsets + by[:, None]) % new
        return jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), axis=1)

    later = Step.after(step.start + skipped, counts, new)
    q, k, v = (moved(x, skipped) for x in (q, k, v))
    part = chunk(q, k, v, later, **options)
    return jax.tree.map(lambda x: moved(x, -skipped), part)


def apart(q: Array, k: Array, v: Array, step: Step, **options: Any) -> bool:
    """Whether there is something for a chunk among itself that cannot do it with what is before."""
    batch, new, heads, dim = k.shape
    shapes = [jax.ShapeDtypeStruct((batch, heads, new, dim), x.dtype) for x in (k, v)]
    chosen = ops.explain(q, *shapes, positions=step.positions, chunk=True, **options)
    return chosen.name == "cudnn"


def with_past(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    step: Step,
    past: Callable[[], ops.Partial],
    since: int = 0,
    **options: Any,
) -> ops.Partial:
    """`chunk` merged with what `past` finds among the tokens before it."""
    own = chunk(q, k, v, step, since, **options)
    if not apart(q, k, v, step, **options):
        return ops.merge(past(), own)
    # Before most prefills there is nothing, and not even a ring is to be walked. Only here, since
    # on a TPU a branch takes copies of encoded buffers.
    return lax.cond(jnp.any(step.start > 0), lambda: ops.merge(past(), own), lambda: own)
