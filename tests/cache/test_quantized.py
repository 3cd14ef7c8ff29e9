"""Caches that round: which tokens are where, that each is rounded once, and what it weighs."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv import ops
from jkv._pytree import nbytes
from jkv.cache.protocol import Step
from jkv.cache.quantized_layer import SLACK, far_slots
from jkv.errors import NonFiniteError
from jkv.ops import AttentionSpec
from jkv.ops.codecs import Affine, Cast

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
SPEC = AttentionSpec(0.4)


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
    return layer.attend(q, k, v, Step.after(start, counts, size), SPEC)


crop = jax.jit(lambda layer, held, kept: layer.crop(held, kept))


def fed(layer, sizes, start=0):
    """The layer after chunks of these sizes, and all outputs; two shapes, two compilations."""
    outs = []
    for size in sizes:
        width = 1 if size == 1 else MOST
        out, layer = attend(layer, material(), rows(start), width, rows(size))
        outs.append(np.asarray(out)[:, :size])
        start += size
    return np.concatenate(outs, axis=1), layer


def rows(count):
    """That many in every row. Never an array that changes later: JAX may read it then."""
    return jnp.asarray(np.full(B, count, np.int32))


legacy = jax.jit(lambda layer, lengths: layer.to_legacy(lengths))


def kept(layer, lengths):
    """Keys and values as they are remembered, [B, S, K, H]."""
    return [np.swapaxes(x, 1, 2) for x in jax.device_get(legacy(layer, jnp.asarray(lengths)))]


@functools.cache
def rounded(name):
    """All of the material's keys and values, each block encoded once."""

    @functools.partial(jax.jit, static_argnums=0)
    def there_and_back(codec, x):
        blocks = jnp.arange(SLOTS // codec.block_size)
        one = codec.empty(B, K, SLOTS, H, jnp.float32)
        one = one.write_blocks(x, jnp.broadcast_to(blocks, (B, len(blocks))))
        return jnp.swapaxes(one.decode(), 1, 2)

    kind, (_, k, v) = KINDS[name], material()
    return np.asarray(there_and_back(kind.keys, k)), np.asarray(there_and_back(kind.values, v))


def remembered(name, count):
    """What must be remembered of the first `count` tokens: whole blocks, each encoded once."""
    kind = KINDS[name]
    block = max(kind.keys.block_size, kind.values.block_size)
    far = max(count - kind.recent, 0) // block * block
    exact = jax.device_get(material()[1:])
    return [
        np.concatenate([a[:, :far], b[:, far:count]], axis=1)
        for a, b in zip(rounded(name), exact, strict=True)
    ]


def holds(name, layer, count):
    for got, want in zip(kept(layer, np.full(B, count)), remembered(name, count), strict=True):
        np.testing.assert_array_equal(got[:, :count], want)


@jax.jit
def oracle(q, keys, values, positions):
    """Exact attention over all of the material, [B, S, K, H], as far as a query may look."""
    kv = ops.ContiguousKV(jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2))
    return ops.attention(q, kv, positions, SPEC, implementation="reference").out


@every_kind
@pytest.mark.parametrize("sizes", [(1,) * 40, (40,), (1, 5, 2, 7, 15, 10)], ids=len)
def test_each_unit_is_rounded_once(name, sizes):
    """Bit for bit what one encoding of each whole block makes, however the tokens came."""
    _, layer = fed(new(KINDS[name]), sizes)
    holds(name, layer, 40)


@every_kind
def test_a_step_is_attention_over_what_is_remembered(name):
    out, _ = fed(new(KINDS[name]), (1,) * 50)
    q, *exact = jax.device_get(material())
    for t in (0, 3, 20, 37, 49):
        # What a token pushes out is rounded after it has been seen, and the token itself later.
        keys, values = (
            np.concatenate([a[:, :t], b[:, t:]], axis=1)
            for a, b in zip(remembered(name, t), exact, strict=True)
        )
        want = oracle(q[:, t : t + 1], keys, values, np.full((B, 1), t))
        np.testing.assert_allclose(out[:, t : t + 1], want, atol=2e-5)


@every_kind
def test_a_chunk_sees_itself_exactly(name):
    """Nothing is rounded before its own pass is over: a first chunk is exact attention."""
    q, k, v = material()
    out, _ = fed(new(KINDS[name]), (30,))
    want = oracle(q[:, :30], k, v, np.broadcast_to(np.arange(30), (B, 30)))
    np.testing.assert_allclose(out, want, atol=2e-5)


@every_kind
@pytest.mark.parametrize("back", [1, SLACK])
def test_rolled_back_as_if_it_had_not_gone_on(name, back):
    """Up to SLACK tokens: the same tokens again leave the same bits, at any phase of a block."""
    kind = KINDS[name]
    for count in range(41, 58, 4 if kind.keys.block_size > 1 else 9):
        _, layer = fed(new(kind), (MOST, count - MOST))
        cropped = crop(layer, rows(count), rows(count - back))
        holds(name, cropped, count - back)
        _, again = fed(cropped, (back,), count - back)
        holds(name, again, count)


