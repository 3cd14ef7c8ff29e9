"""Check lengths and row numbers that users pass to the methods of a cache."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from jkv._axes import Array
from jkv._text import plural

Lengths = int | Sequence[int] | np.ndarray | Array  # for all rows, or one for each
Rows = Sequence[int] | np.ndarray | Array


def check_lengths(lengths: Lengths, batch: int) -> Int[Array, " B"]:
    """Return lengths as ``[B]`` int32; traced ones are not looked at.

    Raises:
        ValueError: another shape or dtype, or a length below 0.
    """
    array = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
    if array.shape not in ((), (batch,)) or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"crop got lengths of shape {array.shape} and dtype {array.dtype}; expected an "
            f"integer or one integer for each of {plural(batch, 'row')}"
        )
    if not isinstance(array, Tracer) and np.any(np.asarray(array) < 0):
        raise ValueError(f"crop got a negative length in {np.asarray(array).tolist()}")
    return jnp.broadcast_to(jnp.asarray(array, jnp.int32), (batch,))


def check_rows(rows: Rows, batch: int) -> Int[Array, " R"]:
    """Return row numbers as ``[R]`` int32; traced ones are not looked at.

    Raises:
        ValueError: another shape or dtype, or a row that does not exist.
    """
    array = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if array.ndim != 1 or not jnp.issubdtype(array.dtype, jnp.integer) or array.shape[0] == 0:
        raise ValueError(
            f"take got rows of shape {array.shape} and dtype {array.dtype}; expected a list of "
            "row numbers"
        )
    if not isinstance(array, Tracer):
        known = np.asarray(array)
        if known.min() < 0 or known.max() >= batch:
            raise ValueError(f"take got rows {known.tolist()}; expected numbers 0 to {batch - 1}")
    return jnp.asarray(array, jnp.int32)
