"""Models of other libraries over jkv's caches: flax's own attention, of both of its interfaces."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jkv
from tests.cache.kinds import KINDS

VOCAB, WIDTH, HEADS, CONTEXT = 11, 16, 2, 24
SHAPE = {"layers": 1, "kv_heads": HEADS, "head_dim": WIDTH // HEADS}
SPEC = jkv.ops.AttentionSpec((WIDTH // HEADS) ** -0.5)
PROMPTS, COUNTS = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9], [7, 5, 3, 0, 0, 0, 0, 0, 0]]), (9, 3)
STEPS = 8


class CachedAttention(nnx.MultiHeadAttention):
    """flax's attention with its own weights, over a layer's cache."""

    def __call__(self, x, layer, step):
        q, k, v = self.query(x), self.key(x), self.value(x)  # [B, T, N, H]
        out, layer = layer.attend(q, k, v, step, SPEC)
        return self.out(out), layer


class Model(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.places = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.attention = CachedAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens, cache, counts=None):
        run = cache.begin(tokens, counts)
        x = self.embed(run.tokens, run.step.positions)
        out, layer = self.attention(x, run.layers[0], run.step)
        x, cache = run.end(x + out, [layer])
        return self.head(x), cache

    def embed(self, tokens, positions):
        # Strong places, so that what a token sees shows in the greedy tokens.
        return 3 * (self.tokens(tokens) + self.places(jnp.maximum(positions, 0)))

    def uncached(self, tokens, mask):
        """As flax runs it: its own attention, masked."""
        x = self.embed(tokens, jnp.arange(tokens.shape[1])[None])
        attended = nnx.MultiHeadAttention.__call__(self.attention, x, mask=mask, decode=False)
        return self.head(x + attended)


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: Model(nnx.Rngs(0)))()


def cache_of(kind):
    return jkv.attention_cache(kind, batch=2, slots=CONTEXT, **SHAPE)


@functools.partial(jax.jit, static_argnums=(1, 2))
def generate(model, kind, layers=1):
    """The pure functions in a program of one's own, the model as its argument."""
    cache = jkv.attention_cache(kind, batch=2, slots=CONTEXT, **(SHAPE | {"layers": layers}))
    logits, cache = jkv.prefill(model, jnp.asarray(PROMPTS), cache, jnp.asarray(COUNTS))
    return logits, jkv.rollout(model, logits, cache, steps=STEPS)


@jax.jit
def uncached(model, tokens, mask):
    return model.uncached(tokens, mask)


def greedy(run, sees):
    """Logits and greedy tokens of both rows, the whole prefix computed again for each token."""
    mask = np.array([[sees(q, p) for p in range(CONTEXT)] for q in range(CONTEXT)])
    first, rows = [], []
    for prompt, count in zip(PROMPTS, COUNTS, strict=True):
        row = prompt[:count].tolist()
        for _ in range(STEPS):
            tokens = np.zeros((1, CONTEXT), np.int32)
            tokens[0, : len(row)] = row
            logits = np.asarray(run(tokens, mask[None, None]))[0, len(row) - 1]
            first += [logits] if len(row) == count else []
            row.append(int(logits.argmax()))
        rows.append(row[count:])
    return np.stack(first), rows


# Those that differ from these in their codec alone are the same to a model.
@pytest.mark.parametrize(
    "case", [case for case in KINDS if case.modelled or case.exact], ids=lambda case: case.name
)
def test_every_kind_serves_flaxs_attention(model, case):
    want_logits, want = greedy(functools.partial(uncached, model), case.sees)
    logits, out = generate(model, case.kind)
    if case.exact:
        np.testing.assert_allclose(logits, want_logits, atol=1e-4)
        assert out.check().tokens.tolist() == want
    else:
        assert np.abs(logits - want_logits).max() <= 2 * case.spread * want_logits.std()
        assert out.check().tokens.shape == (2, STEPS)
    assert out.state.cache.lengths.tolist() == [count + STEPS - 1 for count in COUNTS]


def test_the_prompts_and_kinds_tell_apart(model):
    """A cache that forgot something would show: the twin of the above."""
    tokens = [
        greedy(functools.partial(uncached, model), sees)[1]
        for sees in (lambda q, p: p <= q, lambda q, p: q - 7 < p <= q, lambda q, p: p == q)
    ]
    assert tokens[0] != tokens[1] != tokens[2] != tokens[0]


