"""What an encoded array is, and what all forms share."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int, UInt16

from jkv._axes import Array

E = TypeVar("E", bound="Stored")

# Products of float32 in float32, as in `jkv.ops.attention.xla`.
PRODUCT: dict[str, Any] = {
    "preferred_element_type": jnp.float32,
    "precision": lax.Precision.HIGHEST,
}


@runtime_checkable
class Codec(Protocol):
    """How one stream of tokens (keys or values) is stored: a small frozen value."""

    @property
    def unit(self) -> int:
        """Consecutive tokens that are encoded together."""
        ...

    def empty(self, batch: int, heads: int, slots: int, dim: int, dtype: Any) -> Encoded:
        """Nothing yet, with room for `slots` tokens, whole units.

        Raises:
            ValueError: slots that are no whole units.
        """
        ...


@runtime_checkable
class Encoded(Protocol):
    """Tokens ``[B, K, S, H]`` in a codec's form: a frozen pytree.

    Leaves begin with ``[B, K]``, or with ``[Z]`` for both once merged; one axis of each is S, or
    S / unit.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once merged."""
        ...

    @property
    def unit(self) -> int:
        """Consecutive tokens that are encoded together."""
        ...

    def put(self, new: Float[Array, "B R K H"], at: Int[Array, "B U"], run: int = 1) -> Encoded:
        """With unit u of the new tokens as unit ``at[b, u]``; dropped where there is none.

        `run` units that follow each other count as one.
        """
        ...

    def merged(self) -> Encoded:
        """Rows and heads as one axis, ``Z = B * K``."""
        ...

    def scores(self, q: Float[Array, "Z R H"], start: Any, size: int) -> Float[Array, "Z R size"]:
        """Products of queries with the keys of slots `start` to ``start + size``; once merged.

        Both are whole units. What an empty slot gives may be anything, NaN included.
        """
        ...

    def weighted(
        self, w: Float[Array, "Z R size"], start: Any, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Weighted sum of the values of slots from `start`; those not `used` may be anything."""
        ...

    def decode(self) -> Float[Array, "*lines S H"]:
        """All of it in float32."""
        ...

    def over_slots(self, change: Callable[[Array, int], Array]) -> Encoded:
        """The same with each leaf changed, given its axis of slots or units."""
        ...

    def take(self, rows: Int[Array, " R"]) -> Encoded:
        """The same with other rows."""
        ...

    def resize(self, slots: int) -> Encoded:
        """The same tokens in a buffer of another length, whole units."""
        ...

    def concat(self, others: Sequence[Any]) -> Encoded:
        """The rows of all."""
        ...


def finite(new: Float[Array, "B T K H"], real: Bool[Array, "B T 1 1"]) -> Bool[Array, " B"]:
    """Whether all numbers of a row's real tokens are."""
    return jnp.all(jnp.isfinite(new) | ~real, axis=(1, 2, 3))


def check_slots(slots: int, unit: int) -> None:
    """Refuse slots that are no whole units.

    Raises:
        ValueError: they are none.
    """
    if slots < 1 or slots % unit:
        raise ValueError(
            f"got {slots} slots for tokens that are encoded {unit} at a time; expected a multiple"
        )


def halves(x: Float[Array, "..."]) -> UInt16[Array, "..."]:
    """Numbers rounded to bfloat16, as bits.

    XLA on the CPU has no bfloat16: given an array of it, it converts all of it to write or to read
    a slice.
    """
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def wide(x: UInt16[Array, "..."]) -> Float[Array, "..."]:
    """The numbers of `halves`, in float32."""
    return lax.bitcast_convert_type(x.astype(jnp.uint32) << jnp.uint32(16), jnp.float32)


class Stored(abc.ABC):
    """Leaves that begin with rows and heads, then slots or units unless `over_slots` differs."""

    dim: int
    unit: int = 1

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once merged."""

    def merged(self: E) -> E:
        """Rows and heads as one axis."""
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self)

    def over_slots(self: E, change: Callable[[Array, int], Array]) -> E:
        """The same with each leaf changed, given its axis of slots or units."""
        axis = len(self.shape) - 2
        return jax.tree.map(lambda leaf: change(leaf, axis), self)

    def take(self: E, rows: Int[Array, " R"]) -> E:
        """The same with other rows."""
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def concat(self: E, others: Sequence[E]) -> E:
        """The rows of all."""
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), self, *others)

    def resize(self: E, slots: int) -> E:
        """The same tokens in a buffer of another length, whole units.

        Raises:
            ValueError: no whole units.
        """
        check_slots(slots, self.unit)
        held = self.shape[2]

        def resized(leaf: Array, axis: int) -> Array:
            count = slots * leaf.shape[axis] // held
            room = [(0, 0)] * leaf.ndim
            room[axis] = (0, max(count - leaf.shape[axis], 0))
            return jnp.pad(lax.slice_in_dim(leaf, 0, min(count, leaf.shape[axis]), axis=axis), room)

        return self.over_slots(resized)

    def block(self: E, start: Any, size: int) -> E:
        """Slots `start` to ``start + size`` of a merged form, both whole units."""
        held = self.shape[1]

        def cut(leaf: Array, axis: int) -> Array:
            per = held // leaf.shape[axis]
            at = start if per == 1 else start // per
            return lax.dynamic_slice_in_dim(leaf, at, size // per, axis)

        return self.over_slots(cut)
