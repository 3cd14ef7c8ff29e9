"""Caches that round: which tokens are where, that each is rounded once, and what it weighs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv import ops
from jkv._pytree import nbytes
from jkv.cache.compressed import SLACK, far_slots
from jkv.cache.protocol import Step
from jkv.errors import NonFiniteError
from jkv.ops.encoded import Affine, Cast

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

B, K, G, H, SLOTS = 2, 2, 2, 8, 96
MOST = 40  # tokens in a chunk
KINDS = {
    "int8": jkv.quantized(bits=8),
    "int4": jkv.quantized(bits=4, residual=5, group=8),
    "int2": jkv.quantized(bits=2, residual=0, group=4),
    "k8v4": jkv.quantized(key_bits=8, value_bits=4, residual=3),
    "fp8": jkv.fp8(residual=2),
    "sparse": jkv.sparse(0.5),
    "sparse int8": jkv.sparse(0.5, bits=8, residual=7),
    "near/far": jkv.near_far(recent=6, far=jkv.quantized(bits=4, group=16)),
}
every_kind = pytest.mark.parametrize("name", KINDS)
OPTIONS = {"scale": 0.4, "window": None, "softcap": None}


@functools.cache
def material(total=SLOTS):
    rng = np.random.default_rng(5)
    q = jnp.asarray(rng.normal(size=(B, total, K * G, H)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(B, total, K, H)), jnp.float32) for _ in range(2))
    return q, k, v


def new(kind, slots=SLOTS, dtype=jnp.float32):
    return kind.init(B, slots, K, H, dtype)


@functools.partial(jax.jit, static_argnums=3)
def attend(layer, qkv, start, size, counts=None):
    """`size` tokens of the material after `start[b]`, of which `counts[b]` are real."""
    at = jnp.clip(start[:, None] + jnp.arange(size)[None], 0, SLOTS - 1)
    q, k, v = (jnp.take_along_axis(x, at[..., None, None], axis=1) for x in qkv)
    counts = jnp.full((B,), size) if counts is None else counts
    return layer.attend(q, k, v, Step.after(start, counts, size), **OPTIONS)


crop = jax.jit(lambda layer, held, kept: layer.crop(held, kept))


def fed(layer, sizes, start=0):
    """The layer after chunks of these sizes, and all outputs; two shapes, two compilations."""
    outs = []
    for size in sizes:
        counts = jnp.full((B,), size)
        width = 1 if size == 1 else MOST
        out, layer = attend(layer, material(), jnp.full((B,), start), width, counts)
        outs.append(out[:, :size])
        start += size
    return jnp.concatenate(outs, axis=1), layer


def remembered(kind, count):
    """What must be remembered of the first `count` tokens: whole units, each encoded once."""
    layer = new(kind)
    _, k, v = material()
    unit = max(kind.keys.unit, kind.values.unit)
    far = max(count - kind.recent, 0) // unit * unit

    def decoded(codec, x):
        if not far:
            return x
        one = codec.empty(B, K, far, H, jnp.float32)
        at = jnp.broadcast_to(jnp.arange(far // codec.unit), (B, far // codec.unit))
        return jnp.concatenate(
            [jnp.swapaxes(one.put(x[:, :far], at).decode(), 1, 2), x[:, far:]], axis=1
        )

    assert layer.far(jnp.array([count]))[0] == far
    return decoded(kind.keys, k[:, :count]), decoded(kind.values, v[:, :count])


def holds(kind, layer, count):
    keys, values = layer.to_legacy(jnp.full((B,), count))
    for got, want in zip((keys, values), remembered(kind, count), strict=True):
        np.testing.assert_array_equal(jnp.swapaxes(got, 1, 2)[:, :count], want)


@every_kind
@pytest.mark.parametrize("sizes", [(1,) * 40, (40,), (1, 5, 2, 7, 15, 10)], ids=len)
def test_each_unit_is_rounded_once(name, sizes):
    """Bit for bit what one encoding of each whole unit makes, however the tokens came."""
    kind = KINDS[name]
    _, layer = fed(new(kind), sizes)
    holds(kind, layer, 40)


@every_kind
def test_a_step_is_attention_over_what_is_remembered(name):
    kind = KINDS[name]
    out, _ = fed(new(kind), (1,) * 50)
    q = material()[0]
    for t in (0, 3, 20, 37, 49):
        # What a token pushes out is rounded after it has been seen, and the token itself later.
        keys, values = remembered(kind, t)
        keys, values = (
            jnp.concatenate([a[:, :t], b[:, t : t + 1]], axis=1)
            for a, b in zip((keys, values), material()[1:], strict=True)
        )
        want = ops.attention(
            q[:, t : t + 1],
            jnp.swapaxes(keys, 1, 2),
            jnp.swapaxes(values, 1, 2),
            positions=jnp.full((B, 1), t),
            scale=OPTIONS["scale"],
            implementation="reference",
        ).out
        np.testing.assert_allclose(out[:, t : t + 1], want, atol=2e-5)


@every_kind
def test_a_chunk_sees_itself_exactly(name):
    """Nothing is rounded before its own pass is over: a first chunk is exact attention."""
    q, k, v = (x[:, :30] for x in material())
    out, _ = fed(new(KINDS[name]), (30,))
    want = ops.attention(
        q,
        jnp.swapaxes(k, 1, 2),
        jnp.swapaxes(v, 1, 2),
        positions=jnp.broadcast_to(jnp.arange(30), (B, 30)),
        scale=OPTIONS["scale"],
        implementation="reference",
    ).out
    np.testing.assert_allclose(out, want, atol=2e-5)


@every_kind
@pytest.mark.parametrize("back", [1, SLACK])
def test_rolled_back_as_if_it_had_not_gone_on(name, back):
    """Up to SLACK tokens: the same tokens again leave the same bits, at any phase of a unit."""
    kind = KINDS[name]
    for count in range(41, 58, 4 if kind.keys.unit > 1 else 9):
        _, layer = fed(new(kind), (MOST, count - MOST))
        held, kept = jnp.full((B,), count), jnp.full((B,), count - back)
        cropped = crop(layer, held, kept)
        holds(kind, cropped, count - back)
        _, again = fed(cropped, (back,), count - back)
        holds(kind, again, count)


@every_kind
def test_rolled_back_far(name):
    """What is left are the rounded tokens: each at most a step from itself, none lost or moved."""
    kind = KINDS[name]
    _, layer = fed(new(kind), (MOST, MOST))
    held = jnp.full((B,), 80)
    for kept in (0, 1, 9, 33):
        cropped = crop(layer, held, jnp.full((B,), kept))
        keys, values = cropped.to_legacy(jnp.full((B,), kept))
        whole = layer.to_legacy(held)
        np.testing.assert_array_equal(keys[:, :, :kept], whole[0][:, :, :kept])
        np.testing.assert_array_equal(values[:, :, :kept], whole[1][:, :, :kept])
        # Another future: it goes on as a cache that had never been longer, up to rounding.
        out, _ = fed(cropped, (1,), kept)
        fresh, _ = fed(fed(new(kind), (kept,))[1] if kept else new(kind), (1,), kept)
        assert jnp.max(jnp.abs(out - fresh)) < 1.0
        assert jnp.all(jnp.isfinite(out))


@every_kind
def test_rows_of_different_lengths(name):
    """Rows at different phases of their units are each as if alone."""
    kind = KINDS[name]
    layer, lengths = new(kind), np.zeros(B, np.int32)
    for counts in ((20, 3), (0, 20), (1, 1), (1, 0), (7, 11), (1, 1)):
        size = 1 if max(counts) == 1 else MOST
        _, layer = attend(layer, material(), jnp.asarray(lengths), size, jnp.asarray(counts))
        lengths += np.asarray(counts, np.int32)
    keys, values = layer.to_legacy(jnp.asarray(lengths))
    for b, n in enumerate(lengths.tolist()):
        for got, want in zip((keys, values), remembered(kind, n), strict=True):
            np.testing.assert_array_equal(jnp.swapaxes(got, 1, 2)[b, :n], want[b])


@every_kind
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_not_a_number_is_told(name, bad):
    kind = KINDS[name]
    q, k, v = material()
    _, clean = fed(new(kind), (10,))
    assert not clean.broken.any()
    for what in ("k", "v"):
        dirty = (
            (q, k.at[1, 4, 0, 3].set(bad), v) if what == "k" else (q, k, v.at[1, 4, 1, 2].set(bad))
        )
        _, layer = attend(new(kind), dirty, jnp.zeros(B, jnp.int32), MOST, jnp.array([10, 10]))
        assert layer.broken.tolist() == [False, True]
        # Padding may be anything.
        _, layer = attend(new(kind), dirty, jnp.zeros(B, jnp.int32), MOST, jnp.array([10, 4]))
        assert layer.broken.tolist() == [False, False]
    cache = jkv.Cache(
        layers=(clean, layer.__class__(**{**vars(layer), "broken": jnp.array([False, True])})),
        lengths=jnp.array([10, 10]),
        overflowed=jnp.zeros(B, bool),
    )
    with pytest.raises(NonFiniteError, match=r"layer 1 .* rows \[1\]"):
        cache.check()


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        (jkv.quantized(bits=8), 0.53),
        (jkv.near_far(recent=128, far=jkv.quantized(bits=8)), 0.53),
        (jkv.quantized(bits=4), 0.29),
        (jkv.quantized(bits=2), 0.17),
        (jkv.fp8(), 0.51),
        (jkv.sparse(0.25), 0.40),
        (jkv.sparse(0.25, bits=8), 0.28),
    ],
    ids=str,
)
def test_share_of_bfloat16(kind, most):
    """At H = 128 and 32k tokens, steps, zero points and exact tokens included."""
    dense, made = (
        nbytes(jax.eval_shape(lambda kind=kind: kind.init(1, 32768, 8, 128, jnp.bfloat16)))
        for kind in (jkv.dense(), kind)
    )
    assert made / dense <= most
    assert made / dense > most - 0.05


def test_what_cannot_be():
    for call, message in (
        (lambda: jkv.quantized(bits=3), "bits"),
        (lambda: jkv.quantized(bits=4, group=48), "group"),
        (lambda: jkv.quantized(bits=4, key_axis="row"), "axis"),
        (lambda: jkv.quantized(bits=4, residual=-1), "-1 recent tokens"),
        (lambda: jkv.fp8(residual=1.5), "recent tokens"),
        (lambda: jkv.sparse(0), "keep"),
        (lambda: jkv.sparse(1.5), "keep"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for far in (jkv.dense(), Affine, 4):
        with pytest.raises(TypeError, match="kind that rounds"):
            jkv.near_far(far=far)
    assert jkv.near_far(recent=3, far=Cast("bfloat16")).recent == 3


def test_room():
    """The far part never has fewer slots than leave the near part."""
    for slots in range(1, 200):
        for recent, unit in ((0, 1), (0, 64), (128, 64), (5, 8)):
            kind = jkv.quantized(bits=4, residual=recent, group=unit) if unit > 1 else KINDS["int8"]
            layer = jax.eval_shape(lambda kind=kind, n=slots: kind.init(1, n, 1, 4, jnp.float32))
            assert layer.capacity == slots
            unit = max(kind.keys.unit, kind.values.unit)
            assert far_slots(slots, kind.recent, unit) >= max(slots - kind.recent, 0) // unit * unit


def test_requantise():
    """Exact tokens are rounded once, those that were rounded a second time; exact layers stay."""
    kind = jkv.quantized(bits=8, residual=20)
    _, layer = fed(new(kind), (MOST, 20))
    exact = jkv.dense().init(B, SLOTS, K, H, jnp.float32)
    lengths = jnp.full((B,), 60)
    cache = jkv.Cache((layer, exact), lengths, jnp.zeros(B, bool))
    to = jkv.quantized(bits=4, residual=4, group=8)
    coarse = cache.requantise(to)
    assert coarse.layers[1] is exact
    assert coarse.nbytes < cache.nbytes
    fresh = fed(new(to), (MOST, 20))[1].to_legacy(lengths)
    for got, want in zip(coarse.layers[0].to_legacy(lengths), fresh, strict=True):
        # From position 40 on they were exact, and units of 8 begin there.
        np.testing.assert_array_equal(got[:, :, 40:60], want[:, :, 40:60])
        assert (got[:, :, :40] != want[:, :, :40]).any()
        assert jnp.max(jnp.abs(got[:, :, :40] - want[:, :, :40])) < 0.6
    for to, error, message in (
        (jkv.dense(), TypeError, "kind that rounds"),
        (Cast("bfloat16"), TypeError, "kind that rounds"),
    ):
        with pytest.raises(error, match=message):
            cache.requantise(to)
    with pytest.raises(jkv.UnsupportedError, match=r"cache\.convert"):
        jkv.Cache((exact,), lengths, jnp.zeros(B, bool)).requantise(to)
