"""Eviction against lists of tokens: which are kept, what is seen, and what is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv import _compat, ops, scores
from jkv._pytree import replace
from jkv.cache import Step
from jkv.errors import UnsupportedError
from jkv.ops import AttentionSpec
from jkv.ops.attention.weights import attention_weights

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

B, K, G, H, T = 3, 2, 2, 4, 7
SCALE, SOFTCAP = 0.7, 5.0
# New tokens of each row in each pass; one new token at most is a step of a decode loop.
PASSES = [(3, 7, 0), (1, 1, 1), (1, 1, 0), (5, 2, 7)] + [(1, 1, 1)] * 4 + [(0, 6, 3), (1, 0, 1)]


def fading(seen):
    """An accumulator, as a user would write it."""
    return 0.5 * seen.previous + jnp.max(seen.weights, axis=(2, 3))


def backwards(seen):
    """The oldest are best: protects nothing by itself."""
    return -seen.positions.astype(jnp.float32)


def equal(seen):
    """All the same, and not even numbers."""
    return jnp.full(seen.positions.shape, jnp.nan)


# The same scores on lists. Each takes, for one row, a list over heads of (positions, previous,
# keys, values, weights [G, T, S]), the queries' positions, and whether it is a step of one token.


def per_head(score):
    return lambda heads, queries, step: [score(*head, queries, step) for head in heads]


def listed_tova(heads, queries, step):
    at = int(np.argmax(queries))
    looked = [dict(zip(h[0], h[4][:, at].mean(axis=0), strict=True)) for h in heads]
    return [[np.mean([other[p] for other in looked]) for p in h[0]] for h in heads]


def listed_snapkv(window, pool):
    def score(positions, previous, keys, values, weights, queries, step):
        if step:
            before = zip(positions, previous, strict=True)
            return [np.inf if p == queries[0] else s for p, s in before]
        looked = weights[:, queries > queries.max() - window].sum(axis=(0, 1))
        mass = dict(zip(positions, looked, strict=True))
        near = range(-(pool // 2), pool // 2 + 1)
        return [
            np.inf if p > queries.max() - window else max(mass.get(p + d, 0.0) for d in near)
            for p in positions
        ]

    return per_head(score)


LISTED = {
    scores.key_norm: per_head(lambda p, s, k, v, w, q, one: -np.linalg.norm(k, axis=-1)),
    scores.h2o: per_head(lambda p, s, k, v, w, q, one: s + w.sum(axis=(0, 1))),
    scores.tova: listed_tova,
    scores.recency: per_head(lambda p, s, k, v, w, q, one: np.asarray(p, float)),
    scores.snapkv(2, 3): listed_snapkv(2, 3),
    fading: per_head(lambda p, s, k, v, w, q, one: 0.5 * s + w.max(axis=(0, 1))),
    backwards: per_head(lambda p, s, k, v, w, q, one: -np.asarray(p, float)),
    equal: per_head(lambda p, s, k, v, w, q, one: np.zeros(len(p))),
}


class Listed:
    """One row: for each head a list of [position, key, value, score]."""

    def __init__(self, kind, window):
        budget = kind.budget
        self.budgets = budget if isinstance(budget, tuple) else (budget,) * K
        self.kind, self.window, self.length = kind, window, 0
        self.heads = [[] for _ in range(K)]

    def drop(self, head, last):
        """The worst token of a head, the oldest of equals."""
        tokens = self.heads[head]
        safe = range(last - self.kind.recent + 1, last + 1)
        loose = [t for t in tokens if t[0] not in safe and t[0] >= self.kind.sinks]
        gone = self.window is not None and min(t[0] for t in loose) <= last - self.window
        worst = min(loose, key=lambda t: t[0] if gone else (t[3], t[0]))
        tokens[:] = [t for t in tokens if t is not worst]

    def push(self, q, k, v, step):
        """Queries [t, N, H] and new tokens; what each sees, [t, N, H]."""
        new = len(k)
        queries = np.arange(self.length, self.length + new)
        self.length += new
        seen, out = [], np.zeros(q.shape)
        for head, tokens in enumerate(self.heads):
            while step and len(tokens) >= self.budgets[head]:
                self.drop(head, queries[-1])
            tokens += [[p, k[i, head], v[i, head], 0.0] for i, p in enumerate(queries)]
            positions, keys, values, previous = (np.asarray(x) for x in zip(*tokens, strict=True))
            asked = q[:, head * G : (head + 1) * G]
            found = SOFTCAP * np.tanh(SCALE / SOFTCAP * np.einsum("tgh,sh->gts", asked, keys))
            far = queries[:, None] - positions
            hidden = (far < 0) | (far >= (self.window or np.inf))
            weights = np.exp(np.where(hidden, -np.inf, found))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[:, head * G : (head + 1) * G] = np.einsum("gts,sh->tgh", weights, values)
            seen.append((positions.tolist(), previous, keys, values, weights))
        found = LISTED[self.kind.score](seen, queries, step)
        for head, tokens in enumerate(self.heads):
            for token, score in zip(tokens, found[head], strict=True):
                token[3] = score
            while len(tokens) > self.budgets[head]:
                self.drop(head, queries[-1])
        return out


@functools.partial(jax.jit, static_argnums=5)
def attend(layer, q, k, v, step, window):
    return layer.attend(q, k, v, step, AttentionSpec(SCALE, window, softcap=SOFTCAP))


def material(rng, new):
    q, k, v = (rng.normal(size=(B, new, n, H)).astype(np.float32) for n in (K * G, K, K))
    return q, k * rng.uniform(0.5, 2.0, size=(B, new, K, 1)).astype(np.float32), v


def same_tokens(layer, rows):
    """The layer holds what the lists hold, each in a slot of its own."""
    keys, values, positions, given = (np.asarray(leaf) for leaf in jax.tree.leaves(layer))
    for b, row in enumerate(rows):
        for head, tokens in enumerate(row.heads):
            held = positions[b, head]
            assert sorted(held[held >= 0].tolist()) == [t[0] for t in tokens], (b, head)
            assert (held >= 0).sum() <= row.budgets[head]
            for position, key, value, score in tokens:
                slot = int(np.flatnonzero(held == position)[0])
                np.testing.assert_array_equal(keys[b, head, slot], key)
                np.testing.assert_array_equal(values[b, head, slot], value)
                if row.kind.score is not equal:
                    np.testing.assert_allclose(given[b, head, slot], score, rtol=1e-4)


def poisoned(layer):
    """Something terrible in every slot that holds no token."""
    free = (layer.positions < 0)[..., None]
    return replace(
        layer,
        keys=jnp.where(free, jnp.nan, layer.keys),
        values=jnp.where(free, jnp.inf, layer.values),
    )


def lived(kind, window=None):
    """A layer's whole life beside the lists': yields both after each pass."""
    rng = np.random.default_rng(5)
    layer = poisoned(kind.init(B, 99, K, H, jnp.float32))
    rows = [Listed(kind, window) for _ in range(B)]
    for counts in PASSES:
        size = 1 if max(counts) == 1 else T
        q, k, v = material(rng, size)
        padding = np.arange(size)[None] >= np.asarray(counts)[:, None]
        for x in (q, k, v):
            x[padding] = np.nan
        lengths = jnp.asarray([row.length for row in rows], jnp.int32)
        step = Step.after(lengths, jnp.asarray(counts, jnp.int32), size)
        out, after = attend(layer, q, k, v, step, window)
        for b, n in enumerate(counts):
            if n:
                want = rows[b].push(*(x[b, :n].astype(float) for x in (q, k, v)), step=size == 1)
                np.testing.assert_allclose(out[b, :n], want, atol=2e-5)
            else:
                for x, y in zip(jax.tree.leaves(layer), jax.tree.leaves(after), strict=True):
                    np.testing.assert_array_equal(x[b], y[b])
        layer = after
        yield layer, rows


named = functools.partial(pytest.mark.parametrize, ids=lambda s: getattr(s, "__name__", "snapkv"))


@named("score", LISTED)
def test_step_by_step(score):
    """Every score: the tokens kept, their scores, and what each new token sees."""
    for layer, rows in lived(jkv.evicting(6, score, recent=2, sinks=1)):
        same_tokens(layer, rows)
        # Protected whatever the score says.
        for row, held in zip(rows, np.asarray(layer.positions), strict=True):
            newest = set(range(max(row.length - 2, 0), row.length)) | ({0} if row.length else set())
            assert all(newest <= set(head.tolist()) for head in held)
    assert min(row.length for row in rows) > 12


def test_heads_have_budgets_and_tokens_of_their_own():
    for layer, rows in lived(jkv.evicting((8, 5), scores.key_norm, recent=2)):
        same_tokens(layer, rows)
    assert layer.keys.shape == (B, K, 8, H)
    assert (np.asarray(layer.positions >= 0).sum(axis=-1) == [8, 5]).all()
    held = [[set(head.tolist()) - {-2} for head in row] for row in np.asarray(layer.positions)]
    assert any(few - many for many, few in held), "both heads keep the same: nothing is shown"


def test_what_has_left_the_layers_window_goes_first():
    for layer, rows in lived(jkv.evicting(6, recent=2), window=4):
        same_tokens(layer, rows)
        # So a budget of no less than the window loses nothing that anybody will see.
        for row, held in zip(rows, np.asarray(layer.positions), strict=True):
            seen = set(range(max(row.length - 4, 0), row.length))
            assert all(seen <= set(head.tolist()) for head in held)


def test_the_lists_would_notice(monkeypatch):
    """The comparison itself: another score's tokens do not pass."""
    monkeypatch.setitem(LISTED, scores.h2o, LISTED[backwards])
    life = lived(jkv.evicting(6, recent=2))
    with pytest.raises(AssertionError):
        any(same_tokens(layer, rows) for layer, rows in life)


