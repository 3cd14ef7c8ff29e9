"""Attention over a cache: both implementations against an oracle in float64, at every edge."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkv import ops
from jkv.errors import UnsupportedError
from jkv.ops.attention import xla
from jkv.ops.attention.xla import BLOCK
from jkv.ops.masks import AttentionSpec
from tests import quick
from tests.ops import calls

# Two buffers: one of several blocks whose last is not full, one of a single block.
LONG, SHORT = 3 * BLOCK + 16, 48
IMPLEMENTATIONS = ("xla", "reference")  # that run on a CPU
attention = jax.jit(calls.attention, static_argnames=calls.STATIC)


def oracle(q, k, v, positions, held, scale=None, window=None, sinks=0, softcap=None):
    """One query at a time, in float64: out [B, T, N, H] and lse [B, T, N]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, new, heads, dim = q.shape
    groups = heads // k.shape[1]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    scale = dim**-0.5 if scale is None else scale
    for b, t in np.ndindex(batch, new):
        p = positions[b, t]
        slots = [
            s
            for s, at in enumerate(held[b])
            if 0 <= at <= p and (window is None or p - at < window or at < sinks)
        ]
        if not slots:
            continue
        for n in range(heads):
            scores = k[b, n // groups, slots] @ q[b, t, n] * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, n // groups, slots] / weights.sum()
            lse[b, t, n] = scores.max() + np.log(weights.sum())
    return out, lse


def draw(batch, new, kv_heads, groups, dim, slots, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, new, kv_heads * groups, dim)) * 2
    k, v = rng.normal(size=(2, batch, kv_heads, slots, dim))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def step(lengths, new, counts=None):
    """Positions [B, T] of the last `counts` of each row's `lengths` tokens."""
    lengths = np.asarray(lengths)
    counts = np.minimum(lengths, new) if counts is None else np.asarray(counts)
    offsets = np.arange(new)[None]
    return np.where(offsets < counts[:, None], (lengths - counts)[:, None] + offsets, -1)


def filled(lengths, slots):
    at = np.arange(slots)[None]
    return np.where(at < np.asarray(lengths)[:, None], at, -1)


def close(part, want, bound=1e-5):
    """Relative to the values, which are of order 1: a wrong slot is off by a tenth and more."""
    out, lse = want
    assert part.out.dtype == part.lse.dtype == jnp.float32
    assert np.max(np.abs(np.asarray(part.out, np.float64) - out)) <= bound * max(
        1, np.abs(out).max()
    )
    np.testing.assert_array_equal(np.isneginf(part.lse), np.isneginf(lse))
    seen = ~np.isneginf(lse)
    worst = np.abs(np.asarray(part.lse, np.float64)[seen] - lse[seen])
    assert np.max(worst, initial=0) <= bound * max(1, np.abs(lse[seen]).max(initial=0))


EDGES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, LONG - 1, LONG]


@pytest.mark.parametrize(
    ("window", "sinks", "softcap", "implementation"),
    [
        (None, 0, None, "xla"),
        (None, 0, 3.0, "reference"),
        (1, 0, None, "xla"),
        (BLOCK - 1, 0, None, "xla"),
        (BLOCK, 0, None, "xla"),
        (BLOCK, 0, None, "reference"),
        (BLOCK + 1, 0, 3.0, "xla"),
        (20, 4, None, "xla"),
        (20, 4, 3.0, "reference"),
        (BLOCK + 1, BLOCK + 1, None, "xla"),
        (10 * LONG, 0, None, "xla"),
    ],
)
def test_lengths_at_the_edges_of_blocks(window, sinks, softcap, implementation):
    q, k, v = draw(len(EDGES), 2, 1, 4, 8, LONG)
    positions = step(EDGES, 2)
    options = {"window": window, "sinks": sinks, "softcap": softcap}
    part = attention(
        q,
        k,
        v,
        positions=jnp.asarray(positions),
        lengths=jnp.asarray(EDGES),
        implementation=implementation,
        **options,
    )
    close(part, oracle(q, k, v, positions, filled(EDGES, LONG), **options))


