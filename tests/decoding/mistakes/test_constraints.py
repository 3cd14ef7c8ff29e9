"""What people get wrong in biases, penalties and least lengths, and what they are told."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv import sampling
from tests.decoding.mistakes.table import PROMPTS, refuse


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sampling.presence_penalty(np.inf), ValueError, "presence_penalty got inf"),
        (lambda: sampling.frequency_penalty("1"), ValueError, "frequency_penalty got '1'"),
        (lambda: sampling.no_repeat_ngram(0), ValueError, "no_repeat_ngram got 0"),
        (lambda: sampling.no_repeat_ngram(2.0), ValueError, "no_repeat_ngram got 2.0"),
        (lambda: sampling.min_new_tokens(-1), ValueError, "min_new_tokens got -1"),
        (lambda: sampling.min_new_tokens(1.5), ValueError, "min_new_tokens got 1.5"),
        (lambda: sampling.min_new_tokens(1, "a"), TypeError, "min_new_tokens got 'a' as a token"),
        (lambda: sampling.logit_bias([1]), TypeError, "mapping of token ids"),
        (lambda: sampling.logit_bias({"a": 1}), TypeError, "'a' as a token"),
        (lambda: sampling.logit_bias({1: "a"}), TypeError, "'a' for a token"),
        (lambda: sampling.logit_bias({-1: 1}), ValueError, "token -1"),
        (lambda: sampling.logit_bias({1: np.nan}), ValueError, "got nan"),
        (lambda: sampling.logit_bias({1: np.inf}), ValueError, "-inf to forbid"),
        (lambda: sampling.logit_bias(np.zeros((2, 2))), TypeError, r"float64\[2, 2\]"),
        (lambda: sampling.temperature(np.asarray([1, -1])), ValueError, "got -1 for a row"),
        (lambda: sampling.temperature(np.ones((2, 2))), ValueError, r"float64\[2, 2\].*per row"),
        (lambda: sampling.top_k(np.ones(2)), ValueError, r"top_k got float64\[2\]"),
        (lambda: sampling.top_p(jnp.zeros(2)), ValueError, "top_p got 0.0 for a row"),
    ],
)
def test_bad_parameters(call, error, message):
    refuse(call, error, message)


def test_tokens_outside_the_vocabulary(tiny_model):
    engine = jkv.Engine(tiny_model, pages=8, page=4, max_batch=1)
    for transform in (
        sampling.logit_bias({11: 1.0}),
        sampling.min_new_tokens(2, 11),
        sampling.logit_bias(np.zeros(10)),
    ):
        sampler = sampling.chain(sampling.chain(transform), sampling.greedy())
        for call in (
            functools.partial(jkv.generate, tiny_model, PROMPTS),
            functools.partial(engine.submit, [1]),
        ):
            with pytest.raises(ValueError, match=r"expected (ids from 0 to 10|11, one for each)"):
                call(max_new_tokens=2, sampler=sampler)
