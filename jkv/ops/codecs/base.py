"""What a codec and an encoded array are, and what all forms share."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, UInt16

from jkv._axes import Array, Index

if TYPE_CHECKING:
    from typing import Self
else:
    Self = Any  # beartype, which watches the tests, has none inside of jaxtyping's decorators

E = TypeVar("E", bound="Encoded")

# Products of float32 in float32. By default TPUs round to bfloat16 first, for which XLA converts
# the whole cache at every step, and NVIDIA GPUs to TF32; neither gives the tokens of the CPU.
PRODUCT: dict[str, Any] = {
    "preferred_element_type": jnp.float32,
    "precision": lax.Precision.HIGHEST,
}


@runtime_checkable
class Codec(Protocol):
    """How one stream of tokens (keys or values) is stored: a small frozen value.

    Example:
        >>> isinstance(jkv.ops.codecs.Float8(), jkv.ops.codecs.Codec)
        True
    """

    @property
    def block_size(self) -> int:
        """Consecutive tokens that are encoded together."""
        ...

    def empty(self, batch: int, heads: int, slots: int, dim: int, dtype: DTypeLike) -> Encoded:
        """Return an encoded array of zeros for `slots` tokens per row, whole blocks.

        Raises:
            ValueError: slots that are no whole blocks.
        """
        ...


class Encoded(abc.ABC):
    """Tokens ``[B, K, S, H]`` in a codec's form: a frozen pytree.

    Leaves begin with ``[B, K]``, or with ``[Z]`` for both once flattened; one axis of each is S, or
    S / block_size.

    Example:
        >>> codes = jkv.ops.codecs.Float8().empty(1, 1, 4, 2, "float32")
        >>> new = jnp.array([[[[1.0, -2.0]]]])  # [B, R, K, H]
        >>> codes.write_blocks(new, jnp.array([[3]])).decode()[0, 0, 3].round(1).tolist()
        [1.0, -2.0]
    """

    block_size: int = 1  # consecutive tokens that are encoded together

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)``, or ``(Z, S, H)`` once flattened."""

    @abc.abstractmethod
    def write_blocks(
        self, new: Float[Array, "B R K H"], at: Int[Array, "B U"], run: int = 1
    ) -> Self:
        """Encode new tokens, once: block u of a row becomes block ``at[b, u]`` of what is stored.

        Blocks that do not exist are dropped. `run` blocks that follow each other count as one.
        """

    @abc.abstractmethod
    def scores(self, q: Float[Array, "Z R H"], start: Index, size: int) -> Float[Array, "Z R size"]:
        """Multiply queries with the keys of slots `start` to ``start + size``; once flattened.

        Both are whole blocks. The score of an empty slot may be anything, NaN included.
        """

    @abc.abstractmethod
    def weighted_sum(
        self, w: Float[Array, "Z R size"], start: Index, used: Bool[Array, "Z size"]
    ) -> Float[Array, "Z R H"]:
        """Sum the values of slots from `start` with weights; those not `used` may be anything."""

    @abc.abstractmethod
    def decode(self) -> Float[Array, "*lines S H"]:
        """Decode all tokens to float32."""

    @abc.abstractmethod
    def map_slots(self, change: Callable[[Array, int], Array]) -> Self:
        """Apply `change` to each leaf, given its axis of slots or blocks."""

    @abc.abstractmethod
    def flatten_heads(self) -> Self:
        """Make rows and heads one axis, ``Z = B * K``, as products read them."""

    @abc.abstractmethod
    def slice_slots(self, start: Index, size: int) -> Self:
        """Slice slots `start` to ``start + size``, both whole blocks; once flattened."""

    def take(self, rows: Int[Array, " R"]) -> Self:
        """Select rows."""
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def concat(self, others: Sequence[Self]) -> Self:
        """Concatenate along the batch axis."""
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), self, *others)

    def resize(self, slots: int) -> Self:
        """Return the same tokens in a buffer of another length, whole blocks.

        Raises:
            ValueError: no whole blocks.
        """
        check_slots(slots, self.block_size)
        old_slots = self.shape[2]

        def resized(leaf: Array, axis: int) -> Array:
            count = slots * leaf.shape[axis] // old_slots
            padding = [(0, 0)] * leaf.ndim
            padding[axis] = (0, max(count - leaf.shape[axis], 0))
            kept = lax.slice_in_dim(leaf, 0, min(count, leaf.shape[axis]), axis=axis)
            return jnp.pad(kept, padding)

        return self.map_slots(resized)


def map_slots(encoded: E, change: Callable[[Array, int], Array]) -> E:
    """Apply `change` to each leaf of a form whose leaves all have their slots after the heads."""
    axis = len(encoded.shape) - 2
    return jax.tree.map(lambda leaf: change(leaf, axis), encoded)


def flatten_heads(encoded: E) -> E:
    """Make rows and heads one axis of each leaf: what most forms do to be read."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), encoded)


def slice_slots(encoded: E, start: Index, size: int) -> E:
    """Slice each leaf along its axis of slots or blocks, as `Encoded.slice_slots`."""
    slots = encoded.shape[1]

    def cut(leaf: Array, axis: int) -> Array:
        per = slots // leaf.shape[axis]
        at = start if per == 1 else start // per
        return lax.dynamic_slice_in_dim(leaf, at, size // per, axis)

    return encoded.map_slots(cut)


def all_finite(new: Float[Array, "B T K H"], real: Bool[Array, "B T 1 1"]) -> Bool[Array, " B"]:
    """Return whether all numbers of each row's real tokens are finite.

    Example:
        >>> new = jnp.array([1.0, jnp.inf]).reshape(2, 1, 1, 1)  # [B, T, K, H]
        >>> jkv.ops.codecs.all_finite(new, jnp.ones((2, 1, 1, 1), bool)).tolist()
        [True, False]
    """
    return jnp.all(jnp.isfinite(new) | ~real, axis=(1, 2, 3))


def check_slots(slots: int, block_size: int) -> None:
    """Refuse slots that are no whole blocks.

    Raises:
        ValueError: they are none.
    """
    if slots < 1 or slots % block_size:
        raise ValueError(
            f"got {slots} slots for tokens that are encoded {block_size} at a time; expected a "
            "multiple"
        )


def to_bf16_bits(x: Float[Array, "..."]) -> UInt16[Array, "..."]:
    """Round to bfloat16 and return its bits.

    XLA on the CPU has no bfloat16: given an array of it, it converts all of it to write or to read
    a slice.
    """
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def from_bf16_bits(x: UInt16[Array, "..."]) -> Float[Array, "..."]:
    """Return the numbers of `to_bf16_bits` in float32."""
    return lax.bitcast_convert_type(x.astype(jnp.uint32) << jnp.uint32(16), jnp.float32)
