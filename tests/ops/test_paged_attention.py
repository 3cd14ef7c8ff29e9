"""Attention over pages: against contiguous slots, and against an oracle in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkv.errors import UnsupportedError
from jkv.ops.codecs import Affine, Float8
from tests.ops import calls
from tests.ops.calls import cut
from tests.ops.test_attention import oracle

B, K, G, H, SLOTS = 3, 2, 3, 8, 192
paged = jax.jit(calls.attention, static_argnames=calls.STATIC)
BOTH = pytest.mark.parametrize("implementation", ["xla", "reference"])


@functools.cache
def tokens(new):
    rng = np.random.default_rng(new)
    q = rng.normal(size=(B, new, K * G, H)).astype(np.float32) * 2
    k, v = rng.normal(size=(2, B, K, SLOTS, H)).astype(np.float32)
    return q, k, v


def poisoned(x, lengths):
    x = x.copy()
    for b, n in enumerate(lengths):
        x[b, :, n:] = np.nan if b % 2 else np.inf
    return x


def last(lengths, new):
    """Positions [B, T] of the last tokens of each row, padding where there are fewer."""
    at = np.asarray(lengths)[:, None] - new + np.arange(new)[None]
    return np.where(at >= 0, at, -1).astype(np.int32)


@BOTH
@pytest.mark.parametrize(
    ("page", "new", "options"),
    [
        (16, 1, {}),
        (16, 4, {"window": 21}),
        (64, 1, {"window": 70, "sinks": 3}),
        (64, 4, {"softcap": 3.0}),
        (12, 1, {}),  # does not divide a block
        (192, 4, {"window": 5}),  # one page a row, longer than a block
        (1, 1, {"window": 130}),
    ],
)
def test_against_the_oracle(implementation, page, new, options):
    """Rows empty, of one token, on both sides of a page's end, and full; all else is poison."""
    q, k, v = tokens(new)
    for lengths in ([0, 1, 190], [page - 1, page, min(page + 1, SLOTS)], [192, 64, 128]):
        kp, table = cut(poisoned(k, lengths), page)
        vp, _ = cut(poisoned(v, lengths), page)
        positions = last(lengths, new)
        got = paged(
            q,
            kp,
            vp,
            table,
            positions=positions,
            lengths=np.asarray(lengths, np.int32),
            implementation=implementation,
            **options,
        )
        held = np.where(
            np.arange(SLOTS)[None] < np.asarray(lengths)[:, None], np.arange(SLOTS)[None], -1
        )
        out, lse = oracle(q, k, v, positions, held, **options)
        np.testing.assert_allclose(got.out, out, atol=1e-5)
        np.testing.assert_allclose(got.lse, lse, atol=1e-5)


@BOTH
def test_missing_and_shared_pages(implementation):
    """A page that is not there is seen by nobody; one page may be in many rows."""
    q, k, v = tokens(1)
    k, v = k.copy(), v.copy()
    k[1:, :, :64], v[1:, :, :64] = k[0, :, :64], v[0, :, :64]
    page = 16
    kp, table = cut(k, page)
    vp, _ = cut(v, page)
    lengths = np.asarray([70, 100, 192], np.int32)
    positions = last(lengths, 1)
    call = functools.partial(paged, positions=positions, lengths=lengths)
    held = np.where(np.arange(SLOTS)[None] < lengths[:, None], np.arange(SLOTS)[None], -1)
    shared = table.copy()
    shared[1:, :4] = table[0, :4]
    own = np.setdiff1d(table, shared)
    kp[own] = np.nan  # the copies that nobody needs now
    out = call(q, kp, vp, shared, implementation=implementation).out
    np.testing.assert_allclose(out, oracle(q, k, v, positions, held)[0], atol=1e-5)
    holes = shared.copy()
    holes[:, 1:3] = -1
    held[:, 16:48] = -1
    out = call(q, kp, vp, holes, implementation=implementation).out
    np.testing.assert_allclose(out, oracle(q, k, v, positions, held)[0], atol=1e-5)


