"""Windows and sinks against brute force: every pair of tokens, with the positions the rule means.

The oracle rotates in float64, each query anew for each key, by the distance that the rule gives
the pair; it knows nothing of rings, of turning back, or of what has been written where.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv._pytree import replace
from jkv.cache import Dense, Step
from jkv.cache.window import WindowKind
from jkv.errors import UnsupportedError
from jkv.models import Rope
from jkv.ops import AttentionSpec
from jkv.ops.rope import angles, rotate

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

W, SINKS = 6, 3
K, N, H = 2, 4, 8
SCALE = 0.4

ROPES = {
    "plain": Rope(dims=8),
    "llama3": Rope(dims=6, interleaved=True, rule="llama3", factor=8.0, original_context=64),
    "yarn": Rope(dims=8, rule="yarn", factor=4.0, original_context=16, magnitude=1.4),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kind may ask of a model."""

    rope: Rope | None = None
    windows: tuple[int | None, ...] = (None,)
    layers: int = 1
    kv_heads: int = K
    head_dim: int = H

    def window(self, layer: int) -> int | None:
        return self.windows[layer]


def made(kind: Any, rope: Rope | None, batch: int = 1) -> Any:
    return kind.bind(Shape(rope), 0).init(batch, 64, K, H, jnp.float32)


def tokens_of(total: int, batch: int = 1, seed: int = 0) -> list[np.ndarray]:
    """Queries, keys (not rotated) and values, [B, T, heads, H]."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, total, heads, H)).astype(np.float32) for heads in (N, K, K)]


def turned(x: np.ndarray, positions: np.ndarray, rope: Rope) -> np.ndarray:
    """x [..., H] at positions [...], in float64."""
    angle = positions[..., None] * rope.frequencies()
    cos, sin = np.cos(angle) * rope.magnitude, np.sin(angle) * rope.magnitude
    out = np.array(x, np.float64)
    half = rope.dims // 2
    first = np.arange(half) * 2 if rope.interleaved else np.arange(half)
    second = first + 1 if rope.interleaved else first + half
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


def distance(rule: str, p: Any, s: Any, size: int, sinks: int) -> Any:
    """How far the query at p is from the key at s; negative where it does not see it."""
    is_sink = s < sinks
    far = {
        "text": p - s,
        "cache": np.minimum(p, sinks + size - 1) - s,
        "clamped": np.minimum(p - s, size),
    }[rule]
    return np.where(s > p, -1, np.where(is_sink, far, np.where(p - s < size, p - s, -1)))


def oracle(q, k, v, rope, rule, size, sinks, softcap=None) -> np.ndarray:
    """Attention of all tokens of each row, [B, T, N, H]."""
    total = q.shape[1]
    p, s = np.arange(total)[:, None], np.arange(total)[None, :]
    far = distance(rule, p, s, size, sinks)
    out = np.zeros(q.shape)
    for b, n in itertools.product(range(q.shape[0]), range(N)):
        keys, values = k[b, :, n // (N // K)], v[b, :, n // (N // K)]
        queries = np.repeat(q[b, :, n][:, None], total, axis=1)
        queries = turned(queries, np.maximum(far, 0), rope) if rope else queries
        keys = turned(keys, np.zeros(total), rope) if rope else keys
        scores = np.einsum("psh,sh->ps", queries.astype(np.float64), keys) * SCALE
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        scores = np.where(far >= 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[b, :, n] = weights / weights.sum(axis=1, keepdims=True) @ values
    return out


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def attend(rope, window, softcap, layer, q, k, v, start, counts):
    """A pass as the model does it: rotated at the text's positions, then into the cache."""
    step = Step.after(start, counts, q.shape[1])
    if rope is not None:
        turn = angles(step.positions, rope.frequencies(), rope.magnitude)
        q = rotate(q, *turn, interleaved=rope.interleaved)
        k = rotate(k, *turn, interleaved=rope.interleaved)
    return layer.attend(q, k, v, step, AttentionSpec(SCALE, window, softcap=softcap))


def fed(layer, tokens, sizes, rope, window=None, softcap=None):
    """All tokens in chunks of these sizes: the outputs [B, T, N, H], and the cache."""
    at, outs = 0, []
    for size in sizes:
        chunk = [x[:, at : at + size] for x in tokens]
        batch = chunk[0].shape[0]
        out, layer = attend(
            rope, window, softcap, layer, *chunk, np.full(batch, at), np.full(batch, size)
        )
        outs.append(np.asarray(out))
        at += size
    return np.concatenate(outs, axis=1), layer


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("rule", ["cache", "clamped"])
def test_sinks_are_as_far_as_the_rule_says(rule, rope):
    """One by one to four times the window, then a chunk of more than the ring, then one by one."""
    sizes = [1] * (4 * W) + [2 * W + 3] + [1] * 3
    tokens = tokens_of(sum(sizes))
    layer = made(jkv.window(W, SINKS, rule), ROPES[rope])
    got, _ = fed(layer, tokens, sizes, ROPES[rope])
    want = oracle(*tokens, ROPES[rope], rule, W, SINKS)
    np.testing.assert_allclose(got, want, atol=2e-5)
    # The rules differ, and the test sees it.
    others = [oracle(*tokens, ROPES[rope], r, W, SINKS) for r in ("text", "cache", "clamped")]
    apart = [np.abs(got - other).max() for other in others]
    assert sorted(apart)[1] > 1e-3, apart


