"""New tokens into their slots, in place."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Int, Num

from jkv._axes import Array


def write(
    buffer: Num[Array, "B K S *H"], new: Num[Array, "B T K *H"], slots: Int[Array, "B T"]
) -> Num[Array, "B K S *H"]:
    """Put each row's new tokens into its own slots; a slot that does not exist is dropped.

    Rows and heads are one axis while writing, as they are while reading: with a reshape between
    the update and the product that reads it, XLA updates once per shape and copies the buffer.
    """
    batch, heads, size, *rest = buffer.shape
    count = new.shape[1]
    # Negative indices wrap in JAX; past the end they are dropped. Distinct, to stay unique.
    nowhere = size + jnp.arange(count, dtype=slots.dtype)[None, :]
    slots = jnp.where(slots < 0, nowhere, slots)
    slots = jnp.broadcast_to(slots[:, None], (batch, heads, count)).reshape(-1, count)
    lines = jnp.arange(batch * heads)[:, None]
    tokens = jnp.swapaxes(new, 1, 2).reshape(-1, count, *rest).astype(buffer.dtype)
    merged = buffer.reshape(-1, size, *rest)

    def put(merged: Array, tokens: Array) -> Array:
        return merged.at[lines, slots].set(tokens, mode="drop", unique_indices=True)

    if jnp.issubdtype(buffer.dtype, jnp.floating) and buffer.dtype.itemsize < 4:
        # XLA's CPU compiler has no updates of small floats: it converts all of the buffer to
        # float32 and back at every step. Integers of the same bits it leaves alone, and TPUs
        # copy those.
        bits = jnp.dtype(f"uint{8 * buffer.dtype.itemsize}")

        def put_bits(merged: Array, tokens: Array) -> Array:
            cast = lax.bitcast_convert_type
            return cast(put(cast(merged, bits), cast(tokens, bits)), merged.dtype)

        merged = lax.platform_dependent(merged, tokens, cpu=put_bits, default=put)
    else:
        merged = put(merged, tokens)
    return merged.reshape(buffer.shape)


def write_last(
    buffer: Num[Array, "B K C S"], new: Num[Array, "B T K C"], slots: Int[Array, "B T"]
) -> Num[Array, "B K C S"]:
    """Like `write` where the slots are the last axis: each number of a token is a line apart."""
    batch, heads, lines, size = buffer.shape
    merged = buffer.reshape(batch, heads * lines, size)
    tokens = new.reshape(batch, new.shape[1], heads * lines)
    return write(merged, tokens, slots).reshape(buffer.shape)
