"""Scores of given tokens, and the likeliest alternatives of what is generated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv import sampling
from tests.decoding import oracle

RNG = np.random.default_rng(4)
PROMPTS = [[3], RNG.integers(0, 11, 5).tolist(), RNG.integers(0, 11, 45).tolist(), [7, 7]]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def check_top(tokens: np.ndarray, values: np.ndarray, want: np.ndarray) -> None:
    """`tokens` and `values` [k] are the likeliest of `want` [V], the likeliest first."""
    np.testing.assert_allclose(values, np.sort(want)[::-1][: len(values)], atol=2e-4)
    np.testing.assert_allclose(values, want[tokens], atol=2e-4)
    assert len(set(tokens.tolist())) == len(tokens)


@pytest.mark.parametrize(("chunk", "cache"), [(256, None), (16, None), (20, "window:60")])
def test_scores_are_those_of_the_model(tiny_model, chunk, cache):
    """Ragged, in chunks of any size, one row of a single token."""
    out = jkv.score(tiny_model, PROMPTS, top_logprobs=3, prefill_chunk=chunk, cache=cache)
    assert out.lengths.tolist() == [1, 5, 45, 2]
    assert out.top_tokens is not None
    assert out.top_logprobs is not None
    assert out.top_tokens.shape == out.top_logprobs.shape == (4, 45, 3)
    for row, prompt in enumerate(PROMPTS):
        size = len(prompt)
        assert out.tokens[row].tolist() == prompt + [-1] * (45 - size)
        want = log_softmax(oracle.logits(tiny_model, prompt))
        assert out.logprobs[row, 0] == 0
        assert (out.top_tokens[row, 0] == -1).all()
        for at in range(1, size):
            np.testing.assert_allclose(out.logprobs[row, at], want[at - 1, prompt[at]], atol=2e-4)
            check_top(out.top_tokens[row, at], out.top_logprobs[row, at], want[at - 1])
        assert not out.logprobs[row, size:].any()
        assert (out.top_tokens[row, size:] == -1).all()
        assert not out.top_logprobs[row, size:].any()
        np.testing.assert_allclose(out.totals[row], out.logprobs[row].sum(), rtol=1e-5)
    assert np.isnan(out.perplexities).tolist() == [True, False, False, False]
    np.testing.assert_allclose(out.perplexities[3], np.exp(-out.logprobs[3, 1]), rtol=1e-5)


def test_scores_are_those_of_generation(tiny_model):
    """What `generate` says with its log-probabilities, scored."""
    prompts = PROMPTS[1:]
    options: dict[str, Any] = {"max_new_tokens": 9, "stop": (), "return_logprobs": True}
    out = jkv.generate(tiny_model, prompts, **options)
    scores = jkv.score(tiny_model, out.history)
    assert (scores.top_tokens, scores.top_logprobs) == (None, None)
    for row, history in enumerate(out.history):
        got = scores.logprobs[row, len(history) - 9 : len(history)]
        np.testing.assert_allclose(got, out.logprobs[row], atol=2e-4)


def test_texts_are_scored_with_their_tokenizer(tiny_model):
    lm = oracle.lm(tiny_model)
    out = jkv.score(lm, ["abcab", "k"])
    assert out.tokens.tolist() == [[0, 1, 2, 0, 1], [10, -1, -1, -1, -1]]
    one = jkv.score(lm, "abcab")
    np.testing.assert_allclose(one.logprobs[0], out.logprobs[0], atol=2e-4)


def test_what_cannot_be_scored(tiny_model):
    for what, error, message in (
        ({"prompts": [[1, 2], []]}, ValueError, "prompt 1 is empty"),
        ({"prompts": [[1, 11]]}, ValueError, "token 11"),
        ({"prompts": [[1] * 257]}, ValueError, "a prompt of 257 tokens, more than.*context of 256"),
        ({"prompts": [[1, 2]], "top_logprobs": 12}, ValueError, "top_logprobs got 12.*at most 11"),
        ({"prompts": [[1, 2]], "top_logprobs": -1}, ValueError, "top_logprobs got -1"),
        ({"prompts": [[1, 2]], "prefill_chunk": 8}, ValueError, "prefill_chunk got 8"),
        ({"prompts": [[1, 2]], "cache": "denze"}, ValueError, "denze"),
    ):
        with pytest.raises(error, match=message):
            jkv.score(tiny_model, **what)
    broken = nnx.clone(tiny_model)
    broken.embedding[...] = broken.embedding[...].at[4].set(jnp.nan)
    with pytest.raises(jkv.NonFiniteError, match=r"row 0 at token \d, row 1 at token 1: "):
        jkv.score(broken, [[1, 4, 3], [4, 1], [1, 2]])


# Of what is generated


@pytest.mark.parametrize("how", ["greedy", "sampled", "draft"])
def test_alternatives_of_new_tokens(tiny_model, how):
    """Under the model itself, before the sampler changes anything; rows that end early."""
    prompts = PROMPTS[1:]
    options: dict[str, Any] = {"max_new_tokens": 8, "top_logprobs": 4}
    options["stop"] = [[], [], [oracle.greedy(tiny_model, prompts[2], 3)[2]]]
    if how == "sampled":
        hot = sampling.chain(sampling.logit_bias({3: -9.0}), sampling.temperature(2.0))
        options |= {"sampler": hot, "key": jax.random.key(0)}
    if how == "draft":
        options["draft"] = jkv.prompt_lookup()
    out = jkv.generate(tiny_model, prompts, **options)
    assert out.top_tokens is not None
    assert out.top_logprobs is not None
    assert out.top_tokens.shape == (3, 8, 4)
    for row, history in enumerate(out.history):
        new = int(out.lengths[row])
        want = log_softmax(oracle.logits(tiny_model, history))[len(history) - new - 1 : -1]
        for at in range(new):
            check_top(out.top_tokens[row, at], out.top_logprobs[row, at], want[at])
            np.testing.assert_allclose(
                out.logprobs[row, at], want[at, out.tokens[row, at]], atol=2e-4
            )
        assert (out.top_tokens[row, new:] == -1).all()
        assert not out.top_logprobs[row, new:].any()
    if how == "greedy":
        assert out.lengths[2] == 3
        assert (out.top_tokens[0, :, 0] == out.tokens[0]).all()
        blocks = jkv.stream(tiny_model, prompts, block=3, **options)
        for _ in blocks:
            pass
        np.testing.assert_array_equal(blocks.result.top_tokens, out.top_tokens)
        np.testing.assert_allclose(blocks.result.top_logprobs, out.top_logprobs, atol=1e-5)
        plain = jkv.generate(tiny_model, prompts, max_new_tokens=2)
        assert (plain.logprobs, plain.top_tokens, plain.top_logprobs) == (None, None, None)


def test_alternatives_end_at_a_stop_string(tiny_model):
    lm = oracle.lm(tiny_model)
    whole = jkv.generate(lm, [[1, 2, 3]], max_new_tokens=12, stop=(), top_logprobs=2)
    text = lm.tokenizer.decode(whole.tokens[0][4:6].tolist())
    out = jkv.generate(lm, [[1, 2, 3]], max_new_tokens=12, stop=[text], top_logprobs=2)
    count = int(out.lengths[0])
    assert count < 12
    assert out.top_tokens is not None
    assert whole.top_tokens is not None
    assert out.top_tokens.shape == (1, count, 2)
    np.testing.assert_array_equal(out.top_tokens[0], whole.top_tokens[0, :count])
