"""Writes in place, as kernels for TPUs: tokens into arrays with slots last, and whole pages.

On a TPU the first changes one lane of many tiles. Where the array fits into the chip's own memory,
XLA transposes all of it for that, and back; this kernel fetches the tiles, changes them and stores
them where they were. XLA transposes pages too where it prefers another layout.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jkv._axes import Array, Index, Ref
from jkv.ops.tile import LANES

SUBLANES = 8
HEADS = 8


def write_run(buffer: Array, new: Array, at: Array, interpret: object = False) -> Array:
    """Write one run of R numbers of each row along the last axis, at a multiple of R.

    Args:
        buffer: [B, K, S * R], or [B, K, C, S * R].
        new: [B, K, R], or [B, K, C, R].
        at: [B], in runs; a run that does not exist is dropped.
        interpret: of `pl.pallas_call`.
    """
    batch, heads, *rest = buffer.shape
    run, size = new.shape[-1], buffer.shape[-1]
    wide = jnp.float32 if jnp.issubdtype(buffer.dtype, jnp.floating) else jnp.int32
    width = math.lcm(run, LANES)  # in which a run lies whole
    # With slots last, the channels of a token are a row of one array and a column of the other.
    transposed = run == 1 and buffer.ndim == 4
    tokens = new.astype(buffer.dtype).astype(wide)
    part = heads if heads % HEADS else HEADS
    if transposed:
        tokens = tokens[..., 0]
        room = (-heads % SUBLANES, -rest[0] % LANES)
        tokens = jnp.pad(tokens, ((0, 0), (0, room[0]), (0, room[1])))
        shape = (1, -(-part // SUBLANES) * SUBLANES, tokens.shape[2])
    else:
        tokens = jnp.tile(tokens, width // run)
        shape = (1, part, *tokens.shape[2:])

    def kernel(at_ref: Ref, tokens_ref: Ref, old_ref: Ref, out_ref: Ref) -> None:
        first = at_ref[pl.program_id(0)] * run
        there = (first >= 0) & (first < size)
        first = jnp.where(there, lax.rem(first, width), width)
        columns = jnp.transpose(tokens_ref[0]) if transposed else None
        for h in range(part if buffer.ndim == 4 else 1):
            one = (0, h) if buffer.ndim == 4 else (0,)
            old = old_ref[one].astype(wide)
            lane = lax.broadcasted_iota(jnp.int32, old.shape, old.ndim - 1)
            own = (lane >= first) & (lane < first + run)
            put = tokens_ref[one] if columns is None else columns[: old.shape[0], h : h + 1]
            out_ref[one] = jnp.where(own, put, old).astype(out_ref.dtype)

    def tile(b: Array, g: Array, at_ref: Ref) -> tuple[Index, ...]:
        last = -(-size // width) - 1
        which = jnp.clip(lax.div(at_ref[b] * run, width), 0, last)
        return (b, g, *(0,) * (buffer.ndim - 3), which)

    block = pl.BlockSpec((1, part, *rest[:-1], width), tile)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads // part),
            in_specs=[
                pl.BlockSpec(shape, lambda b, g, _: (b, g, *(0,) * (len(shape) - 2))),
                block,
            ],
            out_specs=block,
        ),
        out_shape=jax.ShapeDtypeStruct(buffer.shape, buffer.dtype),
        input_output_aliases={2: 0},
        interpret=interpret,
        name="jkv_write",
    )(at, tokens, in_hbm(buffer, interpret))


def write_pages(pages: Array, new: Array, at: Array, interpret: object = False) -> Array:
    """Write whole pages to their places.

    Args:
        pages: [P, ...].
        new: [N, ...].
        at: [N], distinct; a page that does not exist is dropped.
        interpret: of `pl.pallas_call`.
    """

    def kernel(at_ref: Ref, new_ref: Ref, _: Ref, out_ref: Ref, done: Ref) -> None:
        n = pl.program_id(0)
        number = at_ref[n]

        @pl.when((number >= 0) & (number < pages.shape[0]))
        def _():
            sent = pltpu.make_async_copy(new_ref.at[n], out_ref.at[number], done)
            sent.start()
            sent.wait()

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(len(at),),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        input_output_aliases={2: 0},
        interpret=interpret,
        name="jkv_write_pages",
    )(at, new, in_hbm(pages, interpret))


def in_hbm(x: Array, interpret: object) -> Array:
    """Return the same array, kept in HBM: XLA must not copy all of it to the chip's memory."""
    return x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)
