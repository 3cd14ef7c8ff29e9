"""New tokens into arrays whose slots lie last, and whole pages into their places, in place.

On a TPU the first changes one lane of many tiles. XLA turns the whole array around for it, and
back, where it fits into the chip's own memory; this kernel fetches the tiles, changes them and
stores them where they were. Pages XLA turns around where they are not as it would like them.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jkv._axes import Array
from jkv.ops.tile import LANES

SUBLANES = 8
HEADS = 8


def write_run(buffer: Array, new: Array, at: Array, interpret: Any = False) -> Array:
    """One run of R numbers of each row along the last axis, at a multiple of R.

    Args:
        buffer: [B, K, S * R], or [B, K, C, S * R].
        new: [B, K, R], or [B, K, C, R].
        at: [B], in runs; one that is not there is dropped.
        interpret: of `pl.pallas_call`.
    """
    batch, heads, *rest = buffer.shape
    run, size = new.shape[-1], buffer.shape[-1]
    wide = jnp.float32 if jnp.issubdtype(buffer.dtype, jnp.floating) else jnp.int32
    width = math.lcm(run, LANES)  # in which a run lies whole
    # A token's channels, if slots lie last, are a row of the one array and a column of the other.
    turned = run == 1 and buffer.ndim == 4
    tokens = new.astype(buffer.dtype).astype(wide)
    part = heads if heads % HEADS else HEADS
    if turned:
        tokens = tokens[..., 0]
        room = (-heads % SUBLANES, -rest[0] % LANES)
        tokens = jnp.pad(tokens, ((0, 0), (0, room[0]), (0, room[1])))
        shape = (1, -(-part // SUBLANES) * SUBLANES, tokens.shape[2])
    else:
        tokens = jnp.tile(tokens, width // run)
        shape = (1, part, *tokens.shape[2:])

    def kernel(at_ref: Any, tokens_ref: Any, held_ref: Any, out_ref: Any) -> None:
        first = at_ref[pl.program_id(0)] * run
        there = (first >= 0) & (first < size)
        first = jnp.where(there, lax.rem(first, width), width)
        columns = jnp.transpose(tokens_ref[0]) if turned else None
        for h in range(part if buffer.ndim == 4 else 1):
            one = (0, h) if buffer.ndim == 4 else (0,)
            held = held_ref[one].astype(wide)
            lane = lax.broadcasted_iota(jnp.int32, held.shape, held.ndim - 1)
            own = (lane >= first) & (lane < first + run)
            put = tokens_ref[one] if columns is None else columns[: held.shape[0], h : h + 1]
            out_ref[one] = jnp.where(own, put, held).astype(out_ref.dtype)

    def tile(b: Any, g: Any, at_ref: Any) -> tuple[Any, ...]:
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
    )(at, tokens, where_it_is(buffer, interpret))


def write_pages(pages: Array, new: Array, at: Array, interpret: Any = False) -> Array:
    """Whole pages into their places.

    Args:
        pages: [P, ...].
        new: [N, ...].
        at: [N], distinct; one that is not there is dropped.
        interpret: of `pl.pallas_call`.
    """

    def kernel(at_ref: Any, new_ref: Any, _: Any, out_ref: Any, done: Any) -> None:
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
    )(at, new, where_it_is(pages, interpret))


def where_it_is(x: Array, interpret: Any) -> Array:
    """The same array, which XLA is not to carry into the chip's memory as a whole and out again."""
    return x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)
