"""The pure functions, traced inside the caller's own jit, vmap and grad."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv.errors import CacheFullError
from tests.decoding import oracle

PROMPTS = np.asarray([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]], np.int32)
COUNTS = np.asarray([3, 5], np.int32)
ROWS = [[1, 2, 3], [4, 5, 6, 7, 8]]
HOT = jkv.sampling.temperature(1.3)
STEPS = 6


@functools.partial(jax.jit, static_argnames=("kind", "slots", "steps"))
def together(
    model, tokens, counts, *, kind, slots=16, steps=STEPS, sampler=None, key=None, ends=None
):
    """Prefill and rollout in one program, as research code has it."""
    cache = jkv.init_cache(model.config, kind, batch=tokens.shape[0], slots=slots)
    logits, cache = jkv.prefill(model, tokens, cache, counts)
    out = jkv.rollout(model, logits, cache, steps=steps, sampler=sampler, key=key, ends=ends)
    return logits, out


# Compiled: op by op, a transformer of two layers is a hundred small programs.
rolled = jax.jit(functools.partial(jkv.rollout, steps=STEPS))


@functools.partial(jax.jit, static_argnames=("kind", "slots"))
def _prefilled(model, counts, kind, slots):
    cache = jkv.init_cache(model.config, kind, batch=2, slots=slots)
    return jkv.prefill(model, PROMPTS, cache, counts)


def prefilled(model, kind=None, counts=COUNTS, slots=16):
    """Logits and cache after the prompts."""
    return _prefilled(model, counts, kind, slots)


@pytest.fixture(params=["dense", "none"])
def kind(request):
    return {"dense": jkv.dense(), "none": jkv.none()}[request.param]


@pytest.fixture(scope="module")
def drawn(tiny_model):
    """Tokens drawn at random, and what was drawn from."""
    return together(
        tiny_model, PROMPTS, COUNTS, kind=jkv.dense(), sampler=HOT, key=jax.random.key(3)
    )


# jit


def test_greedy_in_the_callers_jit(tiny_model, kind):
    logits, out = together(tiny_model, PROMPTS, COUNTS, kind=kind)
    for row, prompt in enumerate(ROWS):
        want = oracle.logits(tiny_model, prompt)[-1]
        np.testing.assert_allclose(logits[row], want, rtol=1e-4, atol=1e-4)
        assert out.tokens[row].tolist() == oracle.greedy(tiny_model, prompt, STEPS)
    assert np.asarray(out.state.cache.lengths).tolist() == [3 + STEPS - 1, 5 + STEPS - 1]
    assert not np.asarray(out.state.done).any()


def test_the_same_draws_as_generate(tiny_model, drawn):
    _, out = drawn
    host = jkv.generate(
        tiny_model,
        ROWS,
        max_new_tokens=STEPS,
        sampler=HOT,
        key=jax.random.key(3),
        return_logprobs=True,
    )
    np.testing.assert_array_equal(out.tokens, host.tokens)
    np.testing.assert_allclose(out.logprobs, host.logprobs, rtol=1e-4, atol=1e-4)


def test_logprobs_against_the_uncached_model(tiny_model, drawn):
    _, out = drawn
    for prompt, tokens, logprobs in zip(ROWS, out.tokens, out.logprobs, strict=True):
        want = oracle.logprobs(tiny_model, [*prompt, *tokens.tolist()], STEPS)
        np.testing.assert_allclose(logprobs, want, rtol=1e-3, atol=1e-3)


def test_rows_end_where_they_are_told(tiny_model, drawn):
    _, free = drawn
    tokens = np.asarray(free.tokens)
    ends = np.asarray([[tokens[0, 2], -1], [-1, -1]], np.int32)
    first = tokens[0].tolist().index(tokens[0, 2]) + 1
    _, out = together(
        tiny_model,
        PROMPTS,
        COUNTS,
        kind=jkv.dense(),
        sampler=HOT,
        key=jax.random.key(3),
        ends=ends,
    )
    got = np.asarray(out.tokens)
    np.testing.assert_array_equal(got[0, :first], tokens[0, :first])
    assert (got[0, first:] == -1).all()
    assert (np.asarray(out.logprobs)[0, first:] == 0).all()
    np.testing.assert_array_equal(got[1], tokens[1])
    assert np.asarray(out.state.done).tolist() == [True, False]
    # The token that ended the row is said and not yet held, as at the end of any rollout.
    assert np.asarray(out.state.cache.lengths).tolist() == [3 + first - 1, 5 + STEPS - 1]
    assert int(out.state.token[0]) == tokens[0, first - 1]


def test_steps_one_by_one_equal_a_rollout(tiny_model):
    _, out = together(tiny_model, PROMPTS, COUNTS, kind=jkv.dense())
    logits, cache = prefilled(tiny_model)
    step = jax.jit(jkv.decode_step)
    tokens = []
    for _ in range(STEPS):
        tokens.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        logits, cache = step(tiny_model, tokens[-1], cache)
    np.testing.assert_array_equal(jnp.stack(tokens, axis=1), out.tokens)


def test_rows_that_take_no_part_keep_every_bit(tiny_model, kind):
    _, cache = prefilled(tiny_model, kind)
    active = jnp.asarray([False, True])
    _, after = jax.jit(jkv.decode_step)(tiny_model, jnp.asarray([9, 9]), cache, active)
    assert np.asarray(after.lengths).tolist() == [3, 6]
    changed = jax.tree.map(lambda a, b: np.asarray(a != b), cache.layers, after.layers)
    for leaf in jax.tree.leaves(changed):
        assert not leaf[0].any()
        assert leaf[1].any()


def test_a_prefill_in_two_parts(tiny_model, kind):
    _, cache = prefilled(tiny_model, kind)
    more = np.asarray([[9, 10, 1], [2, 0, 0]], np.int32)
    logits, cache = jax.jit(jkv.prefill)(tiny_model, more, cache, np.asarray([3, 1]))
    for row, whole in enumerate([[1, 2, 3, 9, 10, 1], [4, 5, 6, 7, 8, 2]]):
        want = oracle.logits(tiny_model, whole)[-1]
        np.testing.assert_allclose(logits[row], want, rtol=1e-4, atol=1e-4)
    assert np.asarray(cache.lengths).tolist() == [6, 6]


def test_without_counts_all_tokens_are_real(tiny_model):
    logits, cache = prefilled(tiny_model, counts=None)
    want = oracle.logits(tiny_model, PROMPTS[0])[-1]
    np.testing.assert_allclose(logits[0], want, rtol=1e-4, atol=1e-4)
    assert np.asarray(cache.lengths).tolist() == [5, 5]


def test_a_penalty_looks_back_at_what_was_said(tiny_model):
    """At the prompt too, where it is told of it; as `generate` does without being told."""
    sampler = jkv.sampling.chain(jkv.sampling.repetition_penalty(5.0), jkv.sampling.greedy())
    logits, cache = prefilled(tiny_model)
    said = np.where(np.arange(5)[None] < COUNTS[:, None], PROMPTS, -1)
    out = rolled(tiny_model, logits, cache, sampler=sampler, history=said)
    want = jkv.generate(tiny_model, ROWS, max_new_tokens=STEPS, sampler=sampler)
    np.testing.assert_array_equal(out.tokens, want.tokens)
    blind = rolled(tiny_model, logits, cache, sampler=sampler)
    assert not np.array_equal(blind.tokens, out.tokens)


def test_a_rollout_past_the_last_slot_stops_and_says_so(tiny_model, kind):
    _, enough = together(tiny_model, PROMPTS, COUNTS, kind=kind)
    assert enough.state.cache.check() is enough.state.cache
    _, out = together(tiny_model, PROMPTS, COUNTS, kind=kind, slots=8)
    tokens, want = np.asarray(out.tokens), np.asarray(enough.tokens)
    np.testing.assert_array_equal(tokens[0], want[0])  # 3 + 6 - 1 slots are just enough
    np.testing.assert_array_equal(tokens[1], [*want[1, :4], -1, -1])
    assert np.asarray(out.state.cache.overflowed).tolist() == [False, True]
    assert np.asarray(out.state.cache.lengths).tolist() == [8, 8]
    with pytest.raises(CacheFullError, match=r"rows \[1\]"):
        out.state.cache.check()
    for got, whole in zip(
        jax.tree.leaves(out.state.cache.layers),
        jax.tree.leaves(enough.state.cache.layers),
        strict=True,
    ):
        axis = 2 if got.ndim == 4 else 1
        np.testing.assert_allclose(got, jnp.take(whole, jnp.arange(8), axis=axis), atol=1e-5)


# vmap


def test_vmap_over_keys(tiny_model):
    """Samples of one prompt, each with a key of its own, from one prefill."""
    logits, cache = prefilled(tiny_model)
    keys = jax.random.split(jax.random.key(0), 4)

    @jax.jit
    def one(key):
        return jkv.rollout(tiny_model, logits, cache, steps=STEPS, sampler=HOT, key=key).tokens

    many = jax.jit(jax.vmap(one))(keys)
    assert many.shape == (4, 2, STEPS)
    assert len({tuple(row) for row in np.asarray(many)[:, 0].tolist()}) > 1
    for key, tokens in zip(keys, many, strict=True):
        np.testing.assert_array_equal(tokens, one(key))


def test_vmap_over_prompts(tiny_model):
    """Batches of one row under vmap say what a batch says, in a buffer of several blocks."""
    _, want = together(tiny_model, PROMPTS, COUNTS, kind=jkv.dense(), slots=160)

    def one(tokens, count):
        return together(tiny_model, tokens[None], count[None], kind=jkv.dense(), slots=160)[1]

    out = jax.jit(jax.vmap(one))(PROMPTS, COUNTS)
    np.testing.assert_array_equal(out.tokens[:, 0], want.tokens)
    np.testing.assert_array_equal(out.state.cache.lengths[:, 0], want.state.cache.lengths)


def test_vmap_over_models(tiny_model):
    """An ensemble: two sets of weights, one program."""
    other = jax.tree.map(lambda x: x * 1.1, tiny_model)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), tiny_model, other)

    def one(model):
        return together(model, PROMPTS, COUNTS, kind=jkv.dense())[1].tokens

    tokens = jax.jit(jax.vmap(one))(both)
    np.testing.assert_array_equal(tokens[0], one(tiny_model))
    np.testing.assert_array_equal(tokens[1], one(other))
    assert not np.array_equal(tokens[0], tokens[1])


# grad


def gradients_agree(got, want, scale=1e-4):
    flat_got, flat_want = (np.asarray(jax.flatten_util.ravel_pytree(t)[0]) for t in (got, want))
    assert np.isfinite(flat_got).all()
    size = np.abs(flat_want).max()
    assert size > 0
    np.testing.assert_allclose(flat_got / size, flat_want / size, atol=scale)


REWARDS = jnp.asarray([[1.0], [-0.5]])


def test_a_policy_gradient_through_a_rollout(tiny_model, drawn):
    """Its logprobs differentiated with respect to the model, against the uncached model's.

    One row ends early, and what comes after must not count, nor be NaN.
    """
    tokens = np.asarray(drawn[1].tokens)
    rows = jnp.asarray([[1, 2, 3, *tokens[0], 0, 0], [*ROWS[1], *tokens[1]]])
    ends = np.asarray([[tokens[0, 2]], [-1]], np.int32)
    said = (tokens[0].tolist().index(tokens[0, 2]) + 1, STEPS)
    assert said[0] < STEPS

    @jax.jit
    @jax.grad
    def through_the_loop(model):
        _, out = together(
            model,
            PROMPTS,
            COUNTS,
            kind=jkv.dense(),
            slots=160,
            sampler=HOT,
            key=jax.random.key(3),
            ends=ends,
        )
        return jnp.sum(out.logprobs * REWARDS)

    @jax.jit
    @jax.grad
    def teacher_forced(model):
        logprobs = jax.nn.log_softmax(model(rows)[0])
        total = 0.0
        for row, (start, new) in enumerate(zip((2, 4), said, strict=True)):
            where = start + jnp.arange(new)
            total += jnp.sum(logprobs[row, where, rows[row, where + 1]]) * REWARDS[row, 0]
        return total

    gradients_agree(through_the_loop(tiny_model), teacher_forced(tiny_model))


def test_the_gradient_through_a_prefill(tiny_model):
    """In two chunks, into a buffer of several blocks."""

    @jax.jit
    @jax.grad
    def cached(model):
        cache = jkv.init_cache(model.config, batch=2, slots=160)
        logits, cache = jkv.prefill(model, PROMPTS[:, :2], cache)
        logits, _ = jkv.prefill(model, PROMPTS[:, 2:], cache, COUNTS - 2)
        return jnp.sum(jnp.sin(logits))

    @jax.jit
    @jax.grad
    def plain(model):
        logits = model(jnp.asarray(PROMPTS))[0]
        return jnp.sum(jnp.sin(logits[jnp.arange(2), COUNTS - 1]))

    gradients_agree(cached(tiny_model), plain(tiny_model))


def test_the_model_is_left_as_it_was(tiny_model):
    before = [np.array(leaf) for leaf in jax.tree.leaves(tiny_model)]
    together(tiny_model, PROMPTS, COUNTS, kind=jkv.dense())
    jkv.generate(tiny_model, ROWS, max_new_tokens=4)
    for old, new in zip(before, jax.tree.leaves(tiny_model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_cache_can_be_used_twice(tiny_model):
    """Pure: nothing is donated unless the caller does."""
    logits, cache = prefilled(tiny_model)
    first = rolled(tiny_model, logits, cache)
    second = rolled(tiny_model, logits, cache)
    np.testing.assert_array_equal(first.tokens, second.tokens)
