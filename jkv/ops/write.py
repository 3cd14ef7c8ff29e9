"""Writes of new tokens into their slots, in place."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Int, Num

from jkv._axes import Array
from jkv.ops import dispatch
from jkv.ops.dispatch import fold_unless_shared
from jkv.ops.tile import LANES

FEW = 16  # tokens that are worth a pass of a kernel each


def write(
    buffer: Num[Array, "B K S *H"],
    new: Num[Array, "B T K *H"],
    slots: Int[Array, "B U"],
    run: int = 1,
) -> Num[Array, "B K S *H"]:
    """Put each row's new tokens into its own slots; a slot that does not exist is dropped.

    Args:
        buffer: what is there, whole runs.
        new: tokens, in runs of `run`.
        slots: of the runs: run u goes to slots from ``slots[b, u] * run``.
        run: consecutive tokens that stay together.

    Example:
        >>> buffer, new = jnp.zeros((1, 1, 4)), jnp.array([[[7.0], [8.0]]])  # [B, K, S], [B, T, K]
        >>> jkv.ops.write(buffer, new, jnp.array([[2, -1]])).tolist()  # no slot -1: dropped
        [[[0.0, 0.0, 7.0, 0.0]]]
    """
    # On a TPU, XLA stores arrays of fewer channels with their slots last.
    if buffer.ndim == 4 and buffer.shape[3] % LANES == 0:
        return _rows(buffer, new, slots, run)
    plain = functools.partial(_rows, run=run)
    return _each(functools.partial(_tokens, run=run), plain, run, buffer, new, slots)


def write_last(
    buffer: Num[Array, "B K C S"],
    new: Num[Array, "B T K C"],
    slots: Int[Array, "B U"],
    run: int = 1,
) -> Num[Array, "B K C S"]:
    """Write tokens where the slots are the last axis: a token's numbers are a line apart."""
    batch, count, *rest = new.shape
    runs = new.reshape(batch, count // run, run, *rest)
    return write_runs(buffer, jnp.moveaxis(runs, 2, -1), slots)


def write_runs(
    buffer: Num[Array, "B K *C S"], new: Num[Array, "B U K *C R"], at: Int[Array, "B U"]
) -> Num[Array, "B K *C S"]:
    """Put runs of R numbers along the last axis, at ``at[b, u] * R``; none where there is none."""
    if buffer.ndim == 4 and buffer.shape[2] == 1:
        # As a TPU keeps it: an axis of one is no reason to turn it around.
        return write_runs(buffer[:, :, 0], new[:, :, :, 0], at)[:, :, None]
    return _each(_runs, _lines, 1, buffer, new, at)


def _each(kernel: Any, plain: Any, run: int, buffer: Array, new: Array, at: Array) -> Array:
    """Write by a kernel if compiled for TPUs and the runs are few."""
    count = at.shape[1]
    if not dispatch.tpu_kernels() or count > FEW:
        return plain(buffer, new, at)

    def one_by_one(buffer: Array, new: Array, at: Array) -> Array:
        for u in range(count):
            buffer = kernel(buffer, new[:, u * run : (u + 1) * run], at[:, u])
        return buffer

    def for_tpu(buffer: Array, new: Array, at: Array) -> Array:
        return dispatch.kernel(one_by_one, plain, (buffer, new, at), fold=fold_unless_shared(0))

    return lax.platform_dependent(buffer, new, at, tpu=for_tpu, default=plain)


def _tokens(buffer: Array, new: Array, at: Array, run: int) -> Array:
    """Write one run of tokens of each row, [B, run, K, *H], in the buffer's own layout."""
    new = jnp.moveaxis(new, 1, -1)
    if buffer.ndim == 3:
        return _kernel(buffer, new, at)
    return jnp.swapaxes(_kernel(jnp.swapaxes(buffer, 2, 3), new, at), 2, 3)


def _runs(buffer: Array, new: Array, at: Array) -> Array:
    """Write one run of each row, [B, 1, K, *C, R]."""
    return _kernel(buffer, new[:, 0], at)


def _kernel(buffer: Array, new: Array, at: Array) -> Array:
    from jkv.ops.mosaic_tpu.write import write_run  # Pallas takes a while to import

    return write_run(buffer, new, at)


def _lines(buffer: Array, new: Array, at: Array) -> Array:
    """Write runs as tokens of lines that have a slot per run."""
    batch, size, run = buffer.shape[0], buffer.shape[-1], new.shape[-1]
    lines = buffer.reshape(batch, -1, size // run, run)
    tokens = new.reshape(batch, new.shape[1], -1, run)
    if run == 1:
        lines, tokens = lines[..., 0], tokens[..., 0]
    return _rows(lines, tokens, at).reshape(buffer.shape)


def _rows(buffer: Array, new: Array, slots: Array, run: int = 1) -> Array:
    """Write by XLA.

    Rows and heads are one axis while writing, as they are while reading: with a reshape between
    the update and the product that reads it, XLA updates once per shape and copies the buffer.
    """
    batch, heads, size, *rest = buffer.shape
    count = new.shape[1]
    if run > 1:
        each = jnp.arange(run, dtype=slots.dtype)[None, None]
        slots = (slots[:, :, None] * run + each).reshape(batch, -1)
    slots = jnp.broadcast_to(distinct(slots, size)[:, None], (batch, heads, count))
    lines = jnp.arange(batch * heads, dtype=jnp.int32)[:, None]
    tokens = jnp.swapaxes(new, 1, 2).reshape(-1, count, *rest)
    merged = buffer.reshape(-1, size, *rest)
    return scatter(merged, (lines, slots.reshape(-1, count)), tokens).reshape(buffer.shape)


def distinct(at: Int[Array, "*B N"], size: int) -> Int[Array, "*B N"]:
    """Move negative indices into `size` places past the end, each to a place of its own.

    JAX wraps negative indices, and drops those past the end; XLA is told that none comes twice.
    """
    nowhere = size + jnp.arange(at.shape[-1], dtype=at.dtype)
    return jnp.where(at < 0, nowhere, at)


def scatter(buffer: Array, at: Any, new: Array) -> Array:
    """Write `new` to distinct places, in place; those past the end are dropped.

    Args:
        buffer: of any shape.
        at: what indexes it.
        new: of the shape of ``buffer[at]``.
    """

    def put(buffer: Array, new: Array) -> Array:
        return buffer.at[at].set(new, mode="drop", unique_indices=True)

    new = new.astype(buffer.dtype)
    if not jnp.issubdtype(buffer.dtype, jnp.floating) or buffer.dtype.itemsize >= 4:
        return put(buffer, new)
    # XLA's CPU compiler has no updates of small floats: it converts all of the buffer to float32
    # and back at every step. Integers of the same bits it leaves alone, and TPUs copy those.
    bits = jnp.dtype(f"uint{8 * buffer.dtype.itemsize}")

    def put_bits(buffer: Array, new: Array) -> Array:
        cast = lax.bitcast_convert_type
        return cast(put(cast(buffer, bits), cast(new, bits)), buffer.dtype)

    return lax.platform_dependent(buffer, new, cpu=put_bits, default=put)
