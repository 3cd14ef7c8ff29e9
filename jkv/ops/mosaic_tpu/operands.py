"""Keys and values as a TPU kernel reads them: which arrays, how they lie, and two products.

A TPU tiles the last two axes by 8 x 128 numbers. XLA keeps an array ``[B, K, S, C]`` of less than
128 channels with its slots last, so that nothing is padded; a kernel's operands lie as they are
indexed. Such arrays are therefore handed over as ``[B, K, C, S]``, which is how they already lie:
no copy. Each form answers what attention asks of a block: products of queries with keys, and the
weighted sum of values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jkv._axes import Array

LANES = 128


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of an operand, ``[B, K, ...]`` or ``[P, K, ...]``."""

    array: Any
    axis: int  # of slots
    rows: bool = False  # [B, K, S]: the lines of all heads in one tile


def lies_last(channels: int) -> bool:
    """Whether the slots are the last axis in a TPU's memory."""
    return channels % LANES != 0


def slots_last(x: Any) -> Leaf:
    """An array [B, K, S, C] as it lies."""
    if lies_last(x.shape[-1]):
        return Leaf(jnp.swapaxes(x, -1, -2), 3)
    return Leaf(x, 2)


def where_it_is(x: Array, interpret: Any) -> Array:
    """The same array, which XLA is not to carry into the chip's memory as a whole and out again."""
    return x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)


def product(a: Array, b: Array, contract: int, precision: Any = None) -> Array:
    """Rows of `a` with rows (contract=1) or columns (contract=0) of `b`, in float32."""
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Dense:
    """Numbers as they are, ``[S, H]`` or, where slots lie last, ``[H, S]``."""

    dtype: Any
    last: bool

    @property
    def _precision(self) -> Any:
        return lax.Precision.HIGHEST if self.dtype == jnp.float32 else None

    def queries(self, q: Array) -> Array:
        """Queries [B, K, R, H] as `products` takes them."""
        return q.astype(self.dtype)

    def products(self, q: Array, leaves: list[Array]) -> Array:
        """[R, S]."""
        return product(q, leaves[0], 0 if self.last else 1, self._precision)

    def sums(self, w: Array, leaves: list[Array], seen: Array | None) -> Array:
        """Sums [R, H] with weights [R, S]; `seen` [R, S] is None where everything is."""
        v = leaves[0]
        if seen is not None:
            # Zero times NaN is NaN. Selects are of 32 bits on all TPUs.
            used = jnp.max(seen.astype(jnp.float32), axis=0, keepdims=True)
            if not self.last:
                used = jnp.transpose(jnp.broadcast_to(used, (8, used.shape[1])))[:, :1]
            v = jnp.where(used > 0, v.astype(jnp.float32), 0.0).astype(self.dtype)
        return product(w.astype(self.dtype), v, 1 if self.last else 0, self._precision)


def operand(x: Any) -> tuple[Any, list[Leaf]]:
    """How an operand is read, and its arrays."""
    leaf = slots_last(x)
    return Dense(jnp.dtype(x.dtype), leaf.axis == 3), [leaf]


def refusal(name: str, x: Any, dtype: Any) -> str | None:
    """Why an operand cannot be read, if so."""
    if not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return f"{name} in the form of {type(x).__name__}"
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{name} in {x.dtype}"
    if x.dtype != dtype:
        return f"{name} in {x.dtype} for queries in {dtype}"
    return None
