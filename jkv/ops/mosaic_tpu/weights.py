"""The two products of attention that tells its weights, in Mosaic kernels for TPUs.

XLA computes them as well, but carries keys and values that fit into the chip's own memory there
and, changed by a token, out again: as many bytes once more. A kernel's operands stay where they
are.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from jkv._axes import Array
from jkv.ops.mosaic_tpu.operands import Dense, lies_last, refusal
from jkv.ops.mosaic_tpu.write import where_it_is
from jkv.ops.tile import LANES

BYTES = 2**20  # of keys or values that a step of the grid fetches
MOST_ROWS = 64  # queries of a key/value head
SUBLANES = 8


def unsupported(q: Any, k: Any, v: Any) -> str | None:
    """Why there are no kernels for queries [Z, R, H] over [Z, S, H], or None."""
    rows, dim = q.shape[1:]
    if rows > MOST_ROWS:
        return f"{rows} queries of a key/value head; up to {MOST_ROWS}"
    if dim % 16 or not 64 <= dim <= 256:
        return f"a head dimension of {dim}; expected a multiple of 16 from 64 to 256"
    if k.shape[1] < LANES:
        return f"{k.shape[1]} slots, fewer than a tile has lanes ({LANES})"
    return refusal("keys", k, q.dtype) or refusal("values", v, q.dtype)


def _tiled(x: Array, interpret: Any) -> tuple[Dense, Array, pl.BlockSpec, int]:
    """How keys or values are read: form, operand, its blocks, and slots of a block."""
    slots, dim = x.shape[1:]
    form = Dense(x.dtype, lies_last(dim))
    size = 2 ** int(math.log2(max(BYTES // (dim * x.dtype.itemsize), LANES)))
    size = min(size, 2 ** int(math.log2(slots)))
    if form.last:
        x, spec = jnp.swapaxes(x, 1, 2), pl.BlockSpec((1, dim, size), lambda z, i: (z, 0, i))
    else:
        spec = pl.BlockSpec((1, size, dim), lambda z, i: (z, i, 0))
    return form, where_it_is(x, interpret), spec, size


def _filled(x: Array) -> Array:
    """Rows filled up to whole tiles."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % SUBLANES), (0, 0)))


def products(
    q: Float[Array, "Z R H"], k: Float[Array, "Z S H"], interpret: Any = False
) -> Float[Array, "Z R S"]:
    """Products of queries with keys, float32; anything where a key may be anything."""
    form, keys, spec, size = _tiled(k, interpret)
    asked = _filled(q)
    lines, rows, dim = asked.shape

    def kernel(q_ref: Any, k_ref: Any, out_ref: Any) -> None:
        out_ref[0] = form.products(q_ref[0], [k_ref[0]])

    out = pl.pallas_call(
        kernel,
        grid=(lines, pl.cdiv(k.shape[1], size)),
        in_specs=[pl.BlockSpec((1, rows, dim), lambda z, i: (z, 0, 0)), spec],
        out_specs=pl.BlockSpec((1, rows, size), lambda z, i: (z, 0, i)),
        out_shape=jax.ShapeDtypeStruct((lines, rows, k.shape[1]), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 2),
        interpret=interpret,
        name="jkv_products",
    )(asked, keys)
    return out[:, : q.shape[1]]


def sums(
    w: Float[Array, "Z R S"], v: Float[Array, "Z S H"], interpret: Any = False
) -> Float[Array, "Z R H"]:
    """Sums of values with weights, float32; values without weight may be anything."""
    form, values, spec, size = _tiled(v, interpret)
    weights = _filled(w)
    lines, rows, slots = weights.shape
    dim = v.shape[2]

    def kernel(w_ref: Any, v_ref: Any, out_ref: Any) -> None:
        i = pl.program_id(1)

        @pl.when(i == 0)
        def _() -> None:
            out_ref[...] = jnp.zeros_like(out_ref)

        slot = i * size + lax.broadcasted_iota(jnp.int32, (rows, size), 1)
        own = jnp.where(slot < slots, w_ref[0], 0.0)
        out_ref[0] += form.sums(own, [v_ref[0]], own > 0)

    out = pl.pallas_call(
        kernel,
        grid=(lines, pl.cdiv(slots, size)),
        in_specs=[pl.BlockSpec((1, rows, size), lambda z, i: (z, 0, i)), spec],
        out_specs=pl.BlockSpec((1, rows, dim), lambda z, i: (z, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((lines, rows, dim), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="jkv_sums",
    )(weights, values)
    return out[:, : w.shape[1]]