class LinenAttention(nn.Module):
    """The weights of `nn.MultiHeadDotProductAttention`, by the same names, over a cache."""

    @nn.compact
    def __call__(self, x, layer, step):
        q, k, v = (
            nn.DenseGeneral((HEADS, WIDTH // HEADS), name=name)(x)
            for name in ("query", "key", "value")
        )
        out, layer = layer.attend(q, k, v, step, SPEC)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(out), layer


class LinenModel(nn.Module):
    cached: bool

    @nn.compact
    def __call__(self, tokens, cache, counts=None):
        """With a cache; or without, where `cache` is a mask, as flax runs it."""
        embed, place = nn.Embed(VOCAB, WIDTH, name="embed"), nn.Embed(CONTEXT, WIDTH, name="place")
        head = nn.Dense(VOCAB, name="head")
        names = [f"attention_{i}" for i in range(2)]
        if not self.cached:
            x = 3 * (embed(tokens) + place(jnp.arange(tokens.shape[1])[None]))
            for name in names:
                attention = nn.MultiHeadDotProductAttention(HEADS, name=name)
                x = x + attention(x, mask=cache)
            return head(x)
        run = cache.begin(tokens, counts)
        x = 3 * (embed(run.tokens) + place(jnp.maximum(run.step.positions, 0)))
        layers = []
        for name, layer in zip(names, run.layers, strict=True):
            out, layer = LinenAttention(name=name)(x, layer, run.step)
            x = x + out
            layers.append(layer)
        x, cache = run.end(x, layers)
        return head(x), cache


def test_linen_with_the_weights_of_its_own_attention():
    plain = LinenModel(cached=False)
    blank = jnp.zeros((1, CONTEXT), jnp.int32)
    weights = jax.jit(plain.init)(jax.random.key(1), blank, jnp.ones((1, 1, CONTEXT, CONTEXT)))
    run = functools.partial(jax.jit(plain.apply), weights)
    want_logits, want = greedy(run, lambda query, position: position <= query)
    model = jax.tree_util.Partial(LinenModel(cached=True).apply, weights)
    logits, out = generate(model, jkv.dense(), layers=2)
    np.testing.assert_allclose(logits, want_logits, atol=1e-4)
    assert out.check().tokens.tolist() == want


def test_decode_steps_of_ones_own(model):
    _, out = generate(model, jkv.dense())
    logits, cache = jkv.prefill(model, PROMPTS, cache_of("dense"), np.array(COUNTS))
    step, tokens = jax.jit(jkv.decode_step), []
    for _ in range(STEPS):
        tokens.append(jnp.argmax(logits, axis=-1))
        logits, cache = step(model, tokens[-1], cache)
    assert np.stack(tokens, 1).tolist() == out.tokens.tolist()
    # A row that does not take part keeps its cache.
    _, after = step(model, tokens[-1], cache, np.array([True, False]))
    assert (after.lengths - cache.lengths).tolist() == [1, 0]


def test_a_function_is_a_model_too_and_a_full_cache_is_told(model):
    assert isinstance(model, jkv.decoding.CachedModel)
    cache = jkv.attention_cache(batch=2, slots=10, **SHAPE)
    logits, cache = jkv.prefill(lambda *given: model(*given), PROMPTS, cache, np.array(COUNTS))
    out = jkv.rollout(lambda *given: model(*given), logits, cache, steps=4)
    with pytest.raises(jkv.CacheFullError, match=r"rows \[0\]"):
        out.check()


def test_mistakes_say_what_is_expected(model):
    cache = cache_of("dense")
    with pytest.raises(TypeError, match=r"or one of your own: logits, cache = model\(tokens"):
        jkv.prefill("gpt2", PROMPTS, cache)
    with pytest.raises(TypeError, match=r"the model returned .* expected a pair: logits"):
        jkv.prefill(lambda *_: 3, PROMPTS, cache)
    with pytest.raises(ValueError, match=r"logits \[2, 1, 11\] of tokens \[2, 9\]"):
        jkv.prefill(lambda *given: (model(*given)[0][:, :1], given[1]), PROMPTS, cache)
    with pytest.raises(TypeError, match="a model of your own runs in"):
        jkv.generate(model, PROMPTS, max_new_tokens=1)
    for wrong in ("layers", "kv_heads", "head_dim"):
        with pytest.raises(ValueError, match=f"attention_cache got {wrong}=0"):
            jkv.attention_cache(batch=1, slots=8, **(SHAPE | {wrong: 0}))
    with pytest.raises(jkv.UnsupportedError, match="no rotary positions to turn"):
        jkv.attention_cache("window:4,sinks=1", batch=1, slots=8, **SHAPE)
    narrow = jkv.attention_cache(batch=2, slots=16, **(SHAPE | {"head_dim": 4}))
    with pytest.raises(ValueError, match="2 heads of 4 dimensions"):
        jkv.prefill(model, PROMPTS, narrow)