@pytest.mark.parametrize(
    "codec",
    [Affine(8), Affine(4, group=4), Affine(4, axis="channel", group=8), Float8()],
    ids=str,
)
def test_encoded_pages(codec):
    """Equal to attention over the same numbers decoded."""
    q, k, v = tokens(1)
    page = 16
    lengths = np.asarray([30, 101, 192], np.int32)
    positions = last(lengths, 1)
    (kp, table), (vp, _) = cut(k, page), cut(v, page)
    kp, vp = np.nan_to_num(kp), np.nan_to_num(vp)

    @jax.jit
    def encoded(pages):
        at = jnp.broadcast_to(
            jnp.arange(page // codec.block_size), (len(pages), page // codec.block_size)
        )
        empty = codec.empty(len(pages), K, page, H, jnp.float32)
        return empty.write_blocks(jnp.swapaxes(pages, 1, 2), at)

    ke, ve = encoded(kp), encoded(vp)
    options = {"positions": positions, "lengths": lengths}
    want = paged(q, ke.decode(), ve.decode(), table, **options, implementation="reference")
    got = paged(q, ke, ve, table, **options)
    np.testing.assert_allclose(got.out, want.out, atol=1e-5)
    np.testing.assert_allclose(got.lse, want.lse, atol=1e-5)
    whole = paged(q, ke, ve, table, **options, implementation="reference")
    np.testing.assert_allclose(whole.out, want.out, atol=1e-6)


def test_the_work_follows_the_tokens_and_not_the_longest_row(monkeypatch):
    q, k, v = tokens(1)
    (kp, table), (vp, _) = cut(k, 16), cut(v, 16)
    steps, loop = [], jax.lax.fori_loop

    def spied(lower, upper, *rest):
        jax.debug.callback(lambda n: steps.append(int(n)), upper)
        return loop(lower, upper, *rest)

    monkeypatch.setattr(jax.lax, "fori_loop", spied)
    for lengths, blocks in ([192, 20, 3], 4), ([3, 0, 0], 1), ([0, 0, 0], 0), ([129, 129, 128], 5):
        lengths = np.asarray(lengths, np.int32)
        where = {"positions": last(lengths, 1), "lengths": lengths}
        # A fresh function: what has been compiled knows no spy.
        jax.block_until_ready(
            jax.jit(lambda *a, **w: calls.attention(*a, **w))(q, kp, vp, table, **where)
        )
        jax.effects_barrier()
        assert sum(steps) == blocks
        steps.clear()


@pytest.mark.usefixtures("optimised")
def test_nothing_is_gathered_as_a_whole():
    """What is in memory beside the pages is a block of each row."""
    pages = jax.ShapeDtypeStruct((1024, 2, 16, 64), jnp.float32)
    compiled = (
        jax.jit(calls.attention)
        .lower(
            jax.ShapeDtypeStruct((2, 1, 4, 64), jnp.float32),
            pages,
            pages,
            jax.ShapeDtypeStruct((2, 512), jnp.int32),
            positions=jax.ShapeDtypeStruct((2, 1), jnp.int32),
            lengths=jax.ShapeDtypeStruct((2,), jnp.int32),
        )
        .compile()
    )
    one = 1024 * 2 * 16 * 64 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < one / 10


def test_derivatives():
    q, k, v = tokens(1)
    page, lengths = 64, np.asarray([30, 101, 192], np.int32)
    (kp, table), (vp, _) = cut(k, page, spare=0), cut(v, page, spare=0)
    options = jax.tree.map(jnp.asarray, {"positions": last(lengths, 1), "lengths": lengths})
    table = jnp.asarray(table)

    @functools.partial(jax.jit, static_argnums=3)
    def slopes(q, kp, vp, implementation):
        def total(q, kp, vp):
            part = calls.attention(q, kp, vp, table, **options, implementation=implementation)
            return jnp.sum(part.out**2) + jnp.sum(part.lse)

        return jax.grad(total, argnums=(0, 1, 2))(q, kp, vp)

    for got, want in zip(slopes(q, kp, vp, "xla"), slopes(q, kp, vp, "reference"), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
        assert np.abs(want).max() > 0.1


def test_what_cannot_be():
    q, k, v = tokens(1)
    (kp, table), (vp, _) = cut(k, 64), cut(v, 64)
    q, kp, vp, table = (jnp.asarray(x) for x in (q, kp, vp, table))
    options = {"positions": jnp.full((B, 1), 63), "lengths": jnp.full((B,), 64)}
    assert calls.explain(q, kp, vp, table, **options, platform="cpu").name == "xla"
    with pytest.raises(ValueError, match="5 query heads over 2 key/value heads"):
        calls.attention(q[:, :, :5], kp, vp, table, **options)
    with pytest.raises(ValueError, match="window=0"):
        calls.attention(q, kp, vp, table, **options, window=0)
    with pytest.raises(ValueError, match="without columns"):
        calls.attention(q, kp, vp, table[:, :0], **options)
    with pytest.raises(UnsupportedError, match="expected one of"):
        calls.attention(q, kp, vp, table, **options, implementation="triton")