def test_weights():
    """They sum to 1, the output is that of `ops.attention`, and empty slots have none."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(x) for x in material(rng, T))
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    positions = jnp.asarray([[5, 6, -1, 2, 3, 4, 9]] * B, jnp.int32)
    slots = jnp.asarray([0, 7, -1, 2, 3, -2, 9], jnp.int32)
    dirty = jnp.where((slots < 0)[:, None], jnp.nan, 1.0)[None, None]
    spec = AttentionSpec(SCALE, 5, softcap=SOFTCAP)
    kv = ops.ContiguousKV(k, v, slot_positions=jnp.broadcast_to(slots, (B, T)))
    want = ops.attention(q, kv, positions, spec, implementation="reference")
    held = jnp.broadcast_to(slots, (B, K, T))
    whole = (k * dirty, v * dirty, held)
    parts = [tuple(x[:, :, :3] for x in whole), tuple(x[:, :, 3:] for x in whole)]
    for given in ([whole], parts):
        out, weights = jax.jit(lambda given: attention_weights(q, given, positions, spec))(given)
        assert weights.shape == (B, K, G, T, T)
        np.testing.assert_allclose(out, want.out, atol=1e-5)
        total = np.asarray(weights.sum(axis=-1))
        sees = (np.asarray(positions) >= 0)[:, None, None]
        np.testing.assert_allclose(total, np.broadcast_to(sees, total.shape), 1e-5)
        assert not np.asarray(weights[..., np.asarray(slots) < 0]).any()


@functools.partial(jax.jit, static_argnums=(0, 4))
def filled(kind, k, v, lengths, dtype):
    step = Step.after(jnp.zeros(B, jnp.int32), lengths, T)
    return kind.init(B, 99, K, H, jnp.dtype(dtype)).append(k, v, step)


def stored(kind, lengths, dtype="float32"):
    """A layer with tokens that nobody looked at, and their keys and values [B, T, K, H]."""
    _, k, v = material(np.random.default_rng(9), T)
    return filled(kind, k, v, jnp.asarray(lengths, jnp.int32), dtype), k, v


@named("score", [scores.h2o, scores.tova, scores.snapkv(), scores.recency])
def test_put_has_no_attention_and_keeps_the_newest(score):
    layer, *_ = stored(jkv.evicting(4, score, recent=1, sinks=1), [7, 3, 5])
    for row, want in zip(layer.positions, [{0, 4, 5, 6}, {0, 1, 2, -1}, {0, 2, 3, 4}], strict=True):
        assert all(set(head.tolist()) == want for head in np.asarray(row))
    # One token at a time too, into slots that are full or not.
    start = jnp.asarray([7, 3, 5], jnp.int32)
    new = jnp.ones((B, 1, K, H))
    layer = layer.append(new, new, Step.after(start, jnp.asarray([1, 1, 0], jnp.int32), 1))
    held = np.sort(np.asarray(layer.positions), axis=-1)[:, 0].tolist()
    assert held == [[0, 5, 6, 7], [0, 1, 2, 3], [0, 2, 3, 4]]


def test_put_by_key_norm():
    layer, k, _ = stored(jkv.evicting(4, scores.key_norm, recent=1), [7, 7, 7])
    norms = np.linalg.norm(k, axis=-1)  # [B, T, K]
    for b in range(B):
        for head in range(K):
            best = {6, *np.argsort(norms[b, :6, head])[:3].tolist()}
            assert set(np.asarray(layer.positions[b, head]).tolist()) == best


def as_cache(layer, lengths):
    return jkv.Cache((layer,), jnp.asarray(lengths, jnp.int32), jnp.zeros(B, bool))


def test_crop_and_to_legacy():
    """Exact as long as what is needed is there, refused where it is not."""
    kind = jkv.evicting(6, scores.recency, recent=1)
    layer, k, v = stored(kind, [6, 2, 7])
    cache = as_cache(layer, [6, 2, 7])
    with pytest.raises(UnsupportedError, match=r"to_legacy.*rows \[2\].*budget of 6"):
        cache.to_legacy()
    with pytest.raises(UnsupportedError, match=r"crop.*rows \[2\]"):
        cache.crop([6, 1, 6])
    cropped = cache.crop([4, 1, 7])
    assert np.asarray(cropped.layers[0].positions[0] >= 0).sum(axis=-1).tolist() == [4, 4]
    assert not np.asarray(cropped.layers[0].scores[1, :, 1:]).any()
    np.testing.assert_array_equal(cropped.layers[0].positions[2], layer.positions[2])
    short = cropped.take([0, 1])
    keys, values = short.to_legacy()[0]
    for b, n in enumerate((4, 1)):
        np.testing.assert_array_equal(keys[b, :, :n], np.swapaxes(k, 1, 2)[b, :, :n])
        np.testing.assert_array_equal(values[b, :, :n], np.swapaxes(v, 1, 2)[b, :, :n])
    # Nothing is needed of a row that begins anew, evicted or not.
    assert (cache.crop(0).layers[0].positions == -1).all()
    assert cache.crop(0).to_legacy()[0][0].shape == (B, K, 0, H)
    for operation in (lambda c: c.crop(1), lambda c: c.to_legacy()):
        with pytest.raises(UnsupportedError, match="under jit"):
            jax.jit(operation)(cache)


def test_to_legacy_puts_slots_in_order():
    """After a crop and an eviction a token's slot says nothing of its position."""
    layer, k, _ = stored(jkv.evicting(7), [7, 7, 7])
    shuffled = jax.tree.map(lambda leaf: leaf[:, :, np.asarray([3, 0, 6, 1, 5, 2, 4])], layer)
    keys = as_cache(shuffled, [7, 7, 7]).to_legacy()[0][0]
    np.testing.assert_array_equal(keys, np.swapaxes(k, 1, 2))


