"""Attention over slots and pages by kernels for TPUs, in the interpreter."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkv.ops.codecs import Affine, Float8
from jkv.ops.masks import AttentionSpec
from jkv.ops.mosaic_tpu import flash
from tests.ops import calls
from tests.ops.calls import cut
from tests.ops.tpu_kernels import (
    BLOCK,
    EDGES,
    INT2,
    INT4,
    NAN,
    RACES,
    SLOTS,
    B,
    attention,
    check,
    draw,
    encoded,
    held_by,
    last,
    paged,
    poisoned,
    small_pages,
    unseen,
)

# In the interpreter: once is enough, on one version of JAX.
pytestmark = [pytest.mark.slow, calls.needs("mosaic_tpu")]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setitem(flash.BLOCK, "bytes", 1)


@pytest.mark.parametrize(
    ("new", "groups", "dim", "dtype", "options"),
    [
        (5, 3, 64, "float32", {"window": 130, "sinks": 3}),
        (1, 1, 128, "float32", {}),
        (1, 4, 128, "bfloat16", {"softcap": 3.0}),
        (1, 16, 80, "float32", {"window": 7}),
    ],
)
def test_dense(new, groups, dim, dtype, options):
    """Rows empty, of one token, and on both sides of a block's end; windows that end anywhere."""
    q, k, v = (np.asarray(jnp.asarray(x, dtype), np.float32) for x in draw(new, groups, dim))
    mask = {"window": options.get("window"), "sinks": options.get("sinks", 0)}
    for lengths in EDGES:
        positions, held = last(lengths, new), held_by(lengths)
        none = unseen(positions, held, **mask)[:, None, :, None]
        got = attention(
            jnp.asarray(q, dtype),
            jnp.asarray(np.where(none, NAN, k), dtype),
            jnp.asarray(np.where(none, np.inf, v), dtype),
            positions=positions,
            slot_positions=None,
            lengths=np.asarray(lengths, np.int32),
            scale=dim**-0.5,
            interpret=True,
            **options,
        )
        check(got, q, k, v, positions, held, 1e-5 if dtype == "float32" else 1e-2, **options)
        assert not np.any(np.asarray(got.out)[positions < 0])


@pytest.mark.parametrize("dim", [64, 128])
def test_slots_in_any_order(dim):
    """Rings, and holes that eviction leaves; blocks of one slot that nobody sees; padding."""
    q, k, v = draw(1, 4, dim)
    order = np.stack([np.random.default_rng(b).permutation(SLOTS) - 40 for b in range(B)])
    order = np.maximum(order, -1)
    for lengths, at in (([SLOTS, 200], [250, 100]), ([SLOTS, SLOTS], [-1, 3])):
        positions, held = np.asarray(at, np.int32)[:, None], held_by(lengths, order=order)
        none = unseen(positions, held, window=60)[:, None, :, None]
        got = attention(
            q,
            np.where(none, NAN, k),
            np.where(none, NAN, v),
            positions=positions,
            slot_positions=order.astype(np.int32),
            lengths=np.asarray(lengths, np.int32),
            scale=0.1,
            window=60,
            interpret=True,
        )
        check(got, q, k, v, positions, held, 1e-5, scale=0.1, window=60)


CODECS = {
    "int8 64": ((Affine(8), Affine(8)), 1, 4, 64, "float32"),
    "int8 128": ((Affine(8), Affine(8)), 1, 2, 128, "bfloat16"),
    "fp8 128": ((Float8(), Float8()), 1, 2, 128, "float32"),
    "int4 64": (INT4, 5, 4, 64, "float32"),
    "int2 128": (INT2, 1, 1, 128, "float32"),
    "int4 and int8 96": ((Affine(4, "token", 24), Affine(8, "token", 32)), 1, 1, 96, "float32"),
}


@pytest.mark.parametrize("name", CODECS)
def test_encoded(name):
    """Equal to attention over what the codes stand for."""
    codecs, new, groups, dim, dtype = CODECS[name]
    q, k, v = draw(new, groups, dim)
    q = jnp.asarray(q, dtype)
    k, v = (encoded(codec, x, dtype) for codec, x in zip(codecs, (k, v), strict=True))
    for lengths in EDGES[1:]:
        positions, held = last(lengths, new), held_by(lengths)
        got = attention(
            q,
            poisoned(k, lengths),
            poisoned(v, lengths),
            positions=positions,
            slot_positions=None,
            lengths=np.asarray(lengths, np.int32),
            scale=0.125,
            interpret=True,
        )
        check(got, q, k.decode(), v.decode(), positions, held, 1e-5, scale=0.125)


