"""Encoded keys and values by themselves: how far they are off, and products with them."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkv import ops
from jkv._pytree import nbytes
from jkv.ops.codecs import Affine, Cast, Codec, Encoded, Float8, Sparse, all_finite
from tests.ops import calls

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

B, K, S, H = 2, 2, 96, 10  # ten channels are no whole groups of three or four, and no whole bytes
CODECS = {
    "int8": Affine(8),
    "int8 groups": Affine(8, "token", 4),
    "int8 channel": Affine(8, "channel", 32),
    "int4": Affine(4),
    "int4 groups": Affine(4, "token", 3),
    "int4 channel": Affine(4, "channel", 16),
    "int2": Affine(2, "token", 4),
    "int2 channel": Affine(2, "channel", 8),
    "fp8": Float8(),
    "bf16": Cast("bfloat16"),
    "sparse": Sparse(0.5),
    "mixed": Sparse(0.5, Affine(8)),
}
every_codec = pytest.mark.parametrize("name", CODECS)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def put(codec, before, tokens, at, run=1):
    """With tokens as the blocks `at`, and all of it decoded, [B, S, K, H]."""
    if before is None:
        before = codec.empty(B, K, S, H, jnp.float32)
    after = before.write_blocks(tokens, at, run)
    return after, jnp.swapaxes(after.decode(), 1, 2)


def filled(name, tokens):
    blocks = S // CODECS[name].block_size
    return put(CODECS[name], None, tokens, np.broadcast_to(np.arange(blocks), (B, blocks)))


def allowed(codec, x):
    """How far a number may be off: half the step of its group, from the numbers themselves."""
    if isinstance(codec, Affine):
        axis, size = (1, codec.group) if codec.axis == "channel" else (3, codec.group or x.shape[3])
        bound = np.empty_like(x)
        for i in range(0, x.shape[axis], size):
            part = (slice(None),) * axis + (slice(i, i + size),)
            span = x[part].max(axis, keepdims=True) - x[part].min(axis, keepdims=True)
            bound[part] = span / (2**codec.bits - 1) / 2
        return bound * (1 + 2.0**-7) + np.abs(x) * 2.0**-15
    if isinstance(codec, Float8):
        top = np.abs(x).max(3, keepdims=True)
        return np.abs(x) * 2.0**-4 + top / 448 * 2.0**-9
    return np.abs(x) * 2.0**-8


@every_codec
def test_half_a_step_in_every_group(name):
    codec = CODECS[name]
    x = draw(B, S, K, H) * 3 + 5
    x[0, 3, 0] *= 1000
    made, found = filled(name, x)
    assert isinstance(codec, Codec)
    assert isinstance(made, Encoded)
    assert made.shape == (B, K, S, H)
    assert made.block_size == codec.block_size
    if not isinstance(codec, Sparse):
        assert np.all(np.abs(found - x) <= allowed(codec, x))
        return
    kept = np.sort(np.argsort(-np.abs(x), axis=-1, kind="stable")[..., : H // 2], axis=-1)
    held = np.take_along_axis(x, kept, axis=-1)
    want, bound = np.zeros_like(x), np.zeros_like(x)
    np.put_along_axis(want, kept, held, axis=-1)
    if codec.inner:
        np.put_along_axis(bound, kept, allowed(codec.inner, held), axis=-1)
    assert np.all(np.abs(found - want) <= bound)


START, SIZE = 32, 64


@jax.jit
def read(made, start, q, w, used):
    """Products with the slots from `start`, for a few queries and for many."""
    made = made.flatten_heads()
    many = [jnp.tile(x, (1, 9, 1)) for x in (q, w)]
    return [
        (made.scores(q, start, SIZE), made.weighted_sum(w, start, used))
        for q, w in ((q, w), tuple(many))
    ]


def spoiled(made, blocks):
    """Anything in the bytes of these blocks of both rows, and all bits set in half of them."""
    rng = np.random.default_rng(3)

    def spoil(leaf, axis):
        leaf = np.moveaxis(np.array(leaf), axis, 0)
        per = len(leaf) // (S // made.block_size)
        dirt = rng.integers(0, 256, (*leaf.shape, leaf.dtype.itemsize), dtype=np.uint8)
        dirt[:, 0] = 0xFF  # NaN, where these are floats
        dirt = dirt.view(leaf.dtype)[..., 0]
        for block in blocks:
            leaf[block * per : (block + 1) * per] = dirt[block * per : (block + 1) * per]
        return jnp.asarray(np.moveaxis(leaf, 0, axis))

    return made.map_slots(spoil)


@every_codec
def test_products(name):
    """Those of what is decoded, from any block on; what lies in other slots has no part in them."""
    made, decoded = filled(name, draw(B, S, K, H, seed=1) + 1)
    lines = np.swapaxes(decoded, 1, 2).reshape(B * K, S, H).astype(float)
    q, w = draw(B * K, 2, H, seed=2), draw(B * K, 2, SIZE, seed=3)
    clean = {}
    for start in (0, START):
        used = np.ones((B * K, SIZE), bool)
        clean[start] = jax.device_get(read(made, start, q, w, used))
        part = lines[:, start : start + SIZE]
        for scores, sums in clean[start]:
            times = scores.shape[1] // 2
            want = np.tile(np.einsum("zrh,zsh->zrs", q, part), (1, times, 1))
            np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-4)
            want = np.tile(np.einsum("zrs,zsh->zrh", w, part), (1, times, 1))
            np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-4)
    # Slots past the first 32 are empty: of what is read from slot 32 on, all; else the second half.
    used = np.broadcast_to(np.arange(SIZE) < START, (B * K, SIZE))
    dirty = spoiled(made, range(START // made.block_size, S // made.block_size))
    weights = np.where(used[:, None], w, 0)
    before = jax.device_get(read(made, 0, q, weights, used))
    after = jax.device_get(read(dirty, 0, q, weights, used))
    for (scores, sums), (other, others) in zip(before, after, strict=True):
        np.testing.assert_array_equal(scores[..., :START], other[..., :START])
        np.testing.assert_array_equal(sums, others)
        assert not np.array_equal(scores[..., START:], other[..., START:])


@every_codec
def test_put_writes_what_it_is_told_and_nothing_else(name):
    """A block is rounded once: what is put elsewhere later leaves its bits alone."""
    codec = CODECS[name]
    x, y = draw(B, S, K, H), draw(B, S, K, H, seed=1) * 9
    block, blocks = codec.block_size, S // codec.block_size
    first, a = filled(name, x)
    # New blocks in turn to block 1 in the first row, to 0 in the second, and to none that exist.
    at = np.full((B, blocks), -1, np.int32)
    at[0, 2], at[1, 0], at[1, 1] = 1, 0, blocks
    _, b = put(codec, first, y, at)
    _, alone = filled(name, y)
    want = np.array(a)
    want[0, block : 2 * block] = alone[0, 2 * block : 3 * block]
    want[1, :block] = alone[1, :block]
    np.testing.assert_array_equal(b, want)


@pytest.mark.parametrize("name", ["int8", "int4 channel"])
def test_runs_of_blocks_are_written_together(name):
    codec = CODECS[name]
    x, y = draw(B, S, K, H), draw(B, S, K, H, seed=1)
    run = 16 // codec.block_size if codec.block_size < 16 else 2
    count = S // codec.block_size // run
    at = np.full((B, count), -1, np.int32)
    at[0, 1], at[1, 0] = 0, 2
    _, found = put(codec, filled(name, x)[0], y, at, run)
    (_, a), (_, b), width = filled(name, x), filled(name, y), run * codec.block_size
    want = np.array(a)
    want[0, :width] = b[0, width : 2 * width]
    want[1, 2 * width : 3 * width] = b[1, :width]
    np.testing.assert_array_equal(found, want)


@every_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_shows(name, bad):
    """As NaN (an infinity may stay one), in its group and in no other."""
    codec = CODECS[name]
    x = draw(B, S, K, H)
    clean = np.asarray(filled(name, x)[1])
    dirty = x.copy()
    dirty[0, 1, 1, 2] = bad
    found = np.asarray(filled(name, dirty)[1])
    assert not np.isfinite(found[0, 1, 1, 2])
    own = np.zeros(x.shape, bool)
    if codec.block_size > 1:
        own[0, : codec.block_size, 1, 2] = True
    else:
        own[0, 1, 1] = True
    assert np.all(np.isfinite(found[~own]))
    np.testing.assert_array_equal(found[~own], clean[~own])


def test_all_finite():
    x = draw(3, 4, K, H)
    x[1, 3, 0, 0], x[2, 0, 1, 1] = np.nan, np.inf
    real = np.ones((3, 4, 1, 1), bool)
    assert all_finite(jnp.asarray(x), jnp.asarray(real)).tolist() == [True, False, False]
    padded = real.copy()
    padded[1, 3] = False  # which may be anything
    assert all_finite(jnp.asarray(x), jnp.asarray(padded)).tolist() == [True, True, False]


def test_a_large_channel_leaves_others_alone():
    """Why keys are grouped per channel (KIVI), and values per token."""
    x = draw(B, S, K, H)
    x[..., 2] += 1000
    for name, best, worst in (("int4 channel", 0.1, 0.3), ("int4", 1.5, np.inf)):
        error = np.abs(filled(name, x)[1] - x)
        assert best < np.delete(error, 2, axis=3).max() < worst


def per_token(codec, dim=128, dtype=jnp.bfloat16):
    return nbytes(jax.eval_shape(lambda: codec.empty(1, 1, 128, dim, dtype))) / 128


def test_bytes_by_hand():
    """Of a token of 128 channels; in bfloat16 it takes 256."""
    for codec, want in {
        Affine(8): 128 + 2 + 2,
        Affine(8, "token", 64): 128 + 2 * 4,
        Affine(4, "token", 64): 64 + 2 * 4,
        Affine(2, "token", 64): 32 + 2 * 4,
        # 128 channels with 4 bytes each, for 64 tokens
        Affine(8, "channel", 64): 128 + 8,
        Affine(4, "channel", 64): 64 + 8,
        Affine(2, "channel", 64): 32 + 8,
        Affine(2, "channel", 128): 32 + 4,
        Float8(): 128 + 2,
        Cast("bfloat16"): 256,
        Sparse(0.25): 32 * (2 + 1),
        Sparse(0.25, Affine(8)): 32 * (1 + 1) + 4,
        Sparse(0.25, Affine(4)): 32 // 2 + 32 + 4,
    }.items():
        assert per_token(codec) == want, codec
    assert per_token(Sparse(0.25), dtype=jnp.float32) == 32 * (4 + 1)
    assert per_token(Sparse(0.25), dim=512) == 128 * (2 + 2)  # indices of 16 bits
    assert per_token(Affine(4), dim=7) == 4 + 4
    assert per_token(Affine(4, "token", 64), dim=80) == 40 + 2 * 4  # a short last group


@functools.partial(jax.jit, static_argnames=("implementation", "window", "sinks", "softcap"))
def attention(q, k, v, held, **options):
    positions = jnp.asarray(np.array([[S - 6, S - 5], [-1, 40]], np.int32))
    return calls.attention(q, k, v, positions=positions, slot_positions=held, scale=0.7, **options)


@pytest.mark.parametrize("name", ["int8 groups", "int4 channel", "int2", "fp8", "mixed"])
def test_attention_under_every_mask(name):
    """Slots in any order, a window, sinks and a soft cap: the reference over what is decoded."""
    made = [filled(name, draw(B, S, K, H, seed=s) + s) for s in (1, 2)]
    q = draw(B, 2, K * 3, H, seed=5)
    order = np.random.default_rng(0).permutation(S)
    held = np.stack([order, np.where(order < 50, order, -1)]).astype(np.int32)
    options = {"window": 30, "sinks": 3, "softcap": 2.0}
    found = attention(q, made[0][0], made[1][0], held, **options)
    decoded = [np.swapaxes(x, 1, 2) for _, x in made]
    want = attention(q, *decoded, held, **options, implementation="reference")
    np.testing.assert_allclose(found.out, want.out, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found.lse, want.lse, atol=1e-5, rtol=1e-5)
    assert np.all(np.isneginf(found.lse[1, 0]))
    assert np.all(np.isfinite(found.lse[1, 1]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Affine(3), "bits=3; expected 8, 4 or 2"),
        (lambda: Affine(True), "bits=True"),
        (lambda: Affine(4, "head"), "axis='head'; expected 'token' or 'channel'"),
        (lambda: Affine(4, "channel"), "group=None; expected an integer"),
        (lambda: Affine(4, "channel", 48), "group=48 .* power of two, 2 to 128"),
        (lambda: Affine(4, "channel", 256), "power of two"),
        (lambda: Affine(4, "channel", 1), "power of two"),
        (lambda: Affine(4, "token", 0), "group=0; expected an integer of at least 1"),
        (lambda: Affine(4, "token", 2.5), "group=2.5"),
        (lambda: Sparse(0), "keep=0; expected a share above 0 and at most 1"),
        (lambda: Sparse(1.5), "keep=1.5"),
        (lambda: Sparse("half"), "keep='half'"),
        (lambda: Sparse(0.5, Affine(4, "channel", 64)), "expected an Affine codec per token"),
        (lambda: Cast("int8"), "dtype='int8'; expected 'bfloat16'"),
        (lambda: Cast("float8_e4m3fn"), "which Float8 has"),
        (lambda: Cast("nonsense"), "dtype='nonsense'; expected one such as"),
        (lambda: Affine(4, "channel", 64).empty(1, 1, 100, 8, jnp.float32), "100 slots .* 64 at a"),
        (lambda: Float8().empty(1, 1, 0, 8, jnp.float32), "0 slots"),
    ],
)
def test_what_there_is_no_form_for(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_former_name_says_what_it_is_now():
    with pytest.raises(ImportError, match=r"jkv\.ops\.encoded is jkv\.ops\.codecs now"):
        importlib.import_module("jkv.ops.encoded")
    with pytest.raises(AttributeError, match=r"it is jkv\.ops\.order\.depend_on now"):
        ops.after  # noqa: B018
