"""`jkv.beam_search` beside the beam search of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import jkv
from tests.compare import reference
from tests.models.cases import CASES

pytestmark = pytest.mark.compare
NEW = 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random model in jkv and in transformers, unsure enough for beams to differ."""
    path = tmp_path_factory.mktemp("beams")
    model = reference.random_model(CASES["llama-mha"], 3)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    reference.save(model, path, CASES["llama-mha"])
    return jkv.load(path), reference.load(path)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("beams", [2, 5])
def test_hypotheses_and_scores(pair, beams, early, penalty):
    """Prompts one by one: what transformers does to a prompt depends on the others."""
    ours, theirs = pair
    prompts = reference.random_prompts(theirs, rows=4, length=9, seed=5)
    ends = [3, 7]
    asked = {"beams": beams, "length_penalty": penalty, "early_stopping": early, "stop": ends}
    got = jkv.beam_search(ours.model, prompts, max_new_tokens=NEW, **asked)
    assert {"stop", "length"} >= {r for row in got.finish_reasons for r in row}
    for row, prompt in enumerate(prompts):
        out = theirs.generate(
            torch.from_numpy(prompt[None]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=NEW,
            do_sample=False,
            length_penalty=penalty,
            early_stopping=early or "never",
            eos_token_id=[*ours.config.end_ids, *ends],
            pad_token_id=1,
            return_dict_in_generate=True,
            output_scores=True,
        )
        sequences = out.sequences[:, len(prompt) :].numpy()
        for beam, (length, said) in enumerate(zip(got.lengths[row], sequences, strict=True)):
            np.testing.assert_array_equal(got.tokens[row, beam, :length], said[:length])
            assert (said[length:] == 1).all()
        np.testing.assert_allclose(got.scores[row], out.sequences_scores, rtol=1e-4, atol=1e-4)


def test_the_cases_are_not_easy(pair):
    """Hypotheses end in both ways and at several lengths, and beams find what greedy does not."""
    ours, theirs = pair
    prompts = reference.random_prompts(theirs, rows=4, length=9, seed=5)
    out = jkv.beam_search(ours.model, prompts, max_new_tokens=NEW, beams=5, stop=[3, 7])
    assert {r for row in out.finish_reasons for r in row} == {"stop", "length"}
    assert len(set(out.lengths.flat)) > 2
    greedy = jkv.generate(ours.model, prompts, max_new_tokens=NEW, stop=[3, 7])
    assert any(
        a[:n].tolist() != b[:m].tolist()
        for a, n, b, m in zip(
            out.tokens[:, 0], out.lengths[:, 0], greedy.tokens, greedy.lengths, strict=True
        )
    )
