"""Whole pages into their places, in place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from jkv._axes import Array
from jkv.ops.encoded import Encoded


def write_tokens(
    pages: Float[Array, "P K page H"] | Encoded,
    new: Float[Array, "B T K H"],
    at: Int[Array, "B U page"],
    source: Int[Array, "B U"],
    into: Int[Array, "B U"],
) -> Any:
    """Put new tokens into pages: each page begins as its source, and is written as a whole.

    All sources are read before anything is written, so that a page may be the source of several,
    and be written itself.

    Args:
        pages: what is there, an array or in a codec's form of single tokens.
        new: tokens.
        at: which of them goes to each slot of a page, -1 where the source's token stays.
        source: numbers of pages.
        into: numbers of the pages that are written, distinct; -1 writes nothing.
    """
    page = at.shape[2]
    lines = at.reshape(-1, page)
    numbers = jnp.maximum(source, 0).reshape(-1)
    if new.shape[1] > 1:
        rows = jnp.maximum(at, 0).reshape(at.shape[0], -1)
        tokens = jnp.take_along_axis(new, rows[..., None, None], axis=1)
        tokens = tokens.reshape(-1, page, *new.shape[2:])
    else:
        tokens = new
    if isinstance(pages, Encoded):
        slots = jnp.where(lines >= 0, jnp.arange(page, dtype=jnp.int32)[None], -1)
        slots = slots if new.shape[1] > 1 else jnp.max(slots, axis=1, keepdims=True)
        written: Any = pages.take(numbers).put(tokens, slots)
    else:
        tokens = jnp.swapaxes(tokens, 1, 2).astype(pages.dtype)
        written = jnp.where((lines >= 0)[:, None, :, None], tokens, pages[numbers])
    return _scattered(pages, written, into.reshape(-1))


def copy(pages: Any, source: Int[Array, " N"], into: Int[Array, " N"]) -> Any:
    """Pages ``into[n]`` as copies of pages ``source[n]``, all read first; -1 copies nothing.

    Args:
        pages: an array ``[P, ...]``, or a pytree of them.
        source: numbers of pages.
        into: numbers of pages, distinct.
    """
    into = jnp.where(source < 0, -1, into)
    found = jax.tree.map(lambda leaf: leaf[jnp.maximum(source, 0)], pages)
    return _scattered(pages, found, into)


def _scattered(pages: Any, written: Any, into: Int[Array, " N"]) -> Any:
    """Each array of `pages` with pages `into` as in `written`."""
    # Negative indices wrap in JAX; past the end they are dropped. Distinct, to stay unique.
    nowhere = jnp.arange(len(into), dtype=into.dtype)

    def scattered(leaf: Array, new: Array) -> Array:
        at = jnp.where(into < 0, leaf.shape[0] + nowhere, into)

        def put(leaf: Array, new: Array) -> Array:
            return leaf.at[at].set(new, mode="drop", unique_indices=True)

        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize == 4:
            return put(leaf, new)
        # XLA's CPU compiler would convert all of it to float32 and back, see `write`.
        bits = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")

        def put_bits(leaf: Array, new: Array) -> Array:
            cast = lax.bitcast_convert_type
            return cast(put(cast(leaf, bits), cast(new, bits)), leaf.dtype)

        return lax.platform_dependent(leaf, new, cpu=put_bits, default=put)

    return jax.tree.map(scattered, pages, written)