@pytest.mark.parametrize(
    ("page", "dim", "options"),
    [(16, 128, {"window": 150, "sinks": 3}), (128, 64, {}), (24, 128, {})],
)
def test_pages(page, dim, options):
    """Tables that end anywhere, pages that are not there, rows that share one."""
    slots = -(-300 // page) * page
    q, k, v = draw(1, 2, dim, slots=slots)
    k[1, :, :page], v[1, :, :page] = k[0, :, :page], v[0, :, :page]
    for lengths, hole in (([0, 129], None), ([128, 300], None), ([257, 140], 0)):
        positions, held = last(lengths, 1), held_by(lengths, slots)
        if hole is not None:
            held[0, hole * page : (hole + 1) * page] = -1
        none = unseen(positions, held, options.get("window"), options.get("sinks", 0))
        none[:, :page] &= none[:, :page].all(0)  # a page that is shared is anybody's
        kp, table = cut(np.where(none[:, None, :, None], NAN, k), page)
        vp, _ = cut(np.where(none[:, None, :, None], np.inf, v), page)
        table[1, 0] = table[0, 0]
        for b, n in enumerate(lengths):
            table[b, max(-(-n // page), 1) :] = -1
        if hole is not None:
            table[0, hole] = -1
        got = paged(
            q,
            kp,
            vp,
            table,
            positions=positions,
            lengths=np.asarray(lengths, np.int32),
            scale=0.1,
            interpret=True,
            **options,
        )
        check(got, q, k, v, positions, held, 1e-5, scale=0.1, **options)


def test_encoded_pages(monkeypatch):
    monkeypatch.setitem(flash.BLOCK, "least slots", 256)  # two pages in a step
    q, k, v = draw(1, 2, 64, slots=384)
    kp, table = cut(k, 128, spare=0)
    vp, _ = cut(v, 128, spare=0)
    k, v = encoded(INT4[0], kp), encoded(INT4[1], vp)
    q, table, lengths = jnp.asarray(q), jnp.asarray(table), jnp.asarray([150, 384])
    arguments: Any = {"positions": jnp.asarray(last([150, 384], 1)), "lengths": lengths}
    got = paged(q, k, v, table, scale=0.1, interpret=True, **arguments)
    want = calls.attention(q, k, v, table, scale=0.1, implementation="reference", **arguments)
    np.testing.assert_allclose(got.out, want.out, atol=1e-5)
    np.testing.assert_allclose(got.lse, want.lse, atol=1e-5)


SMALL = {  # codecs, heads, page, channels: a line of one token, of two, four, eight
    "exact": ((None, None), 1, 16, 64, {"window": 70, "sinks": 3}),
    "exact, in lines of three tiles": ((None, None), 1, 64, 96, {}),
    "int8": ((Affine(8), Affine(8)), 3, 16, 128, {}),
    "int4 and int8": ((Affine(8), Affine(4)), 2, 64, 128, {}),
    "int2": ((Affine(2, group=64), Affine(2, group=64)), 1, 64, 128, {}),
    "fp8, heads in two steps": ((Float8(), Float8()), 4, 64, 64, {}),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_pages(monkeypatch, name):
    """Tokens beside each other in a line, rows that end within one."""
    monkeypatch.setitem(flash.BLOCK, "heads", 2)
    codecs, heads, page, dim, options = SMALL[name]
    q, k, v = draw(2, 2, dim, kv_heads=heads, slots=256)
    lengths = [131, 255]
    kp, table = cut(k, page)
    vp, _ = cut(v, page)
    for b, n in enumerate(lengths):
        table[b, -(-n // page) :] = -1
    (k, v), (kp, vp) = small_pages(codecs, (kp, vp), table, lengths)
    arguments: Any = {
        "positions": jnp.asarray(last(lengths, 2)),
        "lengths": jnp.asarray(lengths),
        "scale": 0.1,
    } | options
    got = paged(q, k, v, table, interpret=True, **arguments)
    want = calls.attention(
        jnp.asarray(q), kp, vp, jnp.asarray(table), implementation="reference", **arguments
    )
    np.testing.assert_allclose(got.out, want.out, atol=2e-5)
    np.testing.assert_allclose(got.lse, want.lse, atol=2e-5)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (200, 0), (200, 5), (1, 130)])
def test_blocks_that_nobody_sees_are_not_fetched(window, sinks):
    """A step beyond a row's last block names it again, which fetches nothing."""
    lengths = [1, 127, 128, 129, 640, 1000]
    tiling = flash.Tiling(1, 1, 1, BLOCK, first=-(-sinks // BLOCK), pages=1)
    spec = AttentionSpec(1.0, window, sinks)
    info, steps = flash.scalars_of(
        tiling, spec, jnp.asarray(last(lengths, 1)), jnp.asarray(lengths), in_order=True
    )
    counts = []
    for b, n in enumerate(lengths):
        seen = {s // BLOCK for s in range(n) if window is None or n - 1 - s < window or s < sinks}
        visited = [int(flash._block_of(tiling, b, i, info)) for i in range(int(steps) + 2)]
        assert set(visited) == seen
        assert visited == sorted(visited)
        counts.append(len(seen))
    assert int(steps) == max(counts)


def test_no_races():
    """Two heads, two blocks, memory that nobody wrote is NaN."""
    q, k, v = draw(1, 1, 128, kv_heads=2, slots=256)
    arguments: Any = {"positions": last([130, 256], 1), "lengths": np.asarray([130, 256], np.int32)}
    got = attention(q, k, v, slot_positions=None, scale=0.1, interpret=RACES, **arguments)
    check(got, q, k, v, arguments["positions"], held_by([130, 256], 256), 1e-5, scale=0.1)


@pytest.mark.usefixtures("interpreted")
def test_derivatives_and_vmap():
    q, k, v = (jnp.asarray(x) for x in draw(1, 2, 64, slots=128))
    call: Any = {"positions": jnp.asarray(last([100, 7], 1)), "lengths": jnp.asarray([100, 7])}

    def loss(name, q, k, v):
        part = calls.attention(q, k, v, implementation=name, **call)
        return jnp.sum(part.out**2) + jnp.sum(part.lse)

    def all_of(name):
        one = functools.partial(loss, name)
        twice = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
        mapped, shared = jax.vmap(one)(*twice), jax.vmap(one, (0, None, None))(twice[0], k, v)
        return *jax.grad(one, (0, 1, 2))(q, k, v), mapped, shared

    kernels, plain = (jax.jit(all_of, static_argnums=0)(name) for name in ("mosaic_tpu", "xla"))
    for got, want in zip(kernels, plain, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)