@every_kind
def test_rolled_back_far(name):
    """What is left are the rounded tokens: each at most a step from itself, none lost or moved."""
    kind = KINDS[name]
    _, layer = fed(new(kind), (MOST, MOST))
    for left in (0, 1, 9, 33):
        cropped = crop(layer, rows(80), rows(left))
        pairs = zip(kept(cropped, np.full(B, left)), kept(layer, np.full(B, 80)), strict=True)
        for got, whole in pairs:
            np.testing.assert_array_equal(got[:, :left], whole[:, :left])
        # Another future: it goes on as a cache that had never been longer, up to rounding.
        out, _ = fed(cropped, (1,), left)
        fresh, _ = fed(fed(new(kind), (left,))[1] if left else new(kind), (1,), left)
        assert np.max(np.abs(out - fresh)) < 1.0
        assert np.all(np.isfinite(out))


@every_kind
def test_rows_of_different_lengths(name):
    """Rows at different phases of their blocks are each as if alone."""
    kind = KINDS[name]
    layer, lengths = new(kind), np.zeros(B, np.int32)
    for counts in ((20, 3), (0, 20), (1, 1), (1, 0), (7, 11), (1, 1)):
        size = 1 if max(counts) == 1 else MOST
        counts = np.asarray(counts, np.int32)
        _, layer = attend(layer, material(), jnp.asarray(lengths), size, jnp.asarray(counts))
        lengths = lengths + counts  # not in place: JAX may still be reading it
    for b, n in enumerate(lengths.tolist()):
        for got, want in zip(kept(layer, lengths), remembered(name, n), strict=True):
            np.testing.assert_array_equal(got[b, :n], want[b])


@every_kind
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_not_a_number_is_told(name, bad):
    kind = KINDS[name]
    q, k, v = material()
    _, clean = fed(new(kind), (10,))
    assert not clean.nonfinite.any()
    for what in ("k", "v"):
        dirty = (
            (q, k.at[1, 4, 0, 3].set(bad), v) if what == "k" else (q, k, v.at[1, 4, 1, 2].set(bad))
        )
        _, layer = attend(new(kind), dirty, jnp.zeros(B, jnp.int32), MOST, jnp.array([10, 10]))
        assert layer.nonfinite.tolist() == [False, True]
        # Padding may be anything.
        _, layer = attend(new(kind), dirty, jnp.zeros(B, jnp.int32), MOST, jnp.array([10, 4]))
        assert layer.nonfinite.tolist() == [False, False]
    cache = jkv.Cache(
        layers=(clean, layer.__class__(**{**vars(layer), "nonfinite": jnp.array([False, True])})),
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
        (lambda: jkv.quantized("int4"), "bits='int4'; expected 8, 4 or 2"),
        (lambda: jkv.quantized(key_bits=0), "bits=0"),
        (lambda: jkv.quantized(bits=4, group=48), "group"),
        (lambda: jkv.quantized(bits=4, key_axis="row"), "axis"),
        (lambda: jkv.quantized(bits=4, residual=-1), "quantized got residual=-1"),
        (lambda: jkv.fp8(residual=1.5), r"fp8 got residual=1\.5"),
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
        for recent, block in ((0, 1), (0, 64), (128, 64), (5, 8)):
            kind = (
                jkv.quantized(bits=4, residual=recent, group=block) if block > 1 else KINDS["int8"]
            )
            layer = jax.eval_shape(lambda kind=kind, n=slots: kind.init(1, n, 1, 4, jnp.float32))
            assert layer.capacity == slots
            block = max(kind.keys.block_size, kind.values.block_size)
            assert (
                far_slots(slots, kind.recent, block) >= max(slots - kind.recent, 0) // block * block
            )


def test_requantise():
    """Exact tokens are rounded once, those that were rounded a second time; exact layers stay."""
    kind = jkv.quantized(bits=8, residual=20)
    _, layer = fed(new(kind), (MOST, 20))
    exact = jkv.dense().init(B, SLOTS, K, H, jnp.float32)
    lengths = jnp.full((B,), 60)
    cache = jkv.Cache((layer, exact), lengths, jnp.zeros(B, bool))
    to = jkv.quantized(bits=4, residual=4, group=8)
    coarse = jax.jit(lambda cache: cache.requantise(to))(cache)
    chex.assert_trees_all_equal(coarse.layers[1], exact)
    assert coarse.nbytes < cache.nbytes
    fresh = kept(fed(new(to), (MOST, 20))[1], lengths)
    for got, want in zip(kept(coarse.layers[0], lengths), fresh, strict=True):
        # From position 40 on they were exact, and blocks of 8 begin there.
        np.testing.assert_array_equal(got[:, 40:60], want[:, 40:60])
        assert (got[:, :40] != want[:, :40]).any()
        assert np.max(np.abs(got[:, :40] - want[:, :40])) < 0.6
    for to, error, message in (
        (jkv.dense(), TypeError, "kind that rounds"),
        (Cast("bfloat16"), TypeError, "kind that rounds"),
    ):
        with pytest.raises(error, match=message):
            cache.requantise(to)
    with pytest.raises(jkv.UnsupportedError, match=r"cache\.convert"):
        jkv.Cache((exact,), lengths, jnp.zeros(B, bool)).requantise(to)
