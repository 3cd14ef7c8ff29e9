"""The kernels for TPUs, in Pallas' interpreter on a CPU: against an oracle, all else is poison."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jkv import ops
from jkv._pytree import replace
from jkv.errors import UnsupportedError
from jkv.ops import dispatch
from jkv.ops.attention import mosaic_tpu
from jkv.ops.attention.weights import attention_weights
from jkv.ops.codecs import Affine, Cast, Float8, Sparse
from jkv.ops.masks import AttentionSpec
from jkv.ops.mosaic_tpu import flash, operands
from jkv.ops.mosaic_tpu import weights as tpu_weights
from jkv.ops.mosaic_tpu import write as mosaic_write
from jkv.ops.pages import TpuPages, _write_by_kernel, empty, write_pages
from jkv.ops.write import write, write_last, write_runs
from tests.ops import calls
from tests.ops.test_attention import oracle

pytestmark = pytest.mark.slow  # a minute in the interpreter: once is enough, on one version of JAX

BLOCK, SLOTS, B = 128, 320, 2  # two blocks and half of one
EDGES = ([0, 1], [BLOCK - 1, BLOCK], [BLOCK + 1, SLOTS])
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
NAN, NAN16 = np.nan, 0x7FC0  # and its bits in bfloat16
attention = paged = jax.jit(
    calls.by(mosaic_tpu.attention), static_argnames=(*calls.SPEC, "interpret")
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setitem(flash.BLOCK, "bytes", 1)


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


def cut(x, page, spare=3):
    """Slots [B, K, S, H] as pages in any order, some of them nobody's, and the table."""
    batch, heads, slots, dim = x.shape
    count = slots // page
    pages = np.full((batch * count + spare, heads, page, dim), NAN, np.float32)
    table = np.random.default_rng(0).permutation(len(pages))[: batch * count].reshape(batch, count)
    pages[table.reshape(-1)] = (
        x.reshape(batch, heads, count, page, dim).swapaxes(1, 2).reshape(-1, heads, page, dim)
    )
    return pages, table.astype(np.int32)


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


