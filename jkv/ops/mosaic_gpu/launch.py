"""The launch of the kernels for given operands, and the reasons why they cannot take some."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jkv._axes import Array, Shaped
from jkv.errors import UnsupportedError
from jkv.ops import dispatch
from jkv.ops.kv import KV, PagedKV, Pages
from jkv.ops.masks import AttentionSpec
from jkv.ops.mosaic_gpu import kernel, tiling
from jkv.ops.mosaic_gpu.operands import (
    DenseOperand,
    Keys,
    PerChannelOperand,
    PerTokenOperand,
    Values,
    operand_of,
    unique_channels,
)
from jkv.ops.mosaic_gpu.tiling import LANES, Layout
from jkv.ops.partial import Partial

MOST_NEW = 16  # tokens: more is a prefill


def refusal(q: Shaped, kv: KV) -> str | None:
    """Return why the kernels cannot take these operands, or None."""
    k, v, slots = kv.k, kv.v, kv.slots
    page = kv.page if isinstance(kv, PagedKV) else None
    capability = dispatch.capability()
    if capability is not None and capability != "9.0":
        return f"a GPU of compute capability {capability} (the kernel is for 9.0, Hopper)"
    if q.shape[1] > MOST_NEW:
        return f"{q.shape[1]} new tokens (the kernel takes up to {MOST_NEW})"
    dim = q.shape[-1]
    if dim % 16 or not 64 <= dim <= 256:
        return f"{dim} channels (the kernel takes multiples of 16 from 64 to 256)"
    for what, x in (("keys", k), ("values", v)):
        why = _refused(q, x, what)
        if why is not None:
            return f"{what}: {why}"
    if page is None and slots % 8:
        return f"{slots} slots (the kernel takes multiples of 8)"
    at = layout_of(q, k, v, page, slots)
    if page is not None and not isinstance(operand_of(k), DenseOperand) and page % 64:
        return f"codes in pages of {page} slots (the kernel takes multiples of 64)"
    if page is not None and (page % 8 or (at.block % page and page % at.block)):
        return f"pages of {page} slots (the kernel takes multiples of 8 that divide {at.block})"
    if at.stages < 2:
        return f"{dim} channels in this form, which do not fit into shared memory"
    return None


def _refused(q: Shaped, x: Pages, what: str) -> str | None:
    stored, dim = operand_of(x), q.shape[-1]
    if isinstance(stored, str):
        return stored
    if stored.factor_dtype != q.dtype:
        return f"{stored.factor_dtype.name} beside queries in {jnp.dtype(q.dtype).name}"
    if isinstance(stored, PerTokenOperand) and dim % (16 * stored.parts):
        return f"{dim} channels in codes of {stored.bits} bits"
    if isinstance(stored, PerTokenOperand) and stored.groups > 1:
        if what == "keys":
            return f"{stored.groups} scales per token (the kernel takes one for keys)"
        if dim % (64 * stored.groups):
            return (
                f"{stored.groups} scales per token of {dim} channels (the kernel takes one for 64)"
            )
    if isinstance(stored, PerChannelOperand):
        if what == "values":
            return "a scale per channel (the kernel takes one per token)"
        if dim % (64 * stored.parts):
            return f"{dim} channels in codes of {stored.bits} bits along the slots"
    return None


def _operands(
    k: Pages | jax.ShapeDtypeStruct, v: Pages | jax.ShapeDtypeStruct
) -> tuple[Keys, Values]:
    keys, values = operand_of(k), operand_of(v)
    if isinstance(keys, str) or isinstance(values, str | PerChannelOperand):
        raise UnsupportedError(f"no kernel for keys as {keys} and values as {values}")
    return keys, values


def layout_of(
    q: Shaped,
    k: Pages | jax.ShapeDtypeStruct,
    v: Pages | jax.ShapeDtypeStruct,
    page: int | None,
    slots: int,
) -> Layout:
    """Return the sizes of a call: blocks, programs, and how queries are split.

    Raises:
        UnsupportedError: no kernel takes operands of this form.
    """
    batch, new, heads, dim = q.shape
    keys, values = _operands(k, v)
    groups = heads // k.shape[1]
    # Weights for several groups of channels take the registers of as many columns.
    chunks, columns = tiling.parts(groups * new, dim if values.groups == 1 else 2 * dim)
    # Of two forms, the one with smaller blocks.
    tuned = min(
        (tiling.tuning()["forms"][x.name] for x in (keys, values)), key=lambda x: x["block"]
    )
    block = tuned["block"]
    if not isinstance(keys, DenseOperand):
        # Converted numbers and sums share the registers.
        block = block if columns <= LANES and dim <= 128 else 64
        block = block if page is None else min(block, page)
    at = Layout(
        batch=batch,
        new=new,
        kv_heads=k.shape[1],
        groups=groups,
        dim=dim,
        slots=slots,
        page=page,
        chunks=chunks,
        columns=columns,
        block=block,
        stages=1,
        programs=1,
    )
    return tiling.fit(at, tuned, functools.partial(_shared_bytes, keys, values))


def _shared_bytes(keys: Keys, values: Values, at: Layout) -> int:
    """Return how many bytes of shared memory a program takes."""
    named = kernel.Call(at, AttentionSpec(1.0), keys, values, True).scratch()
    specs = jax.tree.leaves([spec for name, spec in named.items() if not name.endswith("here")])
    sizes = [math.prod(spec.shape) * spec.dtype.itemsize for spec in specs]
    return sum(-(-size // 1024) * 1024 for size in sizes) + kernel.REDUCTIONS + 1024


def _needs_query_sums(keys: Keys) -> bool:
    """Return whether zero points are multiplied with the sums of queries."""
    return isinstance(keys, PerTokenOperand) and not keys.floating


def attend(
    q: Array, kv: KV, positions: Array, spec: AttentionSpec, *, interpret: object = False
) -> Partial:
    """Run the kernels over slots or pages."""
    k, v = kv.k, kv.v
    table, page, slot_positions = None, None, None
    if isinstance(kv, PagedKV):
        table, page = kv.block_table, kv.page
    else:
        slot_positions = kv.slot_positions
    keys, values = _operands(k, v)
    if interpret and not isinstance(keys, DenseOperand):
        keys = dataclasses.replace(keys, interpret=True)
    if interpret and not isinstance(values, DenseOperand):
        values = dataclasses.replace(values, interpret=True)
    at = layout_of(q, k, v, page, kv.slots)
    has_slot_positions = slot_positions is not None
    rows = tiling.rows(at, spec, positions, kv.lengths, not has_slot_positions)
    starts, spans = tiling.shares(at, rows[:, 0])
    columns_q = tiling.queries(at, q)
    # Computed only where needed: otherwise all layers of a model share one small array.
    sums = (
        jnp.sum(columns_q.astype(jnp.float32), axis=-1)
        if _needs_query_sums(keys)
        else jnp.zeros((1, 1))
    )
    sums = lax.bitcast_convert_type(jnp.broadcast_to(sums, columns_q.shape[:2]), jnp.int32)
    about = jnp.stack([tiling.positions_of_lines(at, positions), sums], axis=1)
    arrays = {
        "starts": starts,
        "rows": rows,
        "q": keys.prepare_queries(columns_q),
        "about": jnp.pad(about, ((0, 0), (0, 0), (0, at.words - at.columns))),
        "keys": jax.tree.leaves(k),
        "values": jax.tree.leaves(v),
    }
    if has_slot_positions:
        arrays["slots"] = slot_positions.astype(jnp.int32)
    if table is not None:
        arrays["table"] = table.astype(jnp.int32)
    call = kernel.Call(at, spec, keys, values, has_slot_positions)
    parts = kernel.walk(call, arrays, interpret)
    out, lse = kernel.join(at, parts, spans, interpret)
    if at.height != at.dim:
        out = unique_channels(at, out)
    out = values.restore_channels(out)
    return Partial(*tiling.results(at, out, lse))