def test_a_thousand_tokens_on_the_rules_still_hold():
    """Where angles of float32 have lost three digits."""
    rope, start = ROPES["llama3"], 1500
    tokens = tokens_of(start + 2)
    for rule in ("cache", "clamped"):
        layer = made(jkv.window(W, SINKS, rule), rope)
        got, _ = fed(layer, tokens, [start, 1, 1], rope)
        tail = [np.concatenate([x[:, :SINKS], x[:, -W - 2 :]], axis=1) for x in tokens]
        p = np.r_[:SINKS, start - W : start + 2]
        for i, query in ((-1, start + 1), (-2, start)):
            far = distance(rule, query, p, W, SINKS)
            for n in range(N):
                q = turned(np.repeat(tail[0][0, i, n][None], len(p), 0), np.maximum(far, 0), rope)
                scores = np.einsum("sh,sh->s", q, tail[1][0, :, n // 2]) * SCALE
                weights = np.exp(np.where(far >= 0, scores, -np.inf))
                want = weights / weights.sum() @ tail[2][0, :, n // 2]
                np.testing.assert_allclose(got[0, i, n], want, atol=5e-4)


LENGTHS = [W - 1, W, W + 1, 2 * W, SINKS + W, SINKS + W + 1]
SIZES = [1, 5, 2, 7, W - 1, W, W + 1, 2 * W + 3]


@pytest.mark.parametrize("sinks", [0, 2, SINKS + W])
def test_a_dense_cache_masked(sinks):
    """At every length about the window: that of a dense cache under the mask, exactly."""
    tokens = tokens_of(max(LENGTHS))
    layer = made(jkv.window(W, sinks, "text"), None)
    got, _ = fed(layer, tokens, [1] * max(LENGTHS), None, softcap=3.0)
    want = oracle(*tokens, None, "text", W, sinks, softcap=3.0)
    np.testing.assert_allclose(got, want, atol=1e-5)
    if not sinks:
        dense = Dense(*(jnp.zeros((1, K, 64, H)) for _ in range(2)))
        want, _ = fed(dense, tokens, [1] * max(LENGTHS), None, window=W, softcap=3.0)
        np.testing.assert_allclose(got, want, atol=1e-5)
    # The window is no wider and no narrower than it says.
    for size in (W - 1, W + 1):
        other = oracle(*tokens, None, "text", size, sinks, softcap=3.0)
        beyond = sinks + size
        assert beyond >= got.shape[1] or np.abs(got - other)[:, beyond:].max() > 1e-3


@pytest.mark.parametrize("rule", ["cache", "clamped"])
def test_chunks_in_any_order(rule):
    """Also chunks longer than the ring, and the caches that they leave: those of one by one."""
    rope = ROPES["llama3"]
    kind = jkv.window(W, SINKS, rule)
    total = sum(SIZES)
    tokens = tokens_of(total)
    want, after = fed(made(kind, rope), tokens, [1] * total, rope)
    rng = np.random.default_rng(1)
    for order in (SIZES[::-1], list(rng.permutation(SIZES))):
        got, left = fed(made(kind, rope), tokens, [int(n) for n in order], rope)
        np.testing.assert_allclose(got, want, atol=1e-5)
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rule", ["cache", "clamped"])
def test_ragged_rows_are_themselves(rule):
    """Rows of other lengths, rows of padding only, and NaN on the padding."""
    rope, rows = ROPES["plain"], (23, 9, 1, 14)
    tokens = tokens_of(max(rows), batch=4)
    layer = made(jkv.window(W, SINKS, rule), rope, batch=4)
    done = np.zeros(4, np.int32)
    got = np.zeros(tokens[0].shape)
    for size in itertools.cycle((5, 1, 1)):
        counts = np.minimum(np.asarray(rows) - done, [size, max(size - 1, 1), 1, size // 2])
        if (done == rows).all():
            break
        chunk = [np.full((4, size, *x.shape[2:]), np.nan, np.float32) for x in tokens]
        for new, x in zip(chunk, tokens, strict=True):
            for b in range(4):
                new[b, : counts[b]] = x[b, done[b] : done[b] + counts[b]]
        out, layer = attend(rope, None, None, layer, *chunk, done, counts)
        for b in range(4):
            got[b, done[b] : done[b] + counts[b]] = out[b, : counts[b]]
        done = done + counts
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(layer))
    for b, length in enumerate(rows):
        alone = [x[b : b + 1, :length] for x in tokens]
        want = oracle(*alone, rope, rule, W, SINKS)
        np.testing.assert_allclose(got[b : b + 1, :length], want, atol=1e-5)


@pytest.mark.parametrize("rule", ["cache", "clamped"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 6e4])
def test_what_is_in_unused_slots_is_not_seen(rule, poison):
    rope = ROPES["plain"]
    tokens = tokens_of(2 + 5 + 1 + 1)
    clean = made(jkv.window(W, SINKS, rule), rope)
    dirty = jax.tree.map(lambda leaf: jnp.full_like(leaf, poison), clean)
    want, left = fed(clean, tokens, [2, 5, 1, 1], rope)
    got, after = fed(dirty, tokens, [2, 5, 1, 1], rope)
    np.testing.assert_array_equal(got, want)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)  # all slots are in use by now


def test_a_shorter_window_of_the_model_takes_its_place():
    rope = ROPES["plain"]
    tokens = tokens_of(4 * W)
    longer = made(jkv.window(W + 5, SINKS, "clamped"), rope)
    got, _ = fed(longer, tokens, [1] * (2 * W) + [2 * W], rope, window=W)
    want = oracle(*tokens, rope, "clamped", W, SINKS)
    np.testing.assert_allclose(got, want, atol=1e-5)
    # Bound to a model with that window, it is no longer than it.
    for own, size in ((W, W), (W + 9, W + 5), (None, W + 5)):
        kind = jkv.window(W + 5, SINKS).bind(Shape(rope, (own,)), 0)
        assert isinstance(kind, WindowKind)
        assert kind.size == size


def cache_of(length: int, sinks: int = SINKS) -> tuple[Any, list[np.ndarray]]:
    """A cache of one layer with two rows of that many tokens, which have not been rotated."""
    tokens = tokens_of(length, batch=2)
    config = Shape(ROPES["plain"])
    cache = jkv.init_cache(config, jkv.window(W, sinks, "text"), batch=2, slots=64)
    _, layer = fed(cache.layers[0], tokens, [1] * length, None)
    return replace(cache, layers=(layer,), lengths=jnp.full(2, length)), tokens


def test_crop_where_nothing_is_missing():
    """As long as sinks and ring hold all; and back to sinks alone from anywhere."""
    more = tokens_of(5, batch=2, seed=5)
    for held, lengths in (
        (SINKS + W, [4, 7]),
        (SINKS + W, [0, 8]),
        (40, [SINKS, 0]),
        (40, [40, 2]),
        (40, [99, 40]),
    ):
        cache, tokens = cache_of(held)
        cropped = cache.crop(lengths)
        left = np.minimum(lengths, held)
        assert cropped.lengths.tolist() == left.tolist()
        out, _ = attend(None, None, None, cropped.layers[0], *more, left, np.full(2, 5))
        for b in range(2):
            row = [
                np.concatenate([x[b : b + 1, : left[b]], m[b : b + 1]], axis=1)
                for x, m in zip(tokens, more, strict=True)
            ]
            want = oracle(*row, None, "text", W, SINKS)
            np.testing.assert_allclose(out[b : b + 1], want[:, left[b] :], atol=1e-5)


def test_crop_refuses_what_was_overwritten():
    for held, lengths in ((SINKS + W + 1, [SINKS + W, 40]), (40, [40, SINKS + 1]), (40, 39)):
        cache, _ = cache_of(held)
        with pytest.raises(UnsupportedError, match="overwritten"):
            cache.crop(lengths)
    cache, _ = cache_of(4)
    assert cache.crop(3).lengths.tolist() == [3, 3]
    with pytest.raises(UnsupportedError, match="under jit"):
        jax.jit(lambda cache: cache.crop(3))(cache)


@pytest.mark.parametrize("sinks", [0, SINKS])
def test_to_legacy_while_all_are_there(sinks):
    for held in (1, W, sinks + W):
        cache, tokens = cache_of(held, sinks)
        ((keys, values),) = cache.to_legacy()
        np.testing.assert_array_equal(keys, tokens[1].swapaxes(1, 2))
        np.testing.assert_array_equal(values, tokens[2].swapaxes(1, 2))
    cache, _ = cache_of(sinks + W + 1, sinks)
    with pytest.raises(UnsupportedError, match="let go"):
        cache.to_legacy()
    with pytest.raises(UnsupportedError, match="under jit"):
        jax.jit(lambda cache: cache.to_legacy())(cache_of(1, sinks)[0])


def test_take_and_concat_carry_the_sinks():
    cache, _ = cache_of(20)
    other = replace(cache, layers=jax.tree.map(lambda leaf: leaf + 1, cache.layers))
    joined = jkv.concat([cache.take([1]), other])
    for x, y, z in zip(*map(jax.tree.leaves, (joined, cache, other)), strict=True):
        np.testing.assert_array_equal(x, jnp.concatenate([y[1:], z]))
    plain, _ = cache_of(20, 0)
    with pytest.raises(ValueError, match="different kinds"):
        jkv.concat([cache, plain])
    assert cache.capacity is None
    assert cache.resize(100).nbytes == cache.nbytes
    assert cache.forgets
