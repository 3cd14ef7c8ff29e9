"""The newest tokens in a ring of slots: what windows and exact residuals are made of."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jkv import ops
from jkv._axes import Array
from jkv._pytree import pytree
from jkv.cache.protocol import Step, check_heads
from jkv.errors import UnsupportedError
from jkv.ops.order import depend_on
from jkv.ops.write import write


@pytree
class Ring:
    """The last W tokens of each row: position p in slot p mod W. Part of a layer cache."""

    keys: Array  # [B, K, W, H]
    values: Array  # [B, K, W, H]

    @classmethod
    def empty(cls, batch: int, size: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> Ring:
        """Make a ring of `size` slots of zeros."""
        shape = (batch, kv_heads, size, head_dim)
        return cls(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))

    @property
    def size(self) -> int:
        """W."""
        return self.keys.shape[2]

    def slot_positions(self, count: Int[Array, " B"]) -> Int[Array, "B W"]:
        """Return the position in each slot after `count` tokens, -1 where it is empty."""
        last = count[:, None] - 1
        positions = last - (last - jnp.arange(self.size, dtype=jnp.int32)[None, :]) % self.size
        return jnp.maximum(positions, -1)

    def operand(
        self, count: Int[Array, " B"], since: Int[Array, " B"] | None = None
    ) -> ops.ContiguousKV:
        """Return what the ring holds after `count` tokens, from position `since` on."""
        held = self.slot_positions(count)
        if since is not None:
            held = jnp.where(held >= since[:, None], held, -1)
        return ops.ContiguousKV(self.keys, self.values, slot_positions=held)

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        step: Step,
        result: Float[Array, "..."] | None = None,
    ) -> Ring:
        """Write the newest of the new tokens, once `result` is known.

        Raises:
            ValueError: keys of other heads than the ring was made for.
        """
        check_heads(self.keys.shape, k)
        kept = step.positions >= jnp.maximum(step.stop[:, None] - self.size, 0)
        slots = jnp.where(kept, step.positions % self.size, -1)
        if result is not None:
            slots = depend_on(slots, result)
        return Ring(keys=write(self.keys, k, slots), values=write(self.values, v, slots))

    def at(
        self, positions: Int[Array, "B R"]
    ) -> tuple[Float[Array, "B R K H"], Float[Array, "B R K H"]]:
        """Return keys and values of tokens that it holds; anything for others."""
        rows = jnp.arange(self.keys.shape[0], dtype=jnp.int32)[:, None]
        slots = positions % self.size
        return self.keys[rows, :, slots], self.values[rows, :, slots]

    def take(self, rows: Int[Array, " R"]) -> Ring:
        """Return the ring of other rows."""
        return Ring(keys=self.keys[rows], values=self.values[rows])

    def concat(self, others: Sequence[Ring]) -> Ring:
        """Concatenate along the batch axis."""
        return Ring(
            keys=jnp.concatenate([self.keys, *(o.keys for o in others)]),
            values=jnp.concatenate([self.values, *(o.values for o in others)]),
        )

    def check_crop(self, held: Int[Array, " B"], lengths: Int[Array, " B"]) -> None:
        """Refuse to roll back to tokens that have been overwritten, or may have been.

        Raises:
            UnsupportedError: a row was longer than the ring, or, under `jit`, may have been.
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
