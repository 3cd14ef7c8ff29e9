"""The kernels for TPUs in the interpreter: operands, and attention over them in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from jkv._pytree import replace
from jkv.ops import dispatch
from jkv.ops.attention import mosaic_tpu
from jkv.ops.codecs import Affine
from jkv.ops.pages import TpuPages, empty
from tests.ops import calls
from tests.ops.test_attention import oracle

BLOCK, SLOTS, B = 128, 320, 2  # two blocks and half of one
EDGES = ([0, 1], [BLOCK - 1, BLOCK], [BLOCK + 1, SLOTS])
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
NAN, NAN16 = np.nan, 0x7FC0  # and its bits in bfloat16
attention = paged = jax.jit(
    calls.by(mosaic_tpu.attention), static_argnames=(*calls.SPEC, "interpret")
)


def draw(new, groups, dim, kv_heads=1, slots=SLOTS):
    rng = np.random.default_rng(dim + new)
    q = rng.normal(size=(B, new, kv_heads * groups, dim)).astype(np.float32) * 2
    k, v = rng.normal(size=(2, B, kv_heads, slots, dim)).astype(np.float32)
    return q, k, v


def last(lengths, new):
    """Positions [B, T] of the last tokens of each row, padding where there are fewer."""
    at = np.asarray(lengths)[:, None] - new + np.arange(new)[None]
    return np.where(at >= 0, at, -1).astype(np.int32)


def unseen(positions, held, window=None, sinks=0) -> np.ndarray:
    """Slots [B, S] that no query sees."""
    p, s = positions[:, :, None], held[:, None]
    seen = (s >= 0) & (s <= p)
    if window is not None:
        seen &= (p - s < window) | (s < sinks)
    return ~seen.any(1)


def held_by(lengths, slots=SLOTS, order=None):
    """Positions [B, S] in the slots."""
    order = np.broadcast_to(np.arange(slots), (B, slots)) if order is None else order
    return np.where(np.arange(slots) < np.asarray(lengths)[:, None], order, -1)


def check(got, q, k, v, positions, held, tolerance, **options):
    out, lse = oracle(q, k, v, positions, held, **options)
    norm = max(np.abs(out).max(), 1.0)
    np.testing.assert_allclose(got.out, out, atol=tolerance * norm, rtol=0)
    np.testing.assert_allclose(got.lse, lse, atol=5 * tolerance, rtol=0)


def encoded(codec, x, dtype="float32"):
    """Tokens [B, K, S, H] in a codec's form."""
    batch, heads, slots, dim = x.shape
    at = np.broadcast_to(np.arange(slots // codec.block_size), (batch, slots // codec.block_size))
    empty = codec.empty(batch, heads, slots, dim, dtype)
    return jax.jit(empty.write_blocks)(jnp.asarray(x.swapaxes(1, 2)), jnp.asarray(at))


def poisoned(x, lengths):
    """NaN as the scales of slots, or of blocks, that hold nothing."""
    scales = np.array(x.scales)
    per_channel = x.block_size > 1
    for b, n in enumerate(lengths):
        scales[b, ..., -(-n // x.block_size) * x.dim if per_channel else n :] = NAN16
    return replace(x, scales=jnp.asarray(scales))


INT4 = (Affine(4, "channel", 64), Affine(4, "token", 64))
INT2 = (Affine(2, "channel", 32), Affine(2, "token", 64))


def small_pages(codecs, pages, table, lengths):
    """Pages [P, K, page, H] as a cache on a TPU has them, and others that say what is in them.

    Tokens of no row are NaN in the first, where that can be, and zero in the second.
    """
    count, heads, page, dim = pages[0].shape
    used = np.zeros((count, page), bool)
    for row, n in zip(table, lengths, strict=True):
        for c, number in enumerate(row):
            used[number] |= (number >= 0) & (c * page + np.arange(page) < n)
    with dispatch.target("tpu"):
        held = empty(codecs, count, heads, page, dim, "float32")
    made, meant = [], []
    for pool, x, codec in zip(held, pages, codecs, strict=True):
        seen = used[:, None, :, None]
        plain: Any = jnp.where(seen, x, NAN)
        if codec is not None:
            plain = encoded(codec, np.nan_to_num(x))
        meant.append(jnp.where(seen, x if codec is None else plain.decode(), 0.0))
        made.append(pool.to_layout(plain))
    assert all(isinstance(x, TpuPages) for x in made)
    return made, meant
