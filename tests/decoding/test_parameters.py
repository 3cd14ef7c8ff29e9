"""Parameters of transforms as arrays and tracers, and cuts exactly at their boundaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv import sampling
from tests.decoding import oracle

INF = np.inf
LOGITS = (np.random.default_rng(0).normal(size=(3, 9)) * 3).astype(np.float32)
TOKENS = np.asarray([[1, 2], [3, -1], [4, 4]], np.int32)

# Makers, and three values that each may be traced.
MAKERS: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "temperature": (sampling.temperature, [0.5, 1.0, 2.0]),
    "top_k": (sampling.top_k, [1, 3, 20]),
    "top_p": (sampling.top_p, [0.3, 0.9, 1.0]),
    "min_p": (sampling.min_p, [0.01, 0.2, 1.0]),
    "repetition_penalty": (sampling.repetition_penalty, [0.5, 1.2, 3.0]),
    "presence_penalty": (sampling.presence_penalty, [-1.0, 0.5, 2.0]),
    "frequency_penalty": (sampling.frequency_penalty, [-1.0, 0.5, 2.0]),
    "min_new_tokens": (lambda n: sampling.min_new_tokens(n, [2, 5]), [0, 1, 2]),
    "logit_bias": (lambda x: sampling.logit_bias({2: x, 5: -1.0}), [-1.0, 0.0, 2.5]),
}


def applied(transform: Any, logits: Any, tokens: Any, token: Any) -> Any:
    """Logits of the second new token of each row."""
    _, state = transform.update(logits, transform.init(tokens, 9), jnp.full_like(token, -1))
    return transform.update(logits, state, token)[0]


@pytest.mark.parametrize("name", MAKERS)
def test_parameters_may_be_traced_and_of_rows(name):
    make, values = MAKERS[name]
    where = [jnp.asarray(x) for x in (LOGITS, TOKENS, np.asarray([0, 7, 2], np.int32))]
    run = jax.jit(lambda transform, at: applied(transform, *(x[at] for x in where)))
    want = [np.asarray(run(make(v), np.arange(3))) for v in values]
    kind = np.int32 if isinstance(values[0], int) else np.float32
    array = np.asarray(values, kind)
    mapped = jax.jit(jax.vmap(lambda v: applied(make(v), *where)))(array)
    np.testing.assert_allclose(mapped, want, rtol=1e-6)
    for one, row in zip(values, want, strict=True):  # an array of one number is that number
        np.testing.assert_array_equal(run(make(jnp.asarray(one)), np.arange(3)), row)
    if name == "logit_bias":
        return
    for rows in (array, jnp.asarray(array)):
        got = np.asarray(run(make(rows), np.arange(3)))
        np.testing.assert_allclose(got, [want[i][i] for i in range(3)], rtol=1e-6)
    with pytest.raises(ValueError, match=rf"{name} got 2 numbers for 3 rows"):
        run(make(array[:2]), np.arange(3))


def test_a_bias_of_all_tokens_may_be_traced():
    bias = np.linspace(-1, 1, 9, dtype=np.float32)
    got = jax.jit(lambda b: sampling.logit_bias(b).apply(jnp.asarray(LOGITS)))(bias)
    np.testing.assert_allclose(got, LOGITS + bias, rtol=1e-6)


def test_a_rollout_under_vmap_of_temperatures(tiny_model):
    """As `generate` with each of them alone, greedy at 0 among them."""
    prompts, heats, key = [[1, 2, 3], [4, 5, 6]], [0.0, 0.7, 3.0], jax.random.key(5)

    @jax.jit
    def run(model, tokens, heats):
        cache = jkv.init_cache(model.config, jkv.dense(), batch=2, slots=16)
        logits, cache = jkv.prefill(model, tokens, cache)

        def one(heat: Any) -> Any:
            how: dict[str, Any] = {"sampler": sampling.temperature(heat), "key": key}
            return jkv.rollout(model, logits, cache, steps=8, **how).tokens

        return jax.vmap(one)(heats)

    got = run(tiny_model, np.asarray(prompts), np.asarray(heats, np.float32))
    for heat, tokens in zip(heats, got, strict=True):
        sampler = sampling.temperature(heat)
        want = jkv.generate(
            tiny_model, prompts, max_new_tokens=8, sampler=sampler, key=key, stop=()
        )
        np.testing.assert_array_equal(tokens, want.tokens)


def test_generate_with_a_temperature_for_each_row(tiny_model):
    prompts = [[1, 2, 3], [4, 5], [6]]
    heats, keys = np.asarray([0.0, 0.7, 3.0]), jax.random.split(jax.random.key(1), 3)
    options: dict[str, Any] = {"max_new_tokens": 8, "stop": ()}
    out = jkv.generate(
        tiny_model, prompts, sampler=sampling.temperature(heats), key=keys, **options
    )
    assert out.tokens[0].tolist() == oracle.greedy(tiny_model, prompts[0], 8)
    for row in range(3):
        sampler = sampling.temperature(heats[row])
        alone = jkv.generate(
            tiny_model, prompts[row : row + 1], sampler=sampler, key=keys[row : row + 1], **options
        )
        assert alone.tokens[0].tolist() == out.tokens[row].tolist()
    with pytest.raises(ValueError, match="temperature got 3 numbers for 2 rows"):
        jkv.generate(
            tiny_model, prompts[:2], sampler=sampling.temperature(heats), key=keys[:2], **options
        )
    engine = jkv.Engine(tiny_model, pages=8, page=4, max_batch=1)
    with pytest.raises(ValueError, match="temperature got 3 numbers for 1 rows"):
        engine.submit([1], max_new_tokens=2, sampler=sampling.temperature(heats), key=keys[0])


# Boundaries


@pytest.mark.parametrize("shift", [0.0, -3.3, 7.7, 12.1])
@pytest.mark.parametrize(
    ("weights", "p", "kept"),
    [
        ((4, 2, 1, 1), 0.5, [0]),
        ((4, 2, 1, 1), 0.5001, [0, 1]),
        ((4, 2, 1, 1), 0.75, [0, 1]),
        ((1, 2, 4, 1), 0.5, [2]),
        ((1, 2, 4, 1), 0.75, [1, 2]),
        ((6, 3, 1), 0.6, [0]),
        ((6, 3, 1), 0.9, [0, 1]),
        ((6, 3, 1), 0.91, [0, 1, 2]),
        ((1, 1, 1, 1), 0.25, [0, 1, 2, 3]),  # equals of the last one stay
        ((7, 2, 1), 1.0, [0, 1, 2]),
    ],
)
def test_top_p_exactly_at_a_boundary(weights, p, kept, shift):
    """The smallest set that reaches p, and p exactly is reached."""
    logits = np.log(np.asarray([weights], np.float32)) + np.float32(shift)
    got = np.asarray(jax.jit(sampling.top_p(p).apply)(logits))
    assert np.flatnonzero(got[0] > -INF).tolist() == kept


@pytest.mark.parametrize("shift", [0.0, -3.3, 7.7, 12.1])
@pytest.mark.parametrize(
    ("weights", "p", "kept"),
    [
        ((4, 2, 1, 1), 0.5, [0, 1]),
        ((4, 2, 1, 1), 0.501, [0]),
        ((4, 2, 1, 1), 0.25, [0, 1, 2, 3]),
        ((4, 2, 1, 1), 0.251, [0, 1]),
        ((10, 3, 1), 0.3, [0, 1]),
        ((10, 3, 1), 0.1, [0, 1, 2]),
        ((5, 5, 1), 1.0, [0, 1]),
    ],
)
def test_min_p_exactly_at_a_boundary(weights, p, kept, shift):
    """Exactly p times as likely as the likeliest stays."""
    logits = np.log(np.asarray([weights], np.float32)) + np.float32(shift)
    got = np.asarray(jax.jit(sampling.min_p(p).apply)(logits))
    assert np.flatnonzero(got[0] > -INF).tolist() == kept


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("k", "kept"), [(1, [1, 2]), (2, [1, 2]), (3, [0, 1, 2, 4]), (4, [0, 1, 2, 4]), (5, 5), (6, 5)]
)
def test_top_k_at_ties(k, kept, traced):
    logits = np.asarray([[1.0, 2, 2, 0, 1]], np.float32)
    transform = sampling.top_k(np.asarray([k]) if traced else k)
    got = np.asarray(jax.jit(transform.apply)(logits))
    assert np.flatnonzero(got[0] > -INF).tolist() == (list(range(5)) if kept == 5 else kept)