@pytest.mark.usefixtures("interpreted")
def test_pages_are_written_by_the_kernel():
    """Into their places, and into none where there is none."""
    with dispatch.target("tpu"):
        pool, _ = empty((Affine(4), Affine(4)), 5, 2, 16, 64, "float32")
    x = np.random.default_rng(0).normal(size=(3, 2, 16, 64)).astype(np.float32)
    new, at = pool.to_layout(encoded(Affine(4), x)), jnp.asarray([3, -1, 0])
    got, want = _write_by_kernel(pool, new, at), write_pages(pool, new, at)
    for a, b, c in zip(*map(jax.tree.leaves, (got, want, pool)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.any(a != c)


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


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels in the place of what runs on a CPU."""
    run = functools.partial(mosaic_tpu.attention, interpret=True)
    monkeypatch.setattr(mosaic_tpu, "attention", run)
    for name in ("write_run", "write_pages"):
        put = functools.partial(getattr(mosaic_write, name), interpret=True)
        monkeypatch.setattr(mosaic_write, name, put)
    monkeypatch.setattr(dispatch, "platforms", lambda: ("tpu",))


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


BUFFERS = [
    ((B, 2, 64, 150), 1, "float32"),
    ((B, 9, 80, 130), 1, "bfloat16"),
    ((B, 16, 2, 200), 1, "uint16"),
    ((B, 8, 300), 1, "int16"),
    ((B, 4, 16, 256), 64, "uint8"),
    ((B, 4, 800), 80, "uint16"),
]


@pytest.mark.parametrize(("shape", "run", "dtype"), BUFFERS)
def test_writes(shape, run, dtype):
    """One run of each row, none where there is none; the rest keeps every bit."""
    rng = np.random.default_rng(0)
    held, new = (
        jnp.asarray(rng.normal(size=(*shape[:-1], n)) * 50, dtype) for n in (shape[-1], run)
    )
    runs = shape[-1] // run
    put = jax.jit(functools.partial(mosaic_write.write_run, interpret=True))
    for at in ([runs - 1, -1], [runs, 1]):
        want = np.array(held)
        for b, i in enumerate(at):
            if 0 <= i < runs:
                want[b, ..., i * run : (i + 1) * run] = new[b]
        got = put(held, new, jnp.asarray(at, jnp.int32))
        np.testing.assert_array_equal(np.asarray(got), want)


def test_writes_do_not_race():
    held, new = jnp.zeros((B, 2, 64, 256)), jnp.ones((B, 2, 64, 1))
    got = mosaic_write.write_run(held, new, jnp.asarray([255, 3]), interpret=RACES)
    assert np.asarray(got).sum() == B * 2 * 64


@pytest.mark.usefixtures("interpreted")
def test_writes_are_those_of_the_cpu(monkeypatch):
    """What `write` makes of its kernels is what it makes without them."""
    rng = np.random.default_rng(0)
    k, steps, packed, new = (
        jnp.asarray(rng.normal(size=s) * 50, jnp.float32)
        for s in ((B, 2, 192, 64), (B, 2, 1, 192), (B, 2, 8, 192), (B, 128, 2, 64))
    )
    at = jnp.asarray([[2, 0], [-1, 1]])

    def both():
        turned = jnp.moveaxis(new.reshape(B, 2, 64, 2, 64)[..., :8], 2, -1)
        return (
            write(k, new[:, :2], at),
            write(k, new, at, 64),
            write_last(steps, new[:, :2, :, :1], at),
            write_runs(packed, turned, at),
        )

    want = both()
    monkeypatch.setattr(dispatch, "platforms", lambda: ("tpu", "cpu"))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, tpu, **_: tpu(*a))
    for got, wanted in zip(both(), want, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_parts_of_numbers_are_all_of_them():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 1e3
    parts = jax.jit(operands.split_bf16, static_argnums=1)(x, 3)
    for part in parts:
        np.testing.assert_array_equal(part.astype(jnp.bfloat16).astype(np.float32), part)
    np.testing.assert_array_equal(np.sum(np.asarray(parts, np.float64), 0), x.astype(np.float64))


def test_all_floats_of_8_bits():
    codes = jnp.arange(256, dtype=jnp.uint8)
    want = np.asarray(jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), np.float32)
    real = ~np.isnan(want)  # never stored
    got = np.asarray(operands.from_float8(codes), np.float32)
    np.testing.assert_array_equal(got[real], want[real])


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def form(codec, slots=256, dim=64):
    return jax.eval_shape(lambda: codec.empty(1, 2, slots, dim, "float32"))


KEYS = shape(1, 2, 256, 64)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "why"),
    [
        (shape(1, 17, 2, 64), KEYS, KEYS, {}, "17 new tokens"),
        (shape(1, 1, 34, 64), KEYS, KEYS, {}, "17 query heads"),
        (shape(1, 1, 2, 8), *[shape(1, 2, 256, 8)] * 2, {}, "head dimension of 8"),
        (shape(1, 1, 2, 64), *[shape(1, 2, 100, 64)] * 2, {}, "100 slots"),
        (shape(1, 1, 2, 64, dtype="float16"), KEYS, KEYS, {}, "queries in float16"),
        (shape(1, 1, 2, 64), shape(1, 2, 256, 64, dtype="bfloat16"), KEYS, {}, "for queries"),
        (shape(1, 1, 2, 64), form(Cast("bfloat16")), KEYS, {}, "form of CastArray"),
        (shape(1, 1, 2, 64), KEYS, form(Sparse(0.5)), {}, "form of SparseArray"),
        (shape(1, 1, 2, 64), KEYS, form(INT4[0]), {}, "a scale per channel"),
        (shape(1, 1, 2, 64), form(Affine(4, "channel", 16)), KEYS, {}, "blocks of 16"),
        (shape(1, 1, 2, 64), KEYS, form(Affine(4, "token", 4)), {}, "16 groups"),
    ],
)
def test_what_is_not_for_the_kernel_says_why(q, k, v, options, why):
    chosen = calls.explain(q, k, v, platform="tpu", **options)
    assert chosen.name == "xla"
    assert why in chosen.refused["mosaic_tpu"]


def test_what_is_for_the_kernel():
    q = shape(1, 1, 2, 64)
    for k, v in ((KEYS, KEYS), (form(Affine(8)), form(Float8())), [form(c) for c in INT4]):
        assert calls.explain(q, k, v, platform="tpu").name == "mosaic_tpu"


@pytest.mark.parametrize(
    ("rows", "dim", "slots", "dtype", "bound"),
    [(1, 64, 300, "float32", 1e-5), (4, 128, 700, "bfloat16", 1e-2), (9, 80, 128, "float32", 1e-5)],
)
def test_the_two_products_of_weights(monkeypatch, rows, dim, slots, dtype, bound):
    """Blocks that the slots do not fill, poison where there is no weight."""
    monkeypatch.setattr(tpu_weights, "BYTES", 2**15)  # more than one block
    make = np.random.default_rng(0)
    q, k, v = (make.standard_normal((3, n, dim)) for n in (rows, slots, slots))
    w = make.random((3, rows, slots)) * (np.arange(slots) % 3 > 0)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    got = jax.jit(tpu_weights.products, static_argnames="interpret")(q, k, interpret=True)
    want = np.einsum("zrh,zsh->zrs", *(np.asarray(x, np.float64) for x in (q, k)))
    np.testing.assert_allclose(got, want, atol=bound * np.abs(want).max())
    held = jnp.where((jnp.arange(slots) % 3 > 0)[None, :, None], v, jnp.asarray(np.nan, dtype))
    summed = jax.jit(tpu_weights.sums, static_argnames="interpret")
    got = summed(jnp.asarray(w, jnp.float32), held, interpret=True)
    want = np.einsum("zrs,zsh->zrh", w, np.asarray(v, np.float64))
    np.testing.assert_allclose(got, want, atol=bound * np.abs(want).max())


def test_weights_are_by_kernels_where_there_are_some():
    def names(new, dim, slots):
        q, held = shape(1, new, 4, dim), shape(1, 2, slots, dim)
        at = shape(1, new, dtype="int32"), shape(1, 2, slots, dtype="int32")

        def call(q, held, positions, places):
            part = (held, held, places)
            return attention_weights(q, [part], positions, AttentionSpec(1.0))

        with dispatch.target("tpu"), dispatch.record() as found:
            jax.eval_shape(call, q, held, *at)
        return found

    assert names(1, 64, 256) == ["mosaic_tpu"]
    assert names(1, 64, 96) == names(1, 32, 256) == ["xla"]


@pytest.mark.parametrize(
    ("codecs", "least"), [((Affine(8), Affine(8)), 128), ((Float8(), Float8()), 128), (INT4, 128)]
)
def test_pages_of_codes(codecs, least):
    """What is said of small pages is so: those of that size are read."""

    def chosen(page):
        pages = [form(codec, page) for codec in codecs]
        where: Any = {"lengths": shape(1), "platform": "tpu"}
        return calls.explain(shape(1, 1, 2, 64), *pages, shape(1, 8), **where)

    assert f"in pages of multiples of {least}" in chosen(least // 2).refused["mosaic_tpu"]
    assert chosen(least).name == "mosaic_tpu"


@pytest.mark.parametrize(
    ("page", "dim", "table", "why"),
    [(16, 64, 8, "multiples of 128"), (4, 128, 8, "multiples of 8"), (16, 128, 2**18, "a block")],
)
def test_pages_that_are_not_for_the_kernel(page, dim, table, why):
    pages = shape(9, 2, page, dim)
    call = calls.operands(
        shape(1, 1, 2, dim), pages, pages, shape(1, table), positions=shape(1, 1), lengths=shape(1)
    )
    assert why in str(mosaic_tpu.unsupported(*call))
    with pytest.raises(UnsupportedError, match="mosaic_tpu"):
        ops.attention(*call, implementation="mosaic_tpu")
