"""Transforms of logits against the logits processors of transformers."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jkv import sampling

torch = pytest.importorskip("torch")
process = pytest.importorskip("transformers.generation.logits_process")

pytestmark = pytest.mark.compare
ROWS, VOCAB, PROMPT, NEW = 4, 13, 5, 12

CASES: dict[str, tuple[Any, Any]] = {
    "repetition": (
        sampling.repetition_penalty(1.7),
        lambda: process.RepetitionPenaltyLogitsProcessor(1.7),
    ),
    "unigrams": (
        sampling.no_repeat_ngram(1),
        lambda: process.NoRepeatNGramLogitsProcessor(1),
    ),
    "bigrams": (sampling.no_repeat_ngram(2), lambda: process.NoRepeatNGramLogitsProcessor(2)),
    "trigrams": (sampling.no_repeat_ngram(3), lambda: process.NoRepeatNGramLogitsProcessor(3)),
    "least length": (
        sampling.min_new_tokens(4, [2, 3]),
        lambda: process.MinNewTokensLengthLogitsProcessor(PROMPT, 4, [2, 3]),
    ),
    "bias": (
        sampling.logit_bias({1: 2.0, 5: -7.5}),
        lambda: process.SequenceBiasLogitsProcessor([[[1], 2.0], [[5], -7.5]]),
    ),
    "top_k": (sampling.top_k(4), lambda: process.TopKLogitsWarper(4)),
    "top_p": (sampling.top_p(0.8), lambda: process.TopPLogitsWarper(0.8)),
    "min_p": (sampling.min_p(0.2), lambda: process.MinPLogitsWarper(0.2)),
    "temperature": (sampling.temperature(0.6), lambda: process.TemperatureLogitsWarper(0.6)),
}


@pytest.mark.parametrize("name", CASES)
def test_as_transformers_does(name):
    """Logits and tokens at random, few enough that n-grams come back."""
    ours, theirs = CASES[name][0], CASES[name][1]()
    rng = np.random.default_rng(2)
    said = rng.integers(0, 4, size=(ROWS, PROMPT)).astype(np.int32)
    room = np.full((ROWS, PROMPT + NEW), -1, np.int32)
    room[:, :PROMPT] = said
    state, update = ours.init(jax.numpy.asarray(room), VOCAB), jax.jit(ours.update)
    token = np.full(ROWS, -1, np.int32)
    for _ in range(NEW):
        logits = (rng.normal(size=(ROWS, VOCAB)) * 3).astype(np.float32)
        got, state = update(logits, state, token)
        want = theirs(torch.from_numpy(said).long(), torch.from_numpy(logits.copy())).numpy()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        token = rng.integers(0, 4, size=ROWS).astype(np.int32)
        said = np.concatenate([said, token[:, None]], axis=1)