def test_evict():
    """Any cache that has its tokens, and an evicting one once more by its own scores."""
    _, k, v = stored(jkv.evicting(7), [7, 3, 7])
    pairs = [(np.swapaxes(k, 1, 2), np.swapaxes(v, 1, 2))]
    dense = jkv.from_legacy(pairs, lengths=[7, 3, 7])
    cache = dense.evict(4)
    want, *_ = stored(jkv.evicting(4, scores.key_norm), [7, 3, 7])
    assert cache.layers[0].score is scores.key_norm
    for x, y in zip(jax.tree.leaves(cache.layers[0]), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert np.asarray(cache.lengths).tolist() == [7, 3, 7]
    # A buffer with empty slots, whose lengths nobody knows.
    newest = jax.jit(lambda c: c.evict((2, 3), score=scores.recency))(dense.resize(9)).layers[0]
    assert sorted(newest.positions[0, 0].tolist()) == [-2, 5, 6]
    assert sorted(newest.positions[0, 1].tolist()) == [4, 5, 6]
    layer = want
    for budgets in (3, (2, 1)):
        again = jax.jit(lambda c, budgets=budgets: c.evict(budgets))
        layer = again(as_cache(layer, [7, 3, 7])).layers[0]
    norms = np.linalg.norm(k, axis=-1)
    for b, n in enumerate((7, 3, 7)):
        held = np.asarray(layer.positions[b]).tolist()
        assert set(held[0]) == {n - 1, int(np.argmin(norms[b, : n - 1, 0]))}
        assert held[1] == [n - 1, -2]
    for x in (layer, want):  # and the values are the tokens'
        for b, head, slot in np.argwhere(np.asarray(x.positions) >= 0):
            position = int(np.asarray(x.positions)[b, head, slot])
            np.testing.assert_array_equal(np.asarray(x.values)[b, head, slot], v[b, position, head])
    cut = as_cache(want, [7, 3, 7])
    with pytest.raises(ValueError, match="budget of 5 for a cache of 4"):
        cut.evict(5)
    with pytest.raises(ValueError, match="leave score out"):
        cut.evict(3, score=scores.h2o)
    assert cut.evict(4, score=scores.key_norm).layers[0].keys.shape[2] == 4
    with pytest.raises(ValueError, match="3 budgets for 2"):
        dense.evict((3, 3, 3))
    sinks, *_ = stored(jkv.evicting(6, sinks=3), [7, 7, 7])
    with pytest.raises(ValueError, match="first 3 tokens"):
        as_cache(sinks, [7, 7, 7]).evict(3)
    ring = as_cache(jkv.window(4).init(B, 9, K, H, jnp.float32), [7, 7, 7])
    with pytest.raises(UnsupportedError):
        ring.evict(3)


def test_convert_both_ways():
    layer, k, _ = stored(jkv.evicting(7), [7, 3, 5])
    dense = as_cache(layer, [7, 3, 5]).convert(jkv.dense())
    assert dense.capacity == 7
    np.testing.assert_array_equal(dense.layers[0].keys[0], np.swapaxes(k, 1, 2)[0])
    back = dense.convert(jkv.evicting(3, scores.recency))
    assert np.asarray(back.layers[0].positions[2, 0]).tolist() == [2, 3, 4]
    with pytest.raises(UnsupportedError, match="config="):
        dense.convert(jkv.pyramid(3))


@pytest.mark.skipif(
    _compat.JAX < (0, 10),
    reason="XLA of jaxlib 0.7.2 compiles no product of 2 x 7 x 8 bfloat16 numbers in a loop",
)
def test_narrow_dtypes():
    layer, *_ = stored(jkv.evicting(6, recent=2, sinks=1), [7, 7, 7], "bfloat16")
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in material(np.random.default_rng(0), 1))
    step = Step.after(jnp.full(B, 7), jnp.ones(B, jnp.int32), 1)
    out, after = attend(layer, q, k, v, step, None)
    assert (out.dtype, after.keys.dtype, after.scores.dtype) == ("bfloat16", "bfloat16", "float32")
    assert np.isfinite(np.asarray(out, np.float32)).all()
