"""The two products of attention that returns its weights, as Mosaic kernels for TPUs.

XLA computes them too, but copies keys and values that fit into the chip's own memory there and,
changed by a token, back: as many bytes once more. The operands of a kernel stay in HBM.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from jkv._axes import Array, Ref, Shaped
from jkv.ops.mosaic_tpu.operands import DenseReader, has_slots_last, refusal
from jkv.ops.mosaic_tpu.write import in_hbm
from jkv.ops.tile import LANES

BYTES = 2**20  # of keys or values that a step of the grid fetches
MOST_ROWS = 64  # queries of a key/value head
SUBLANES = 8


def unsupported(q: Shaped, k: Shaped, v: Shaped) -> str | None:
    """Return why no kernel takes queries [Z, R, H] over [Z, S, H], or None."""
    rows, dim = q.shape[1:]
    if rows > MOST_ROWS:
        return f"{rows} queries of a key/value head; up to {MOST_ROWS}"
    if dim % 16 or not 64 <= dim <= 256:
        return f"a head dimension of {dim}; expected a multiple of 16 from 64 to 256"
    if k.shape[1] < LANES:
        return f"{k.shape[1]} slots, fewer than a tile has lanes ({LANES})"
    return refusal("keys", k, q.dtype) or refusal("values", v, q.dtype)


def _tile(x: Array, interpret: object) -> tuple[DenseReader, Array, pl.BlockSpec, int]:
    """Return the reader of keys or values, the operand, its blocks, and slots of a block."""
    slots, dim = x.shape[1:]
    reader = DenseReader(x.dtype, has_slots_last(dim))
    size = 2 ** int(math.log2(max(BYTES // (dim * x.dtype.itemsize), LANES)))
    size = min(size, 2 ** int(math.log2(slots)))
    if reader.last:
        x, spec = jnp.swapaxes(x, 1, 2), pl.BlockSpec((1, dim, size), lambda z, i: (z, 0, i))
    else:
        spec = pl.BlockSpec((1, size, dim), lambda z, i: (z, i, 0))
    return reader, in_hbm(x, interpret), spec, size


def _pad_rows(x: Array) -> Array:
    """Pad rows to whole tiles."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % SUBLANES), (0, 0)))


def products(
    q: Float[Array, "Z R H"], k: Float[Array, "Z S H"], interpret: object = False
) -> Float[Array, "Z R S"]:
    """Multiply queries with keys in float32; the product with an empty slot may be anything."""
    reader, keys, spec, size = _tile(k, interpret)
    padded_q = _pad_rows(q)
    lines, rows, dim = padded_q.shape

    def kernel(q_ref: Ref, k_ref: Ref, out_ref: Ref) -> None:
        out_ref[0] = reader.products(q_ref[0], [k_ref[0]])

    out = pl.pallas_call(
        kernel,
        grid=(lines, pl.cdiv(k.shape[1], size)),
        in_specs=[pl.BlockSpec((1, rows, dim), lambda z, i: (z, 0, 0)), spec],
        out_specs=pl.BlockSpec((1, rows, size), lambda z, i: (z, 0, i)),
        out_shape=jax.ShapeDtypeStruct((lines, rows, k.shape[1]), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 2),
        interpret=interpret,
        name="jkv_products",
    )(padded_q, keys)
    return out[:, : q.shape[1]]


def sums(
    w: Float[Array, "Z R S"], v: Float[Array, "Z S H"], interpret: object = False
) -> Float[Array, "Z R H"]:
    """Sum values with weights in float32; values of weight zero may be anything."""
    reader, values, spec, size = _tile(v, interpret)
    weights = _pad_rows(w)
    lines, rows, slots = weights.shape
    dim = v.shape[2]

    def kernel(w_ref: Ref, v_ref: Ref, out_ref: Ref) -> None:
        i = pl.program_id(1)

        @pl.when(i == 0)
        def _() -> None:
            out_ref[...] = jnp.zeros_like(out_ref)

        slot = i * size + lax.broadcasted_iota(jnp.int32, (rows, size), 1)
        own = jnp.where(slot < slots, w_ref[0], 0.0)
        out_ref[0] += reader.sums(own, [v_ref[0]], own > 0)

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