@pytest.mark.parametrize(
    ("new", "kv_heads", "groups", "dim", "slots"),
    [
        (1, 2, 1, 64, LONG),  # one query row: repeated to two on some devices
        (1, 1, 8, 80, LONG),
        (2, 3, 1, 7, LONG),
        (16, 2, 4, 8, LONG),
        (64, 1, 4, 8, LONG),
        (3, 1, 1, 1, LONG),
        (1, 2, 8, 64, SHORT),
        (16, 2, 1, 5, SHORT),
        (64, 1, 1, 8, BLOCK),  # as many slots as one block has, and one more
        (64, 1, 1, 8, BLOCK + 1),
        (1, 1, 1, 8, 1),
    ],
)
def test_shapes(new, kv_heads, groups, dim, slots):
    check_shape(new, kv_heads, groups, dim, slots, jnp.float32)


@pytest.mark.parametrize(
    ("new", "kv_heads", "groups", "dim", "slots"),
    [(1, 2, 1, 64, LONG), (16, 2, 4, 8, LONG), (2, 1, 8, 80, SHORT)],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(new, kv_heads, groups, dim, slots, dtype):
    check_shape(new, kv_heads, groups, dim, slots, dtype)


def check_shape(new, kv_heads, groups, dim, slots, dtype):
    lengths = [slots, max(slots - 1, 0), min(3, slots), 0]
    q, k, v = draw(4, new, kv_heads, groups, dim, slots, dtype)
    positions = step(lengths, new)
    part = attention(
        q, k, v, positions=jnp.asarray(positions), lengths=jnp.asarray(lengths), window=40
    )
    bound = 1e-5 if dtype == jnp.float32 else 1e-2
    want = oracle(q, k, v, positions, filled(lengths, slots), window=40)
    close(part, want, bound)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("slots", [SHORT, LONG])
def test_slots_in_any_order_with_holes(implementation, slots):
    """What eviction and rings leave: positions in no order, empty slots between them."""
    rng = np.random.default_rng(5)
    q, k, v = draw(3, 4, 2, 2, 8, slots)
    held = np.stack([rng.permutation(slots) for _ in range(3)])
    held[rng.random(held.shape) < 0.4] = -1
    positions = np.array([[slots - 4, slots - 3, slots - 2, -1], [0, 1, 2, 3], [9, -1, -1, -1]])
    options = {"window": 30, "sinks": 2}
    arrays = {"positions": jnp.asarray(positions), "slot_positions": jnp.asarray(held)}
    part = attention(q, k, v, **arrays, **options, implementation=implementation)
    close(part, oracle(q, k, v, positions, held, **options))
    # Only the first slots of a row count, whatever the rest claims to hold.
    lengths = np.array([slots // 2, slots, 1])
    part = attention(
        q, k, v, **arrays, lengths=jnp.asarray(lengths), **options, implementation=implementation
    )
    cut = np.where(np.arange(slots)[None] < lengths[:, None], held, -1)
    close(part, oracle(q, k, v, positions, cut, **options))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("slots", [SHORT, LONG])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_unused_slots_may_hold_anything(implementation, slots, dtype):
    """Bits, not closeness: what is not seen has no influence at all."""
    lengths = np.array([slots - 5, 1, 0, slots // 2])
    q, k, v = draw(4, 3, 2, 2, 8, slots, dtype)
    positions = jnp.asarray(step(lengths, 3, counts=[3, 1, 0, 2]))
    run = functools.partial(
        attention,
        q,
        positions=positions,
        lengths=jnp.asarray(lengths),
        implementation=implementation,
    )
    unused = jnp.asarray(filled(lengths, slots) < 0)[:, None, :, None]
    clean = run(jnp.where(unused, 0, k), jnp.where(unused, 0, v))
    assert jnp.isfinite(clean.out).all()
    for poison in (jnp.nan, jnp.inf, -jnp.inf, 6e4):
        part = run(
            jnp.where(unused, poison, k).astype(dtype), jnp.where(unused, poison, v).astype(dtype)
        )
        np.testing.assert_array_equal(part.out, clean.out)
        np.testing.assert_array_equal(part.lse, clean.lse)
    # The twin that must differ: the same poison where it is seen.
    seen = run(k.at[0, 0, 0].set(jnp.nan), v)
    assert not jnp.isfinite(seen.out[0]).all()
    np.testing.assert_array_equal(seen.out[1:], clean.out[1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_padding_are_zero(implementation):
    q, k, v = draw(2, 2, 1, 2, 8, LONG)
    part = attention(
        q,
        k,
        v,
        positions=jnp.full((2, 2), -1),
        lengths=jnp.array([LONG, 0]),
        implementation=implementation,
    )
    assert (part.out == 0).all()
    assert jnp.isneginf(part.lse).all()


@pytest.mark.parametrize("cut", [1, BLOCK, BLOCK + 3, LONG - 1])
def test_two_halves_merge_to_the_whole(cut):
    q, k, v = draw(3, 2, 2, 2, 8, LONG)
    lengths = np.array([LONG, cut, cut + 1])
    positions = jnp.asarray(step(lengths, 2))
    held = jnp.asarray(filled(lengths, LONG))
    whole = attention(q, k, v, positions=positions, lengths=jnp.asarray(lengths))
    halves = [
        attention(q, k[:, :, s], v[:, :, s], positions=positions, slot_positions=held[:, s])
        for s in (slice(0, cut), slice(cut, None))
    ]
    assert not np.allclose(halves[0].out, whole.out, atol=1e-2)
    merged = ops.merge(*halves)
    np.testing.assert_allclose(merged.out, whole.out, atol=1e-5)
    np.testing.assert_allclose(merged.lse, whole.lse, atol=1e-5)


@pytest.mark.parametrize(("slots", "new", "groups"), [(SHORT, 3, 2), (LONG, 3, 2), (LONG, 1, 1)])
def test_derivatives_are_those_of_the_reference(slots, new, groups):
    """Backwards and forwards, of the output and the log-sum-exp, through the loop over blocks."""
    q, k, v = draw(3, new, 2, groups, 8, slots)
    lengths = np.array([slots, 5, 0])
    positions = jnp.asarray(step(lengths, new))
    mix = draw(3, new, 2, groups, 8, slots, seed=9)

    def loss(arrays, implementation):
        part = calls.attention(
            *arrays,
            positions=positions,
            lengths=jnp.asarray(lengths),
            window=slots - 7,
            softcap=5.0,
            implementation=implementation,
        )
        lse = jnp.where(jnp.isneginf(part.lse), 0.0, part.lse)
        return jnp.sum(part.out * mix[0]) + jnp.sum(jnp.sin(lse))

    def both(arrays, implementation):
        back = jax.grad(loss)(arrays, implementation)
        ahead = jax.jvp(lambda x: loss(x, implementation), (arrays,), (mix,))[1]
        return back, ahead

    run = jax.jit(both, static_argnums=1)
    (back, ahead), (want_back, want_ahead) = run((q, k, v), "xla"), run((q, k, v), "reference")
    for got, want in zip(back, want_back, strict=True):
        assert jnp.abs(want).max() > 1e-3
        np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_allclose(ahead, want_ahead, rtol=1e-4)
    # And the two modes agree with each other, which no shared mistake in one of them survives.
    along = sum(jnp.vdot(g, t) for g, t in zip(back, mix, strict=True))
    np.testing.assert_allclose(ahead, along, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("slots", "new", "groups"), [(SHORT, 3, 2), (LONG, 1, 1)])
def test_what_is_beyond_the_lengths_has_no_part_in_derivatives(slots, new, groups, implementation):
    q, k, v = draw(3, new, 2, groups, 8, slots)
    lengths = np.array([slots, 5, 0])
    positions = jnp.asarray(step(lengths, new))

    def loss(arrays):
        part = calls.attention(
            *arrays,
            positions=positions,
            lengths=jnp.asarray(lengths),
            softcap=5.0,
            implementation=implementation,
        )
        return jnp.sum(part.out**2) + jnp.sum(jnp.where(jnp.isneginf(part.lse), 0.0, part.lse))

    back = jax.jit(jax.grad(loss))
    empty = jnp.asarray(np.arange(slots)[None] >= lengths[:, None])[:, None, :, None]
    clean = back((q, jnp.where(empty, 0.0, k), jnp.where(empty, 0.0, v)))
    for poison in (jnp.nan, jnp.inf):
        spoilt = back((q, jnp.where(empty, poison, k), jnp.where(empty, poison, v)))
        for got, want in zip(spoilt, clean, strict=True):
            assert jnp.abs(want).max() > 1e-3
            np.testing.assert_array_equal(got, want)


def test_second_derivatives():
    q, k, v = draw(1, 2, 1, 1, 4, LONG)
    positions = jnp.array([[200, 201]])

    def curve(scale, implementation):
        part = calls.attention(q * scale, k, v, positions=positions, implementation=implementation)
        return jnp.sum(part.out**2)

    second = jax.jit(jax.grad(jax.grad(curve)), static_argnums=1)
    np.testing.assert_allclose(second(0.7, "xla"), second(0.7, "reference"), rtol=1e-3)


def test_vmap():
    """Over models' layers, say: the same as a loop, also where positions differ."""
    layers = [draw(2, 2, 1, 2, 8, LONG, seed=s) for s in range(3)]
    positions = [jnp.asarray(step(n, 2)) for n in ([5, 300], [1, 0], [LONG, 129])]
    mapped = jax.jit(jax.vmap(lambda q, k, v, p: calls.attention(q, k, v, positions=p)))
    got = mapped(*(jnp.stack(x) for x in zip(*layers, strict=True)), jnp.stack(positions))
    for i, (arrays, p) in enumerate(zip(layers, positions, strict=True)):
        want = attention(*arrays, positions=p)
        np.testing.assert_allclose(got.out[i], want.out, atol=1e-5)
        np.testing.assert_allclose(got.lse[i], want.lse, atol=1e-5)


def blocks_walked(slots, positions, **options):
    """The bounds of the loop over blocks, as it computes them from its arguments."""
    spec = AttentionSpec(1.0, options.get("window"), options.get("sinks", 0))
    lengths = options.get("lengths")
    lengths = None if lengths is None else jnp.asarray(lengths)
    held = options.get("slot_positions")
    first, last = xla.block_range(spec, jnp.asarray(positions), held, lengths, slots)
    return int(first), int(last)


def test_the_walk_covers_what_is_filled_and_no_more():
    slots = 64 * BLOCK
    assert blocks_walked(slots, [[511]]) == (0, 4)
    assert blocks_walked(slots, [[512]]) == (0, 5)
    assert blocks_walked(slots, [[-1]]) == (0, 0)
    assert blocks_walked(slots, [[4 * BLOCK], [3]]) == (0, 5)
    assert blocks_walked(slots, [[9 * BLOCK]], lengths=[2 * BLOCK]) == (0, 2)
    assert blocks_walked(slots, [[slots - 1]]) == (0, 64)
    # A window starts in the block of the earliest token that any query sees.
    assert blocks_walked(slots, [[10 * BLOCK]], window=BLOCK) == (9, 11)
    assert blocks_walked(slots, [[10 * BLOCK], [5 * BLOCK]], window=BLOCK) == (4, 11)
    assert blocks_walked(slots, [[10 * BLOCK], [-1]], window=BLOCK + 2) == (8, 11)
    assert blocks_walked(slots, [[10 * BLOCK]], window=BLOCK, sinks=1) == (0, 11)


def test_the_loop_over_blocks_is_in_the_program():
    """The bounds above are those of a loop, and a short buffer has none."""
    for slots, loops in ((LONG, True), (SHORT, False)):
        arrays = draw(1, 1, 1, 2, 8, slots)
        lowered = jax.jit(calls.attention).lower(*arrays, positions=jnp.zeros((1, 1), jnp.int32))
        assert ("stablehlo.while" in lowered.as_text()) == loops


@pytest.mark.slow
def test_the_cost_follows_the_filled_length():
    """32 times the buffer, read in blocks, against the shorter one at once: not 32 times as long.

    A block costs about twice its share of the whole. The bound leaves what others take from a
    machine: the two run in turns, and the best of each counts.
    """
    attention = jax.jit(calls.attention, compiler_options=quick.OPTIMISED)
    sizes = (8 * BLOCK, 256 * BLOCK)
    arrays = {slots: draw(1, 1, 4, 1, 64, slots) for slots in sizes}
    times = dict.fromkeys(sizes, float("inf"))
    at = jnp.array([[512]])
    for _ in range(31):  # the first of them compiles
        for slots, (q, k, v) in arrays.items():
            start = time.perf_counter()
            attention(q, k, v, positions=at).out.block_until_ready()
            times[slots] = min(times[slots], time.perf_counter() - start)
    assert times[256 * BLOCK] < 12 * times[8 * BLOCK], times


def test_what_is_refused():
    q, k, v = draw(1, 1, 2, 2, 4, 8)
    at = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="3 query heads over 2"):
        calls.attention(q[:, :, :3], k, v, positions=at)
    with pytest.raises(ValueError, match="window=0"):
        calls.attention(q, k, v, positions=at, window=0)
    with pytest.raises(UnsupportedError, match="'fast'"):
        calls.attention(q, k, v, positions=at, implementation="fast")
